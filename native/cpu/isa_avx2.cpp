// AVX2 + FMA + F16C kernels. Integer dot products by maddubs: unsigned codes times signed query bytes, pairs
// added in 16 bits.
#include <immintrin.h>

#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Vec = float __attribute__((vector_size(32)));
using Ints = std::int32_t __attribute__((vector_size(32)));

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec load_half(const std::uint16_t* at) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
inline float sum_lanes(Vec v) {
  const __m256 x = (__m256)v;
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void store_bytes(std::int8_t* at, Ints v) {
  const __m256i x = (__m256i)v;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi16(words, words));
}

inline __m256i broadcast_quad(const std::int8_t* at) {
  std::int32_t quad;
  __builtin_memcpy(&quad, at, 4);
  return _mm256_set1_epi32(quad);
}

// Keeps a sum in a register: otherwise g++ makes all products first and has no register left for the sums.
inline void stay(__m256i& sum) { asm("" : "+x"(sum)); }

// 8 kTiles rows x kVectors query vectors. A 16-bit lane holds pairs of products for `kRun` quads before it is
// widened: 2 * (2^bits - 1) * 128 * kRun stays below 2^15.
template <int kVectors, int kTiles, int kRun, bool kNibbles>
void dot_rows(const DotArgs& args, int row, int first) {
  const __m256i ones = _mm256_set1_epi16(1), low_nibble = _mm256_set1_epi8(15);
  __m256i total_hi[kVectors][kTiles] = {}, total_lo[kVectors][kTiles] = {};
  const std::uint8_t* codes = args.bytes + std::ptrdiff_t{4} * row;
  for (int begin = 0; begin < args.quads; begin += kRun) {
    const int end = begin + kRun < args.quads ? begin + kRun : args.quads;
    __m256i hi[kVectors][kTiles] = {}, lo[kVectors][kTiles] = {};
    for (int quad = begin; quad < end; ++quad) {
      __m256i code[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        code[t] = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(codes + std::ptrdiff_t{4} * quad * args.rows + 32 * t));
        if constexpr (kNibbles)
          code[t] = _mm256_and_si256(first ? _mm256_srli_epi16(code[t], 4) : code[t], low_nibble);
      }
      for (int v = 0; v < kVectors; ++v) {
        const std::ptrdiff_t at = v * args.stride + 4 * quad;
        const __m256i q_hi = broadcast_quad(args.hi + at), q_lo = broadcast_quad(args.lo + at);
        for (int t = 0; t < kTiles; ++t) {
          hi[v][t] = _mm256_add_epi16(hi[v][t], _mm256_maddubs_epi16(code[t], q_hi));
          lo[v][t] = _mm256_add_epi16(lo[v][t], _mm256_maddubs_epi16(code[t], q_lo));
          stay(hi[v][t]);
          stay(lo[v][t]);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v)
      for (int t = 0; t < kTiles; ++t) {
        total_hi[v][t] = _mm256_add_epi32(total_hi[v][t], _mm256_madd_epi16(hi[v][t], ones));
        total_lo[v][t] = _mm256_add_epi32(total_lo[v][t], _mm256_madd_epi16(lo[v][t], ones));
      }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int t = 0; t < kTiles; ++t) {
      __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(total_hi[v][t], 8), total_lo[v][t]);
      __m256i* to = reinterpret_cast<__m256i*>(args.sums + std::ptrdiff_t{v} * args.rows + row + 8 * t);
      if constexpr (kNibbles)
        if (first) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 4), _mm256_loadu_si256(to));
      _mm256_storeu_si256(to, sum);
    }
}

template <int kVectors, int kRun, bool kNibbles = false>
void dot_vectors(const DotArgs& args) {
  for (int row = args.row_begin; row < args.row_end; row += 16) {
    dot_rows<kVectors, 2, kRun, kNibbles>(args, row, 0);
    if constexpr (kNibbles) dot_rows<kVectors, 2, kRun, true>(args, row, 1);  // the high nibbles, times 16
  }
}

template <int kVectors>
void dot_bits(const DotArgs& args) {
  switch (args.bits) {
    case 1:
    case 2:
      return dot_vectors<kVectors, 32>(args);
    case 3:
      return dot_vectors<kVectors, 16>(args);
    case 4:
      return dot_vectors<kVectors, 8>(args);
    default:
      return dot_vectors<kVectors, 8, true>(args);
  }
}

void dot(const DotArgs& all) {
  DotArgs args = all;
  for (int done = 0; done < all.vectors;) {
    args.hi = all.hi + done * all.stride;
    args.lo = all.lo + done * all.stride;
    args.sums = all.sums + std::ptrdiff_t{done} * all.rows;
    const int left = all.vectors - done;
    if (left >= 2)
      dot_bits<2>(args), done += 2;
    else
      dot_bits<1>(args), done += 1;
  }
}

bool float_to_half(const float* value, std::uint16_t* half, std::size_t count) {
  __m128i worst = _mm_setzero_si128();
  const __m128i exponent = _mm_set1_epi16(0x7c00);
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits =
        _mm256_cvtps_ph(_mm256_loadu_ps(value + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    worst = _mm_or_si128(worst, _mm_cmpeq_epi16(_mm_and_si128(bits, exponent), exponent));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), bits);
  }
  bool finite = _mm_movemask_epi8(worst) == 0;
  for (; i < count; ++i) {
    half[i] = half_bits_ieee(value[i]);
    finite &= half_is_finite(half[i]);
  }
  return finite;
}

#include "kernels.inl.h"

constexpr Kernels kTable = table("avx2");

}  // namespace

const Kernels* avx2_kernels() {
#if defined(__clang__)  // knows no such name before release 19; every AVX2 machine has it
  const bool f16c = true;
#else
  const bool f16c = __builtin_cpu_supports("f16c");
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c ? &kTable : nullptr;
}

}  // namespace innerkv
