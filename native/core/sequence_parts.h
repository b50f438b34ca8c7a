// What the parts of Sequence share.
#pragma once

#include <cstddef>

#include "backend.h"

namespace innerkv {

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// The extents that a page's zero points leave empty go back to the pool.
inline void give_back_extents(Page& page) {
  page.k_zeros.resize(at(ceil_div(page.k_zero_count, kZeroExtent)));
  page.v_zeros.resize(at(ceil_div(page.v_zero_count, kZeroExtent)));
}

}  // namespace innerkv
