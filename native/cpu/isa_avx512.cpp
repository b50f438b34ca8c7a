// AVX-512 (F, BW, VL, DQ) + VNNI kernels. One vpdpbusd does 64 products of codes and query bytes into 16
// sums.
#include <immintrin.h>

#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Vec = float __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vec load_half(const std::uint16_t* at) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline float sum_lanes(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
inline void store_bytes(std::int8_t* at, Ints v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8((__m512i)v));
}

inline __m512i broadcast_quad(const std::int8_t* at) {
  std::int32_t quad;
  __builtin_memcpy(&quad, at, 4);
  return _mm512_set1_epi32(quad);
}

template <int kVectors, int kTiles>
void dot_rows(const DotArgs& args, int row) {
  __m512i hi[kVectors][kTiles] = {}, lo[kVectors][kTiles] = {};
  const std::uint8_t* codes = args.bytes + std::ptrdiff_t{4} * row;
  for (int quad = 0; quad < args.quads; ++quad) {
    __m512i code[kTiles];
    for (int t = 0; t < kTiles; ++t)
      code[t] = _mm512_loadu_si512(codes + std::ptrdiff_t{4} * quad * args.rows + 64 * t);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i q_hi = broadcast_quad(args.hi + v * args.stride + 4 * quad);
      const __m512i q_lo = broadcast_quad(args.lo + v * args.stride + 4 * quad);
      for (int t = 0; t < kTiles; ++t) {
        hi[v][t] = _mm512_dpbusd_epi32(hi[v][t], code[t], q_hi);
        lo[v][t] = _mm512_dpbusd_epi32(lo[v][t], code[t], q_lo);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int t = 0; t < kTiles; ++t)
      _mm512_storeu_si512(args.sums + std::ptrdiff_t{v} * args.rows + row + 16 * t,
                          _mm512_add_epi32(_mm512_slli_epi32(hi[v][t], 8), lo[v][t]));
}

template <int kVectors>
void dot_vectors(const DotArgs& args) {
  int row = args.row_begin;
  for (; row + 32 <= args.row_end; row += 32) dot_rows<kVectors, 2>(args, row);
  for (; row < args.row_end; row += 16) dot_rows<kVectors, 1>(args, row);
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
    else if (left == 3)
      dot_vectors<3>(args), done += 3;
    else if (left == 2)
      dot_vectors<2>(args), done += 2;
    else
      dot_vectors<1>(args), done += 1;
  }
}

bool float_to_half(const float* value, std::uint16_t* half, std::size_t count) {
  const __m256i exponent = _mm256_set1_epi16(0x7c00);
  bool finite = true;
  std::size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i bits =
        _mm512_cvtps_ph(_mm512_loadu_ps(value + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    finite &= _mm256_cmpeq_epi16_mask(_mm256_and_si256(bits, exponent), exponent) == 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), bits);
  }
  for (; i < count; ++i) {
    half[i] = half_bits_ieee(value[i]);
    finite &= half_is_finite(half[i]);
  }
  return finite;
}

#include "kernels.inl.h"

constexpr Kernels kTable = table("avx512");

}  // namespace

const Kernels* avx512_kernels() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vnni")
             ? &kTable
             : nullptr;
}

}  // namespace innerkv
