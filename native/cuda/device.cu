#include <atomic>
#include <mutex>
#include <string>

#include "../core/error.h"
#include "device.h"
#include "factory.h"
#include "gpu_backend.h"

namespace innerkv {

namespace gpu::device {
namespace {

std::atomic<cudaError_t> noted{cudaSuccess};

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

}  // namespace

cudaStream_t stream() {
  static cudaStream_t made = [] {
    cudaStream_t fresh = nullptr;
    check(cudaStreamCreateWithFlags(&fresh, cudaStreamNonBlocking), "Opening a stream");
    return fresh;
  }();
  return made;
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaSuccess) return memory;
  cudaGetLastError();  // this one is reported here; later calls must not trip over it
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
              "The GPU refused " + std::to_string(bytes) + " bytes: " + text_of(error) + ".");
}

void release(void* memory) noexcept {
  if (memory) note(cudaFree(memory));
}

bool owns(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

void clear(void* memory, std::size_t bytes) noexcept { note(cudaMemsetAsync(memory, 0, bytes, stream())); }

void copy(void* to, const void* from, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()));
  if (!owns(to)) note(cudaStreamSynchronize(stream()));
}

void check(cudaError_t error, const char* what) {
  const cudaError_t before = noted.exchange(cudaSuccess);
  if (error == cudaSuccess) error = before;
  if (error != cudaSuccess)
    throw Error(ErrorCode::kInternal, std::string(what) + " failed on the GPU: " + text_of(error) + ".");
}

void note(cudaError_t error) noexcept {
  if (error == cudaSuccess) return;
  cudaError_t none = cudaSuccess;
  noted.compare_exchange_strong(none, error);
}

}  // namespace gpu::device

std::shared_ptr<Backend> make_cuda_backend() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw Error(ErrorCode::kUnsupported, std::string("There is no usable CUDA device: ") +
                                             (error == cudaSuccess ? "none found" : cudaGetErrorName(error)) +
                                             ".");
  }
  gpu::device::check(cudaSetDevice(0), "Choosing the GPU");
  return std::make_shared<gpu::GpuBackend>();
}

}  // namespace innerkv
