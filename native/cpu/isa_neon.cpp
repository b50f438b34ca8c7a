// NEON kernels for AArch64 with dot products (Armv8.2 and newer).
#include <arm_neon.h>
#include <sys/auxv.h>

#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
using Vec = float __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline Vec load_half(const std::uint16_t* at) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at)));
}
inline float sum_lanes(Vec v) { return vaddvq_f32((float32x4_t)v); }
inline void store_bytes(std::int8_t* at, Ints v) {
  for (int l = 0; l < kLanes; ++l) at[l] = static_cast<std::int8_t>(v[l]);
}

// Codes of up to 4 bits are non-negative signed bytes, so the signed dot product serves; 8-bit codes go as
// two nibbles.
template <int kVectors>
void dot_rows(const DotArgs& args, int row) {
  const bool wide = args.bits == 8;
  for (int half = 0; half < (wide ? 2 : 1); ++half) {
    int32x4_t hi[kVectors], lo[kVectors];
    for (int v = 0; v < kVectors; ++v) hi[v] = lo[v] = vdupq_n_s32(0);
    for (int quad = 0; quad < args.quads; ++quad) {
      uint8x16_t code = vld1q_u8(args.bytes + 4 * (std::ptrdiff_t{quad} * args.rows + row));
      if (wide) code = half ? vshrq_n_u8(code, 4) : vandq_u8(code, vdupq_n_u8(15));
      for (int v = 0; v < kVectors; ++v) {
        std::int32_t q_hi, q_lo;
        __builtin_memcpy(&q_hi, args.hi + v * args.stride + 4 * quad, 4);
        __builtin_memcpy(&q_lo, args.lo + v * args.stride + 4 * quad, 4);
        hi[v] = vdotq_s32(hi[v], vreinterpretq_s8_u8(code), vreinterpretq_s8_s32(vdupq_n_s32(q_hi)));
        lo[v] = vdotq_s32(lo[v], vreinterpretq_s8_u8(code), vreinterpretq_s8_s32(vdupq_n_s32(q_lo)));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      int32x4_t sum = vaddq_s32(vshlq_n_s32(hi[v], 8), lo[v]);
      std::int32_t* to = args.sums + std::ptrdiff_t{v} * args.rows + row;
      if (half) sum = vaddq_s32(vshlq_n_s32(sum, 4), vld1q_s32(to));
      vst1q_s32(to, sum);
    }
  }
}

template <int kVectors>
void dot_vectors(const DotArgs& args) {
  for (int row = args.row_begin; row < args.row_end; row += 4) dot_rows<kVectors>(args, row);
}

void dot(const DotArgs& all) {
  DotArgs args = all;
  for (int done = 0; done < all.vectors;) {
    args.hi = all.hi + done * all.stride;
    args.lo = all.lo + done * all.stride;
    args.sums = all.sums + std::ptrdiff_t{done} * all.rows;
    const int left = all.vectors - done;
    if (left >= 4)
      dot_vectors<4>(args), done += 4;
    else if (left >= 2)
      dot_vectors<2>(args), done += 2;
    else
      dot_vectors<1>(args), done += 1;
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

constexpr Kernels kTable = table("neon");

}  // namespace

const Kernels* neon_kernels() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &kTable : nullptr; }

}  // namespace innerkv
