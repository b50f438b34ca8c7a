// sum32 of docs/format.md section 4: the one order in which reductions that decide stored bits are added.
//
// 32 accumulators, element i into accumulator i mod 32, then a binary tree: what one warp does with 32 lanes
// and five exchanges, and what a CPU does with vectors of any width that divides 32.
#pragma once

#include "../platform.h"

namespace innerkv {

inline constexpr int kSumLanes = 32;

/// Adds up 32 accumulators in place and returns the total.
INNERKV_HD float sum_tree(float* lanes) {
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

/// sum32 of term(0) ... term(count - 1). Sixteen terms a step so that a compiler can use vectors of up to
/// that width.
template <class Term>
INNERKV_HD float ordered_sum(int count, Term term) {
  float lanes[kSumLanes] = {};
  int first = 0;
  for (; first + 16 <= count; first += 16) {
    float* part = lanes + first % kSumLanes;
    for (int i = 0; i < 16; ++i) part[i] += term(first + i);
  }
  for (; first < count; ++first) lanes[first % kSumLanes] += term(first);
  return sum_tree(lanes);
}

}  // namespace innerkv
