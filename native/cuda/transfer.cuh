// Numbers on the move: callers' tensors into the type that is worked with, searched for what is not finite on
// the way, and rows into and out of windows.
//
// Shape      tensors (row runs) x blocks of threads that stride over their numbers.
// Reads      everything once. Writes what is converted or copied.
// Sharing    nothing but a flag per tensor, which is set by an atomic and only when something is found.
// Order      none: numbers are independent, and the same conversions as on the host give the same bits.
#pragma once

#include "../core/backend.h"
#include "../numerics/half.h"
#include "portable.h"

namespace innerkv::gpu {

inline constexpr int kIntakeThreads = 256;

struct IntakeArgs {
  const void* from;
  void* to;       // null: only searched
  unsigned* bad;  // 0 before; set when a number is not finite
  std::size_t count;
  Dtype dtype;
  bool half;  // binary16 is wanted, else float32
};

/// Callers' tensors: grid (blocks, tensors).
INNERKV_KERNEL(256) void take_numbers(const IntakeArgs* tensors) {
  const IntakeArgs& t = tensors[blockIdx.y];
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  bool bad = false;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < t.count; i += stride) {
    std::uint16_t bits = 0;
    float value;
    if (t.dtype == Dtype::kF32) {
      value = static_cast<const float*>(t.from)[i];
    } else {
      bits = static_cast<const std::uint16_t*>(t.from)[i];
      value =
          t.dtype == Dtype::kF16 ? half_value(bits) : __builtin_bit_cast(float, std::uint32_t{bits} << 16);
    }
    if (t.half) {
      if (t.dtype != Dtype::kF16) bits = half_bits_ieee(value);
      bad |= !half_is_finite(bits);
      if (t.to) static_cast<std::uint16_t*>(t.to)[i] = bits;
    } else {
      bad |= (__builtin_bit_cast(std::uint32_t, value) & 0x7f800000u) == 0x7f800000u;
      if (t.to) static_cast<float*>(t.to)[i] = value;
    }
  }
  if (bad) atomicOr(t.bad, 1u);
}

/// Rows into windows, or out of them: grid (rows, copies), 64 threads.
INNERKV_KERNEL(64) void copy_window_rows(const RowCopy* copies, int row) {
  const RowCopy& copy = copies[blockIdx.y];
  for (int r = static_cast<int>(blockIdx.x); r < copy.rows; r += static_cast<int>(gridDim.x))
    for (int i = static_cast<int>(threadIdx.x); i < row; i += static_cast<int>(blockDim.x))
      copy.to[static_cast<std::ptrdiff_t>(r) * row + i] = copy.from[r * copy.stride + i];
}

}  // namespace innerkv::gpu
