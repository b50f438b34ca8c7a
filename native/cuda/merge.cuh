// merge: the last step of attention split over tokens.
//
// - Maths: M = max m_s, w_s = 2^(m_s - M), out = (H sum_rotated w_s a_s + sum_raw w_s a_s) / sum w_s l_s,
//   lse = (M + log2 sum w_s l_s) ln 2; H is the orthonormal Hadamard matrix of docs/format.md 5.4.
// - Shape: one row by kWarps warps of a block (1 or 4); a warp takes every kWarps-th split, warp 0 joins and
//   writes. Lane l holds channels kVector (l + 32 j) + v: loads of 4 kVector bytes side by side, and a
//   butterfly of stride h is inside a register pair (h < kVector or h >= 32 kVector) or one shuffle.
// - Reads: splits * rows * (4 D + 8) bytes once; splits whose sum is 0 are not read.
// - Writes: rows * (4 D + 4) bytes.
// - Order: float32; the butterflies are those of numerics/hadamard.h in the same order. 2^x is ex2.approx.
// - Limits: a warp's lanes share every branch; kWarps > 1 has one barrier, which all threads reach.
#pragma once

#include "../numerics/hadamard.h"
#include "merge.h"
#include "ptx.h"

namespace innerkv {

template <int kHeadDim>
struct MergeLayout {
  static constexpr int kVector = kHeadDim % 128 == 0 ? 4 : kHeadDim % 64 == 0 ? 2 : 1;
  static constexpr int kSteps = (kHeadDim + 32 * kVector - 1) / (32 * kVector);
  static constexpr int kValues = kVector * kSteps;
  static_assert(kVector * 32 * kSteps == kHeadDim || kVector == 1,
                "only single channels may leave lanes idle");

  static INNERKV_DEVICE int channel(int lane, int step) { return kVector * (lane + 32 * step); }
};

/// The largest power of two that is at most n.
constexpr INNERKV_HD int hadamard_block(int n) {
  int block = 1;
  while (2 * block <= n) block *= 2;
  return block;
}

/// One block of the Hadamard transform, over channels [kFirst, kFirst + kSize) of the row.
template <int kHeadDim, int kFirst, int kSize>
INNERKV_DEVICE void hadamard_lanes(float (&x)[MergeLayout<kHeadDim>::kValues], int lane) {
  using Layout = MergeLayout<kHeadDim>;
  constexpr int kVector = Layout::kVector, kRow = 32 * kVector;
  static_assert(kFirst % kRow == 0, "a block begins with a step");
  constexpr int kBegin = kFirst / kRow * kVector, kEnd = kBegin + (kSize + kRow - 1) / kRow * kVector;
#pragma unroll
  for (int h = 1; h < kSize; h *= 2) {
    const bool shuffled = h >= kVector && h < kRow;
    const int stride = h < kVector ? h : h / kRow * kVector;  // between registers
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      if (shuffled) {
        const float other = __shfl_xor_sync(ptx::kFullWarp, x[i], h / kVector);
        x[i] = lane & (h / kVector) ? other - x[i] : x[i] + other;
      } else if (((i - kBegin) & stride) == 0) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) x[i] *= hadamard_norm(kSize);
}

template <int kHeadDim, int kWarps>
INNERKV_KERNEL(32 * kWarps)
void merge_kernel(const MergeArgs* requests) {
  expect_block<32 * kWarps>();
  using Layout = MergeLayout<kHeadDim>;
  constexpr int kVector = Layout::kVector, kSteps = Layout::kSteps, kValues = Layout::kValues;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const MergeArgs args = requests[blockIdx.y];
  if (static_cast<int>(blockIdx.x) >= args.rows) return;
  const std::size_t row = blockIdx.x, rows = static_cast<std::size_t>(args.rows);

  float largest = -INFINITY;
  for (int s = lane; s < args.splits; s += 32)
    largest = fmaxf(largest, args.state[static_cast<std::size_t>(s) * rows + row].x);
#pragma unroll
  for (int h = 16; h > 0; h /= 2) largest = fmaxf(largest, __shfl_xor_sync(ptx::kFullWarp, largest, h));

  float rotated[kValues] = {}, raw[kValues] = {}, sum = 0;
  for (int s = warp; s < args.splits; s += kWarps) {
    const std::size_t at = static_cast<std::size_t>(s) * rows + row;
    const float2 state = args.state[at];
    if (!(state.y > 0)) continue;
    const float weight = ptx::ex2(state.x - largest);
    sum += weight * state.y;
    float x[kValues] = {};
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int c = Layout::channel(lane, j);
      if (c >= kHeadDim) continue;
      const float* from = args.partial + at * kHeadDim + c;
      if constexpr (kVector == 4) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        x[4 * j] = v.x, x[4 * j + 1] = v.y, x[4 * j + 2] = v.z, x[4 * j + 3] = v.w;
      } else if constexpr (kVector == 2) {
        const float2 v = *reinterpret_cast<const float2*>(from);
        x[2 * j] = v.x, x[2 * j + 1] = v.y;
      } else {
        x[j] = *from;
      }
    }
    if (s < args.rotated_splits) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) rotated[i] += weight * x[i];
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) raw[i] += weight * x[i];
    }
  }

  if constexpr (kWarps > 1) {
    constexpr int kOthers = kWarps - 1;
    INNERKV_SHARED(float, sums, [kOthers]);
    INNERKV_SHARED(float, others, [kOthers][2 * kValues][32]);  // lane-major: no bank is hit twice
    if (warp > 0) {
      if (lane == 0) sums[warp - 1] = sum;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        others[warp - 1][i][lane] = rotated[i];
        others[warp - 1][kValues + i][lane] = raw[i];
      }
    }
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int w = 0; w < kOthers; ++w) {
      sum += sums[w];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        rotated[i] += others[w][i][lane];
        raw[i] += others[w][kValues + i][lane];
      }
    }
  }

  if (args.rotated_splits > 0) {
    constexpr int kFirst = hadamard_block(kHeadDim), kRest = kHeadDim - kFirst;
    hadamard_lanes<kHeadDim, 0, kFirst>(rotated, lane);
    if constexpr (kRest > 0) hadamard_lanes<kHeadDim, kFirst, kRest>(rotated, lane);
  }
  float x[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = sum > 0 ? (rotated[i] + raw[i]) / sum : 0.0f;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const int c = Layout::channel(lane, j);
    if (c >= kHeadDim) continue;
    float* to = args.out + row * kHeadDim + c;
    if constexpr (kVector == 4)
      *reinterpret_cast<float4*>(to) = make_float4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
    else if constexpr (kVector == 2)
      *reinterpret_cast<float2*>(to) = make_float2(x[2 * j], x[2 * j + 1]);
    else
      *to = x[j];
  }
  if (args.lse && lane == 0)
    args.lse[row] = sum > 0 ? (largest + log2f(sum)) * 0.693147180559945309f : -INFINITY;
}

}  // namespace innerkv
