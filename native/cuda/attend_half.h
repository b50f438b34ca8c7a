// Host side of attend_half.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"

namespace innerkv::gpu {

/// Some rows of one KV head against 16-bit keys and values: pages [first, end) or, with `raw`, tokens
/// [first, end) of those whose keys and values are in the sink or, behind it, in the ring.
struct HalfTask {
  int request, kv_head, first_row, rows, first, end, split;
  bool raw;
};

inline constexpr int kHalfWarps = 4;

/// Query rows of a task; `rows`: query rows per KV head. Every head_dim is supported.
int half_rows(const AttendRule& rule, int rows);

/// Enqueues the tasks; `rows_a_task` as half_rows() said. All pointers are on the device.
cudaError_t attend_half_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                              const HalfTask* tasks, int task_count, int rows_a_task, cudaStream_t stream);

}  // namespace innerkv::gpu
