// Outliers: which numbers of a token they are, and their rows in a page, compressed sparse rows.
// docs/format.md section 8.
//
// Bytes: row starts (rows + 1, 8 or 16 bits each), channels (8 bits), values (binary16).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../numerics/half.h"
#include "../platform.h"
#include "spec.h"

namespace innerkv {

struct OutlierLayout {
  int capacity = 0;  // entries
  int rows = kPageTokens;

  constexpr INNERKV_HD int start_bytes() const { return capacity <= 255 ? 1 : 2; }
  constexpr INNERKV_HD std::size_t indices_at() const {
    return static_cast<std::size_t>(start_bytes() * (rows + 1));
  }
  constexpr INNERKV_HD std::size_t values_at() const {
    return (indices_at() + static_cast<std::size_t>(capacity) + 1) / 2 * 2;
  }  // values are 2-byte aligned
  /// Without what aligns values and the end of the section.
  constexpr INNERKV_HD std::size_t payload_bytes() const {
    return indices_at() + std::size_t{3} * static_cast<std::size_t>(capacity);
  }
  constexpr INNERKV_HD std::size_t bytes() const {
    return align_section(values_at() + std::size_t{2} * static_cast<std::size_t>(capacity));
  }
};

INNERKV_HD int outlier_start(const std::uint8_t* section, const OutlierLayout& layout, int row) {
  if (layout.start_bytes() == 1) return section[row];
  return section[2 * row] | section[2 * row + 1] << 8;
}

INNERKV_HD void put_outlier_start(std::uint8_t* section, const OutlierLayout& layout, int row, int start) {
  if (layout.start_bytes() == 1) {
    section[row] = static_cast<std::uint8_t>(start);
  } else {
    section[2 * row] = static_cast<std::uint8_t>(start);
    section[2 * row + 1] = static_cast<std::uint8_t>(start >> 8);
  }
}

struct Outlier {
  int index;
  std::uint16_t value;  // binary16 bits
};

INNERKV_HD Outlier outlier_at(const std::uint8_t* section, const OutlierLayout& layout, int entry) {
  const std::uint8_t* value = section + layout.values_at() + 2 * entry;
  return {section[layout.indices_at() + static_cast<std::size_t>(entry)],
          static_cast<std::uint16_t>(value[0] | value[1] << 8)};
}

INNERKV_HD void put_outlier(std::uint8_t* section, const OutlierLayout& layout, int entry,
                            const Outlier& outlier) {
  std::uint8_t* value = section + layout.values_at() + 2 * entry;
  section[layout.indices_at() + static_cast<std::size_t>(entry)] = static_cast<std::uint8_t>(outlier.index);
  value[0] = static_cast<std::uint8_t>(outlier.value);
  value[1] = static_cast<std::uint8_t>(outlier.value >> 8);
}

/// Writes row `row`, entries first ... first + count - 1 of the section, and no other row's bytes.
INNERKV_HD void put_outlier_row(std::uint8_t* section, const OutlierLayout& layout, int row, int first,
                                const Outlier* entries, int count) {
  if (row == 0) put_outlier_start(section, layout, 0, 0);
  for (int i = 0; i < count; ++i) put_outlier(section, layout, first + i, entries[i]);
  put_outlier_start(section, layout, row + 1, first + count);
}

/// Whether `rows_used` rows read from an untrusted section obey the layout: no entry outside the section, no
/// channel outside the row, channels ascending, values finite.
inline bool outliers_valid(const std::uint8_t* section, const OutlierLayout& layout, int rows_used,
                           int row_length) {
  if (rows_used < 0 || rows_used > layout.rows) return false;
  if (rows_used > 0 && outlier_start(section, layout, 0) != 0) return false;
  for (int row = 0; row < rows_used; ++row) {
    const int begin = outlier_start(section, layout, row), end = outlier_start(section, layout, row + 1);
    if (begin > end || end > layout.capacity) return false;
    for (int entry = begin; entry < end; ++entry) {
      const Outlier outlier = outlier_at(section, layout, entry);
      if (outlier.index >= row_length || !half_is_finite(outlier.value) ||
          (entry > begin && outlier.index <= outlier_at(section, layout, entry - 1).index))
        return false;
    }
  }
  return true;
}

/// What was taken out of a token before it was quantised, ascending by channel.
struct TakenOutliers {
  std::uint8_t channel[kMaxOutliers];
  float x[kMaxOutliers];
};

/// An outlier as it is quantised: drawn into [low, high], the range of its group's numbers that are no
/// outliers. Never -0.
INNERKV_HD float drawn_in(float x, float low, float high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  return x + 0.0f;
}

/// The stored value of an outlier: what its quantised self lacks. Never -0.
INNERKV_HD std::uint16_t outlier_value(float x, float decoded) { return half_bits((x - decoded) + 0.0f); }

/// Takes the `count` numbers of largest magnitude, ties to the lower channel, out of a token x [head_dim]
/// whose groups have `group` channels, the last perhaps fewer, but more than `count`.
INNERKV_HD void take_outliers(float* x, int head_dim, int group, int count, TakenOutliers& taken) {
  constexpr int kLanes = 16;  // independent, so that compilers can make vectors of them
  constexpr float kHighest = 3.402823466e38f;
  float magnitude[kMaxHeadDim];  // -1: taken
  for (int c = 0; c < head_dim; ++c) magnitude[c] = x[c] < 0 ? -x[c] : x[c];
  for (int e = 0; e < count; ++e) {
    float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = magnitude[l];
    for (int c = kLanes; c < head_dim; c += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] = magnitude[c + l] > lanes[l] ? magnitude[c + l] : lanes[l];
    float largest = lanes[0];
    for (int l = 1; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
    int channel = 0;
    while (magnitude[channel] != largest) ++channel;
    magnitude[channel] = -1.0f;
  }
  for (int c = 0, e = 0; e < count; ++c) {
    if (magnitude[c] >= 0) continue;
    taken.channel[e] = static_cast<std::uint8_t>(c);
    taken.x[e++] = x[c];
  }
  int end = 0;
  float low[kLanes], high[kLanes];
  for (int e = 0; e < count; ++e) {
    if (taken.channel[e] >= end) {  // the range of the next group that has outliers
      const int begin = taken.channel[e] / group * group;
      end = begin + group < head_dim ? begin + group : head_dim;
      for (int l = 0; l < kLanes; ++l) {
        low[l] = kHighest;
        high[l] = -kHighest;
      }
      for (int c = begin; c < end; c += kLanes)
        for (int l = 0; l < kLanes; ++l) {
          const bool stays = magnitude[c + l] >= 0;
          const float least = stays ? x[c + l] : kHighest, most = stays ? x[c + l] : -kHighest;
          low[l] = least < low[l] ? least : low[l];
          high[l] = most > high[l] ? most : high[l];
        }
      for (int l = 1; l < kLanes; ++l) {
        low[0] = low[l] < low[0] ? low[l] : low[0];
        high[0] = high[l] > high[0] ? high[l] : high[0];
      }
    }
    x[taken.channel[e]] = drawn_in(taken.x[e], low[0], high[0]);
  }
}

}  // namespace innerkv
