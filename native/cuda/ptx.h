// Every PTX instruction that kernels use, one wrapper each, with its emulation behind the same #if. No other
// file has inline assembly. test/native/simt/golden compares the two on a GPU.
//
// Fragments (PTX ISA, "Warp-level matrix instructions"), with g = lane / 4 and t = lane % 4:
//   m16n8k16, 16-bit   a[r]: row g + 8 (r & 1), k = 2t + 8 (r >> 1) in the low half and k + 1 in the high
//   half
//                      b[r]: column g, k = 2t + 8 r and k + 1
//   m16n8k32, 8-bit    a[r], byte j: row g + 8 (r & 1), k = 16 (r >> 1) + 4t + j
//                      b[r], byte j: column g, k = 16 r + 4t + j
//   c[i], d[i]         row g + 8 (i >> 1), column 2t + (i & 1)
#pragma once

#include <type_traits>

#include "emulation.h"
#include "portable.h"

namespace innerkv::ptx {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- arithmetic of one lane; the emulation also runs on the host of a CUDA build ----

/// Any function of three bits, bitwise: bit 4a + 2b + c of kTable is the result.
template <unsigned kTable>
INNERKV_HD std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(__CUDA_ARCH__)
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
#else
  return emulation::lop3(kTable, a, b, c);
#endif
}

/// Byte i of the result is byte (selector >> 4i & 7) of b:a, or that byte's sign in every bit if 8 is set
/// too.
INNERKV_HD std::uint32_t prmt(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
#if defined(__CUDA_ARCH__)
  std::uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  return emulation::prmt(a, b, selector);
#endif
}

/// c + the products of four bytes; A and B are std::int8_t or std::uint8_t. Wraps around.
template <class A, class B>
INNERKV_HD std::int32_t dp4a(std::uint32_t a, std::uint32_t b, std::int32_t c) {
#if defined(__CUDA_ARCH__)
  std::int32_t d;
  if constexpr (std::is_signed_v<A> && std::is_signed_v<B>)
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else if constexpr (std::is_signed_v<A>)
    asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else if constexpr (std::is_signed_v<B>)
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return emulation::dp4a<A, B>(a, b, c);
#endif
}

/// The two binary16 numbers of a word as float32, exactly; a NaN stays one. The low half first.
INNERKV_HD float2 floats_of(std::uint32_t halves) {
  float2 to;
#if defined(__CUDA_ARCH__)
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(to.x), "=f"(to.y)
      : "r"(halves));
#else
  to.x = half_value(static_cast<std::uint16_t>(halves));
  to.y = half_value(static_cast<std::uint16_t>(halves >> 16));
#endif
  return to;
}
INNERKV_HD float float_of(std::uint16_t half) { return floats_of(half).x; }

/// 2^x with a relative error of at most 2^-22; subnormal arguments and results are zero.
INNERKV_HD float ex2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::ex2(x);
#endif
}

/// 1 / x with a relative error of at most 2^-23, for normal x with a normal reciprocal.
INNERKV_HD float rcp(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

/// x itself, but what is computed from it is computed after this: compilers keep nothing of it in registers
/// from one round of a loop to the next.
INNERKV_HD int fresh(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- global memory ----

/// Reads what no thread of the launch writes, without keeping it in L1. T is a 4-, 8- or 16-byte word of
/// integers: unsigned, uint2, uint4.
template <class T>
INNERKV_DEVICE T load_streaming(const T* from, [[maybe_unused]] CallSite where = CallSite::here()) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, uint2> || std::is_same_v<T, uint4>);
  T value;
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, unsigned>)
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(from));
  else if constexpr (std::is_same_v<T, uint2>)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
#else
  simt::check_read_only(from, sizeof(T), where);
  value = *from;
#endif
  return value;
}

/// Writes what will not be read again soon. T is float, float2, float4, unsigned, uint2 or uint4.
template <class T>
INNERKV_DEVICE void store_streaming(T* to, const T& value) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, float>)
    asm volatile("st.global.cs.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
  else if constexpr (std::is_same_v<T, float2>)
    asm volatile("st.global.cs.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(value.x), "f"(value.y) : "memory");
  else if constexpr (std::is_same_v<T, float4>)
    asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
  else if constexpr (std::is_same_v<T, unsigned>)
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  else if constexpr (std::is_same_v<T, uint2>)
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
  else {
    static_assert(std::is_same_v<T, uint4>);
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
  }
#else
  *to = value;
#endif
}

// ---- cp.async: global to shared memory, behind the program's back until waited for ----

#if defined(__CUDACC__)
INNERKV_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
#endif

/// 16 bytes, past L1; the first `from_bytes` of them from memory, the rest zero.
INNERKV_DEVICE void cp_async_16(void* to, const void* from, int from_bytes = 16,
                                [[maybe_unused]] CallSite where = CallSite::here()) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(from_bytes)
               : "memory");
#else
  simt::cp_async(to, from, 16, static_cast<unsigned>(from_bytes), where);
#endif
}

/// 4 bytes, through L1; zero when `from_bytes` is 0.
INNERKV_DEVICE void cp_async_4(void* to, const void* from, int from_bytes = 4,
                               [[maybe_unused]] CallSite where = CallSite::here()) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(from_bytes)
               : "memory");
#else
  simt::cp_async(to, from, 4, static_cast<unsigned>(from_bytes), where);
#endif
}

/// Closes the group of this thread's copies since the last commit.
INNERKV_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}

/// Waits until at most the kPending last groups of this thread are on their way. Other threads need a barrier
/// too.
template <int kPending>
INNERKV_DEVICE void cp_async_wait_group() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::cp_async_wait(kPending);
#endif
}

// ---- warp-wide: all 32 lanes, converged ----

/// kCount (1, 2, 4) 8 x 8 matrices of 16-bit numbers from shared memory. Lane i gives the address of row i %
/// 8 of matrix i / 8 (lanes of absent matrices: any valid row). Lane l receives of matrix j the numbers 2(l %
/// 4) and the next one of row l / 4, or with kTransposed of column l / 4.
template <int kCount, bool kTransposed = false>
INNERKV_DEVICE void ldmatrix(std::uint32_t (&r)[kCount], const void* row,
                             [[maybe_unused]] CallSite where = CallSite::here()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(__CUDACC__)
  const std::uint32_t at = shared_address(row);
  if constexpr (kCount == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  else if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(at)
                 : "memory");
  else if constexpr (kCount == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (!kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#else
  // The row is read here, by the lane that named it, so that the access is checked like any other.
  emulation::MatrixRow in{};
  if (simt::current_thread->lane < 8 * kCount) in = *static_cast<const emulation::MatrixRow*>(row);
  using Out = emulation::Registers<kCount>;
  const Out out =
      simt::collective<emulation::ldmatrix<kCount, kTransposed, CallSite>, emulation::MatrixRow, Out>(
          "ldmatrix", kFullWarp, in, where);
  for (int i = 0; i < kCount; ++i) r[i] = out.r[i];
#endif
}

/// d += A (16 x 16) B (16 x 8), float32 accumulators. T is __half or __nv_bfloat16.
template <class T>
INNERKV_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                 [[maybe_unused]] CallSite where = CallSite::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  using Kind = std::conditional_t<std::is_same_v<T, __half>, emulation::Half, emulation::BFloat16>;
  const emulation::Fragments<float> in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  using Out = emulation::Accumulators<float>;
  const Out out = simt::collective<emulation::mma_k16<Kind, CallSite>, emulation::Fragments<float>, Out>(
      "mma.m16n8k16", kFullWarp, in, where);
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
#endif
}

/// d = A (16 x 32) B (32 x 8) + c in 32-bit integers, wrapping around. A and B are std::int8_t or
/// std::uint8_t.
template <class A, class B>
INNERKV_DEVICE void mma_m16n8k32(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[2], const std::int32_t (&c)[4],
                                 [[maybe_unused]] CallSite where = CallSite::here()) {
#if defined(__CUDACC__)
  if constexpr (std::is_signed_v<A> && std::is_signed_v<B>)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
          "r"(c[3]));
  else if constexpr (std::is_signed_v<A>)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
          "r"(c[3]));
  else if constexpr (std::is_signed_v<B>)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
          "r"(c[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
          "r"(c[3]));
#else
  const emulation::Fragments<std::int32_t> in{
      {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  using Out = emulation::Accumulators<std::int32_t>;
  const Out out =
      simt::collective<emulation::mma_k32<A, B, CallSite>, emulation::Fragments<std::int32_t>, Out>(
          "mma.m16n8k32", kFullWarp, in, where);
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
#endif
}

}  // namespace innerkv::ptx
