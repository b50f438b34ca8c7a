// Orthonormal Hadamard transform of a head, block-diagonal when its size is no power of two. docs/format.md
// section 5.4.
#pragma once

#include "../platform.h"

namespace innerkv {

/// float32(1 / sqrt(n)) for the block sizes that occur.
constexpr INNERKV_HD float hadamard_norm(int n) {
  return n == 16 ? 0.25f : n == 32 ? 0x1.6a09e6p-3f : n == 64 ? 0.125f : n == 128 ? 0x1.6a09e6p-4f : 0.0625f;
}

/// x <- H x in place; H is symmetric and its own inverse.
INNERKV_HD void hadamard(float* x, int count) {
  while (count > 0) {
    int n = 1;
    while (2 * n <= count) n *= 2;
    for (int h = 1; h < n; h *= 2)
      for (int base = 0; base < n; base += 2 * h)
        for (int i = base; i < base + h; ++i) {
          const float a = x[i], b = x[i + h];
          x[i] = a + b;
          x[i + h] = a - b;
        }
    const float norm = hadamard_norm(n);
    for (int i = 0; i < n; ++i) x[i] *= norm;
    x += n;
    count -= n;
  }
}

}  // namespace innerkv
