// AVX-512 (F, BW, VL, DQ) + VNNI model kernels.
#include <immintrin.h>

#include <type_traits>

#include "../numerics/half.h"
#include "kernels.h"

namespace innerkv {
namespace {

constexpr int kLanes = 16, kRowTile = 4, kTokenTile = 6;
using Vec = float __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));
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
INNERKV_HD void store_bytes(std::int8_t* at, Ints v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8((__m512i)v));
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

/// The nibbles of two blocks, 64 codes in the order of their columns.
INNERKV_HD __m512i two_blocks(const std::uint8_t* first, const std::uint8_t* second) {
  const __m512i high_halves = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0,
                                               0x0004000400040004, 0x0004000400040004, 0, 0);
  const __m256i both =
      _mm256_inserti128_si256(_mm256_castsi128_si256(load_as<__m128i>(first)), load_as<__m128i>(second), 1);
  const __m512i wide = _mm512_castsi256_si512(both);
  const __m512i twice = _mm512_shuffle_i64x2(wide, wide, 0x50);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, high_halves), _mm512_set1_epi8(15));
}

/// Lane b is the sum of the lanes that belong to block b: pair p holds block 2p in its lower half, block 2p +
/// 1 in the upper one.
INNERKV_HD __m512i sums_of_blocks(const __m512i (&pairs)[8]) {
  __m512i four[4], eight[2];
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(pairs[2 * i], pairs[2 * i + 1]),
                               _mm512_unpackhi_epi32(pairs[2 * i], pairs[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    eight[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(four[2 * i], four[2 * i + 1]),
                                _mm512_unpackhi_epi64(four[2 * i], four[2 * i + 1]));
  const __m512i sums = _mm512_add_epi32(_mm512_shuffle_i64x2(eight[0], eight[1], 0x88),
                                        _mm512_shuffle_i64x2(eight[0], eight[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm512_permutexvar_epi32(order, sums);
}

/// The first four bytes, scale and offset, of 16 Q4_1 blocks of 20 bytes.
INNERKV_HD __m512i heads_of_blocks(const std::uint8_t* blocks) {
  const __m512i a = load_as<__m512i>(blocks), b = load_as<__m512i>(blocks + 64),
                c = load_as<__m512i>(blocks + 128), d = load_as<__m512i>(blocks + 192),
                e = load_as<__m512i>(blocks + 256);
  // Number 5 i of 80; those from 32 on lie in c and d, those from 64 on in e.
  const __m512i order = _mm512_setr_epi32(0, 5, 10, 15, 20, 25, 30, 3, 8, 13, 18, 23, 28, 1, 6, 11);
  const __m512i low = _mm512_permutex2var_epi32(a, order, b), middle = _mm512_permutex2var_epi32(c, order, d);
  return _mm512_mask_permutexvar_epi32(_mm512_mask_blend_epi32(0x1f80, low, middle), 0xe000, order, e);
}

/// Dot products of as many leading columns as whole runs cover, faster than block by block; returns their
/// number. Q4_1: 16 blocks at once, whose integer sums, scales and offsets then fill one register each.
template <TensorType kType, int kVectors>
INNERKV_HD int dot_runs(const std::uint8_t* blocks, int columns, const ByteActivations& x, float* out) {
  constexpr int kRun = 512, kBytes = 16 * 20;
  if (kType != TensorType::kQ4_1 || columns < kRun) return 0;
  const __m512i low_twins = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                high_twins = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
  __m512 sum[kVectors];
  for (__m512& one : sum) one = _mm512_setzero_ps();
  int first = 0;
  for (; first + kRun <= columns; first += kRun, blocks += kBytes) {
    const __m512i heads = heads_of_blocks(blocks);
    const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(heads)),
                 offset = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(heads, 16)));
    const __m512 offsets[2] = {_mm512_permutexvar_ps(low_twins, offset),
                               _mm512_permutexvar_ps(high_twins, offset)};
    __m512i codes[8];
    for (int p = 0; p < 8; ++p) codes[p] = two_blocks(blocks + 40 * p + 4, blocks + 40 * p + 24);
    for (int v = 0; v < kVectors; ++v) {
      const std::int8_t* bytes = x.codes + std::ptrdiff_t{v} * columns + first;
      const float *steps = x.steps + (v * columns + first) / 32,
                  *totals = x.totals + (v * columns + first) / 16;
      __m512i pairs[8];
      for (int p = 0; p < 8; ++p)
        pairs[p] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[p], load_as<__m512i>(bytes + 64 * p));
      const __m512 dots = _mm512_cvtepi32_ps(sums_of_blocks(pairs));
      sum[v] = _mm512_fmadd_ps(dots, _mm512_mul_ps(scale, load_as<__m512>(steps)), sum[v]);
      for (int half = 0; half < 2; ++half)
        sum[v] = _mm512_fmadd_ps(offsets[half], load_as<__m512>(totals + 16 * half), sum[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) out[v] = _mm512_reduce_add_ps(sum[v]);
  return first;
}

// For packed.inl.h: sums[v][i] += products of the columns of a group, kLanes rows in a register.
constexpr int kPackedTiles = 2, kPackedVectors = 6;
constexpr bool kSignedCodes = false;
template <TensorType kType, int kQuads, int kVectors, int kTiles>
INNERKV_HD void dot_group(const std::uint8_t* codes, const std::int8_t* x, std::ptrdiff_t stride,
                          Ints (&sums)[kVectors][kTiles]) {
  for (int quad = 0; quad < kQuads; ++quad) {
    __m512i code[kTiles];
    for (int i = 0; i < kTiles; ++i)
      code[i] = _mm512_loadu_si512(codes + (quad * kPanelRows + i * kLanes) * 4);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i four = _mm512_set1_epi32(load_as<std::int32_t>(x + v * stride + 4 * quad));
      for (int i = 0; i < kTiles; ++i)
        sums[v][i] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[v][i], code[i], four);
    }
  }
}

#include "kernels.inl.h"
#include "packed.inl.h"

constexpr ModelKernels kTable = table("avx512");

}  // namespace

const ModelKernels* avx512_model_kernels() { return &kTable; }

}  // namespace innerkv
