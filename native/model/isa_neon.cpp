// NEON model kernels for AArch64 with dot products (Armv8.2 and newer).
#include <arm_neon.h>

#include <type_traits>

#include "../numerics/half.h"
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 4, kRowTile = 4, kTokenTile = 4;
using Vec = float __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));
using Wide = float __attribute__((vector_size(32)));

INNERKV_HD Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INNERKV_HD Wide fma8(Wide a, Wide b, Wide c) {
  float32x4_t x[2], y[2], z[2];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
  __builtin_memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  Wide sum;
  __builtin_memcpy(&sum, z, sizeof sum);
  return sum;
}
INNERKV_HD Vec load_half(const std::uint8_t* at) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
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
INNERKV_HD float sum_lanes(Vec v) { return vaddvq_f32((float32x4_t)v); }

// Unsigned codes have at most 6 bits here, so they are signed bytes too.
template <class Packed>
INNERKV_HD Wide dot_signed(const Packed& codes, const Packed& x) {
  int8x16_t c[2], a[2];
  __builtin_memcpy(c, &codes, 32);
  __builtin_memcpy(a, &x, 32);
  float32x4_t sums[2];
  for (int i = 0; i < 2; ++i) sums[i] = vcvtq_f32_s32(vdotq_s32(vdupq_n_s32(0), c[i], a[i]));
  Wide result;
  __builtin_memcpy(&result, sums, sizeof result);
  return result;
}
template <class Packed>
INNERKV_HD Wide dot_unsigned(const Packed& codes, const Packed& x) {
  return dot_signed(codes, x);
}

/// Dot products of as many leading columns as whole runs cover, faster than block by block; returns their
/// number.
template <TensorType kType, int kVectors>
INNERKV_HD int dot_runs(const std::uint8_t*, int, const ByteActivations&, float*) {
  return 0;
}

// For packed.inl.h: sums[v][i] += products of the columns of a group, kLanes rows in a register.
constexpr int kPackedTiles = 2, kPackedVectors = 4;
constexpr bool kSignedCodes = true;
template <TensorType kType, int kQuads, int kVectors, int kTiles>
INNERKV_HD void dot_group(const std::uint8_t* codes, const std::int8_t* x, std::ptrdiff_t stride,
                          Ints (&sums)[kVectors][kTiles]) {
  for (int quad = 0; quad < kQuads; ++quad)
    for (int i = 0; i < kTiles; ++i) {
      const int8x16_t code = vreinterpretq_s8_u8(vld1q_u8(codes + (quad * kPanelRows + i * kLanes) * 4));
      for (int v = 0; v < kVectors; ++v) {
        const int8x16_t four =
            vreinterpretq_s8_s32(vdupq_n_s32(load_as<std::int32_t>(x + v * stride + 4 * quad)));
        sums[v][i] = (Ints)vdotq_s32((int32x4_t)sums[v][i], code, four);
      }
    }
}

#include "kernels.inl.h"
#include "packed.inl.h"

constexpr ModelKernels kTable = table("neon");

}  // namespace

const ModelKernels* neon_model_kernels() { return &kTable; }

}  // namespace innerkv
