// Device memory for tests that run both on the emulator and on a GPU: exact in size, fresh memory is
// uninitialised.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "cuda/portable.h"

namespace simt {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) {
#if defined(__CUDACC__)
    if (cudaMalloc(&memory_, count * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
#else
    memory_ = static_cast<T*>(device_allocate(count * sizeof(T)));
#endif
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { upload(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(memory_);
#else
    device_free(memory_);
#endif
  }

  T* get() const { return memory_; }
  std::size_t size() const { return count_; }
  void upload(const std::vector<T>& values) {
#if defined(__CUDACC__)
    cudaMemcpy(memory_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
#else
    device_upload(memory_, values.data(), values.size() * sizeof(T));
#endif
  }
  std::vector<T> download() const {
    std::vector<T> values(count_);
#if defined(__CUDACC__)
    cudaMemcpy(values.data(), memory_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
#else
    device_download(values.data(), memory_, count_ * sizeof(T));
#endif
    return values;
  }

 private:
  T* memory_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace simt
