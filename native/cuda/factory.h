// The GPU backend for those who must not see CUDA's headers: the addon.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "../core/backend.h"
#include "../model/device.h"
#include "../model/model.h"

namespace innerkv {

/// On the first CUDA device. `stream`: a cudaStream_t of the caller's, with whose work calls are kept in
/// order. Throws Error{kUnsupported} without a device, or in a build without CUDA.
std::shared_ptr<Backend> make_cuda_backend(std::optional<std::uint64_t> stream = std::nullopt);

/// A model for caches of that backend, its weights copied to the device. Throws Error{kOutOfMemory}.
std::unique_ptr<ModelDevice> make_cuda_model(std::shared_ptr<const Model> model);

}  // namespace innerkv
