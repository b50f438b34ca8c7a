// The few things the host asks of a device, so that the backend's host code also runs against the emulated
// GPU of the tests. device.cu is the CUDA runtime's version.
//
// Everything happens in the order asked, on one stream; copies to the host wait for what came before.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "../core/backend.h"
#include "portable.h"

namespace innerkv::gpu::device {

cudaStream_t stream();
void* allocate(std::size_t bytes);  // throws Error{kOutOfMemory}
bool owns(const void* memory);      // device memory, ours or borrowed
/// Host memory that the device copies by itself. Throws Error{kOutOfMemory}.
void* allocate_pinned(std::size_t bytes);
void release_pinned(void* memory) noexcept;

/// What the functions below do once flush() has enqueued what was put down before.
namespace raw {
void release(void* memory) noexcept;
void clear(void* memory, std::size_t bytes) noexcept;
void copy(void* to, const void* from, std::size_t bytes) noexcept;
void copy_later(void* to, const void* from, std::size_t bytes) noexcept;
void set(void*& event) noexcept;
void wait(void* event) noexcept;
void forget(void* event) noexcept;
void synchronize() noexcept;
void follow(cudaStream_t other) noexcept;
void lead(cudaStream_t other) noexcept;
}  // namespace raw

/// Enqueues what the open recording of this thread has put down; recording.h.
void flush() noexcept;

// None of these throws: an error is noted.
inline void release(void* memory) noexcept {
  if (memory) flush();
  raw::release(memory);
}
inline void clear(void* memory, std::size_t bytes) noexcept {
  flush();
  raw::clear(memory, bytes);
}
/// Any direction.
inline void copy(void* to, const void* from, std::size_t bytes) noexcept {
  flush();
  raw::copy(to, from, bytes);
}
/// copy() from or to pinned memory that returns at once: the host must leave it alone until a mark that was
/// set afterwards has been waited for.
inline void copy_later(void* to, const void* from, std::size_t bytes) noexcept {
  flush();
  raw::copy_later(to, from, bytes);
}

/// A point in the order of things; none before set().
class Mark {
 public:
  Mark() = default;
  Mark(const Mark&) = delete;
  ~Mark() { raw::forget(event_); }
  void set() noexcept {
    flush();
    raw::set(event_);
  }
  void wait() noexcept { raw::wait(event_); }  // an error is noted

 private:
  void* event_ = nullptr;
};

/// Everything asked so far is done; an error is noted.
inline void synchronize() noexcept {
  flush();
  raw::synchronize();
}
/// What is asked next comes after what `other` has been given so far, and the other way round.
inline void follow(cudaStream_t other) noexcept {
  flush();
  raw::follow(other);
}
inline void lead(cudaStream_t other) noexcept {
  flush();
  raw::lead(other);
}

/// Pinned memory on its way to the device; none without bytes.
struct PinnedCopy {
  void* to = nullptr;
  const void* from = nullptr;
  std::size_t bytes = 0;
};

/// A copy, if there is one, and kernels, each after the one before, given to the device as one piece of work.
/// Changes count for later launches only.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual cudaError_t set(const PinnedCopy& copy) = 0;
  /// The kernel of a node stays.
  virtual cudaError_t set(std::size_t index, const KernelNode& node, const std::byte* parameters) = 0;
  virtual cudaError_t launch() = 0;
};
/// `parameters`: what KernelNode::at counts from. Null where the device refuses.
std::unique_ptr<Graph> make_graph(const PinnedCopy& copy, std::span<const KernelNode> nodes,
                                  const std::byte* parameters) noexcept;
/// Padding inside parameters has no value of its own.
bool same_parameters(const std::byte* a, const std::byte* b, std::size_t bytes) noexcept;

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
