// The mark that lets the same header be read by a host and a device compiler. Nothing else belongs here.
//
// Always inlined on the host: a shared function that is compiled with AVX-512 enabled in one file must never
// be merged by the linker into the scalar path of another.
#pragma once

#if defined(__CUDACC__)
#define INNERKV_HD __host__ __device__ __forceinline__
#else
#define INNERKV_HD inline __attribute__((always_inline))
#endif
