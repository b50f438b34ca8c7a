#include "cuda/probe.h"

#ifdef INNERKV_HAS_CUDA
#include <cuda_runtime_api.h>

#include <exception>
#endif

namespace innerkv {

#ifdef INNERKV_HAS_CUDA

namespace {

void read_devices(CudaProbe& probe) {
  const auto failed = [&probe](cudaError_t error) {
    if (error == cudaSuccess) return false;
    cudaGetLastError();  // the runtime remembers errors; later calls must not trip over this one
    probe.error = error;
    probe.error_name = cudaGetErrorName(error);
    return true;
  };
  if (failed(cudaRuntimeGetVersion(&probe.runtime_version))) return;
  if (failed(cudaDriverGetVersion(&probe.driver_version))) return;
  int count = 0;
  if (failed(cudaGetDeviceCount(&count))) return;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (failed(cudaGetDeviceProperties(&properties, device))) return;
    probe.devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                             properties.multiProcessorCount});
  }
}

}  // namespace

CudaProbe probe_cuda() noexcept {
  CudaProbe probe;
  probe.compiled = true;
  try {
    read_devices(probe);
  } catch (
      const std::exception&) {  // only the strings and the vector can throw, when host memory is exhausted
    probe.devices.clear();
    probe.error_name.clear();
    probe.error = cudaErrorMemoryAllocation;
  }
  return probe;
}

#else

CudaProbe probe_cuda() noexcept { return {}; }

#endif

}  // namespace innerkv
