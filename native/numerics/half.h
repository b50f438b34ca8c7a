// binary16 <-> float32, our own so that no CUDA or F16C header is needed and every backend agrees on each
// bit.
//
// Conversions round to nearest, ties to even. half_bits() saturates at 65504 instead of giving infinity,
// because a stored scale must stay finite; half_bits_ieee() keeps infinities and NaN, for input checks.
#pragma once

#include <cstdint>

#include "../platform.h"

namespace innerkv {

inline constexpr std::uint16_t kHalfMaxBits = 0x7bff;  // 65504

constexpr INNERKV_HD std::uint16_t half_bits_ieee(float value) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x33000001u) return sign;  // below half the smallest subnormal
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const std::uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
  const int shift = exponent < -14 ? 13 + (-14 - exponent) : 13;
  const std::uint32_t kept = fraction >> shift;
  const std::uint32_t rest = fraction & ((1u << shift) - 1u);
  const std::uint32_t tie = 1u << (shift - 1);
  const std::uint32_t rounded = kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u);
  // A normal number keeps its hidden bit out of the field; a carry moves the exponent up by itself.
  const std::uint32_t base = exponent < -14 ? 0u : static_cast<std::uint32_t>(exponent + 14) << 10;
  return static_cast<std::uint16_t>(sign | (base + rounded));
}

constexpr INNERKV_HD std::uint16_t half_bits(float value) {
  const std::uint16_t bits = half_bits_ieee(value);
  return (bits & 0x7fffu) == 0x7c00u ? static_cast<std::uint16_t>((bits & 0x8000u) | kHalfMaxBits) : bits;
}

constexpr INNERKV_HD float half_value(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  std::uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0x1f) return __builtin_bit_cast(float, sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return __builtin_bit_cast(float, sign | (exponent + 112u) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // exact
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, magnitude));
}

/// half(x) of docs/format.md: the float32 value of x stored as binary16.
constexpr INNERKV_HD float round_half(float value) { return half_value(half_bits(value)); }

constexpr INNERKV_HD bool half_is_finite(std::uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

}  // namespace innerkv
