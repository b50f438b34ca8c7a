// The few things the host asks of a device, so that the backend's host code also runs against the emulated
// GPU of the tests. device.cu is the CUDA runtime's version.
//
// Everything happens in the order asked, on one stream; copies to the host wait for what came before.
#pragma once

#include <cstddef>
#include <string>

#include "../core/backend.h"
#include "portable.h"

namespace innerkv::gpu::device {

cudaStream_t stream();
void* allocate(std::size_t bytes);  // throws Error{kOutOfMemory}
void release(void* memory) noexcept;
bool owns(const void* memory);  // device memory, ours or borrowed
// These two never throw: an error is noted.
void clear(void* memory, std::size_t bytes) noexcept;
void copy(void* to, const void* from, std::size_t bytes) noexcept;  // any direction

/// Host memory that the device copies by itself. Throws Error{kOutOfMemory}.
void* allocate_pinned(std::size_t bytes);
void release_pinned(void* memory) noexcept;
/// copy() from or to such memory that returns at once: the host must leave it alone until a mark that was set
/// afterwards has been waited for.
void copy_later(void* to, const void* from, std::size_t bytes) noexcept;

/// A point in the order of things; none before set().
class Mark {
 public:
  Mark() = default;
  Mark(const Mark&) = delete;
  ~Mark();
  void set() noexcept;
  void wait() noexcept;  // an error is noted

 private:
  void* event_ = nullptr;
};

/// Everything asked so far is done; an error is noted.
void synchronize() noexcept;
/// What is asked next comes after what `other` has been given so far, and the other way round.
void follow(cudaStream_t other) noexcept;
void lead(cudaStream_t other) noexcept;

/// As Backend's.
std::string objection(const void* memory, std::size_t bytes);
MemoryHandle export_memory(void* memory);
void* import_memory(const MemoryHandle& handle);
void close_memory(void* memory) noexcept;

/// Throws Error when this launch, or anything noted before it, failed.
void check(cudaError_t error, const char* what);
/// Remembers an error for the next check().
void note(cudaError_t error) noexcept;

}  // namespace innerkv::gpu::device
