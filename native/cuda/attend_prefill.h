// Host side of attend_prefill.cuh and dequantise.cuh: attention of many query rows.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"

namespace innerkv::gpu {

/// Stored tokens of one sequence's head as 16-bit pages: pages [first, first + capacity) of `from` become the
/// pages of `to`, page p at p % capacity.
struct DequantiseArgs {
  HeadArgs from;
  PageArgs* pages;      // [capacity], written
  std::uint16_t* rows;  // [capacity][2][128][D]: K, then V; 16-byte aligned
};

/// Some rows of one KV head against the positions [first, end) of a 16-bit view of it.
struct PrefillTask {
  int request, head, kv_head, first_row, rows, first, end, split;  // head: index of the view's HeadArgs
  bool resume;  // begin with the state that an earlier launch left in this split
};

/// Query rows of a task.
int prefill_rows(int head_dim);

/// Enqueues the dequantisation of pages [first, end) of `heads` heads.
cudaError_t dequantise_pages(const AttendRule& rule, const DequantiseArgs* args, int heads, int first,
                             int end, int capacity, cudaStream_t stream);

/// Enqueues the tasks; page p of a head is at p % capacity. All pointers are on the device.
cudaError_t attend_prefill_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                                 const PrefillTask* tasks, int task_count, int capacity, cudaStream_t stream);

}  // namespace innerkv::gpu
