// What kernels are told: plain structs of device pointers, made by gpu_backend.cu from the core's jobs.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "../core/backend.h"
#include "../format/group.h"
#include "../format/outliers.h"

namespace innerkv::gpu {

inline constexpr int kMaxExtents =
    8;  // 128 slots x 8 groups, or 4 sub-blocks x 256 channels, of 128 zero points

/// One KV head's change of basis; null pointers switch a step off. core/config.h says what the numbers are.
struct BasisArgs {
  const float *mean = nullptr, *lam = nullptr, *inv_lam = nullptr;
  const std::uint8_t *order = nullptr;
  const float *metric = nullptr, *feedback = nullptr, *pivot = nullptr;
};

/// What all jobs of a launch share.
struct QuantiseRule {
  TensorSpec k, v;
  int head_dim = 0, pairs = 0;
  bool half_layout = false, hadamard_k = false, hadamard_v = false, unbiased_k = false, unbiased_v = false;
  int clip_k_count = 0, clip_v_count = 0;
  float clip_k[kMaxClipRatios] = {}, clip_v[kMaxClipRatios] = {};
};

struct QuantiseArgs {
  std::uint8_t *page;
  TokenSource k, v;
  int position;  // of slot 0
  int k_first, k_count, v_first, v_count;
  BasisArgs basis;
  const float *cos, *sin;            // [D] of the page's block, or null
  std::uint16_t *k_dense, *v_dense;  // zero points of all groups before compaction, [scales()], or null
  std::uint16_t *k_zeros[kMaxExtents], *v_zeros[kMaxExtents];
  int *k_zero_count, *v_zero_count;  // in: compact zero points before this job; out: after it
};

struct PageArgs {
  const std::uint8_t *k, *v;  // null: every token was removed
  std::uint64_t removed[2];
  const std::uint16_t *const *k_zeros, *const *v_zeros;  // extents of compact zero points
};

/// One KV head of one sequence.
struct HeadArgs {
  const PageArgs *pages;
  const std::uint16_t *sink_k, *sink_v, *ring_k, *ring_v;
  const float *mean, *lam;
  const float *rotations;  // [blocks][2][D] cos and sin, or null
  int tokens, sink, k_quantised, v_quantised, ring;
};

struct RequestArgs {
  const float *q;                      // [q_tokens][query_heads][D]
  float *logits;                       // [q_tokens][query_heads][tokens] or null
  float *partial;                      // [splits][rows][D], rows in the order of q; merge.h
  float2 *state;                       // [splits][rows]
  int rows, from_end, sliding_window;  // from_end: query token i is token tokens - from_end + i when causal
  bool causal;
};

/// Some rows of one KV head against the stored values of a run of tiles or, with `raw`, against those of its
/// tokens whose keys are stored and whose values are still in the ring.
struct TaskArgs {
  int request, kv_head, first_row, rows, first_tile, end_tile, split;
  bool raw;
};

/// Where a tensor's outlier rows lie, as numbers that kernels find in constant memory.
struct OutlierRule {
  int bytes = 0, channels_at = 0, values_at = 0;  // of the section
  bool wide = false;                              // 16-bit row starts

  OutlierRule() = default;
  explicit OutlierRule(const TensorSpec &spec) {
    if (spec.outliers == 0) return;
    const OutlierLayout layout{spec.outliers * kPageTokens};
    bytes = static_cast<int>(layout.bytes());
    channels_at = static_cast<int>(layout.indices_at());
    values_at = static_cast<int>(layout.values_at());
    wide = layout.start_bytes() > 1;
  }
};

struct AttendRule {
  TensorSpec k, v;
  OutlierRule k_outliers, v_outliers;
  int head_dim = 0, kv_heads = 0, group = 0, block_tokens = 0, pairs = 0;
  bool half_layout = false, hadamard_k = false, hadamard_v = false;
  bool float32 = false;  // 16-bit pages hold float32 rows: plain attention only
  float scale = 0, softcap = 0;
};

}  // namespace innerkv::gpu
