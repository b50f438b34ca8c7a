// A tile of 128 tokens as one block of 128 threads sees it: queries, scores and scales in shared memory. The
// pieces of attend_any.cuh.
#pragma once

#include "attend.cuh"
#include "ptx.h"

namespace innerkv::gpu {

inline constexpr int kRows = 8, kTileThreads = 128, kTileWarps = 4;
inline constexpr int kMaxGroups = kMaxHeadDim / 32;

/// Scales and offsets of a tile's K, then of its V: value = scale * code + offset.
struct ScaleMemory {
  float scale[kPageTokens * kMaxGroups], offset[kPageTokens * kMaxGroups];
  int counts[kTileWarps];
};

/// Shared memory of a task.
struct TileMemory : ScaleMemory {
  std::uint32_t holders[kPageTokens / 32][kMaxHeadDim];  // a bit per token that has an outlier at the channel
  float q[kRows * kMaxHeadDim];                          // times softmax scale and log2(e)
  float prepared[kRows * kMaxHeadDim];                   // in the basis of the stored keys
  float scores[kRows * kPageTokens];                     // then probabilities
  float constant[kRows], largest[kRows], sum[kRows], rescale[kRows];
};

/// Rows of numbers as they came.
struct RawRows {
  const void* rows;
  bool float32;
  INNERKV_DEVICE float at(std::ptrdiff_t i) const {
    return float32 ? static_cast<const float*>(rows)[i]
                   : ptx::float_of(static_cast<const std::uint16_t*>(rows)[i]);
  }
};

/// How a block of 128 threads reads the scales of a page.
struct ScaleLoader {
  ScaleMemory& s;
  int tid, warp, lane;

  /// Exclusive sum of `mine` over the threads of the block; the last argument gets the total.
  INNERKV_DEVICE int scan(int mine, int& total) const {
    int inclusive = mine;
    for (int h = 1; h < 32; h *= 2) {
      const int other = __shfl_up_sync(kFullMask, inclusive, static_cast<unsigned>(h));
      if (lane >= h) inclusive += other;
    }
    __syncthreads();  // counts may still be read by a previous scan
    if (lane == 31) s.counts[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      if (w < warp) before += s.counts[w];
      total += s.counts[w];
    }
    return before + inclusive - mine;
  }

  /// Scales and offsets of the first `slots` slots: value = scale * code + offset. Thread = slot, or channel
  /// for tokens32.
  INNERKV_DEVICE void load(const TensorLayout& layout, const std::uint8_t* base,
                           const std::uint16_t* const* zeros, int slots) const {
    const auto* stored = reinterpret_cast<const std::uint16_t*>(base + layout.scales_at());
    const auto* dense = reinterpret_cast<const std::uint16_t*>(base + layout.zeros_at());
    const TensorSpec spec = layout.spec;
    const auto put = [&](int index, std::uint16_t zero) {
      const Dequantiser map = dequantiser(spec.bits, spec.mode, stored[index], zero);
      s.scale[index] = map.scale;
      s.offset[index] = map.offset;
    };
    if (!spec.compact_zeros()) {
      for (int index = tid; index < layout.scales(); index += kTileThreads)
        put(index, spec.dense_zeros() ? dense[index] : std::uint16_t{0});
      return;
    }
    // Rounds of 128 owners in storage order; each owner's groups are neighbours in that order.
    const bool blocks = spec.group == Group::kTokens32;
    const int owners = blocks ? slots / kBlockTokens32 * layout.head_dim : slots,
              groups = blocks ? 1 : layout.groups();
    int before = 0;
    for (int first = 0; first < owners; first += kTileThreads) {
      const int owner = first + tid;
      int mine = 0, total = 0;
      for (int g = 0; owner < owners && g < groups; ++g)
        mine += stored[blocks ? owner : layout.scale_index(owner, g)] >> 15;
      int at = before + scan(mine, total);
      for (int g = 0; owner < owners && g < groups; ++g) {
        const int index = blocks ? owner : layout.scale_index(owner, g);
        const bool own = stored[index] >> 15;
        put(index, own ? zeros[at / kZeroExtent][at % kZeroExtent] : std::uint16_t{0});
        at += own;
      }
      before += total;
    }
  }
};

/// The four codes of row `row` in quad `quad`, as bytes of one word.
INNERKV_DEVICE std::uint32_t codes_of(const std::uint32_t* words, const CodeShape& shape, int row, int quad) {
  const int X = shape.words(), cls = row / X;
  const std::uint32_t* at = words + static_cast<std::ptrdiff_t>(quad) * shape.planes() * X + row % X;
  if (shape.bits == 8) return *at;
  if (shape.bits != 3) return *at >> (shape.bits * cls) & 0x01010101u * ((1u << shape.bits) - 1u);
  if (cls < 6) return at[cls / 2 * X] >> (3 * (cls % 2)) & 0x07070707u;
  return (at[(cls - 6) * X] >> 5 & 0x06060606u) | (at[2 * X] >> cls & 0x01010101u);
}

/// Calls `entry(channel, value)` for each outlier of a token.
template <class Entry>
INNERKV_DEVICE void each_outlier(const TensorLayout& layout, const std::uint8_t* base, int slot,
                                 Entry entry) {
  const OutlierLayout rows = layout.outliers();
  const std::uint8_t* section = base + layout.outliers_at();
  const int end = outlier_start(section, rows, slot + 1);
  for (int i = outlier_start(section, rows, slot); i < end; ++i) {
    const Outlier outlier = outlier_at(section, rows, i);
    entry(outlier.index, ptx::float_of(outlier.value));
  }
}

struct Tile {
  const AttendRule& rule;
  const HeadArgs& head;
  const RequestArgs& request;
  const TaskArgs& task;
  TileMemory& s;
  int tid, warp, lane;

  INNERKV_DEVICE void load_scales(const TensorLayout& layout, const std::uint8_t* base,
                                  const std::uint16_t* const* zeros, int slots) const {
    ScaleLoader{s, tid, warp, lane}.load(layout, base, zeros, slots);
  }
  INNERKV_DEVICE int query_token(int r) const { return (task.first_row + r) / rule.group; }
  INNERKV_DEVICE int query_head(int r) const {
    return task.kv_head * rule.group + (task.first_row + r) % rule.group;
  }
  INNERKV_DEVICE int query_heads() const { return rule.kv_heads * rule.group; }
  INNERKV_DEVICE int position_of(int r) const {
    return request.causal ? head.tokens - request.from_end + query_token(r) : head.tokens - 1;
  }
  INNERKV_DEVICE int end_visible(int r) const { return position_of(r) + 1; }
  INNERKV_DEVICE int first_visible(int r) const {
    const int first = position_of(r) + 1 - request.sliding_window;
    return request.sliding_window > 0 && first > 0 ? first : 0;
  }
  /// Of positions [begin, end).
  INNERKV_DEVICE bool nothing_visible(int begin, int end) const {
    for (int r = 0; r < task.rows; ++r)
      if (begin < end_visible(r) && end > first_visible(r)) return false;
    return true;
  }
  /// Row of q and of the results.
  INNERKV_DEVICE std::ptrdiff_t row_of(int r) const {
    return static_cast<std::ptrdiff_t>(query_token(r)) * query_heads() + query_head(r);
  }
  INNERKV_DEVICE float* logits_row(int r) const { return request.logits + row_of(r) * head.tokens; }

  INNERKV_DEVICE void load_queries() const {
    const int D = rule.head_dim;
    const float factor = rule.scale * kLog2e;
    for (int i = tid; i < task.rows * D; i += kTileThreads) {
      const int r = i / D;
      s.q[i] = factor * request.q[row_of(r) * D + i % D];
    }
    if (tid < kRows) {
      s.largest[tid] = no_score();
      s.sum[tid] = 0.0f;
    }
  }

  /// Queries in the basis of a block's keys; a warp per row.
  INNERKV_DEVICE void prepare_queries(const float* rotation) const {
    const int D = rule.head_dim;
    for (int r = warp; r < task.rows; r += kTileWarps) {
      float* x = s.prepared + r * D;
      for (int i = lane; i < D; i += 32) x[i] = s.q[r * D + i];
      if (rotation) warp_rotate(lane, x, rotation, rotation + D, rule.pairs, rule.half_layout);
      float constant = 0.0f;
      if (head.mean) {
        for (int i = lane; i < D; i += 32) constant = fmaf(x[i], head.mean[i], constant);
        constant = warp_sum(constant);
      }
      if (lane == 0) s.constant[r] = constant;
      if (head.lam)
        for (int i = lane; i < D; i += 32) x[i] *= head.lam[i];
      if (rule.hadamard_k) warp_hadamard(lane, x, D);
    }
  }

  /// Scores of 16-bit (or float32) rows: a warp per token.
  INNERKV_DEVICE void raw_scores(RawRows k, int count, int slot) const {
    const int D = rule.head_dim;
    for (int i = warp; i < count; i += kTileWarps) {
      float sums[kRows] = {};
      for (int c = lane; c < D; c += 32) {
        const float key = k.at(static_cast<std::ptrdiff_t>(i) * D + c);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < task.rows) sums[r] = fmaf(key, s.q[r * D + c], sums[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= task.rows) break;
        const float total = warp_sum(sums[r]);
        if (lane == 0) s.scores[r * kPageTokens + slot + i] = total;
      }
    }
  }

  /// Scores of stored keys: thread = slot.
  INNERKV_DEVICE void stored_scores(const PageArgs& page, int stored) const {
    const int D = rule.head_dim;
    const TensorLayout layout{rule.k, false, D};
    load_scales(layout, page.k, page.k_zeros, stored);
    __syncthreads();
    if (tid >= stored) return;
    const CodeShape shape = layout.codes();
    const auto* words = reinterpret_cast<const std::uint32_t*>(page.k);
    float scores[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) scores[r] = r < task.rows ? s.constant[r] : 0.0f;
    for (int g = 0; g < layout.groups(); ++g) {
      const int index = layout.scale_index(tid, g);
      const float scale = s.scale[index], offset = s.offset[index];
      for (int quad = layout.group_begin(g) / 4; quad < layout.group_end(g) / 4; ++quad) {
        const std::uint32_t codes = codes_of(words, shape, tid, quad);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float key = fmaf(scale, static_cast<float>(codes >> (8 * j) & 0xffu), offset);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (r < task.rows) scores[r] = fmaf(key, s.prepared[r * D + 4 * quad + j], scores[r]);
        }
      }
    }
    if (layout.spec.outliers > 0)
      each_outlier(layout, page.k, tid, [&](int channel, float value) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < task.rows) scores[r] = fmaf(value, s.prepared[r * D + channel], scores[r]);
      });
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < task.rows) s.scores[r * kPageTokens + tid] = scores[r];
  }

  /// Which of the first `stored` tokens have an outlier at a channel: thread = slot.
  INNERKV_DEVICE void find_holders(const TensorLayout& layout, const std::uint8_t* base, int stored) const {
    for (int i = tid; i < kPageTokens / 32 * kMaxHeadDim; i += kTileThreads)
      s.holders[i / kMaxHeadDim][i % kMaxHeadDim] = 0;
    __syncthreads();
    if (tid < stored)
      each_outlier(layout, base, tid,
                   [&](int channel, float) { atomicOr(&s.holders[warp][channel], 1u << lane); });
  }

  /// Softcap, masks, the optional logits; then probabilities in place of scores, 0 outside of slots [begin,
  /// end). A warp per row. Slots before `stored` are removed where `removed` says so, all of them if it is
  /// null.
  INNERKV_DEVICE void softmax(int position, int begin, int end, const std::uint64_t* removed,
                              int stored) const {
    for (int r = warp; r < task.rows; r += kTileWarps) {
      float* scores = s.scores + r * kPageTokens;
      const int first = first_visible(r) - position, past = end_visible(r) - position;
      float largest = no_score();
      for (int i = begin + lane; i < end; i += 32) {
        const bool gone = i < stored && (!removed || (removed[i / 64] >> (i % 64) & 1u));
        float x = no_score();
        if (!gone && i >= first && i < past) x = scores[i];
        if (x != no_score() && rule.softcap > 0) x = kLog2e * rule.softcap * tanhf(x * kLn2 / rule.softcap);
        scores[i] = x;
        if (request.logits) logits_row(r)[position + i] = x * kLn2;
        largest = x > largest ? x : largest;
      }
      __syncwarp();
      largest = warp_max(largest);
      const float before = s.largest[r], now = largest > before ? largest : before;
      float sum = 0.0f;
      for (int i = lane; i < kPageTokens; i += 32) {
        const bool counts = i >= begin && i < end && scores[i] != no_score();
        const float p = counts ? exp2f(scores[i] - now) : 0.0f;
        scores[i] = p;
        sum += p;
      }
      sum = warp_sum(sum);
      __syncwarp();
      if (lane == 0) {
        s.rescale[r] = now == no_score() || before == now ? 1.0f
                       : before == no_score()             ? 0.0f
                                                          : exp2f(before - now);
        s.sum[r] = fmaf(s.sum[r], s.rescale[r], sum);
        s.largest[r] = now;
      }
    }
  }

  INNERKV_DEVICE void hide_logits(int position, int begin, int end) const {
    if (!request.logits) return;
    for (int r = 0; r < task.rows; ++r)
      for (int i = begin + tid; i < end; i += kTileThreads) logits_row(r)[position + i] = no_score();
  }
};

}  // namespace innerkv::gpu
