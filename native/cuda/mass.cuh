// mass: attention mass per token, from the logits and log-sum-exps of the same call.
//
// - Maths: mass[h][t] = sum over query tokens i and query heads g of KV head h of e^(logit[i][h][g][t] -
// lse[i][h][g]).
// - Work: a thread per token; a block of 128 tokens of one KV head of one request.
// - Lanes: neighbouring lanes have neighbouring tokens, so a row is read in lines of 128 bytes.
// - Memory: reads rows * tokens * 4 bytes once, which attention has just written (from L2 when short); writes
// 4 bytes
//   per token and KV head. Keys and values are not read again.
// - Precision: float32 in the order of the rows; 2^x is ex2.approx.
// - Limits: none on shapes; a row without tokens (lse = -inf) adds nothing.
#pragma once

#include "mass.h"
#include "ptx.h"

namespace innerkv {

inline constexpr int kMassThreads = 128;

INNERKV_KERNEL(kMassThreads)
void mass_kernel(const MassArgs* requests) {
  const MassArgs args = requests[blockIdx.z];
  const int token = static_cast<int>(blockIdx.x) * kMassThreads + static_cast<int>(threadIdx.x);
  if (!args.mass || token >= args.tokens) return;
  const int kv_heads = static_cast<int>(gridDim.y), head = static_cast<int>(blockIdx.y);
  float sum = 0;
  for (int i = 0; i < args.q_tokens; ++i)
    for (int g = 0; g < args.group; ++g) {
      const std::ptrdiff_t row = (static_cast<std::ptrdiff_t>(i) * kv_heads + head) * args.group + g;
      const float lse = args.lse[row];
      if (lse == -INFINITY) continue;
      sum += ptx::ex2((args.logits[row * args.tokens + token] - lse) * 1.44269504088896341f);
    }
  args.mass[static_cast<std::ptrdiff_t>(head) * args.tokens + token] = sum;
}

}  // namespace innerkv
