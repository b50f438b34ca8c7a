// cuda/device.h on the emulated GPU. Includes the backend's host code, so that a program has one of the two.
#include "cuda/device.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"

namespace innerkv::gpu::device {
namespace {
std::map<const std::uint8_t*, std::size_t> regions;
cudaError_t noted = cudaSuccess;
}  // namespace

cudaStream_t stream() { return nullptr; }

void* allocate(std::size_t bytes) {
  void* memory;
  try {
    memory = simt::device_allocate(bytes);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "The emulated GPU has no " + std::to_string(bytes) + " bytes left.");
  }
  regions[static_cast<const std::uint8_t*>(memory)] = bytes;
  return memory;
}

void release(void* memory) noexcept {
  if (!memory) return;
  regions.erase(static_cast<const std::uint8_t*>(memory));
  simt::device_free(memory);
}

bool owns(const void* memory) {
  const auto* byte = static_cast<const std::uint8_t*>(memory);
  const auto after = regions.upper_bound(byte);
  return after != regions.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

void clear(void* memory, std::size_t bytes) noexcept {
  const std::vector<std::uint8_t> zeros(bytes);
  simt::device_upload(memory, zeros.data(), bytes);
}

void copy(void* to, const void* from, std::size_t bytes) noexcept {
  std::vector<std::uint8_t> passing(bytes);
  if (owns(from))
    simt::device_download(passing.data(), from, bytes);
  else
    std::memcpy(passing.data(), from, bytes);
  if (owns(to))
    simt::device_upload(to, passing.data(), bytes);
  else
    std::memcpy(to, passing.data(), bytes);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) error = noted;
  noted = cudaSuccess;
  if (error != cudaSuccess)
    throw Error(ErrorCode::kInternal, std::string(what) + " failed on the emulated GPU.");
}

void note(cudaError_t error) noexcept {
  if (noted == cudaSuccess) noted = error;
}

}  // namespace innerkv::gpu::device
