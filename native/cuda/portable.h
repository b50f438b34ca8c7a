// The language that kernels are written in: CUDA C++ under nvcc, and under a host compiler the same source as
// an emulation on the CPU (test/native/simt), which runs it in any order of threads and finds races, missing
// waits, wrong masks and foreign memory.
//
// Rules, so that both compilers and every GPU agree:
// - Kernels include this header and ptx.h only; inline PTX lives in ptx.h, triple chevrons here.
// - Static shared memory by INNERKV_SHARED at function scope, dynamic by dynamic_shared(); nothing mutable is
//   global.
// - A barrier has one call site that every thread of the block reaches; a kernel is left by whole warps,
// after
//   its last barrier. Masks are full unless the others provably wait elsewhere; no __activemask().
// - Lanes that hand data over through memory call __syncwarp(); a shuffle orders no memory.
// - Between blocks only atomics, with __threadfence() on both sides; no waiting for another block.
// - Vector loads through types of their true alignment (uint4, float4); no branches on __CUDA_ARCH__.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/// INNERKV_KERNEL(128) void name(Args args): the block is of at most 128 threads. A second number asks for so
/// many blocks a multiprocessor; 1 keeps ptxas from spilling a few registers to make room for more.
#define INNERKV_KERNEL(...) __global__ __launch_bounds__(__VA_ARGS__)
#define INNERKV_DEVICE __device__ __forceinline__
/// INNERKV_SHARED(float, tile, [4][32]): a static shared array or, without dimensions, an object.
#define INNERKV_SHARED(type, name, dimensions) __shared__ type name dimensions

namespace innerkv {

/// The caller's line, for the emulation's reports; nothing on the GPU.
struct CallSite {
  static constexpr __host__ __device__ CallSite here() { return {}; }
};

/// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
INNERKV_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char innerkv_dynamic_shared[];
  return reinterpret_cast<T*>(innerkv_dynamic_shared);
}

/// To be said first in a kernel whose code depends on its block's size.
template <int kThreads>
INNERKV_DEVICE void expect_block() {
  __builtin_assume(blockDim.x == kThreads && blockDim.y == 1 && blockDim.z == 1);
}

/// Dynamic shared memory beyond 48 KiB has to be asked for, once per kernel.
inline cudaError_t allow_shared(const void* kernel, std::size_t bytes) {
  if (bytes <= std::size_t{48} << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... P>
inline cudaError_t enqueue(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                           cudaStream_t stream, const P&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace innerkv

#else
#include "simt/simt.h"

#define INNERKV_KERNEL(...)
#define INNERKV_DEVICE inline
// NOLINTNEXTLINE
#define INNERKV_SHARED(type, name, dimensions)                                     \
  using shared_type_of_##name = type dimensions;                                   \
  static char shared_site_of_##name;                                               \
  shared_type_of_##name& name = *static_cast<shared_type_of_##name*>(              \
      ::simt::shared_static(&shared_site_of_##name, sizeof(shared_type_of_##name), \
                            alignof(shared_type_of_##name), ::simt::Where::here()))

namespace innerkv {

using CallSite = simt::Where;

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(simt::shared_dynamic());
}

template <int kThreads>
inline void expect_block(CallSite where = CallSite::here()) {
  simt::expect_block(kThreads, where);
}

inline cudaError_t allow_shared(const void*, std::size_t) { return cudaSuccess; }

template <class... P>
inline cudaError_t enqueue(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                           cudaStream_t, const P&... arguments) {
  return simt::launch(CallSite::here(), kernel, grid, block, shared_bytes, arguments...);
}

}  // namespace innerkv
#endif

#include "launch_list.h"

namespace innerkv {

/// Enqueues a kernel, or puts it down where a list is open; arguments are converted to its parameters' types.
template <class... P, class... A>
inline cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                          cudaStream_t stream, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "a kernel is launched with all its arguments");
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes))
    return error;
  if (!LaunchList::open)
    return enqueue<P...>(kernel, grid, block, shared_bytes, stream,
                         static_cast<P>(std::forward<A>(arguments))...);
  LaunchList::open->add<P...>(kernel, grid, block, shared_bytes,
                              static_cast<P>(std::forward<A>(arguments))...);
  return cudaSuccess;
}

}  // namespace innerkv
