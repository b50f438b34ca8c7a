// AVX2 + FMA + F16C model kernels.
#include <immintrin.h>

#include <type_traits>

#include "../numerics/half.h"
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 8, kRowTile = 4, kTokenTile = 3;
using Vec = float __attribute__((vector_size(32)));
using Ints = std::int32_t __attribute__((vector_size(32)));
using Wide = Vec;

INNERKV_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INNERKV_HD Vec fma8(Vec a, Vec b, Vec c) { return fma(a, b, c); }
INNERKV_HD Vec load_half(const std::uint8_t* at) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
INNERKV_HD float half_at(const std::uint8_t* at) { return _cvtsh_ss(load_as<std::uint16_t>(at)); }
template <bool kSigned>
INNERKV_HD Vec widen(const std::uint8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return (Vec)_mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}
INNERKV_HD void store_bytes(std::int8_t* at, Ints v) {
  const __m256i x = (__m256i)v;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi16(words, words));
}
INNERKV_HD float sum_lanes(Vec v) {
  const __m256 x = (__m256)v;
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/// Pairs of products are added in 16 bits: 2 * 128 * 127 stays below 2^15.
INNERKV_HD Wide dot_pairs(__m256i codes, __m256i x) {
  const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
  return (Wide)_mm256_cvtepi32_ps(sums);
}
template <class Packed>
INNERKV_HD Wide dot_unsigned(const Packed& codes, const Packed& x) {
  return dot_pairs((__m256i)codes, (__m256i)x);
}
template <class Packed>
INNERKV_HD Wide dot_signed(const Packed& codes, const Packed& x) {
  return dot_pairs(_mm256_abs_epi8((__m256i)codes), _mm256_sign_epi8((__m256i)x, (__m256i)codes));
}

/// The first four bytes, scale and offset, of 8 Q4_1 blocks of 20 bytes. Number 5 i of 40 lies in lane 5 i
/// mod 8 of its register, and no two in the same one.
INNERKV_HD __m256i heads_of_blocks(const std::uint8_t* blocks) {
  __m256i heads = load_as<__m256i>(blocks);
  heads = _mm256_blend_epi32(heads, load_as<__m256i>(blocks + 32), 0x84);
  heads = _mm256_blend_epi32(heads, load_as<__m256i>(blocks + 64), 0x10);
  heads = _mm256_blend_epi32(heads, load_as<__m256i>(blocks + 96), 0x42);
  heads = _mm256_blend_epi32(heads, load_as<__m256i>(blocks + 128), 0x08);
  return _mm256_permutevar8x32_epi32(heads, _mm256_setr_epi32(0, 5, 2, 7, 4, 1, 6, 3));
}

/// Lane b is the sum of all lanes of pairs[b]. Two rounds in 16 bits: 8 products of nibbles stay below 2^14.
INNERKV_HD __m256i sums_of_blocks(const __m256i (&pairs)[8]) {
  __m256i four[2];
  for (int i = 0; i < 2; ++i)
    four[i] = _mm256_madd_epi16(_mm256_hadd_epi16(_mm256_hadd_epi16(pairs[4 * i], pairs[4 * i + 1]),
                                                  _mm256_hadd_epi16(pairs[4 * i + 2], pairs[4 * i + 3])),
                                _mm256_set1_epi16(1));
  return _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                          _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

/// Dot products of as many leading columns as whole runs cover, faster than block by block; returns their
/// number. Q4_1: 8 blocks at once, whose integer sums, scales and offsets then fill one register each.
template <TensorType kType, int kVectors>
INNERKV_HD int dot_runs(const std::uint8_t* blocks, int columns, const ByteActivations& x, float* out) {
  constexpr int kRun = 256, kBytes = 8 * 20;
  if (kType != TensorType::kQ4_1 || columns < kRun) return 0;
  const __m256i low_twins = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                high_twins = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
  Vec sum[kVectors] = {};
  int first = 0;
  for (; first + kRun <= columns; first += kRun, blocks += kBytes) {
    const __m256i heads = heads_of_blocks(blocks);
    const __m256i halves = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_and_si256(heads, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(heads, 16)),
        0xd8);
    const __m256 scale = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                 offset = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    const Vec offsets[2] = {(Vec)_mm256_permutevar8x32_ps(offset, low_twins),
                            (Vec)_mm256_permutevar8x32_ps(offset, high_twins)};
    __m256i codes[8];
    for (int b = 0; b < 8; ++b) {
      const __m128i both = load_as<__m128i>(blocks + 20 * b + 4);
      const __m256i twice = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
      codes[b] = _mm256_and_si256(twice, _mm256_set1_epi8(15));
    }
    for (int v = 0; v < kVectors; ++v) {
      const std::int8_t* bytes = x.codes + std::ptrdiff_t{v} * columns + first;
      const float *steps = x.steps + (v * columns + first) / 32,
                  *totals = x.totals + (v * columns + first) / 16;
      __m256i pairs[8];
      for (int b = 0; b < 8; ++b) pairs[b] = _mm256_maddubs_epi16(codes[b], load_as<__m256i>(bytes + 32 * b));
      const Vec dots = (Vec)_mm256_cvtepi32_ps(sums_of_blocks(pairs));
      sum[v] = fma(dots, (Vec)scale * load_as<Vec>(steps), sum[v]);
      for (int half = 0; half < 2; ++half)
        sum[v] = fma(offsets[half], load_as<Vec>(totals + 8 * half), sum[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) out[v] = sum_lanes(sum[v]);
  return first;
}

// For packed.inl.h: sums[v][i] += products of the columns of a group, kLanes rows in a register.
constexpr int kPackedTiles = 2, kPackedVectors = 2;
constexpr bool kSignedCodes = true;
template <TensorType kType, int kQuads, int kVectors, int kTiles>
INNERKV_HD void dot_group(const std::uint8_t* codes, const std::int8_t* x, std::ptrdiff_t stride,
                          Ints (&sums)[kVectors][kTiles]) {
  // Quads whose sums of two products stay below 2^15 together: 2 * 127 * the largest code * kRun.
  constexpr bool kBytes = kType == TensorType::kQ8_0;
  constexpr int kMost = kBytes                                                     ? 1
                        : kType == TensorType::kQ6_K                               ? 2
                        : kType == TensorType::kQ5_0 || kType == TensorType::kQ5_1 ? 4
                                                                                   : 8;
  constexpr int kRun = kMost < kQuads ? kMost : kQuads;
  for (int first = 0; first < kQuads; first += kRun) {
    __m256i pairs[kVectors][kTiles] = {};
    for (int quad = first; quad < first + kRun; ++quad)
      for (int v = 0; v < kVectors; ++v) {
        const __m256i four = _mm256_set1_epi32(load_as<std::int32_t>(x + v * stride + 4 * quad));
        for (int i = 0; i < kTiles; ++i) {
          const __m256i code = load_as<__m256i>(codes + (quad * kPanelRows + i * kLanes) * 4);
          const __m256i products =
              kBytes ? _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four, code))
                     : _mm256_maddubs_epi16(code, four);
          pairs[v][i] = _mm256_add_epi16(pairs[v][i], products);
        }
      }
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kTiles; ++i)
        sums[v][i] += (Ints)_mm256_madd_epi16(pairs[v][i], _mm256_set1_epi16(1));
  }
}

#include "kernels.inl.h"
#include "packed.inl.h"

constexpr ModelKernels kTable = table("avx2");

}  // namespace

const ModelKernels* avx2_model_kernels() { return &kTable; }

}  // namespace innerkv
