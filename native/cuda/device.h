// The few things the host asks of a device, so that the backend's host code also runs against the emulated
// GPU of the tests. device.cpp is the CUDA runtime's version.
//
// Everything happens in the order asked, on one stream; copies to the host wait for what came before.
#pragma once

#include <cstddef>

#include "portable.h"

namespace innerkv::gpu::device {

cudaStream_t stream();
void* allocate(std::size_t bytes);  // throws Error{kOutOfMemory}
void release(void* memory) noexcept;
bool owns(const void* memory);  // device memory, ours or borrowed
// These two never throw: an error is noted.
void clear(void* memory, std::size_t bytes) noexcept;
void copy(void* to, const void* from, std::size_t bytes) noexcept;  // any direction
/// Throws Error when this launch, or anything noted before it, failed.
void check(cudaError_t error, const char* what);
/// Remembers an error for the next check().
void note(cudaError_t error) noexcept;

}  // namespace innerkv::gpu::device
