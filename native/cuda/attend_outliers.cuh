// Outliers in attend_mma: what the sparse rows of a page add to scores and to the output (docs/format.md
// section 8).
//
// - Shape: the warp of the task, around its products with the dense codes. A lane has the tokens lane, lane +
//   32, lane + 64 and lane + 96 with all of their entries, for all query rows of the task.
// - Reads: the page's two sections once, by cp.async that travels during the dense products; float32 queries
//   of prepare.cuh, once per block of keys.
// - Keys: float32 sums in the order of the entries, to the lanes that hold the scores through shared memory.
// - Values: tokens meet in channels by chance, and float32 sums would depend on who comes first. So a page's
//   sums are integers: products of probability and outlier in units of the largest outlier / kUnits, added by
//   shared atomics, brought to the output page by page.
// - Limits: a channel has at most 128 entries in a page, one per token, so that sums stay below 2^31.
#pragma once

#include "attend.cuh"
#include "attend_mma.h"
#include "ptx.h"

namespace innerkv::gpu {

/// Shared memory of a warp; the sections of the page's keys and values follow it.
template <int D, int kRows>
struct OutlierMemory {
  static constexpr int kPad = 8;  // four rows meet different banks
  alignas(16) float q[D][kRows];
  alignas(16) float tokens[kRows][kPageTokens + kPad];  // of the scores, then probabilities
  alignas(16) std::int32_t sums[kRows][D + kPad];
};

/// Bytes of shared memory that a warp needs.
template <int D, int kRows>
INNERKV_HD int outlier_bytes(const AttendRule& rule) {
  return static_cast<int>(sizeof(OutlierMemory<D, kRows>)) + rule.k_outliers.bytes + rule.v_outliers.bytes;
}

template <int D, int kRows>
struct OutlierPart {
  using Memory = OutlierMemory<D, kRows>;
  static constexpr int kTokens = kPageTokens / 32;  // of a lane
  /// Steps of a product of a probability with an outlier. A float between 2^23 and 2^24 has them as its low
  /// bits.
  static constexpr float kUnits = 4194048.0f, kInteger = 12582912.0f;  // 2^22 - 256 and 1.5 * 2^23

  const AttendRule& rule;
  Memory& s;
  int lane;

  INNERKV_DEVICE std::uint8_t* k_section() const {
    return reinterpret_cast<std::uint8_t*>(&s) + sizeof(Memory);
  }
  INNERKV_DEVICE std::uint8_t* v_section() const { return k_section() + rule.k_outliers.bytes; }

  INNERKV_DEVICE void clear() const {
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < D; c += 32) s.sums[r][c + lane] = 0;
  }

  /// Sends for the sections of a page. Those of the last one were read before a __syncwarp() of key_sums() or
  /// value_sums(), and the last block's queries, too.
  INNERKV_DEVICE void fetch(const std::uint8_t* k_there, const std::uint8_t* v_there) const {
    const int k_bytes = rule.k_outliers.bytes, bytes = k_bytes + rule.v_outliers.bytes;
#pragma unroll 1
    for (int i = 16 * lane; i < bytes; i += 16 * 32)
      ptx::cp_async_16(k_section() + i, i < k_bytes ? k_there + i : v_there + (i - k_bytes));
    ptx::cp_async_commit();
  }
  INNERKV_DEVICE void arrive() const {
    ptx::cp_async_wait_group<0>();
    __syncwarp();
  }

  /// The queries of a block; `row_of(r)`: where row r of the task lies among the prepared ones.
  template <class RowOf>
  INNERKV_DEVICE void take_queries(const float* prepared, RowOf row_of) const {
    const float4* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = reinterpret_cast<const float4*>(prepared + row_of(r) * D);
#pragma unroll 1
    for (int quad = lane; quad < D / 4; quad += 32)
#pragma unroll
      for (int first = 0; first < kRows; first += 4) {
        const float4 a = rows[first][quad], b = rows[first + 1][quad], c = rows[first + 2][quad],
                     d = rows[first + 3][quad];
        const auto put = [&](int channel, float4 numbers) {
          *reinterpret_cast<float4*>(&s.q[4 * quad + channel][first]) = numbers;
        };
        put(0, make_float4(a.x, b.x, c.x, d.x));
        put(1, make_float4(a.y, b.y, c.y, d.y));
        put(2, make_float4(a.z, b.z, c.z, d.z));
        put(3, make_float4(a.w, b.w, c.w, d.w));
      }
  }

  /// One entry of each of this lane's tokens; 0 for a token that has no more.
  struct Entries {
    int channel[kTokens];
    float value[kTokens];
  };
  /// Entries of this lane's tokens, and how many the one with the most has.
  struct Rows {
    const std::uint8_t* channels;
    const std::uint16_t* values;
    int begin[kTokens], end[kTokens], most;

    INNERKV_DEVICE Entries entries(int e) const {
      Entries of;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const bool any = begin[i] + e < end[i];
        const int at = any ? begin[i] + e : 0;
        const float value = ptx::float_of(values[at]);
        of.channel[i] = channels[at];
        of.value[i] = any ? value : 0.0f;
      }
      return of;
    }
  };
  /// The same where all tokens have as many.
  struct RegularRows {
    const std::uint8_t* channels;  // of this lane's first token
    const std::uint16_t* values;
    int most;

    INNERKV_DEVICE Entries entries(int e) const {
      Entries of;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        of.channel[i] = channels[32 * i * most + e];
        of.value[i] = ptx::float_of(values[32 * i * most + e]);
      }
      return of;
    }
  };

  /// Whether the row starts of a full page are those of rows of `each` entries. Starts of 8 bits: 1 entry.
  INNERKV_DEVICE bool regular(const std::uint8_t* section, const OutlierRule& of, int each) const {
    bool good;  // of this lane's tokens, 4 lane to 4 lane + 3, and the end of the last one
    if (of.wide) {
      const uint2 four = *reinterpret_cast<const uint2*>(section + 8 * lane);
      const auto two = static_cast<unsigned>(each * (4 * lane * 0x10001 + 0x10000));
      good = four.x == two && four.y == two + static_cast<unsigned>(each) * 0x20002u &&
             reinterpret_cast<const std::uint16_t*>(section)[kPageTokens] == kPageTokens * each;
    } else {
      good = *reinterpret_cast<const unsigned*>(section + 4 * lane) ==
                 0x03020100u + 0x04040404u * static_cast<unsigned>(lane) &&
             section[kPageTokens] == kPageTokens;
    }
    return __all_sync(kFullMask, good);
  }

  /// Calls `use` with the rows of the tokens that are `there`, `all` of them or not.
  template <class There, class Use>
  INNERKV_DEVICE void with_rows(const std::uint8_t* section, const OutlierRule& of, int each, bool all,
                                There there, Use use) const {
    const std::uint8_t* channels = section + of.channels_at;
    const auto* values = reinterpret_cast<const std::uint16_t*>(section + of.values_at);
    if (all && regular(section, of, each))
      return use(RegularRows{channels + lane * each, values + lane * each, each});
    Rows rows{channels, values, {}, {}, 0};
    const auto* wide_starts = reinterpret_cast<const std::uint16_t*>(section);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int slot = 32 * i + lane;
      rows.begin[i] = of.wide ? wide_starts[slot] : section[slot];
      rows.end[i] = of.wide ? wide_starts[slot + 1] : section[slot + 1];
      if (!there(i)) rows.end[i] = 0;
      rows.most = max(rows.most, rows.end[i] - rows.begin[i]);
    }
    use(rows);
  }

  /// What the keys' outliers add to the scores, into s.tokens.
  INNERKV_DEVICE void key_sums(int stored) const {
    with_rows(
        k_section(), rule.k_outliers, rule.k.outliers, stored == kPageTokens,
        [&](int i) { return 32 * i + lane < stored; },
        [&](const auto& rows) {
          float sums[kTokens][kRows] = {};
#pragma unroll 1
          for (int e = 0; e < rows.most; ++e) {
            const Entries of = rows.entries(e);
#pragma unroll
            for (int i = 0; i < kTokens; ++i)
#pragma unroll
              for (int first = 0; first < kRows; first += 4) {
                const float4 q = *reinterpret_cast<const float4*>(&s.q[of.channel[i]][first]);
                sums[i][first] = fmaf(q.x, of.value[i], sums[i][first]);
                sums[i][first + 1] = fmaf(q.y, of.value[i], sums[i][first + 1]);
                sums[i][first + 2] = fmaf(q.z, of.value[i], sums[i][first + 2]);
                sums[i][first + 3] = fmaf(q.w, of.value[i], sums[i][first + 3]);
              }
          }
#pragma unroll
          for (int i = 0; i < kTokens; ++i)
#pragma unroll
            for (int r = 0; r < kRows; ++r) s.tokens[r][32 * i + lane] = sums[i][r];
        });
    __syncwarp();
  }

  /// Adds the probabilities in s.tokens times outliers to s.sums; returns what a unit of these is worth.
  INNERKV_DEVICE float value_sums(const PageArgs& page, int stored) const {
    float largest = 0.0f;
    with_rows(
        v_section(), rule.v_outliers, rule.v.outliers,
        stored == kPageTokens && !(page.removed[0] | page.removed[1]),
        [&](int i) {  // the unit depends on tokens that are there only
          const auto removed = static_cast<std::uint32_t>(page.removed[i / 2] >> (32 * (i % 2)));
          return 32 * i + lane < stored && !(removed >> lane & 1u);
        },
        [&](const auto& rows) {
          const auto measure = [&](const Entries& of) {
#pragma unroll
            for (int i = 0; i < kTokens; ++i) largest = fmaxf(largest, fabsf(of.value[i]));
          };
          const Entries firsts = rows.entries(0);
          measure(firsts);
#pragma unroll 1
          for (int e = 1; e < rows.most; ++e) measure(rows.entries(e));
          largest = __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest)));
          const float inverse = largest > 0.0f ? kUnits * ptx::rcp(largest) : 0.0f;
          __syncwarp();  // the probabilities have been written
          add_products(firsts, inverse);
#pragma unroll 1
          for (int e = 1; e < rows.most; ++e) add_products(rows.entries(e), inverse);
        });
    __syncwarp();
    return largest * (1.0f / kUnits);
  }
  INNERKV_DEVICE void add_products(const Entries& of, float inverse) const {
#pragma unroll
    for (int first = 0; first < kRows; first += 4) {
      float p[kTokens][4];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) p[i][r] = s.tokens[first + r][32 * i + lane];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          atomicAdd(
              &s.sums[first + r][of.channel[i]],
              __float_as_int(fmaf(p[i][r], of.value[i] * inverse, kInteger)) - __float_as_int(kInteger));
    }
  }
};

}  // namespace innerkv::gpu
