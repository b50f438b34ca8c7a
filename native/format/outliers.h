// Outlier rows of a page in compressed sparse rows. docs/format.md section 8.
//
// Bytes: row starts (rows + 1, 8 or 16 bits each), indices (8 bits), values (binary16). Rows are appended in
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "page.h"

namespace innerkv {

struct OutlierLayout {
  int capacity = 0;  // entries
  int rows = kPageTokens;

  constexpr int start_bytes() const { return capacity <= 255 ? 1 : 2; }
  constexpr std::size_t indices_at() const { return static_cast<std::size_t>(start_bytes()) * (rows + 1); }
  constexpr std::size_t values_at() const {
    return (indices_at() + capacity + 1) / 2 * 2;
  }  // values are 2-byte aligned
  constexpr std::size_t bytes() const { return align_section(values_at() + std::size_t{2} * capacity); }
};

inline int outlier_start(const std::uint8_t* section, const OutlierLayout& layout, int row) {
  if (layout.start_bytes() == 1) return section[row];
  return section[2 * row] | section[2 * row + 1] << 8;
}

inline void set_outlier_start(std::uint8_t* section, const OutlierLayout& layout, int row, int start) {
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

inline Outlier outlier_at(const std::uint8_t* section, const OutlierLayout& layout, int entry) {
  std::uint16_t value;
  std::memcpy(&value, section + layout.values_at() + 2 * static_cast<std::size_t>(entry), sizeof value);
  return {section[layout.indices_at() + entry], value};
}

/// Writes row `row` after rows 0 ... row - 1. Returns false, changing nothing, when the entries do not fit or
/// the indices do not ascend within [0, row_length).
inline bool append_outlier_row(std::uint8_t* section, const OutlierLayout& layout, int row,
                               const Outlier* entries, int count, int row_length) {
  if (row < 0 || row >= layout.rows || count < 0) return false;
  const int first = row == 0 ? 0 : outlier_start(section, layout, row);
  if (count > layout.capacity - first) return false;
  for (int i = 0; i < count; ++i)
    if (entries[i].index < 0 || entries[i].index >= row_length ||
        (i > 0 && entries[i].index <= entries[i - 1].index))
      return false;
  if (row == 0) set_outlier_start(section, layout, 0, 0);
  for (int i = 0; i < count; ++i) {
    section[layout.indices_at() + first + i] = static_cast<std::uint8_t>(entries[i].index);
    std::memcpy(section + layout.values_at() + 2 * static_cast<std::size_t>(first + i), &entries[i].value, 2);
  }
  set_outlier_start(section, layout, row + 1, first + count);
  return true;
}

/// Whether `rows_used` rows read from an untrusted section obey the layout.
inline bool outliers_valid(const std::uint8_t* section, const OutlierLayout& layout, int rows_used,
                           int row_length) {
  if (rows_used < 0 || rows_used > layout.rows) return false;
  if (rows_used > 0 && outlier_start(section, layout, 0) != 0) return false;
  for (int row = 0; row < rows_used; ++row) {
    const int begin = outlier_start(section, layout, row), end = outlier_start(section, layout, row + 1);
    if (begin > end || end > layout.capacity) return false;
    for (int entry = begin; entry < end; ++entry) {
      const Outlier outlier = outlier_at(section, layout, entry);
      if (outlier.index >= row_length ||
          (entry > begin && outlier.index <= outlier_at(section, layout, entry - 1).index))
        return false;
    }
  }
  return true;
}

}  // namespace innerkv
