// Rounding one group of numbers to codes, a scale and perhaps a zero point. docs/format.md section 4, line by
// line.
#pragma once

#include <cstdint>

#include "../numerics/half.h"
#include "../numerics/ordered_sum.h"
#include "spec.h"

namespace innerkv {

inline constexpr int kMaxClipRatios = 8;

struct GroupRule {
  int bits;
  Mode mode;
  const float* ratios;  // clip ratios, or nullptr
  int ratio_count;
  bool unbiased;
};

struct GroupScale {
  std::uint16_t scale = 0;  // binary16; the sign is the mode bit of the hybrid modes
  std::uint16_t zero = 0;
  bool has_zero = false;
};

INNERKV_HD float clamp_code(float u, float low, float high) {
  u = u > low ? u : low;
  u = u < high ? u : high;
  return static_cast<float>(static_cast<int>(u));
}

INNERKV_HD float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

INNERKV_HD float max_magnitude(const float* x, int count) {
  float lanes[16] = {};
  int i = 0;
  for (; i + 16 <= count; i += 16)
    for (int l = 0; l < 16; ++l) {
      const float a = x[i + l] < 0 ? -x[i + l] : x[i + l];
      lanes[l] = a > lanes[l] ? a : lanes[l];
    }
  float largest = 0;
  for (int l = 0; l < 16; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
  for (; i < count; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    largest = a > largest ? a : largest;
  }
  return largest;
}

/// Least-squares rounding shrinks; the unbiased scale undoes it. `num` = <x, Mx>, `den` = <x, M x̂> in some
/// metric M.
INNERKV_HD std::uint16_t unbiased_scale(float scale, float num, float den) {
  float gain = num / den;
  if (!(den > 0.0f) || !(gain <= 3.4e38f)) gain = 1.0f;
  gain = gain > 0.5f ? gain : 0.5f;
  gain = gain < 2.0f ? gain : 2.0f;
  return half_bits(scale * gain);
}

/// Codes of x for levels scale * (code - offset') in [low, high]; `bias` already holds the 0.5 of rounding.
INNERKV_HD void assign_codes(const float* x, int count, float inverse, float shift, float bias, float low,
                             float high, std::uint8_t* codes) {
  for (int i = 0; i < count; ++i)
    codes[i] =
        static_cast<std::uint8_t>(static_cast<int>(clamp_code((x[i] - shift) * inverse + bias, low, high)));
}

namespace detail {

INNERKV_HD GroupScale quantise_mid_rise(const float* x, int count, const GroupRule& rule,
                                        std::uint8_t* codes) {
  const float top = static_cast<float>((1 << rule.bits) - 1),
              half_levels = static_cast<float>(1 << (rule.bits - 1));
  const float center = 0.5f * top;
  const float full = 2.0f * max_magnitude(x, count) / top;
  const int candidates = rule.ratio_count > 0 ? rule.ratio_count : 1;
  std::uint16_t best_bits = 0;
  float best_error = 0;
  for (int r = 0; r < candidates; ++r) {
    const std::uint16_t bits = half_bits(rule.ratio_count > 0 ? rule.ratios[r] * full : full);
    const float scale = half_value(bits), inverse = reciprocal(scale);
    const float error = candidates == 1 ? 0.0f : ordered_sum(count, [&](int i) {
      const float difference = x[i] - scale * (clamp_code(x[i] * inverse + half_levels, 0.0f, top) - center);
      return difference * difference;
    });
    if (r == 0 || error < best_error) {
      best_error = error;
      best_bits = bits;
    }
  }
  const float scale = half_value(best_bits);
  assign_codes(x, count, reciprocal(scale), 0.0f, half_levels, 0.0f, top, codes);
  if (rule.unbiased) {
    const float num = ordered_sum(count, [&](int i) { return x[i] * x[i]; });
    const float den =
        ordered_sum(count, [&](int i) { return x[i] * (scale * (static_cast<float>(codes[i]) - center)); });
    best_bits = unbiased_scale(scale, num, den);
  }
  return {best_bits, 0, false};
}

INNERKV_HD GroupScale quantise_zero_level(const float* x, int count, int bits, std::uint8_t* codes) {
  const float middle = static_cast<float>(1 << (bits - 1));
  const std::uint16_t scale = half_bits(max_magnitude(x, count) / (middle - 1.0f));
  assign_codes(x, count, reciprocal(half_value(scale)), 0.0f, middle + 0.5f, 1.0f, 2.0f * middle - 1.0f,
               codes);
  return {scale, 0, false};
}

INNERKV_HD GroupScale quantise_signed_max(const float* x, int count, int bits, std::uint8_t* codes) {
  float extreme = x[0];
  for (int i = 1; i < count; ++i)
    if ((x[i] < 0 ? -x[i] : x[i]) > (extreme < 0 ? -extreme : extreme)) extreme = x[i];
  const float middle = static_cast<float>(1 << (bits - 1));
  const std::uint16_t scale = half_bits(extreme / -middle);
  assign_codes(x, count, reciprocal(half_value(scale)), 0.0f, middle + 0.5f, 0.0f, 2.0f * middle - 1.0f,
               codes);
  return {scale, 0, false};
}

INNERKV_HD GroupScale quantise_asymmetric(const float* x, int count, int levels, std::uint8_t* codes) {
  float low = x[0], high = x[0];
  for (int i = 1; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float top = static_cast<float>(levels - 1);
  const std::uint16_t zero = half_bits(low + 0.0f), scale = half_bits((high - low) / top);
  assign_codes(x, count, reciprocal(half_value(scale)), half_value(zero), 0.5f, 0.0f, top, codes);
  return {scale, zero, true};
}

INNERKV_HD GroupScale quantise_hybrid(const float* x, int count, int bits, bool released,
                                      std::uint8_t* codes) {
  std::uint8_t other[kMaxHeadDim];
  const float middle = static_cast<float>(1 << (bits - 1));
  const GroupScale symmetric = quantise_zero_level(x, count, bits, codes);
  const GroupScale asymmetric = quantise_asymmetric(x, count, (1 << bits) / (released ? 2 : 1), other);
  const float s = half_value(symmetric.scale), a = half_value(asymmetric.scale),
              z = half_value(asymmetric.zero);
  const auto size = [&](float difference) {
    return released ? (difference < 0 ? -difference : difference) : difference * difference;
  };
  const float s_error =
      ordered_sum(count, [&](int i) { return size(x[i] - s * (static_cast<float>(codes[i]) - middle)); });
  const float a_error =
      ordered_sum(count, [&](int i) { return size(x[i] - (a * static_cast<float>(other[i]) + z)); });
  if (released ? s_error < a_error : !(a_error < s_error)) return symmetric;
  for (int i = 0; i < count; ++i) codes[i] = other[i];
  return {static_cast<std::uint16_t>(asymmetric.scale | 0x8000u), asymmetric.zero, true};
}

}  // namespace detail

/// codes [count]; count <= kMaxHeadDim.
INNERKV_HD GroupScale quantise_group(const float* x, int count, const GroupRule& rule, std::uint8_t* codes) {
  switch (rule.mode) {
    case Mode::kMidRise:
      return detail::quantise_mid_rise(x, count, rule, codes);
    case Mode::kZeroLevel:
      return detail::quantise_zero_level(x, count, rule.bits, codes);
    case Mode::kSignedMax:
      return detail::quantise_signed_max(x, count, rule.bits, codes);
    case Mode::kAsymmetric:
      return detail::quantise_asymmetric(x, count, 1 << rule.bits, codes);
    case Mode::kHybrid:
      return detail::quantise_hybrid(x, count, rule.bits, false, codes);
    case Mode::kHybridReleased:
      break;
  }
  return detail::quantise_hybrid(x, count, rule.bits, true, codes);
}

/// What a stored scale and zero point mean: value = scale * code + offset.
struct Dequantiser {
  float scale, offset;
};

INNERKV_HD Dequantiser dequantiser(int bits, Mode mode, std::uint16_t scale_bits, std::uint16_t zero_bits) {
  const bool hybrid = mode == Mode::kHybrid || mode == Mode::kHybridReleased;
  const float scale = half_value(hybrid ? static_cast<std::uint16_t>(scale_bits & 0x7fffu) : scale_bits);
  if (mode == Mode::kAsymmetric || (hybrid && (scale_bits & 0x8000u))) return {scale, half_value(zero_bits)};
  const float center = mode == Mode::kMidRise ? 0.5f * static_cast<float>((1 << bits) - 1)
                                              : static_cast<float>(1 << (bits - 1));
  return {scale, -(scale * center)};
}

}  // namespace innerkv
