// Queries in the basis of each block of stored keys, as the integers that attend_mma.cuh multiplies: a small
// kernel before the attention of a call.
//
// - Shape: a warp per query row and block of keys.
// - Reads: the row, the block's rotation, the head's mean and normalisation.
// - Writes: 2 D + 24 bytes: signed high and low bytes, the integers' step, the mean's constant, and the sums
//   of the integers over each group of channels that shares a scale. For keys with outliers 4 D more: the
//   float32 numbers.
// - Exchange: a warp's row lies in its own part of shared memory.
// - Order: float32 operations of warp.cuh, in channel order.
// - Limits: head_dim <= 128.
#pragma once

#include "attend.cuh"
#include "attend_mma.h"

namespace innerkv::gpu {

/// Largest integer of two signed bytes.
inline constexpr float kLargestSigned = 32639.0f;  // 127 * 256 + 127

/// Queries of every block as integers: grid (ceil(rows / 4), blocks, requests), 128 threads.
INNERKV_KERNEL(128)
void prepare_queries(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads,
                     const PreparedArgs* prepared) {
  INNERKV_SHARED(float, all_rows, [kMmaWarps][kMaxHeadDim]);
  const RequestArgs& request = requests[blockIdx.z];
  const PreparedArgs& to = prepared[blockIdx.z];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * kMmaWarps + warp, block = static_cast<int>(blockIdx.y),
            D = rule.head_dim, query_heads = rule.kv_heads * rule.group;
  if (row >= request.rows || block >= to.blocks) return;
  const HeadArgs& head = heads[static_cast<int>(blockIdx.z) * rule.kv_heads + row % query_heads / rule.group];
  float* x = all_rows[warp];
  const float factor = rule.scale * kLog2e;
  for (int i = lane; i < D; i += 32) x[i] = factor * request.q[static_cast<std::ptrdiff_t>(row) * D + i];
  if (rule.block_tokens > 0) {
    const float* rotation = head.rotations + static_cast<std::ptrdiff_t>(block) * 2 * D;
    warp_rotate(lane, x, rotation, rotation + D, rule.pairs, rule.half_layout);
  }
  float constant = 0.0f;
  if (head.mean) {
    for (int i = lane; i < D; i += 32) constant = fmaf(x[i], head.mean[i], constant);
    constant = warp_sum(constant);
  }
  if (head.lam)
    for (int i = lane; i < D; i += 32) x[i] *= head.lam[i];
  if (rule.hadamard_k) warp_hadamard(lane, x, D);
  const float largest = warp_max_magnitude(lane, D, [&](int i) { return x[i]; });
  const bool tiny = !(largest > kTiny);
  const float inverse = tiny ? 0.0f : kLargestSigned / largest;
  const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(block) * request.rows + row;
  std::uint8_t* bytes = to.bytes + at * 2 * D;
  if (to.stored)
    for (int i = lane; i < D; i += 32) to.stored[at * D + i] = x[i];
  const bool grouped = rule.k.group != Group::kToken;
  PreparedRow result{tiny ? 0.0f : largest / kLargestSigned, constant, {}};
#pragma unroll
  for (int step = 0; step < kMostGroups; ++step) {
    const int i = 32 * step + lane;
    if (i >= D) break;  // 32 divides D
    const int value = static_cast<int>(rintf(x[i] * inverse)), high = (value + 128) >> 8;
    bytes[i] = static_cast<std::uint8_t>(high);
    bytes[D + i] = static_cast<std::uint8_t>(value - 256 * high);
    int total = value;
    for (int h = 16; h > 0; h /= 2) total += __shfl_xor_sync(kFullMask, total, h);
    result.totals[grouped ? step : 0] += total;
  }
  if (lane == 0) to.rows[at] = result;
}

}  // namespace innerkv::gpu
