// What the attention kernels share.
#pragma once

#include "args.h"
#include "warp.cuh"

namespace innerkv::gpu {

inline constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

/// Vectors without any element above this become zeros instead of integers: the reciprocal of their step must
/// stay finite.
inline constexpr float kTiny = 1e-30f;

INNERKV_DEVICE float no_score() { return __int_as_float(static_cast<int>(0xff800000u)); }  // -infinity

INNERKV_DEVICE int clamp_int(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

}  // namespace innerkv::gpu
