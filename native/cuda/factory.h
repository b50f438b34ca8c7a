// The GPU backend for those who must not see CUDA's headers: the addon.
#pragma once

#include <memory>

#include "../core/backend.h"

namespace innerkv {

/// On the first CUDA device. Throws Error{kUnsupported} without one, or in a build without CUDA.
std::shared_ptr<Backend> make_cuda_backend();

}  // namespace innerkv
