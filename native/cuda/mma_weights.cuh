// Weights of a page's tokens as the B operand of an 8-bit matrix product: from the lanes that hold a token's
// score to the lanes that multiply its values.
#pragma once

#include <type_traits>

#include "codes.cuh"
#include "ptx.h"
#include "warp.cuh"

namespace innerkv::gpu {

/// Integers of two bytes, columns 2h and 2h + 1 of B being the high and the low bytes of row h. K: the codes
/// whose units the weights belong to. Weights that may be negative have signed bytes.
template <class K, bool kSigned>
struct WeightBytes {
  using Byte = std::conditional_t<kSigned, std::int8_t, std::uint8_t>;
  static constexpr float kLargest = kSigned ? 127 * 256 + 127 : 65535;
  /// Added to a weight, it leaves the nearest integer in the low bits of the sum; signed low bytes are made
  /// with 128 more, which moves their carry into the high byte.
  static constexpr float kInteger = kSigned ? 12582912.0f + 128.0f : 8388608.0f;

  std::uint32_t words[4][2];  // of every 32 tokens, what operand() exchanges

  /// This lane's units as multiples of 1 / inverse; none may be beyond kLargest.
  template <class Weight>
  INNERKV_DEVICE void pack(int g, float inverse, Weight weight) {
    const auto integer = [&](int unit) { return __float_as_uint(fmaf(weight(unit), inverse, kInteger)); };
    const auto both = [&](int unit) {  // low, low, high, high byte of two neighbouring tokens
      return ptx::prmt(integer(unit), integer(unit + 1), 0x5140u);
    };
    if constexpr (K::kVector == 4) {  // this lane holds quads of tokens
      const std::uint32_t first = g < 4 ? 0x7632u : 0x5410u, second = g < 4 ? 0x5410u : 0x7632u;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const std::uint32_t a = both(4 * s), b = both(4 * s + 2);
        words[s][0] = ptx::prmt(a, b, first);
        words[s][1] = ptx::prmt(a, b, second);
        if constexpr (kSigned) {
          words[s][0] ^= g < 4 ? 0u : 0x80808080u;
          words[s][1] ^= g < 4 ? 0x80808080u : 0u;
        }
      }
    } else {  // two tokens of every class
      static_assert(K::kVector == 2 && K::kWords == 2);
#pragma unroll
      for (int cls = 0; cls < 8; ++cls)
        words[cls / 2][cls % 2] = both(2 * cls) ^ (kSigned ? 0x00008080u : 0u);
    }
  }

  /// Tokens 32 s to 32 s + 31, column g. With quads, a lane of tokens 0 to 15 offers high bytes first and the
  /// others low bytes, so that two shuffles bring both halves.
  INNERKV_DEVICE void operand(int s, int g, int t, std::uint32_t (&b)[2]) const {
    const int column = g / 2;
    const bool low = g % 2;
    if constexpr (K::kVector == 4) {
      const int here = 16 * (g % 2) + 4 * t + column;
      const std::uint32_t one = __shfl_sync(kFullMask, words[s][0], here),
                          other = __shfl_sync(kFullMask, words[s][1], here ^ 16);
      b[0] = low ? other : one;
      b[1] = low ? one : other;
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t left = __shfl_sync(kFullMask, words[s][half], 8 * t + column),
                            right = __shfl_sync(kFullMask, words[s][half], 8 * t + 4 + column);
        b[half] = ptx::prmt(left, right, low ? 0x5410u : 0x7632u);
      }
    }
  }
};

}  // namespace innerkv::gpu
