// What one warp does together with a head's numbers in shared memory: the transforms and the rounding of
// docs/format.md sections 4 and 5, lane by lane the same operations as native/format and native/numerics.
#pragma once

#include "../format/group.h"
#include "../numerics/hadamard.h"
#include "portable.h"

namespace innerkv::gpu {

inline constexpr unsigned kFullMask = 0xffffffffu;

INNERKV_DEVICE float warp_max(float x) {
  for (int h = 16; h > 0; h /= 2) {
    const float other = __shfl_xor_sync(kFullMask, x, h);
    x = other > x ? other : x;
  }
  return x;
}

INNERKV_DEVICE float warp_sum(float x) {
  for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(kFullMask, x, h);
  return x;
}

/// sum32: lane l holds accumulator l; everybody gets the total.
INNERKV_DEVICE float warp_ordered_sum(float lane_sum) {
  for (int h = 16; h > 0; h /= 2) lane_sum = lane_sum + __shfl_down_sync(kFullMask, lane_sum, h);
  return __shfl_sync(kFullMask, lane_sum, 0);
}

template <class Term>
INNERKV_DEVICE float warp_ordered_sum_of(int lane, int count, Term term) {
  float sum = 0.0f;
  for (int i = lane; i < count; i += 32) sum = sum + term(i);
  return warp_ordered_sum(sum);
}

/// x <- H x; the warp owns x [count].
INNERKV_DEVICE void warp_hadamard(int lane, float* x, int count) {
  while (count > 0) {
    int n = 1;
    while (2 * n <= count) n *= 2;
    for (int h = 1; h < n; h *= 2) {
      __syncwarp();
      for (int p = lane; p < n / 2; p += 32) {
        const int i = p / h * 2 * h + p % h;
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    }
    __syncwarp();
    const float norm = hadamard_norm(n);
    for (int i = lane; i < n; i += 32) x[i] *= norm;
    x += n;
    count -= n;
  }
  __syncwarp();
}

/// x <- R(-P) x with the table of core/rotation.h.
INNERKV_DEVICE void warp_rotate(int lane, float* x, const float* cos, const float* sin, int pairs,
                                bool half_layout) {
  __syncwarp();
  for (int pair = lane; pair < pairs; pair += 32) {
    const int a = half_layout ? pair : 2 * pair, b = half_layout ? pair + pairs : 2 * pair + 1;
    const float xa = x[a], xb = x[b];
    x[a] = xa * cos[a] + xb * sin[a];
    x[b] = xb * cos[b] + xa * sin[b];
  }
  __syncwarp();
}

// ---- rounding one group; `x(i)` reads element i, `put(i, code)` stores its code, both for the lane's own i
// ----

template <class X>
INNERKV_DEVICE float warp_max_magnitude(int lane, int count, X x) {
  float largest = 0.0f;
  for (int i = lane; i < count; i += 32) {
    const float a = x(i) < 0 ? -x(i) : x(i);
    largest = a > largest ? a : largest;
  }
  return warp_max(largest);
}

/// One lane's codes of a group: levels scale * (code - offset) as in assign_codes().
struct Levels {
  float inverse, shift, bias, low, high;
  INNERKV_DEVICE float operator()(float x) const {
    return clamp_code((x - shift) * inverse + bias, low, high);
  }
};

template <class X, class Put>
INNERKV_DEVICE GroupScale warp_mid_rise(int lane, int count, const GroupRule& rule, X x, Put put) {
  const float top = static_cast<float>((1 << rule.bits) - 1),
              half_levels = static_cast<float>(1 << (rule.bits - 1)), center = 0.5f * top;
  const float full = 2.0f * warp_max_magnitude(lane, count, x) / top;
  const int candidates = rule.ratio_count > 0 ? rule.ratio_count : 1;
  std::uint16_t best_bits = 0;
  float best_error = 0;
  for (int r = 0; r < candidates; ++r) {
    const std::uint16_t bits = half_bits(rule.ratio_count > 0 ? rule.ratios[r] * full : full);
    const float scale = half_value(bits), inverse = reciprocal(scale);
    const float error = candidates == 1 ? 0.0f : warp_ordered_sum_of(lane, count, [&](int i) {
      const float difference = x(i) - scale * (clamp_code(x(i) * inverse + half_levels, 0.0f, top) - center);
      return difference * difference;
    });
    if (r == 0 || error < best_error) {
      best_error = error;
      best_bits = bits;
    }
  }
  const float scale = half_value(best_bits);
  const Levels levels{reciprocal(scale), 0.0f, half_levels, 0.0f, top};
  for (int i = lane; i < count; i += 32) put(i, static_cast<std::uint8_t>(levels(x(i))));
  if (rule.unbiased) {
    const float num = warp_ordered_sum_of(lane, count, [&](int i) { return x(i) * x(i); });
    const float den =
        warp_ordered_sum_of(lane, count, [&](int i) { return x(i) * (scale * (levels(x(i)) - center)); });
    best_bits = unbiased_scale(scale, num, den);
  }
  return {best_bits, 0, false};
}

template <class X>
INNERKV_DEVICE float warp_extreme(int lane, int count, X x) {  // largest magnitude, first among equals
  float extreme = 0.0f, size = -1.0f;
  int index = 1 << 30;
  for (int i = lane; i < count; i += 32) {
    const float a = x(i) < 0 ? -x(i) : x(i);
    if (a > size) {
      size = a;
      extreme = x(i);
      index = i;
    }
  }
  for (int h = 16; h > 0; h /= 2) {
    const float other_size = __shfl_xor_sync(kFullMask, size, h),
                other = __shfl_xor_sync(kFullMask, extreme, h);
    const int other_index = __shfl_xor_sync(kFullMask, index, h);
    if (other_size > size || (other_size == size && other_index < index)) {
      size = other_size;
      extreme = other;
      index = other_index;
    }
  }
  return extreme;
}

template <class X>
INNERKV_DEVICE GroupScale warp_asymmetric(int lane, int count, int levels, X x, Levels* code_of) {
  float low = x(0), high = x(0);
  for (int i = lane; i < count; i += 32) {
    low = x(i) < low ? x(i) : low;
    high = x(i) > high ? x(i) : high;
  }
  low = -warp_max(-low);
  high = warp_max(high);
  const float top = static_cast<float>(levels - 1);
  const std::uint16_t zero = half_bits(low + 0.0f), scale = half_bits((high - low) / top);
  *code_of = {reciprocal(half_value(scale)), half_value(zero), 0.5f, 0.0f, top};
  return {scale, zero, true};
}

template <class X, class Put>
INNERKV_DEVICE GroupScale warp_quantise_group(int lane, int count, const GroupRule& rule, X x, Put put) {
  if (rule.mode == Mode::kMidRise) return warp_mid_rise(lane, count, rule, x, put);
  const float middle = static_cast<float>(1 << (rule.bits - 1));
  const bool hybrid = rule.mode == Mode::kHybrid || rule.mode == Mode::kHybridReleased,
             released = rule.mode == Mode::kHybridReleased;
  Levels symmetric_levels{}, asymmetric_levels{};
  GroupScale symmetric, asymmetric;
  if (rule.mode == Mode::kSignedMax) {
    symmetric.scale = half_bits(warp_extreme(lane, count, x) / -middle);
    symmetric_levels = {reciprocal(half_value(symmetric.scale)), 0.0f, middle + 0.5f, 0.0f,
                        2.0f * middle - 1.0f};
  } else if (rule.mode != Mode::kAsymmetric) {
    symmetric.scale = half_bits(warp_max_magnitude(lane, count, x) / (middle - 1.0f));
    symmetric_levels = {reciprocal(half_value(symmetric.scale)), 0.0f, middle + 0.5f, 1.0f,
                        2.0f * middle - 1.0f};
  }
  if (hybrid || rule.mode == Mode::kAsymmetric)
    asymmetric = warp_asymmetric(lane, count, (1 << rule.bits) / (released ? 2 : 1), x, &asymmetric_levels);
  bool choose_asymmetric = rule.mode == Mode::kAsymmetric;
  if (hybrid) {
    const float s = half_value(symmetric.scale), a = half_value(asymmetric.scale),
                z = half_value(asymmetric.zero);
    const auto size = [&](float difference) {
      return released ? (difference < 0 ? -difference : difference) : difference * difference;
    };
    const float s_error = warp_ordered_sum_of(
        lane, count, [&](int i) { return size(x(i) - s * (symmetric_levels(x(i)) - middle)); });
    const float a_error = warp_ordered_sum_of(
        lane, count, [&](int i) { return size(x(i) - (a * asymmetric_levels(x(i)) + z)); });
    choose_asymmetric = released ? !(s_error < a_error) : a_error < s_error;
    if (choose_asymmetric) asymmetric.scale = static_cast<std::uint16_t>(asymmetric.scale | 0x8000u);
  }
  const Levels& levels = choose_asymmetric ? asymmetric_levels : symmetric_levels;
  for (int i = lane; i < count; i += 32) put(i, static_cast<std::uint8_t>(levels(x(i))));
  return choose_asymmetric ? asymmetric : symmetric;
}

}  // namespace innerkv::gpu
