// What the kernels on 16-bit tensor cores share: numbers as pairs of binary16 in a word, and which positions
// a row of queries sees.
#pragma once

#include "attend.cuh"
#include "ptx.h"

namespace innerkv::gpu {

/// Two numbers rounded to binary16, the first in the low half.
INNERKV_DEVICE std::uint32_t pack_half(float first, float second) {
  return __builtin_bit_cast(std::uint32_t, static_cast<__half2_raw>(__floats2half2_rn(first, second)));
}
INNERKV_DEVICE float2 unpack_half(std::uint32_t word) {
  return __half22float2(__half2(__builtin_bit_cast(__half2_raw, word)));
}

/// A power of two that brings numbers up to `largest` into [2^13, 2^14), where neither they nor their
/// rounding errors are subnormal in binary16, and its inverse. Of zeros and tiny numbers: 2^126.
struct HalfScale {
  float factor, inverse;
};
INNERKV_DEVICE HalfScale half_scale(float largest) {
  const int exponent = static_cast<int>(__builtin_bit_cast(std::uint32_t, largest) >> 23 & 0xffu),
            e = exponent < 14 ? 14 : exponent;
  return {__int_as_float((267 - e) << 23), __int_as_float((e - 13) << 23)};
}

/// Some rows of queries of one KV head, numbered by query token, then by query head.
struct TaskRows {
  const AttendRule& rule;
  const RequestArgs& request;
  int tokens, kv_head, first, count;

  /// Row of q and of the results.
  INNERKV_DEVICE int row_of(int r) const {
    return (first + r) / rule.group * rule.kv_heads * rule.group + kv_head * rule.group +
           (first + r) % rule.group;
  }
  /// Row r sees positions [first_visible(r), end_visible(r)); both grow with r.
  INNERKV_DEVICE int end_visible(int r) const {
    return request.causal ? tokens - request.from_end + (first + r) / rule.group + 1 : tokens;
  }
  INNERKV_DEVICE int first_visible(int r) const {
    const int begin = end_visible(r) - request.sliding_window;
    return request.sliding_window > 0 && begin > 0 ? begin : 0;
  }
  INNERKV_DEVICE bool any_sees(int begin, int end) const {
    return begin < end_visible(count - 1) && end > first_visible(0);
  }
  INNERKV_DEVICE bool all_see(int begin, int end) const {
    return begin >= first_visible(count - 1) && end <= end_visible(0);
  }
  INNERKV_DEVICE float* logits_of(int r) const {
    return request.logits + static_cast<std::ptrdiff_t>(row_of(r)) * tokens;
  }
};

/// A score in units of log2, capped.
INNERKV_DEVICE float capped(float score, float softcap) {
  return kLog2e * softcap * tanhf(score * kLn2 / softcap);
}

}  // namespace innerkv::gpu
