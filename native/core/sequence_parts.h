// What the parts of Sequence share.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "sequence.h"

namespace innerkv {

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// The extents that a page's zero points leave empty go back to the pool. Were there any?
inline bool give_back_extents(Page& page) {
  const std::size_t held = page.k_zeros.size() + page.v_zeros.size();
  page.k_zeros.resize(at(ceil_div(page.k_zero_count, kZeroExtent)));
  page.v_zeros.resize(at(ceil_div(page.v_zero_count, kZeroExtent)));
  return page.k_zeros.size() + page.v_zeros.size() != held;
}

/// k and v of one item in device memory as binary16.
struct StagedTokens {
  const std::uint16_t *k = nullptr, *v = nullptr;
};

/// The numbers of all items, until the next call; none for an item without tokens. Throws NotFinite.
std::vector<StagedTokens> stage(Cache& cache, std::span<const AppendItem> items);

}  // namespace innerkv
