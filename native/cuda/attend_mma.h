// Host side of attend_mma.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"

namespace innerkv::gpu {

inline constexpr int kMostGroups = 4;  // of 32 channels

/// One query row in the basis of one block of keys.
struct PreparedRow {
  float step;  // of the integers
  float constant;
  std::int32_t totals[kMostGroups];  // sums of the integers over the channels that share a scale
};

/// Where prepared queries of a request lie: rows in the order of q.
struct PreparedArgs {
  std::uint8_t* bytes;  // [blocks][rows][2][D] signed high and low bytes
  PreparedRow* rows;    // [blocks][rows]
  float* stored;        // [blocks][rows][D] what the integers were made of, or null: keys have no outliers
  int blocks;
};

inline constexpr int kMmaWarps = 4;

/// Query rows of a task, or 0 when this format is not one of the fast ones. `rows`: query rows per KV head.
int mma_rows(const AttendRule& rule, int rows);

/// Enqueues the preparation of all queries and the tasks; `rows_a_task` as mma_rows() said, `most_rows` and
/// `most_blocks` over the requests. All pointers are on the device.
cudaError_t attend_mma_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                             const PreparedArgs* prepared, int request_count, int most_rows, int most_blocks,
                             const TaskArgs* tasks, int task_count, int rows_a_task, cudaStream_t stream);

}  // namespace innerkv::gpu
