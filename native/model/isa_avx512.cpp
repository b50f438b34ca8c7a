// AVX-512 (F, BW, VL, DQ) + VNNI model kernels.
#include <immintrin.h>

#include <type_traits>

#include "../numerics/half.h"
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 16, kRowTile = 4, kTokenTile = 6;
using Vec = float __attribute__((vector_size(64)));
using Wide = float __attribute__((vector_size(32)));

INNERKV_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INNERKV_HD Wide fma8(Wide a, Wide b, Wide c) {
  return (Wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INNERKV_HD Vec load_half(const std::uint8_t* at) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
INNERKV_HD float half_at(const std::uint8_t* at) { return _cvtsh_ss(load_as<std::uint16_t>(at)); }
template <bool kSigned>
INNERKV_HD Vec widen(const std::uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return (Vec)_mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}
INNERKV_HD float sum_lanes(Vec v) { return _mm512_reduce_add_ps((__m512)v); }

template <class Packed>
INNERKV_HD Wide dot_unsigned(const Packed& codes, const Packed& x) {
  return (Wide)_mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), (__m256i)codes, (__m256i)x));
}
template <class Packed>
INNERKV_HD Wide dot_signed(const Packed& codes, const Packed& x) {
  const __m256i signs = _mm256_sign_epi8((__m256i)x, (__m256i)codes);
  return (Wide)_mm256_cvtepi32_ps(
      _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_abs_epi8((__m256i)codes), signs));
}

#include "kernels.inl.h"

constexpr ModelKernels kTable = table("avx512");

}  // namespace

const ModelKernels* avx512_model_kernels() { return &kTable; }

}  // namespace innerkv
