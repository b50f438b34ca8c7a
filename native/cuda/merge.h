// Joins the partial attention states of the splits of each row. Host side of merge.cuh.
#pragma once

#include <cuda_runtime_api.h>

namespace innerkv {

/// Row r of the output is query token x query head r. A split's state is its largest logit in units of log2
/// (the logit times log2 e), the sum of 2^(logit - largest) and the sum of 2^(logit - largest) * value.
struct MergeArgs {
  const float* partial = nullptr;  // [splits][rows][D] sums of weighted values; not read where the sum is 0
  const float2* state = nullptr;   // [splits][rows] {largest, sum}; {-inf, 0} for a split without tokens
  float* out = nullptr;            // [rows][D] 32-byte aligned; zeros for a row without tokens
  float* lse = nullptr;  // [rows] natural log-sum-exp of the logits, -inf without tokens; or nullptr
  int splits = 0, rows = 0;
  int rotated_splits =
      0;  // the first so many hold values rotated by docs/format.md 5.4, which is undone here
};

/// Enqueues the merge of several requests (`requests` on the device) of at most `most_rows` rows and
/// `most_splits` splits each, for head_dim 64, 80, 96, 128 or 256; cudaErrorInvalidValue for another.
cudaError_t merge_states(const MergeArgs* requests, int count, int most_rows, int most_splits, int head_dim,
                         cudaStream_t stream);

}  // namespace innerkv
