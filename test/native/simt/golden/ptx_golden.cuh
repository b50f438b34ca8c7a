// Every wrapper of cuda/ptx.h on random operands, warp by warp, against its emulation. On a GPU this decides
// whether the PTX text means what the emulation says; on the emulator it proves that this program works.
#pragma once

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/ptx.h"
#include "simt/buffer.h"

namespace golden {

using namespace innerkv;
using Word = std::uint32_t;
namespace emulation = ptx::emulation;

inline constexpr int kWarps = 64;

/// Operands and results of the 32 lanes of a warp.
template <class Op>
using Ins = std::array<std::array<Word, Op::kIn>, 32>;
template <class Op>
using Outs = std::array<std::array<Word, Op::kOut>, 32>;

template <class Op>
INNERKV_KERNEL(32)
void golden_kernel(const Word* in, Word* out) {
  const std::size_t lane = std::size_t{blockIdx.x} * 32 + threadIdx.x;
  Op::run(in + lane * Op::kIn, out + lane * Op::kOut);
}

// ---- one lane ----

/// An operation of one lane whose result is exact; expect() is the emulation itself.
template <class Op>
bool lanes_agree(const Ins<Op>& in, const Outs<Op>& out) {
  for (std::size_t lane = 0; lane < 32; ++lane) {
    std::array<Word, Op::kOut> expected;
    Op::expect(in[lane].data(), expected.data());
    if (expected != out[lane]) return false;
  }
  return true;
}

struct Lop3 {
  static constexpr const char* kName = "lop3, all 256 tables";
  static constexpr int kIn = 3, kOut = 256;
  template <unsigned... kTable>
  static INNERKV_DEVICE void run_all(const Word* in, Word* out, std::integer_sequence<unsigned, kTable...>) {
    ((out[kTable] = ptx::lop3<kTable>(in[0], in[1], in[2])), ...);
  }
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    run_all(in, out, std::make_integer_sequence<unsigned, 256>{});
  }
  static void expect(const Word* in, Word* out) {
    for (unsigned table = 0; table < 256; ++table) out[table] = emulation::lop3(table, in[0], in[1], in[2]);
  }
  static bool agrees(const Ins<Lop3>& in, const Outs<Lop3>& out) { return lanes_agree<Lop3>(in, out); }
};

struct Prmt {
  static constexpr const char* kName = "prmt";
  static constexpr int kIn = 3, kOut = 1;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    out[0] = ptx::prmt(in[0], in[1], in[2] & 0xffffu);
  }
  static void expect(const Word* in, Word* out) { out[0] = emulation::prmt(in[0], in[1], in[2] & 0xffffu); }
  static bool agrees(const Ins<Prmt>& in, const Outs<Prmt>& out) { return lanes_agree<Prmt>(in, out); }
};

template <class A, class B>
struct Dp4a {
  static constexpr const char* kName = "dp4a";
  static constexpr int kIn = 3, kOut = 1;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    out[0] = static_cast<Word>(ptx::dp4a<A, B>(in[0], in[1], static_cast<std::int32_t>(in[2])));
  }
  static void expect(const Word* in, Word* out) {
    out[0] = static_cast<Word>(emulation::dp4a<A, B>(in[0], in[1], static_cast<std::int32_t>(in[2])));
  }
  static bool agrees(const Ins<Dp4a>& in, const Outs<Dp4a>& out) { return lanes_agree<Dp4a>(in, out); }
};

/// Arguments in [-130, 130], where ex2.approx promises 2^-22.
struct Ex2 {
  static constexpr const char* kName = "ex2.approx";
  static constexpr int kIn = 1, kOut = 1;
  static INNERKV_HD float argument(Word bits) {
    return static_cast<float>(static_cast<std::int32_t>(bits)) * (130 * 0x1p-31f);
  }
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    out[0] = __builtin_bit_cast(Word, ptx::ex2(argument(in[0])));
  }
  static bool agrees(const Ins<Ex2>& in, const Outs<Ex2>& out) {
    for (std::size_t lane = 0; lane < 32; ++lane) {
      const double exact = std::exp2(static_cast<double>(argument(in[lane][0])));
      const double got = static_cast<double>(__builtin_bit_cast(float, out[lane][0]));
      const bool flushed = got == 0 && exact < 0x1.00001p-126,
                 infinite = std::isinf(got) && exact > 0x1.fffffep127;
      if (!flushed && !infinite && !(std::fabs(got - exact) <= exact * 0x1p-22)) return false;
    }
    return true;
  }
};

/// Every binary16 number, two a word; the bits of a NaN are the machine's.
struct FloatsOf {
  static constexpr const char* kName = "cvt.f32.f16";
  static constexpr int kIn = 1, kOut = 2;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    const float2 two = ptx::floats_of(in[0]);
    out[0] = __builtin_bit_cast(Word, two.x);
    out[1] = __builtin_bit_cast(Word, two.y);
  }
  static bool agrees(const Ins<FloatsOf>& in, const Outs<FloatsOf>& out) {
    for (std::size_t lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        const float expected = half_value(static_cast<std::uint16_t>(in[lane][0] >> (16 * i)));
        const float got = __builtin_bit_cast(float, out[lane][static_cast<std::size_t>(i)]);
        if (std::isnan(expected) ? !std::isnan(got)
                                 : __builtin_bit_cast(Word, got) != __builtin_bit_cast(Word, expected))
          return false;
      }
    return true;
  }
};

/// Arguments in [2^-100, 2^100), where rcp.approx promises 2^-23.
struct Rcp {
  static constexpr const char* kName = "rcp.approx";
  static constexpr int kIn = 1, kOut = 1;
  static INNERKV_HD float argument(Word bits) {
    return __builtin_bit_cast(float, (27 + (bits >> 23) % 200) << 23 | (bits & 0x7fffffu));
  }
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    out[0] = __builtin_bit_cast(Word, ptx::rcp(argument(in[0])));
  }
  static bool agrees(const Ins<Rcp>& in, const Outs<Rcp>& out) {
    for (std::size_t lane = 0; lane < 32; ++lane) {
      const double exact = 1 / static_cast<double>(argument(in[lane][0]));
      const double got = static_cast<double>(__builtin_bit_cast(float, out[lane][0]));
      if (!(std::fabs(got - exact) <= exact * 0x1p-23)) return false;
    }
    return true;
  }
};

// ---- memory ----

struct Streaming {
  static constexpr const char* kName = "ld.global.nc and st.global.cs of 4, 8 and 16 bytes";
  static constexpr int kIn = 16, kOut = 16;  // offsets 0, 4, 8, 12 of each: words, floats, pairs, fours
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    ptx::store_streaming(reinterpret_cast<uint4*>(out),
                         ptx::load_streaming(reinterpret_cast<const uint4*>(in)));
    const uint4 four = ptx::load_streaming(reinterpret_cast<const uint4*>(in + 4));
    ptx::store_streaming(reinterpret_cast<float4*>(out + 4),
                         make_float4(__uint_as_float(four.x), __uint_as_float(four.y),
                                     __uint_as_float(four.z), __uint_as_float(four.w)));
    ptx::store_streaming(reinterpret_cast<uint2*>(out + 8),
                         ptx::load_streaming(reinterpret_cast<const uint2*>(in + 8)));
    const uint2 two = ptx::load_streaming(reinterpret_cast<const uint2*>(in + 10));
    ptx::store_streaming(reinterpret_cast<float2*>(out + 10),
                         make_float2(__uint_as_float(two.x), __uint_as_float(two.y)));
    ptx::store_streaming(out + 12, ptx::load_streaming(in + 12));
    ptx::store_streaming(reinterpret_cast<float*>(out + 13), __uint_as_float(ptx::load_streaming(in + 13)));
    ptx::store_streaming(out + 14, 14u);
    ptx::store_streaming(out + 15, 15u);
  }
  static void expect(const Word* in, Word* out) {
    for (int i = 0; i < 14; ++i) out[i] = in[i];
    out[14] = 14;
    out[15] = 15;
  }
  static bool agrees(const Ins<Streaming>& in, const Outs<Streaming>& out) {
    return lanes_agree<Streaming>(in, out);
  }
};

/// Three groups; the last is waited for after the first two were read.
struct CpAsync {
  static constexpr const char* kName = "cp.async of 16 and 4 bytes, filled with zeros, in groups";
  static constexpr int kIn = 12, kOut = 12;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    INNERKV_SHARED(uint4, fours, [2][32]);
    INNERKV_SHARED(Word, ones, [4][32]);
    const int lane = static_cast<int>(threadIdx.x);
    ptx::cp_async_16(&fours[0][lane], in);
    ptx::cp_async_commit();
    ptx::cp_async_16(&fours[1][lane], in + 4, 4 * (lane % 5));
    ptx::cp_async_commit();
    for (int i = 0; i < 4; ++i) ptx::cp_async_4(&ones[i][lane], in + 8 + i, (lane + i) % 3 ? 4 : 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait_group<1>();
    for (int i = 0; i < 2; ++i) {
      const uint4 four = fours[i][lane];
      out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
    }
    ptx::cp_async_wait_group<0>();
    for (int i = 0; i < 4; ++i) out[8 + i] = ones[i][lane];
  }
  static bool agrees(const Ins<CpAsync>& in, const Outs<CpAsync>& out) {
    for (std::size_t lane = 0; lane < 32; ++lane)
      for (std::size_t i = 0; i < 12; ++i) {
        const bool kept = i < 4 || (i < 8 ? i - 4 < lane % 5 : (lane + i - 8) % 3 != 0);
        if (out[lane][i] != (kept ? in[lane][i] : 0)) return false;
      }
    return true;
  }
};

/// Rows lie in shared memory in another order than the lanes that name them.
template <int kCount, bool kTransposed>
struct LdMatrix {
  static constexpr const char* kName = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  static constexpr int kIn = 4, kOut = kCount;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    INNERKV_SHARED(uint4, rows, [32]);
    const unsigned place = threadIdx.x * 7 % 32;
    rows[place] = make_uint4(in[0], in[1], in[2], in[3]);
    __syncwarp();
    Word r[kCount];
    ptx::ldmatrix<kCount, kTransposed>(r, &rows[place]);
    for (int i = 0; i < kCount; ++i) out[i] = r[i];
  }
  static bool agrees(const Ins<LdMatrix>& in, const Outs<LdMatrix>& out) {
    emulation::MatrixRow rows[32];
    emulation::Registers<kCount> expected[32];
    std::memcpy(rows, in.data(), sizeof rows);
    emulation::ldmatrix<kCount, kTransposed, CallSite>(rows, expected, ptx::kFullWarp, CallSite::here());
    return std::memcmp(expected, out.data(), sizeof expected) == 0;
  }
};

// ---- tensor cores ----

/// A 16-bit number of type T that is finite; of bfloat16 between 2^-63 and 2^33, so that sums of products are
/// too.
template <class T>
INNERKV_HD Word finite(Word bits) {
  if (std::is_same_v<T, __half>) return (bits & 0x7c00u) == 0x7c00u ? bits & 0xbfffu : bits;
  if ((bits & 0x7fffu) == 0) return bits;
  return bits & 0x4000u ? bits & 0xcfffu : bits | 0x2000u;
}

/// Products are exact. Tensor cores align the terms to the largest and truncate: up to one unit of 2^-23 of
/// the largest for each of the 17 terms, and again where partial sums meet.
template <class T>
struct MmaFloat {
  static constexpr const char* kName = std::is_same_v<T, __half> ? "mma.m16n8k16 f16" : "mma.m16n8k16 bf16";
  static constexpr int kIn = 10, kOut = 4;
  static INNERKV_HD Word operand(const Word* in, int i) {
    if (i < 6) return finite<T>(in[i] & 0xffffu) | finite<T>(in[i] >> 16) << 16;
    return (in[i] & 0x807fffffu) | 0x3f800000u;  // c: 1 <= |c| < 2
  }
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    Word a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = operand(in, i);
    for (int i = 0; i < 2; ++i) b[i] = operand(in, 4 + i);
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(operand(in, 6 + i));
    ptx::mma_m16n8k16<T>(d, a, b);
    for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(d[i]);
  }
  static bool agrees(const Ins<MmaFloat>& in, const Outs<MmaFloat>& out) {
    using Kind = std::conditional_t<std::is_same_v<T, __half>, emulation::Half, emulation::BFloat16>;
    emulation::Fragments<float> fragments[32], sizes[32];
    for (std::size_t lane = 0; lane < 32; ++lane) {
      Word words[10], magnitudes[10];
      for (int i = 0; i < 10; ++i) {
        words[i] = operand(in[lane].data(), i);
        magnitudes[i] = words[i] & (i < 6 ? 0x7fff7fffu : 0x7fffffffu);
      }
      std::memcpy(&fragments[lane], words, sizeof words);
      std::memcpy(&sizes[lane], magnitudes, sizeof magnitudes);
    }
    emulation::Accumulators<float> expected[32], size[32];
    emulation::mma_k16<Kind, CallSite>(fragments, expected, ptx::kFullWarp, CallSite::here());
    emulation::mma_k16<Kind, CallSite>(sizes, size, ptx::kFullWarp, CallSite::here());  // sums of magnitudes
    for (std::size_t lane = 0; lane < 32; ++lane)
      for (std::size_t i = 0; i < 4; ++i) {
        const float got = __builtin_bit_cast(float, out[lane][i]), wanted = expected[lane].d[i];
        const double bound = static_cast<double>(size[lane].d[i]) * 20 * 0x1p-23;
        if (!(std::fabs(static_cast<double>(got) - static_cast<double>(wanted)) <= bound)) return false;
      }
    return true;
  }
};

template <class A, class B>
struct MmaInt {
  static constexpr const char* kName = "mma.m16n8k32 8-bit";
  static constexpr int kIn = 10, kOut = 4;
  static INNERKV_DEVICE void run(const Word* in, Word* out) {
    Word a[4], b[2];
    std::int32_t c[4], d[4];
    for (int i = 0; i < 4; ++i) a[i] = in[i];
    for (int i = 0; i < 2; ++i) b[i] = in[4 + i];
    for (int i = 0; i < 4; ++i) c[i] = static_cast<std::int32_t>(in[6 + i]);
    ptx::mma_m16n8k32<A, B>(d, a, b, c);
    for (int i = 0; i < 4; ++i) out[i] = static_cast<Word>(d[i]);
  }
  static bool agrees(const Ins<MmaInt>& in, const Outs<MmaInt>& out) {
    emulation::Fragments<std::int32_t> fragments[32];
    emulation::Accumulators<std::int32_t> expected[32];
    std::memcpy(fragments, in.data(), sizeof fragments);
    emulation::mma_k32<A, B, CallSite>(fragments, expected, ptx::kFullWarp, CallSite::here());
    return std::memcmp(expected, out.data(), sizeof expected) == 0;
  }
};

/// Runs one operation on kWarps warps of random operands and returns how many disagree.
template <class Op>
int disagreements(std::uint64_t seed) {
  check::Random random(seed);
  std::vector<Word> words;
  for (int i = 0; i < kWarps * 32 * Op::kIn; ++i) words.push_back(static_cast<Word>(random.bits()));
  simt::Buffer<Word> in(words), out(std::size_t{kWarps} * 32 * Op::kOut);
  if (launch(golden_kernel<Op>, dim3(kWarps), dim3(32), 0, nullptr, in.get(), out.get()) != cudaSuccess)
    return kWarps;
  const std::vector<Word> results = out.download();
  int wrong = 0;
  for (std::size_t warp = 0; warp < kWarps; ++warp) {
    Ins<Op> operands;
    Outs<Op> got;
    std::memcpy(&operands, words.data() + warp * 32 * Op::kIn, sizeof operands);
    std::memcpy(&got, results.data() + warp * 32 * Op::kOut, sizeof got);
    wrong += !Op::agrees(operands, got);
  }
  return wrong;
}

/// Calls f(name, disagreeing warps) for every wrapper.
template <class F>
void run_all(std::uint64_t seed, F f) {
  using S = std::int8_t;
  using U = std::uint8_t;
  const auto each = [&]<class... Op>(std::tuple<Op...>*) { (f(Op::kName, disagreements<Op>(seed)), ...); };
  using All = std::tuple<Lop3, Prmt, Dp4a<S, S>, Dp4a<S, U>, Dp4a<U, S>, Dp4a<U, U>, Ex2, FloatsOf, Rcp,
                         Streaming, CpAsync, LdMatrix<1, false>, LdMatrix<2, false>, LdMatrix<4, false>,
                         LdMatrix<1, true>, LdMatrix<2, true>, LdMatrix<4, true>, MmaFloat<__half>,
                         MmaFloat<__nv_bfloat16>, MmaInt<S, S>, MmaInt<S, U>, MmaInt<U, S>, MmaInt<U, U>>;
  each(static_cast<All*>(nullptr));
}

}  // namespace golden
