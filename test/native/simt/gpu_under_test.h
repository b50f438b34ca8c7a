// The GPU backend that a test program gets: with INNERKV_ON_GPU the compiled one on the first device, where
// schedules and reports mean nothing; else the same sources, compiled for the emulated GPU
// (innerkv_simt_kernels).
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#ifdef INNERKV_ON_GPU
#include <cuda_runtime_api.h>

#include "cuda/factory.h"

namespace simt {

struct Schedule {};
inline std::vector<Schedule> schedules() { return std::vector<Schedule>(12); }
inline void use(Schedule) {}
/// An error that no call has reported is one, too.
inline std::vector<std::string> take_reports() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return {};
  return {cudaGetErrorString(error)};
}

}  // namespace simt
#else
#include "cuda/gpu_backend.h"
#endif

#include "check.h"

namespace innerkv::test {

#ifdef INNERKV_ON_GPU
inline constexpr bool kOnGpu = true;
/// Prints what is tested, or that nothing is.
inline bool gpu_at_hand(const char* program) {
  cudaDeviceProp properties{};
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0 || cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("%s: *** NOT RUN: there is no usable GPU (%s) ***\n", program, cudaGetErrorName(error));
    return false;
  }
  std::printf("%s on %s, compute capability %d.%d\n", program, properties.name, properties.major,
              properties.minor);
  return true;
}
#else
inline constexpr bool kOnGpu = false;
inline bool gpu_at_hand(const char*) { return true; }
#endif

/// INNERKV_GPU_STRIDE, for slow sanitizers: every so manieth case of what is enumerated.
inline std::size_t stride() { return static_cast<std::size_t>(check::number_from("INNERKV_GPU_STRIDE", 1)); }

/// The device belongs to one process, so one backend serves all tests.
inline std::shared_ptr<Backend> gpu_backend() {
#ifdef INNERKV_ON_GPU
  static const std::shared_ptr<Backend> backend = make_cuda_backend();
  return backend;
#else
  return std::make_shared<gpu::GpuBackend>();
#endif
}

/// What main() returns: of the program NAME_test on the emulated GPU, NAME_gpu_test on a real one.
inline int run_gpu_tests(const std::string& name, int argc, char** argv) {
  const std::string full = kOnGpu ? name + "_gpu" : name;
  if (!gpu_at_hand(full.c_str())) return 77;
  return check::run(full.c_str(), argc, argv);
}

}  // namespace innerkv::test
