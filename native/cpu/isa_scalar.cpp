// Portable CPU kernels: the baseline instruction set of the platform, no intrinsics. The other tables must
// match it.
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
using Vec = float __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec load_half(const std::uint16_t* at) {
  return Vec{half_value(at[0]), half_value(at[1]), half_value(at[2]), half_value(at[3])};
}
inline float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline void store_bytes(std::int8_t* at, Ints v) {
  for (int l = 0; l < kLanes; ++l) at[l] = static_cast<std::int8_t>(v[l]);
}

void dot(const DotArgs& args) {
  for (int v = 0; v < args.vectors; ++v) {
    const std::int8_t *hi = args.hi + v * args.stride, *lo = args.lo + v * args.stride;
    std::int32_t* sums = args.sums + std::ptrdiff_t{v} * args.rows;
    for (int row = args.row_begin; row < args.row_end; ++row) sums[row] = 0;
    for (int quad = 0; quad < args.quads; ++quad) {
      std::int32_t q[4];
      for (int j = 0; j < 4; ++j) q[j] = 256 * hi[4 * quad + j] + lo[4 * quad + j];
      const std::uint8_t* codes = args.bytes + std::ptrdiff_t{4} * quad * args.rows;
      for (int row = args.row_begin; row < args.row_end; ++row)
        sums[row] += codes[4 * row] * q[0] + codes[4 * row + 1] * q[1] + codes[4 * row + 2] * q[2] +
                     codes[4 * row + 3] * q[3];
    }
  }
}

bool float_to_half(const float* value, std::uint16_t* half, std::size_t count) {
  bool finite = true;
  for (std::size_t i = 0; i < count; ++i) {
    half[i] = half_bits_ieee(value[i]);
    finite &= half_is_finite(half[i]);
  }
  return finite;
}

#include "kernels.inl.h"

constexpr Kernels kTable = table("scalar");

}  // namespace

const Kernels* scalar_kernels() { return &kTable; }

}  // namespace innerkv
