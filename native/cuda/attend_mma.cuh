// Attention straight from the codes on integer tensor cores, for the formats of routes.h.
//
// - Shape: a warp per task, 4 * NT query rows of one KV head against a run of pages; 4 independent warps a
//   block.
// - Reads: each page once, 4 to 16 bytes a lane, whole words of codes (docs/format.md section 2); queries
//   that prepare.cuh made.
// - Writes: the task's softmax state and unnormalised output, in the basis of the stored values.
// - Arithmetic: A = codes as bytes under a class mask (rows are tokens for K, channels for V), B = queries or
//   weighted probabilities as 16-bit integers in two bytes; columns 2h and 2h + 1 are the high and low part
//   of row h. The power of two that a mask leaves is undone by the row's scale; the centre of the levels is
//   one integer per row, where accumulators start. All integer sums are exact: |code - centre| * |integer|
//   summed over 128 elements is at most 128 * 255 * 65535 / 2 < 2^31, and what comes before wraps around
//   harmlessly.
// - Groups: 32 channels of a key are one matrix product, 32 tokens of a value too, so a group's scale meets
//   the product's sum. Values with scales per token have them folded into the weights, group by group.
// - Order: no barrier; lanes exchange by shuffles, hybrid values through the warp's own shared memory. The
//   result of a task depends on its pages alone.
// - Outliers, where a route has them: attend_outliers.cuh, in a kernel of its own.
// - Limits: head_dim 64 and 128; up to 8 query rows a task.
// Long file: one pass over a page, in the order of its steps.
#pragma once

#include "attend.cuh"
#include "attend_mma.h"
#include "attend_outliers.cuh"
#include "mma_weights.cuh"
#include "ptx.h"
#include "routes.h"

namespace innerkv::gpu {

template <class T, int kCount>
struct alignas(4 * kCount) Several {
  T x[kCount];
};

/// Values of a page with hybrid scales: magnitude / 2^shift and what is added, sub-block by sub-block.
template <int D>
struct HybridScales {
  alignas(16) float size[4][D], offset[4][D];
};

template <Scales kScalesK, int kBitsK, Scales kScalesV, int kBitsV, int D, int NT, bool kOutliers>
struct MmaAttention {
  using K = Codes<kBitsK, kPageTokens>;
  using V = Codes<kBitsV, D>;
  static constexpr bool kKeyGroups = kScalesK != Scales::kToken,
                        kHybrid = kScalesV == Scales::kTokens32Hybrid,
                        kBlocks = kHybrid || kScalesV == Scales::kTokens32,
                        kChannelGroups = kScalesV == Scales::kChannels32;
  using Weights = WeightBytes<K, kChannelGroups>;
  static constexpr TensorLayout kLayoutK{a_spec(kScalesK, kBitsK), false, D},
      kLayoutV{a_spec(kScalesV, kBitsV), true, D};
  static constexpr std::size_t kScalesAtK = kLayoutK.scales_at(), kScalesAtV = kLayoutV.scales_at();
  using Outliers = OutlierPart<D, 4 * NT>;
  using OutlierShared = std::conditional_t<kOutliers, typename Outliers::Memory, char>;

  const AttendRule& rule;
  const RequestArgs& request;
  const HeadArgs& head;
  const PreparedArgs& prepared;
  const TaskArgs& task;
  int lane, g, t;
  HybridScales<D>* hybrid;
  OutlierShared& outlier_memory;

  float softcap, inverse_softcap;   // base 2
  int q_row[NT], row[NT], end[NT];  // of columns g and t; positions that row sees end there
  float largest[NT], sum[NT], out[V::kUnits][NT];

  /// Row of q and of the results that column `column` of n-tile n stands for; rows beyond the task repeat its
  /// last one.
  INNERKV_DEVICE int row_of(int n, int column) const {
    const int r = task.first_row + task_row(n, column), token = r / rule.group;
    return token * rule.kv_heads * rule.group + task.kv_head * rule.group + r - token * rule.group;
  }
  INNERKV_DEVICE int task_row(int n, int column) const {
    const int r = 4 * n + column;
    return r < task.rows ? r : task.rows - 1;
  }
  INNERKV_DEVICE int end_visible(int r) const {
    return request.causal ? head.tokens - request.from_end + (task.first_row + r) / rule.group + 1
                          : head.tokens;
  }
  INNERKV_DEVICE int first_visible(int past) const {
    const int first = past - request.sliding_window;
    return request.sliding_window > 0 && first > 0 ? first : 0;
  }

  static INNERKV_DEVICE std::uint32_t joined(const std::int32_t* part) {
    return 256u * static_cast<std::uint32_t>(part[0]) + static_cast<std::uint32_t>(part[1]);
  }
  /// A unit's sum of products, from its high and its low column.
  static INNERKV_DEVICE float product_sum(const std::int32_t* part) {
    return static_cast<float>(static_cast<std::int32_t>(joined(part)));
  }
  /// Twice the sum without the centre of the levels; `centre`: twice that code.
  static INNERKV_DEVICE float twice_centred(const std::int32_t* part, int centre, std::int32_t total,
                                            int shift) {
    const std::uint32_t all = static_cast<std::uint32_t>(centre) * static_cast<std::uint32_t>(total);
    return static_cast<float>(static_cast<std::int32_t>(2u * joined(part) - (all << shift)));
  }
  /// Accumulators of a tile that leave out a centre of 2^(bits - 1).
  template <class Matrix>
  static INNERKV_DEVICE void start_centred(std::int32_t (&start)[4], int bits, std::int32_t total, int tile) {
    const auto centre = [&](int unit) {
      return static_cast<std::int32_t>(
          0u - (static_cast<std::uint32_t>(total) << (bits - 1 + Matrix::shift(unit))));
    };
    start[0] = start[2] = 0;
    start[1] = centre(2 * tile);
    start[3] = centre(2 * tile + 1);
  }
  template <class Matrix>
  static INNERKV_DEVICE void load_tile(std::uint32_t (&a)[4], const Matrix& low, const Matrix& high,
                                       int tile) {
    a[0] = low.fragment(2 * tile);
    a[1] = low.fragment(2 * tile + 1);
    a[2] = high.fragment(2 * tile);
    a[3] = high.fragment(2 * tile + 1);
  }
  static constexpr INNERKV_DEVICE float unshifted(int shift) { return 1.0f / static_cast<float>(1 << shift); }

  /// Scores of one page: scores[unit][n] of row task_row(n, t), slot K::row(g, unit).
  INNERKV_DEVICE void scores_of(const PageArgs& page, int block, float (&scores)[K::kUnits][NT]) const {
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.k);
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page.k + kScalesAtK);
    const std::uint32_t* q[NT];   // of column g
    const PreparedRow* rows[NT];  // of column t
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(block) * request.rows;
      q[n] = reinterpret_cast<const std::uint32_t*>(prepared.bytes + ((at + q_row[n]) * 2 + g % 2) * D);
      rows[n] = prepared.rows + at + row[n];
    }
    [[maybe_unused]] std::int32_t sums[kKeyGroups ? 1 : K::kTiles][NT][4] = {};
#pragma unroll
    for (int unit = 0; unit < K::kUnits; ++unit)
#pragma unroll
      for (int n = 0; n < NT; ++n) scores[unit][n] = 0.0f;
    // Steps of loads under way: 32 registers.
    [[maybe_unused]] constexpr int kTogether = kBitsK == 8   ? 1
                                               : kKeyGroups  ? (NT == 1 ? 2 : 1)
                                               : kBitsK == 2 ? 4
                                                             : 2;
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
      std::uint32_t a[4];
      if constexpr (kKeyGroups) {
        float scale[K::kUnits];
        load_units<K>(scales + step * kPageTokens, g, scale);
        std::int32_t total[NT], start[4], part[4];
#pragma unroll
        for (int n = 0; n < NT; ++n) total[n] = rows[n]->totals[step];
#pragma unroll
        for (int tile = 0; tile < K::kTiles; ++tile) {
          load_tile(a, low, high, tile);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            start_centred<K>(start, kBitsK, total[n], tile);
            ptx::mma_m16n8k32<std::uint8_t, std::int8_t>(part, a, b[n], start);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& score = scores[2 * tile + i][n];
              score = fmaf(product_sum(part + 2 * i), scale[2 * tile + i], score);
            }
          }
        }
      } else {
#pragma unroll
        for (int tile = 0; tile < K::kTiles; ++tile) {
          load_tile(a, low, high, tile);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            ptx::mma_m16n8k32<std::uint8_t, std::int8_t>(sums[tile][n], a, b[n], sums[tile][n]);
        }
      }
    }
    [[maybe_unused]] float scale[K::kUnits];
    if constexpr (!kKeyGroups) load_units<K>(scales, g, scale);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const PreparedRow of_row = *rows[n];
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        const float step = of_row.step * unshifted(K::shift(unit));
        float& score = scores[unit][n];
        if constexpr (kKeyGroups)
          score = fmaf(score, step, of_row.constant);
        else
          score = fmaf(twice_centred(sums[unit / 2][n] + 2 * (unit % 2), (1 << kBitsK) - 1, of_row.totals[0],
                                     K::shift(unit)),
                       0.5f * step * scale[unit], of_row.constant);
      }
    }
  }

  /// Made anew wherever it is used: registers are short, and what follows from the lane alone is soon there.
  INNERKV_DEVICE Outliers outliers() const {
    const int zero = ptx::fresh(0);
    auto* memory = reinterpret_cast<std::uint8_t*>(&outlier_memory) + zero;
    return {rule, *reinterpret_cast<typename Outliers::Memory*>(memory), lane + zero};
  }
  /// The queries of a block, for the outliers of its keys.
  INNERKV_DEVICE void take_outlier_queries(int block) const {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(block) * request.rows;
    outliers().take_queries(prepared.stored,
                            [&](int r) { return at + __shfl_sync(kFullMask, row[r / 4], r % 4); });
  }
  INNERKV_DEVICE void add_key_outliers(int stored, float (&scores)[K::kUnits][NT]) const {
    outliers().key_sums(stored);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float sums[K::kUnits];
      load_floats<K>(outlier_memory.tokens[4 * n + t], sums);
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) scores[unit][n] += sums[unit];
    }
  }
  /// In the places that this lane has read.
  INNERKV_DEVICE void give_probabilities(const float (&p)[K::kUnits][NT]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int unit = 0; unit < K::kUnits; unit += K::kVector) {
        Several<float, K::kVector> several;
#pragma unroll
        for (int i = 0; i < K::kVector; ++i) several.x[i] = p[unit + i][n];
        *reinterpret_cast<Several<float, K::kVector>*>(outlier_memory.tokens[4 * n + t] + K::lane_row(g) +
                                                       K::unit_row(unit)) = several;
      }
  }
  INNERKV_DEVICE void add_value_outliers(const PageArgs& page, int stored, const float (&part)[NT]) {
    const float worth = outliers().value_sums(page, stored);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      std::int32_t* sums = outlier_memory.sums[4 * n + t] + V::lane_row(g);
#pragma unroll
      for (int unit = 0; unit < V::kUnits; unit += V::kVector) {
        auto& several = *reinterpret_cast<Several<std::int32_t, V::kVector>*>(sums + V::unit_row(unit));
#pragma unroll
        for (int i = 0; i < V::kVector; ++i)
          out[unit + i][n] = fmaf(static_cast<float>(several.x[i]), worth * part[n], out[unit + i][n]);
        several = {};
      }
    }
  }

  /// Softcap, masks, logits.
  INNERKV_DEVICE void finish_scores(const PageArgs& page, int position, int stored,
                                    float (&scores)[K::kUnits][NT]) const {
    // Slots count from this lane's first, so that a unit's is a constant.
    const int mine = K::lane_row(g);
    const std::uint64_t removed = page.removed[0], removed_late = page.removed[1],
                        gone = removed >> mine | (mine > 0 ? removed_late << (64 - mine) : 0),
                        gone_late = removed_late >> mine;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int first = first_visible(end[n]) - position, past = end[n] - position;
      const bool whole = stored == kPageTokens && first <= 0 && past >= kPageTokens &&
                         !(removed | removed_late) && !request.logits && !(rule.softcap > 0);
      if (whole) continue;
      float* logits =
          request.logits && 4 * n + t < task.rows
              ? request.logits + static_cast<std::ptrdiff_t>(row[n]) * head.tokens + position + mine
              : nullptr;
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        const int slot = K::unit_row(unit);
        float& x = scores[unit][n];
        if (rule.softcap > 0) x = softcap * tanhf(x * inverse_softcap);
        if (slot < first - mine || slot >= past - mine || slot >= stored - mine ||
            ((slot < 64 ? gone : gone_late) >> (slot % 64) & 1u))
          x = no_score();
        if (logits && slot < stored - mine) logits[slot] = x * kLn2;
      }
    }
  }

  /// Maximum over the lanes of one column.
  static INNERKV_DEVICE float column_max(float x) {
#pragma unroll
    for (int h = 4; h <= 16; h *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, h));
    return x;
  }

  /// Scores become probabilities relative to the page's largest, `part[n]` of which counts; the state and the
  /// output so far are brought to the new maximum.
  INNERKV_DEVICE void softmax(float (&scores)[K::kUnits][NT], float (&part)[NT]) {
    float rescale[NT];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float page_largest = no_score();
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) page_largest = fmaxf(page_largest, scores[unit][n]);
      page_largest = column_max(page_largest);
      const float before = largest[n], now = fmaxf(before, page_largest);
      const bool nothing = page_largest == no_score();
      rescale[n] = before == now || before == no_score() ? 1.0f : ptx::ex2(before - now);
      moved |= rescale[n] != 1.0f;
      part[n] = nothing ? 0.0f : ptx::ex2(page_largest - now);
      const float base = nothing ? 0.0f : page_largest;
      float page_sum = 0.0f;
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        scores[unit][n] = ptx::ex2(scores[unit][n] - base);
        page_sum += scores[unit][n];
      }
      sum[n] = fmaf(page_sum, part[n], sum[n] * rescale[n]);
      largest[n] = now;
    }
    if (!__any_sync(kFullMask, moved)) return;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) out[unit][n] *= rescale[n];
  }

  /// sum += the integers of 32 tokens: a product with ones.
  static INNERKV_DEVICE void add_total(std::int32_t (&total)[4], const std::uint32_t (&b)[2]) {
    const std::uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    ptx::mma_m16n8k32<std::uint8_t, typename Weights::Byte>(total, ones, b, total);
  }

  /// Probabilities times the scales of their tokens' values, as integers that `factor` undoes.
  INNERKV_DEVICE void weigh(const std::uint16_t* scales, const float (&p)[K::kUnits][NT],
                            const float (&part)[NT], Weights (&weights)[NT], float (&factor)[NT]) const {
    float scale[K::kUnits];  // of slots that hold nothing: finite, and their p is 0
    load_units<K>(scales, g, scale);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float w[K::kUnits], heaviest = 0.0f;
#pragma unroll
      for (int unit = 0; unit < K::kUnits; ++unit) {
        w[unit] = p[unit][n] * scale[unit];
        heaviest = fmaxf(heaviest, fabsf(w[unit]));
      }
      heaviest = column_max(heaviest);
      const bool tiny = !(heaviest > kTiny);
      factor[n] = tiny ? 0.0f : part[n] * heaviest * (1.0f / Weights::kLargest);
      weights[n].pack(g, tiny ? 0.0f : Weights::kLargest * ptx::rcp(heaviest),
                      [&](int unit) { return w[unit]; });
    }
  }

  /// Values with one scale per token.
  INNERKV_DEVICE void add_token_values(const PageArgs& page, const float (&p)[K::kUnits][NT],
                                       const float (&part)[NT]) {
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.v);
    Weights weights[NT];
    float factor[NT];
    weigh(reinterpret_cast<const std::uint16_t*>(page.v + kScalesAtV), p, part, weights, factor);
    std::int32_t sums[V::kTiles][NT][4] = {}, total[NT][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      V low, high;
      low.load(base, 8 * s + t, g);
      high.load(base, 8 * s + 4 + t, g);
      std::uint32_t b[NT][2], a[4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        weights[n].operand(s, g, t, b[n]);
        add_total(total[n], b[n]);
      }
#pragma unroll
      for (int tile = 0; tile < V::kTiles; ++tile) {
        load_tile(a, low, high, tile);
#pragma unroll
        for (int n = 0; n < NT; ++n)
          ptx::mma_m16n8k32<std::uint8_t, typename Weights::Byte>(sums[tile][n], a, b[n], sums[tile][n]);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const auto all = static_cast<std::int32_t>(joined(total[n]));
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) {
        const float twice =
            twice_centred(sums[unit / 2][n] + 2 * (unit % 2), (1 << kBitsV) - 1, all, V::shift(unit));
        out[unit][n] = fmaf(twice, 0.5f * factor[n] * unshifted(V::shift(unit)), out[unit][n]);
      }
    }
  }

  /// Values with a scale per token and 32 channels: weights of their own for every group. A loop, or else the
  /// groups' loads would be interleaved until registers spill; so the outputs move on from group to group.
  INNERKV_DEVICE void add_channel_values(const PageArgs& page, const float (&p)[K::kUnits][NT],
                                         const float (&part)[NT]) {
    static_assert(!kChannelGroups || V::kVector == 4);  // a group is four units: a vector of words, a class
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.v);
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page.v + kScalesAtV);
    constexpr int kVectors = V::kX / 32;
#pragma unroll 1
    for (int group = 0; group < D / 32; ++group) {
      Weights weights[NT];
      float factor[NT];
      weigh(scales + group * kPageTokens, p, part, weights, factor);
      std::int32_t sums[2][NT][4] = {}, total[NT][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        V low, high;
        low.load(base + 32 * (group % kVectors), 8 * s + t, g, 0, 4);
        high.load(base + 32 * (group % kVectors), 8 * s + 4 + t, g, 0, 4);
        low.drop_classes(group / kVectors);
        high.drop_classes(group / kVectors);
        std::uint32_t b[NT][2], a[4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          weights[n].operand(s, g, t, b[n]);
          add_total(total[n], b[n]);
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          load_tile(a, low, high, tile);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            ptx::mma_m16n8k32<std::uint8_t, typename Weights::Byte>(sums[tile][n], a, b[n], sums[tile][n]);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const auto all = static_cast<std::int32_t>(joined(total[n]));
        float done[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          done[i] = fmaf(twice_centred(sums[i / 2][n] + 2 * (i % 2), 1 << kBitsV, all, 0), 0.5f * factor[n],
                         out[i][n]);
#pragma unroll
        for (int unit = 0; unit < V::kUnits; ++unit)
          out[unit][n] = unit + 4 < V::kUnits ? out[unit + 4][n] : done[unit + 4 - V::kUnits];
      }
    }
  }

  /// What the hybrid scales of the page's values mean, into shared memory. Zero points lie in the order of
  /// sub-blocks and channels, one for every scale with a sign bit.
  INNERKV_DEVICE void read_hybrid(const PageArgs& page, int stored) const {
    constexpr int kEach = D / 32;  // neighbouring channels of this lane
    const auto* scales = reinterpret_cast<const std::uint16_t*>(page.v + kScalesAtV);
    std::uint32_t pairs[4][kEach / 2];
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int j = 0; j < kEach / 2; ++j)
        pairs[s][j] =
            32 * s < stored ? reinterpret_cast<const std::uint32_t*>(scales + s * D + kEach * lane)[j] : 0u;
    const unsigned before_me = (1u << lane) - 1u;
    int before = 0;
    __syncwarp();  // the last page has been read
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      int rank = before;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const unsigned asymmetric = __ballot_sync(kFullMask, pairs[s][j / 2] >> (16 * (j % 2) + 15) & 1u);
        rank += __popc(asymmetric & before_me);
        before += __popc(asymmetric);
      }
      Several<float, kEach> size, offset;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int shift = V::shift(V::kWords * ((kEach * lane + j) / V::kX));
        const std::uint32_t bits = pairs[s][j / 2] >> (16 * (j % 2));
        const float magnitude = ptx::float_of(static_cast<std::uint16_t>(bits & 0x7fffu));
        size.x[j] = magnitude * __int_as_float((127 - shift) << 23);
        offset.x[j] = -static_cast<float>(1 << (kBitsV - 1)) * magnitude;
        if (bits >> 15 & 1u) {
          offset.x[j] = ptx::float_of(page.v_zeros[rank / kZeroExtent][rank % kZeroExtent]);
          ++rank;
        }
      }
      reinterpret_cast<Several<float, kEach>*>(hybrid->size[s])[lane] = size;
      reinterpret_cast<Several<float, kEach>*>(hybrid->offset[s])[lane] = offset;
    }
    __syncwarp();
  }

  /// Values with a scale per channel and 32 tokens.
  INNERKV_DEVICE void add_block_values(const PageArgs& page, const float (&p)[K::kUnits][NT],
                                       const float (&part)[NT]) {
    const auto* base = reinterpret_cast<const std::uint32_t*>(page.v);
    [[maybe_unused]] const auto* scales = reinterpret_cast<const std::uint16_t*>(page.v + kScalesAtV);
    Weights weights[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n)  // the largest p is 1
      weights[n].pack(g, Weights::kLargest, [&](int unit) { return p[unit][n]; });
    float sums[V::kUnits][NT] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {  // of empty sub-blocks the weights are 0
      V low, high;
      low.load(base, 8 * s + t, g);
      high.load(base, 8 * s + 4 + t, g);
      float scale[V::kUnits], offset[V::kUnits];
      if constexpr (kHybrid) {
        load_floats<V>(hybrid->size[s], scale);
        load_floats<V>(hybrid->offset[s], offset);
      } else {
        load_units<V>(scales + s * D, g, scale);
      }
      std::uint32_t b[NT][2], a[4];
      std::int32_t all[NT], start[4] = {}, products[4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        std::int32_t total[4] = {};
        weights[n].operand(s, g, t, b[n]);
        add_total(total, b[n]);
        all[n] = static_cast<std::int32_t>(joined(total));
      }
#pragma unroll
      for (int tile = 0; tile < V::kTiles; ++tile) {
        load_tile(a, low, high, tile);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if constexpr (!kHybrid) start_centred<V>(start, kBitsV, all[n], tile);
          ptx::mma_m16n8k32<std::uint8_t, typename Weights::Byte>(products, a, b[n], start);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int unit = 2 * tile + i;
            float& x = sums[unit][n];
            x = fmaf(product_sum(products + 2 * i), scale[unit], x);
            if constexpr (kHybrid) x = fmaf(static_cast<float>(all[n]), offset[unit], x);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) {
        const float factor = part[n] * (1.0f / Weights::kLargest);
        out[unit][n] =
            fmaf(sums[unit][n], factor * (kHybrid ? 1.0f : unshifted(V::shift(unit))), out[unit][n]);
      }
  }
  /// The numbers of this lane's rows, one a unit, from shared memory.
  template <class Matrix>
  INNERKV_DEVICE void load_floats(const float* from, float (&to)[Matrix::kUnits]) const {
    constexpr int kVector = Matrix::kVector;
#pragma unroll
    for (int unit = 0; unit < Matrix::kUnits; unit += kVector) {
      const auto several = *reinterpret_cast<const Several<float, kVector>*>(from + Matrix::lane_row(g) +
                                                                             Matrix::unit_row(unit));
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[unit + i] = several.x[i];
    }
  }

  INNERKV_DEVICE void hide_logits(int position, int stored) const {
    if (!request.logits) return;
    for (int r = 0; r < task.rows; ++r)
#pragma unroll 1
      for (int i = lane; i < stored; i += 32)
        request.logits[static_cast<std::ptrdiff_t>(row_of(r / 4, r % 4)) * head.tokens + position + i] =
            no_score();
  }

  INNERKV_DEVICE void run() {
    softcap = kLog2e * rule.softcap;
    inverse_softcap = rule.softcap > 0 ? kLn2 / rule.softcap : 0.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      q_row[n] = row_of(n, g / 2);
      row[n] = row_of(n, t);
      end[n] = end_visible(task_row(n, t));
      largest[n] = no_score();
      sum[n] = 0.0f;
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit) out[unit][n] = 0.0f;
    }
    const int any_end = end_visible(task.rows - 1), any_first = first_visible(end_visible(0));
    const int block_pages = rule.block_tokens / kPageTokens;
    int block = block_pages > 0 ? task.first_tile / block_pages : 0,
        page_in_block = block_pages > 0 ? task.first_tile % block_pages : 0;
    for (int tile = task.first_tile; tile < task.end_tile; ++tile) {
      const int first = tile * kPageTokens, position = head.sink + first;
      const int stored = clamp_int(head.v_quantised - first, 0, kPageTokens), block_now = block;
      if constexpr (kOutliers) {
        const bool fresh = tile == task.first_tile || (block_pages > 0 && page_in_block == 0);
        if (fresh && rule.k.outliers > 0) take_outlier_queries(block_now);
      }
      if (++page_in_block == block_pages) {
        page_in_block = 0;
        ++block;
      }
      const PageArgs page = head.pages[tile];
      if (!page.k || position >= any_end || position + stored <= any_first) {
        hide_logits(position, stored);
        continue;
      }
      if constexpr (kHybrid) read_hybrid(page, stored);
      float scores[K::kUnits][NT], part[NT];
      if constexpr (kOutliers) {
        outliers().fetch(page.k + kLayoutK.outliers_at(), page.v + kLayoutV.outliers_at());
      }
      scores_of(page, block_now, scores);
      if constexpr (kOutliers) {
        outliers().arrive();
        if (rule.k.outliers > 0) add_key_outliers(stored, scores);
      }
      finish_scores(page, position, stored, scores);
      softmax(scores, part);
      if constexpr (kOutliers) {
        if (rule.v.outliers > 0) give_probabilities(scores);
      }
      if constexpr (kBlocks)
        add_block_values(page, scores, part);
      else if constexpr (kChannelGroups)
        add_channel_values(page, scores, part);
      else
        add_token_values(page, scores, part);
      if constexpr (kOutliers)
        if (rule.v.outliers > 0) add_value_outliers(page, stored, part);
    }
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(task.split) * request.rows;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 4; h <= 16; h *= 2) sum[n] += __shfl_xor_sync(kFullMask, sum[n], h);
      if (4 * n + t >= task.rows) continue;
      const std::ptrdiff_t to = at + row[n];
      if (g == 0) request.state[to] = {largest[n], sum[n]};
#pragma unroll
      for (int unit = 0; unit < V::kUnits; ++unit)
        (request.partial + to * D + V::lane_row(g))[V::unit_row(unit)] = out[unit][n];
    }
  }
};

/// Blocks a multiprocessor, which bound registers: 12 warps or 8, else ptxas spills some to make room for
/// more. 0 leaves it to ptxas, which spills none then where values lie in sub-blocks.
constexpr int least_blocks(Scales values, int head_dim, int n_tiles) {
  const bool hybrid = values == Scales::kTokens32Hybrid;
  if ((hybrid || values == Scales::kTokens32) && !(hybrid && head_dim == 64 && n_tiles > 1)) return 0;
  return n_tiles > 1 ? 2 : 3;
}

/// Grid: ceil(tasks / 4); 128 threads. With outliers: dynamic shared memory, see outlier_bytes().
template <Scales kScalesK, int kBitsK, Scales kScalesV, int kBitsV, int D, int NT, bool kOutliers>
INNERKV_KERNEL(32 * kMmaWarps, least_blocks(kScalesV, D, NT))
void attend_mma(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads,
                const PreparedArgs* prepared, const TaskArgs* tasks, int count) {
  constexpr bool kHybrid = kScalesV == Scales::kTokens32Hybrid;
  using Hybrid = std::conditional_t<kHybrid, HybridScales<D>, char>;
  INNERKV_SHARED(Hybrid, hybrid, [kMmaWarps]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            index = static_cast<int>(blockIdx.x) * kMmaWarps + warp;
  if (index >= count) return;
  const TaskArgs& task = tasks[index];
  using Attention = MmaAttention<kScalesK, kBitsK, kScalesV, kBitsV, D, NT, kOutliers>;
  const auto run = [&](typename Attention::OutlierShared& outlier_memory) {
    Attention attention{rule,
                        requests[task.request],
                        heads[task.request * rule.kv_heads + task.kv_head],
                        prepared[task.request],
                        task,
                        lane,
                        lane / 4,
                        lane % 4,
                        nullptr,
                        outlier_memory,
                        0.0f,
                        0.0f,
                        {},
                        {},
                        {},
                        {},
                        {},
                        {}};
    if constexpr (kHybrid) attention.hybrid = &hybrid[warp];
    if constexpr (kOutliers) attention.outliers().clear();
    attention.run();
  };
  if constexpr (kOutliers) {
    auto* memory = dynamic_shared<std::uint8_t>() + warp * outlier_bytes<D, 4 * NT>(rule);
    run(*reinterpret_cast<OutlierMemory<D, 4 * NT>*>(memory));
  } else {
    char none{};
    run(none);
  }
}

}  // namespace innerkv::gpu
