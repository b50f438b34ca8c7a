// Portable model kernels: the baseline instruction set of the platform, no intrinsics.
#include <type_traits>

#include "../numerics/half.h"
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 4, kRowTile = 4, kTokenTile = 2;
using Vec = float __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));

INNERKV_HD Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INNERKV_HD Vec load_half(const std::uint8_t* at) {
  std::uint16_t bits[4];
  __builtin_memcpy(bits, at, sizeof bits);
  return Vec{half_value(bits[0]), half_value(bits[1]), half_value(bits[2]), half_value(bits[3])};
}
INNERKV_HD float half_at(const std::uint8_t* at) { return half_value(load_as<std::uint16_t>(at)); }
template <bool kSigned>
INNERKV_HD Vec widen(const std::uint8_t* codes) {
  Vec values;
  for (int i = 0; i < kLanes; ++i)
    values[i] = static_cast<float>(kSigned ? static_cast<std::int8_t>(codes[i]) : codes[i]);
  return values;
}
INNERKV_HD void store_bytes(std::int8_t* at, Ints v) {
  for (int l = 0; l < kLanes; ++l) at[l] = static_cast<std::int8_t>(v[l]);
}
INNERKV_HD float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

using Wide = float __attribute__((vector_size(32)));
INNERKV_HD Wide fma8(Wide a, Wide b, Wide c) { return a * b + c; }

/// Products of 32 bytes with 32 signed bytes, lane l the sum of those at 4l to 4l + 3.
template <class Code, class Packed>
INNERKV_HD Wide dot_bytes(const Packed& codes, const Packed& x) {
  Code c[32];
  std::int8_t a[32];
  __builtin_memcpy(c, &codes, 32);
  __builtin_memcpy(a, &x, 32);
  Wide sums;
  for (int l = 0; l < 8; ++l)
    sums[l] = static_cast<float>(c[4 * l] * a[4 * l] + c[4 * l + 1] * a[4 * l + 1] +
                                 c[4 * l + 2] * a[4 * l + 2] + c[4 * l + 3] * a[4 * l + 3]);
  return sums;
}
template <class Packed>
INNERKV_HD Wide dot_unsigned(const Packed& codes, const Packed& x) {
  return dot_bytes<std::uint8_t>(codes, x);
}
template <class Packed>
INNERKV_HD Wide dot_signed(const Packed& codes, const Packed& x) {
  return dot_bytes<std::int8_t>(codes, x);
}

/// Dot products of as many leading columns as whole runs cover, faster than block by block; returns their
/// number.
template <TensorType kType, int kVectors>
INNERKV_HD int dot_runs(const std::uint8_t*, int, const ByteActivations&, float*) {
  return 0;
}

// For packed.inl.h: sums[v][i] += products of the columns of a group, kLanes rows in a register.
constexpr int kPackedTiles = 2, kPackedVectors = 2;
constexpr bool kSignedCodes = true;
template <TensorType kType, int kQuads, int kVectors, int kTiles>
INNERKV_HD void dot_group(const std::uint8_t* codes, const std::int8_t* x, std::ptrdiff_t stride,
                          Ints (&sums)[kVectors][kTiles]) {
  for (int quad = 0; quad < kQuads; ++quad)
    for (int i = 0; i < kTiles; ++i)
      for (int v = 0; v < kVectors; ++v)
        for (int l = 0; l < kLanes; ++l)
          for (int c = 0; c < 4; ++c) {
            const std::uint8_t code = codes[(quad * kPanelRows + i * kLanes + l) * 4 + c];
            sums[v][i][l] += (kType == TensorType::kQ8_0 ? static_cast<std::int8_t>(code) : code) *
                             x[v * stride + 4 * quad + c];
          }
}

#include "kernels.inl.h"
#include "packed.inl.h"

constexpr ModelKernels kTable = table("scalar");

}  // namespace

const ModelKernels* scalar_model_kernels() { return &kTable; }

}  // namespace innerkv
