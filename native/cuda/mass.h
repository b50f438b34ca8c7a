// How much attention each token got: probabilities summed over the rows of a KV head. Host side of mass.cuh.
#pragma once

#include <cuda_runtime_api.h>

namespace innerkv {

struct MassArgs {
  const float* logits = nullptr;  // [q_tokens][kv_heads][group][tokens] natural, -inf where masked
  const float* lse = nullptr;     // [q_tokens][kv_heads][group] natural log-sum-exp, -inf without tokens
  float* mass = nullptr;          // [kv_heads][tokens]
  int q_tokens = 0, group = 0, tokens = 0;
};

/// Enqueues the sums of several requests (`requests` on the device) of at most `most_tokens` tokens each.
/// Requests without `mass` are left out.
cudaError_t sum_masses(const MassArgs* requests, int count, int kv_heads, int most_tokens,
                       cudaStream_t stream);

}  // namespace innerkv
