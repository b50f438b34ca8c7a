// What the instructions of ptx.h do, as plain functions: of one lane, or of the operands of all 32 lanes of a
// warp. The emulator runs kernels on them and the golden test holds them against a GPU. Layouts are stated in
// ptx.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../numerics/half.h"

namespace innerkv::ptx::emulation {

// Instrumenting these would slow emulated kernels down and find nothing: they see only their operands.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define INNERKV_EMULATION __attribute__((no_sanitize("thread"))) inline
#else
#define INNERKV_EMULATION inline
#endif

constexpr INNERKV_HD std::uint32_t lop3(unsigned table, std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1u) d |= (i & 4u ? a : ~a) & (i & 2u ? b : ~b) & (i & 1u ? c : ~c);
  return d;
}

constexpr INNERKV_HD std::uint32_t prmt(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t nibble = selector >> 4 * i & 15u;
    std::uint32_t byte = static_cast<std::uint32_t>(bytes >> 8 * (nibble & 7u)) & 255u;
    if (nibble & 8u) byte = byte & 128u ? 255u : 0u;
    d |= byte << 8 * i;
  }
  return d;
}

/// Byte `index` of a word as a number of type T.
template <class T>
constexpr INNERKV_HD std::int32_t byte_of(std::uint32_t word, int index) {
  return static_cast<T>(word >> 8 * index & 255u);
}

template <class A, class B>
constexpr INNERKV_HD std::int32_t dp4a(std::uint32_t a, std::uint32_t b, std::int32_t c) {
  std::uint32_t sum = static_cast<std::uint32_t>(c);
  for (int i = 0; i < 4; ++i) sum += static_cast<std::uint32_t>(byte_of<A>(a, i) * byte_of<B>(b, i));
  return static_cast<std::int32_t>(sum);
}

INNERKV_HD float ex2(float x) {
  const float y = ::exp2f(x);  // of a subnormal it is 1 anyway
  return y < 0x1p-126f ? 0.0f : y;
}

// ---- all lanes of a warp; `mask` and `where` are the emulator's, which has checked that the mask is full
// ----

struct Half {
  static float value(std::uint16_t bits) { return half_value(bits); }
};
struct BFloat16 {
  static float value(std::uint16_t bits) { return __builtin_bit_cast(float, std::uint32_t{bits} << 16); }
};

template <class C>
struct Fragments {
  std::uint32_t a[4], b[2];
  C c[4];
};
template <class C>
struct Accumulators {
  C d[4];
};
template <int kCount>
struct Registers {
  std::uint32_t r[kCount];
};
struct alignas(16) MatrixRow {
  std::uint16_t x[8];
};

/// The products are exact; they are added to c in float64 and rounded once. A GPU truncates on the way.
template <class T, class Where>
INNERKV_EMULATION void mma_k16(const Fragments<float> (&in)[32], Accumulators<float> (&out)[32], unsigned,
                               Where) {
  double a[16][16], b[16][8], sum[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h)
        a[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] =
            static_cast<double>(T::value(static_cast<std::uint16_t>(in[lane].a[r] >> 16 * h)));
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h)
        b[2 * t + h + 8 * r][g] =
            static_cast<double>(T::value(static_cast<std::uint16_t>(in[lane].b[r] >> 16 * h)));
    for (int i = 0; i < 4; ++i) sum[g + 8 * (i >> 1)][2 * t + (i & 1)] = static_cast<double>(in[lane].c[i]);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      out[lane].d[i] = static_cast<float>(sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)]);
}

template <class A, class B, class Where>
INNERKV_EMULATION void mma_k32(const Fragments<std::int32_t> (&in)[32], Accumulators<std::int32_t> (&out)[32],
                               unsigned, Where) {
  std::int32_t a[16][32], b[32][8];
  std::uint32_t sum[16][8];  // unsigned: wraps around
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int j = 0; j < 4; ++j)
        a[g + 8 * (r & 1)][16 * (r >> 1) + 4 * t + j] = byte_of<A>(in[lane].a[r], j);
    for (int r = 0; r < 2; ++r)
      for (int j = 0; j < 4; ++j) b[16 * r + 4 * t + j][g] = byte_of<B>(in[lane].b[r], j);
    for (int i = 0; i < 4; ++i)
      sum[g + 8 * (i >> 1)][2 * t + (i & 1)] = static_cast<std::uint32_t>(in[lane].c[i]);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 32; ++k)
      for (int column = 0; column < 8; ++column)
        sum[row][column] += static_cast<std::uint32_t>(a[row][k] * b[k][column]);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      out[lane].d[i] = static_cast<std::int32_t>(sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)]);
}

template <int kCount, bool kTransposed, class Where>
INNERKV_EMULATION void ldmatrix(const MatrixRow (&in)[32], Registers<kCount> (&out)[32], unsigned, Where) {
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < kCount; ++j) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const std::uint16_t low = kTransposed ? in[8 * j + column].x[row] : in[8 * j + row].x[column];
      const std::uint16_t high = kTransposed ? in[8 * j + column + 1].x[row] : in[8 * j + row].x[column + 1];
      out[lane].r[j] = std::uint32_t{high} << 16 | low;
    }
}

#undef INNERKV_EMULATION

}  // namespace innerkv::ptx::emulation
