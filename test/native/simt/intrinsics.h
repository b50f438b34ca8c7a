// CUDA's built-in names for kernels that a host compiler reads. Only what kernels use: a new one comes with a
// check in self_test.cpp. Included by simt.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#define threadIdx (::simt::current_thread->index)
#define blockIdx (::simt::current_grid.block)
#define blockDim (::simt::current_grid.block_size)
#define gridDim (::simt::current_grid.grid_size)

namespace simt {

struct ShuffleIn {
  std::uint64_t bits;
  int source;
};
SIMT_QUIET inline void shuffle(const ShuffleIn (&in)[32], std::uint64_t (&out)[32], unsigned mask,
                               Where where) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    if (!(mask >> in[lane].source & 1u))
      return fail_here(Kind::kMask, "shuffle from a lane not in the mask", where);
    out[lane] = in[in[lane].source].bits;
  }
}
SIMT_QUIET inline void vote(const bool (&in)[32], unsigned (&out)[32], unsigned mask, Where) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (mask >> lane & 1u) && in[lane] ? 1u << lane : 0u;
  for (unsigned& word : out) word = bits;
}
SIMT_QUIET inline void match(const std::uint64_t (&in)[32], unsigned (&out)[32], unsigned mask, Where) {
  for (int lane = 0; lane < 32; ++lane)
    for (int other = 0; other < 32; ++other)
      if ((mask >> other & 1u) && in[lane] == in[other]) out[lane] |= 1u << other;
}
template <class T, class F>
SIMT_QUIET void reduce(const T (&in)[32], T (&out)[32], unsigned mask, Where) {
  T total = in[std::countr_zero(mask)];
  for (int lane = std::countr_zero(mask) + 1; lane < 32; ++lane)
    if (mask >> lane & 1u) total = F{}(total, in[lane]);
  for (T& value : out) value = total;
}
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

/// `inside` is false where CUDA returns the caller's own value.
template <class T>
inline T shuffle_from(unsigned mask, T value, int source, bool inside, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleIn in{0, inside ? source : static_cast<int>(current_thread->lane)};
  std::memcpy(&in.bits, &value, sizeof(T));
  const std::uint64_t bits = collective<shuffle, ShuffleIn, std::uint64_t>("shuffle", mask, in, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class F>
SIMT_QUIET_ATOMIC inline T update(T* memory, F change, Where where) {
  using Word = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
  static_assert(sizeof(T) == sizeof(Word));
  before_atomic(memory, sizeof(T), where);
  Word* word = reinterpret_cast<Word*>(memory);
  Word seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    const T old = std::bit_cast<T>(seen);
    const Word wanted = std::bit_cast<Word>(static_cast<T>(change(old)));
    if (__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return old;
  }
}

}  // namespace simt

// ---- block and warp ----

inline void __syncthreads(simt::Where where = simt::Where::here()) { simt::barrier(0, where); }
inline int __syncthreads_count(int vote, simt::Where where = simt::Where::here()) {
  return simt::barrier(vote != 0, where);
}
inline int __syncthreads_or(int vote, simt::Where where = simt::Where::here()) {
  return simt::barrier(vote != 0, where) != 0;
}
inline int __syncthreads_and(int vote, simt::Where where = simt::Where::here()) {
  return simt::barrier(vote == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::here()) {
  simt::meet("__syncwarp", mask, nullptr, 0, nullptr, 0, nullptr, true, where);
}
inline void __threadfence() { simt::fence(); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     simt::Where where = simt::Where::here()) {
  const int lane = static_cast<int>(simt::current_thread->lane);
  return simt::shuffle_from(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), true, where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                         simt::Where where = simt::Where::here()) {
  const int lane = static_cast<int>(simt::current_thread->lane), source = lane ^ flip;
  return simt::shuffle_from(mask, value, source, source < (lane & ~(width - 1)) + width, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                          simt::Where where = simt::Where::here()) {
  const int lane = static_cast<int>(simt::current_thread->lane), source = lane + static_cast<int>(by);
  return simt::shuffle_from(mask, value, source, source < (lane & ~(width - 1)) + width, where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                        simt::Where where = simt::Where::here()) {
  const int lane = static_cast<int>(simt::current_thread->lane), source = lane - static_cast<int>(by);
  return simt::shuffle_from(mask, value, source, source >= (lane & ~(width - 1)), where);
}
inline unsigned __ballot_sync(unsigned mask, int vote, simt::Where where = simt::Where::here()) {
  return simt::collective<simt::vote, bool, unsigned>("__ballot_sync", mask, vote != 0, where);
}
inline int __any_sync(unsigned mask, int vote, simt::Where where = simt::Where::here()) {
  return simt::collective<simt::vote, bool, unsigned>("__any_sync", mask, vote != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, simt::Where where = simt::Where::here()) {
  return simt::collective<simt::vote, bool, unsigned>("__all_sync", mask, vote == 0, where) == 0;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, simt::Where where = simt::Where::here()) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return simt::collective<simt::match, std::uint64_t, unsigned>("__match_any_sync", mask, bits, where);
}

namespace simt {
template <class F, class T>
inline T reduce_sync(unsigned mask, T value, Where where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return collective<reduce<T, F>, T, T>("__reduce_sync", mask, value, where);
}
}  // namespace simt
template <class T>
inline T __reduce_add_sync(unsigned mask, T value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<std::plus<T>>(mask, value, where);
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<simt::Least>(mask, value, where);
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<simt::Most>(mask, value, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<std::bit_and<unsigned>>(mask, value, where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<std::bit_or<unsigned>>(mask, value, where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::here()) {
  return simt::reduce_sync<std::bit_xor<unsigned>>(mask, value, where);
}

// ---- atomics: relaxed, as on the GPU ----

template <class T>
inline T atomicAdd(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return old + value; }, where);
}
template <class T>
inline T atomicMax(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return old < value ? value : old; }, where);
}
template <class T>
inline T atomicMin(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return value < old ? value : old; }, where);
}
template <class T>
inline T atomicOr(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return old | value; }, where);
}
template <class T>
inline T atomicAnd(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return old & value; }, where);
}
template <class T>
inline T atomicExch(T* memory, std::type_identity_t<T> value, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T) { return value; }, where);
}
template <class T>
inline T atomicCAS(T* memory, std::type_identity_t<T> expected, std::type_identity_t<T> value,
                   simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](T old) { return old == expected ? value : old; }, where);
}
inline unsigned atomicInc(unsigned* memory, unsigned limit, simt::Where where = simt::Where::here()) {
  return simt::update(memory, [&](unsigned old) { return old >= limit ? 0u : old + 1u; }, where);
}

// ---- one lane ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> (by & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (by & 31u) >> 32);
}
// cuda_fp16.h gives these to device code only. float64 holds the product exactly; the sum is rounded twice,
// which can differ from one rounding only in rare ties.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * static_cast<double>(__half2float(b)) +
                       static_cast<double>(__half2float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
template <class T>
  requires std::is_arithmetic_v<T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
  requires std::is_arithmetic_v<T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
