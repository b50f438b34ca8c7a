// Attention straight from the codes on integer tensor cores: keys and values with one mid-rise scale per
// token, the formats that calibrated and rotated caches store.
//
// Shape      a warp per task: 4 * NT query rows of one KV head against a run of pages; 4 independent warps a
// block. Reads      each page once, 4 to 16 bytes a lane, whole words of codes (docs/format.md section 2);
// prepared queries. Writes     the task's softmax state and unnormalised output, in the basis of the stored
// values. Arithmetic A = codes as bytes under a class mask (rows are tokens for K, channels for V), B =
// queries or weighted
//            probabilities as 16-bit integers in two signed bytes: columns 2h and 2h + 1 are the high and low
//            part of row h. The power of two that a mask leaves is undone by the row's scale, the centre of
//            the levels by one integer per row. All integer sums are exact (bounds at their place); weights
//            are relative to the page's largest.
// Order      no barrier; lanes exchange by shuffles. The result of a task depends on its pages alone.
// Limits     head_dim 64, 128; the pairs of bits that attend_mma.cu lists; up to 8 query rows a task.
#pragma once

#include "attend.cuh"
#include "attend_mma.h"
#include "codes.cuh"
#include "ptx.h"

namespace innerkv::gpu {

inline constexpr float kLargestInteger = 32639.0f;  // 127 * 256 + 127

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
  const float inverse = largest > 0 ? kLargestInteger / largest : 0.0f;
  const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(block) * request.rows + row;
  std::uint8_t* bytes = to.bytes + at * 2 * D;
  int total = 0;
  for (int i = lane; i < D; i += 32) {
    const int value = static_cast<int>(rintf(x[i] * inverse)), high = (value + 128) >> 8;
    bytes[i] = static_cast<std::uint8_t>(high);
    bytes[D + i] = static_cast<std::uint8_t>(value - 256 * high);
    total += value;
  }
  for (int h = 16; h > 0; h /= 2) total += __shfl_xor_sync(kFullMask, total, h);
  if (lane == 0) to.rows[at] = {largest / kLargestInteger, constant, total};
}

/// 4 rows' integers split into signed bytes: high and low words.
struct SplitWord {
  std::uint32_t high = 0, low = 0;
};

template <int kBitsK, int kBitsV, int D, int NT>
struct MmaAttention {
  using K = Codes<kBitsK, kPageTokens>;
  using V = Codes<kBitsV, D>;
  static constexpr int kRowsInTile = 4 * NT, kTopK = (1 << kBitsK) - 1, kTopV = (1 << kBitsV) - 1;

  const AttendRule& rule;
  const RequestArgs& request;
  const HeadArgs& head;
  const PreparedArgs& prepared;
  const TaskArgs& task;
  int lane, g, t;

  float largest[NT], sum[NT], out[V::kUnits][NT];

  /// The task's row that lane column t of n-tile n stands for; rows beyond the task repeat its last one.
  INNERKV_DEVICE int task_row(int n, int column) const {
    const int r = 4 * n + column;
    return r < task.rows ? r : task.rows - 1;
  }
  INNERKV_DEVICE int row_of(int r) const {
    const int token = (task.first_row + r) / rule.group;
    return token * rule.kv_heads * rule.group + task.kv_head * rule.group + (task.first_row + r) % rule.group;
  }
  INNERKV_DEVICE int end_visible(int r) const {
    return request.causal ? head.tokens - request.q_tokens + (task.first_row + r) / rule.group + 1
                          : head.tokens;
  }
  INNERKV_DEVICE int first_visible(int r) const {
    const int first = end_visible(r) - request.sliding_window;
    return request.sliding_window > 0 && first > 0 ? first : 0;
  }

  /// Scores of one page: scores[unit][n] of row task_row(n, t), slot K::row(g, unit).
  INNERKV_DEVICE void scores_of(const PageArgs& page, int block, float (&scores)[K::kUnits][NT]) const {
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.k);
    std::int32_t sums[K::kTiles][NT][4] = {};
    const std::uint32_t* q[NT];  // of column g
    PreparedRow rows[NT];        // of column t
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(block) * request.rows;
      q[n] = reinterpret_cast<const std::uint32_t*>(prepared.bytes +
                                                    ((at + row_of(task_row(n, g / 2))) * 2 + g % 2) * D);
      rows[n] = prepared.rows[at + row_of(task_row(n, t))];
    }
    [[maybe_unused]] constexpr int kTogether = kBitsK == 2   ? 4
                                               : kBitsK == 8 ? 1
                                                             : 2;  // loads under way: 32 registers
#pragma unroll kTogether
    for (int step = 0; step < D / 32; ++step) {
      K low, high;  // quads 8 * step + t and 4 further
      low.load(base, 8 * step + t, g);
      high.load(base, 8 * step + 4 + t, g);
      std::uint32_t b[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        b[n][0] = q[n][8 * step + t];
        b[n][1] = q[n][8 * step + 4 + t];
      }
#pragma unroll
      for (int tile = 0; tile < K::kTiles; ++tile) {
        const std::uint32_t a[4] = {low.fragment(2 * tile), low.fragment(2 * tile + 1),
                                    high.fragment(2 * tile), high.fragment(2 * tile + 1)};
#pragma unroll
        for (int n = 0; n < NT; ++n)
          ptx::mma_m16n8k32<std::uint8_t, std::int8_t>(sums[tile][n], a, b[n], sums[tile][n]);
      }
    }
    const TensorLayout layout{rule.k, false, D};
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page.k + layout.scales_at());
#pragma unroll
    for (int unit = 0; unit < K::kUnits; ++unit) {
      const float scale = half_value(scales[K::row(g, unit)]);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        // |2 * code - top| * |q| <= 255 * 2^15 * 256 < 2^31 in the end; before, sums wrap around harmlessly.
        const std::int32_t* part = sums[unit / 2][n] + 2 * (unit % 2);
        const std::uint32_t twice = 512u * static_cast<std::uint32_t>(part[0]) +
                                    2u * static_cast<std::uint32_t>(part[1]) -
                                    (static_cast<std::uint32_t>(kTopK * rows[n].total) << K::shift(unit));
        const float unit_step = 0.5f * rows[n].step / static_cast<float>(1 << K::shift(unit));
        scores[unit][n] =
            fmaf(static_cast<float>(static_cast<std::int32_t>(twice)), unit_step * scale, rows[n].constant);
      }
    }
  }

  /// Softcap, masks, logits.
  INNERKV_DEVICE void finish_scores(const PageArgs& page, int position, int stored,
                                    float (&scores)[K::kUnits][NT]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int r = task_row(n, t), first = first_visible(r) - position, end = end_visible(r) - position;
      const bool whole = stored == kPageTokens && first <= 0 && end >= kPageTokens &&
                         !(page.removed[0] | page.removed[1]) && !request.logits && !(rule.softcap > 0);
      if (whole) continue;
      float* logits = request.logits && 4 * n + t < task.rows
                          ? request.logits + static_cast<std::ptrdiff_t>(row_of(r)) * head.tokens + position
                          : nullptr;
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        const int slot = K::row(g, unit);
        float& x = scores[unit][n];
        const bool hidden =
            slot >= stored || slot < first || slot >= end || (page.removed[slot / 64] >> (slot % 64) & 1u);
        if (rule.softcap > 0) x = kLog2e * rule.softcap * tanhf(x * kLn2 / rule.softcap);
        if (hidden) x = no_score();
        if (logits && slot < stored) logits[slot] = x * kLn2;
      }
    }
  }

  /// Maximum (or sum) over the lanes of one column.
  static INNERKV_DEVICE float column_max(float x) {
#pragma unroll
    for (int h = 4; h <= 16; h *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, h));
    return x;
  }

  /// Probabilities times the values' scales as integers: split[s][n] holds the quad of tokens quad_of(s).
  /// Returns the factor of the integers and their total.
  INNERKV_DEVICE void weigh(const PageArgs& page, int stored, float (&scores)[K::kUnits][NT],
                            SplitWord (&split)[4][NT], float (&factor)[NT], std::int32_t (&total)[NT],
                            float (&rescale)[NT]) {
    const TensorLayout layout{rule.v, true, D};
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page.v + layout.scales_at());
    float value_scales[K::kUnits];
#pragma unroll
    for (int unit = 0; unit < K::kUnits; ++unit) {
      const int slot = K::row(g, unit);
      value_scales[unit] = slot < stored ? half_value(scales[slot]) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float page_largest = no_score();
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) page_largest = fmaxf(page_largest, scores[unit][n]);
      page_largest = column_max(page_largest);
      const float before = largest[n], now = fmaxf(before, page_largest);
      const bool nothing = page_largest == no_score();
      rescale[n] = before == now || before == no_score() ? 1.0f : ptx::ex2(before - now);
      const float page_factor = nothing ? 0.0f : ptx::ex2(page_largest - now);
      float page_sum = 0.0f, heaviest = 0.0f;
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        const float p = nothing ? 0.0f : ptx::ex2(scores[unit][n] - page_largest);
        page_sum += p;
        scores[unit][n] = p * value_scales[unit];
        heaviest = fmaxf(heaviest, scores[unit][n]);
      }
      sum[n] = fmaf(page_sum, page_factor, sum[n] * rescale[n]);
      largest[n] = now;
      heaviest = column_max(heaviest);
      const float inverse = heaviest > 0 ? kLargestInteger / heaviest : 0.0f;
      factor[n] = page_factor * heaviest / kLargestInteger;
      std::int32_t all = 0;
      std::uint32_t high[K::kUnits], low[K::kUnits];
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        const int value = static_cast<int>(fmaf(scores[unit][n], inverse, 0.5f)), upper = (value + 128) >> 8;
        all += value;
        high[unit] = static_cast<std::uint32_t>(upper) & 0xffu;
        low[unit] = static_cast<std::uint32_t>(value - 256 * upper) & 0xffu;
      }
#pragma unroll
      for (int h = 4; h <= 16; h *= 2) all += __shfl_xor_sync(kFullMask, all, h);
      total[n] = all;
      gather_quads(high, low, split, n);
    }
  }

  /// Bytes of units to words of token quads. A lane's vector of 4 words is a quad of tokens; with vectors of
  /// 2 (3 bits) two neighbouring lanes hold the halves of a quad and exchange them, so that each ends with
  /// every other class.
  INNERKV_DEVICE void gather_quads(const std::uint32_t (&high)[K::kUnits],
                                   const std::uint32_t (&low)[K::kUnits], SplitWord (&split)[4][NT],
                                   int n) const {
    if constexpr (K::kVector == 4) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        split[s][n] = {high[4 * s] | high[4 * s + 1] << 8 | high[4 * s + 2] << 16 | high[4 * s + 3] << 24,
                       low[4 * s] | low[4 * s + 1] << 8 | low[4 * s + 2] << 16 | low[4 * s + 3] << 24};
      }
    } else {
      static_assert(K::kVector == 2);
      const bool odd = g % 2;
#pragma unroll
      for (int s = 0; s < 4; ++s) {  // classes 2 s and 2 s + 1
        const auto half = [&](const std::uint32_t(&bytes)[K::kUnits], int c) {
          return bytes[2 * c] | bytes[2 * c + 1] << 8;
        };
        const auto exchange = [&](const std::uint32_t(&bytes)[K::kUnits]) {
          const std::uint32_t even_class = half(bytes, 2 * s), odd_class = half(bytes, 2 * s + 1);
          const std::uint32_t other = __shfl_xor_sync(kFullMask, odd ? even_class : odd_class, 4);
          return odd ? other | odd_class << 16 : even_class | other << 16;
        };
        split[s][n].high = exchange(high);
        split[s][n].low = exchange(low);
      }
    }
  }
  /// Lane group (value of g) that holds quad `quad` of 8 in the words split[s].
  static INNERKV_DEVICE int holder(int quad) { return K::kVector == 4 ? quad : 2 * (quad % 4) + quad / 4; }

  INNERKV_DEVICE void add_values(const PageArgs& page, const SplitWord (&split)[4][NT],
                                 const float (&factor)[NT], const std::int32_t (&total)[NT],
                                 const float (&rescale)[NT]) {
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.v);
    std::int32_t sums[V::kTiles][NT][4] = {};
    // 4-bit keys leave too few registers for four steps of loads: ptxas would spill some.
    [[maybe_unused]] constexpr int kTogether =
        V::kWords * V::kPlanes > 4 || (kBitsK == 4 && D == 128) ? 2 : 4;
#pragma unroll kTogether
    for (int s = 0; s < 4; ++s) {
      V low, high;
      low.load(base, 8 * s + t, g);
      high.load(base, 8 * s + 4 + t, g);
      std::uint32_t b[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int source = 4 * holder(4 * half + t) + g / 2;
          const std::uint32_t from_high = __shfl_sync(kFullMask, split[s][n].high, source),
                              from_low = __shfl_sync(kFullMask, split[s][n].low, source);
          b[n][half] = g % 2 ? from_low : from_high;
        }
#pragma unroll
      for (int tile = 0; tile < V::kTiles; ++tile) {
        const std::uint32_t a[4] = {low.fragment(2 * tile), low.fragment(2 * tile + 1),
                                    high.fragment(2 * tile), high.fragment(2 * tile + 1)};
#pragma unroll
        for (int n = 0; n < NT; ++n)
          ptx::mma_m16n8k32<std::uint8_t, std::int8_t>(sums[tile][n], a, b[n], sums[tile][n]);
      }
    }
#pragma unroll
    for (int unit = 0; unit < V::kUnits; ++unit)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        // |2 * code - top| * weight <= 255 * 2^15 * 128 < 2^31 in the end.
        const std::int32_t* part = sums[unit / 2][n] + 2 * (unit % 2);
        const std::uint32_t twice = 512u * static_cast<std::uint32_t>(part[0]) +
                                    2u * static_cast<std::uint32_t>(part[1]) -
                                    (static_cast<std::uint32_t>(kTopV * total[n]) << V::shift(unit));
        const float unit_factor = 0.5f * factor[n] / static_cast<float>(1 << V::shift(unit));
        out[unit][n] = fmaf(static_cast<float>(static_cast<std::int32_t>(twice)), unit_factor,
                            out[unit][n] * rescale[n]);
      }
  }

  INNERKV_DEVICE void hide_logits(int position, int stored) const {
    if (!request.logits) return;
    for (int r = 0; r < task.rows; ++r)
      for (int i = lane; i < stored; i += 32)
        request.logits[static_cast<std::ptrdiff_t>(row_of(r)) * head.tokens + position + i] = no_score();
  }

  INNERKV_DEVICE void run() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      largest[n] = no_score();
      sum[n] = 0.0f;
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) out[unit][n] = 0.0f;
    }
    for (int tile = task.first_tile; tile < task.end_tile; ++tile) {
      const int first = tile * kPageTokens, position = head.sink + first;
      const int stored = clamp_int(head.v_quantised - first, 0, kPageTokens);
      const PageArgs& page = head.pages[tile];
      const bool seen = position < end_visible(task.rows - 1) && position + stored > first_visible(0);
      if (!page.k || !seen) {
        hide_logits(position, stored);
        continue;
      }
      float scores[K::kUnits][NT], factor[NT], rescale[NT];
      SplitWord split[4][NT];
      std::int32_t total[NT];
      scores_of(page, rule.block_tokens > 0 ? first / rule.block_tokens : 0, scores);
      finish_scores(page, position, stored, scores);
      weigh(page, stored, scores, split, factor, total, rescale);
      add_values(page, split, factor, total, rescale);
    }
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(task.split) * request.rows;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 4; h <= 16; h *= 2) sum[n] += __shfl_xor_sync(kFullMask, sum[n], h);
      if (4 * n + t >= task.rows) continue;
      const std::ptrdiff_t row = at + row_of(4 * n + t);
      if (g == 0) request.state[row] = {largest[n], sum[n]};
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) request.partial[row * D + V::row(g, unit)] = out[unit][n];
    }
  }
};

/// Grid: ceil(tasks / 4); 128 threads.
template <int kBitsK, int kBitsV, int D, int NT>
INNERKV_KERNEL(32 * kMmaWarps)
void attend_mma(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads,
                const PreparedArgs* prepared, const TaskArgs* tasks, int count) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            index = static_cast<int>(blockIdx.x) * kMmaWarps + warp;
  if (index >= count) return;
  const TaskArgs& task = tasks[index];
  MmaAttention<kBitsK, kBitsV, D, NT> attention{rule,
                                                requests[task.request],
                                                heads[task.request * rule.kv_heads + task.kv_head],
                                                prepared[task.request],
                                                task,
                                                lane,
                                                lane / 4,
                                                lane % 4,
                                                {},
                                                {},
                                                {}};
  attention.run();
}

}  // namespace innerkv::gpu
