// What the machine offers to CUDA, found out without touching it.
//
// probe_cuda() never throws, never creates a context and keeps nothing. A machine without a GPU or without a
// driver is not a failure: `error` is then cudaErrorNoDevice (100) or cudaErrorInsufficientDriver (35) and
// the CPU is used. driver_version 0 means no driver at all; a driver older than the runtime also gives
// error 35. Versions are CUDA's own numbers, 1000 * major + 10 * minor: 13000 is 13.0.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace innerkv {

struct CudaDevice {
  std::string name;
  int capability_major = 0;
  int capability_minor = 0;
  std::uint64_t total_bytes = 0;
  int sm_count = 0;
};

struct CudaProbe {
  bool compiled = false;  // false: this binary was built without CUDA and the rest is empty
  int driver_version = 0;
  int runtime_version = 0;
  int error = 0;           // the first error met, as a cudaError_t; 0 when all went well
  std::string error_name;  // "cudaErrorNoDevice"; empty when error is 0
  std::vector<CudaDevice> devices;
};

CudaProbe probe_cuda() noexcept;

}  // namespace innerkv
