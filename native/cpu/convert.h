// Callers' numbers from one type to another, searched for what is not finite on the way.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/tensor.h"
#include "kernels.h"

namespace innerkv {

bool all_finite(const void* numbers, Dtype dtype, std::size_t count);

/// False when some number is not finite in binary16; `to` then holds anything.
bool convert_to_halves(const Kernels& kernels, const void* from, Dtype dtype, std::size_t count,
                       std::uint16_t* to);

/// False when some number is not finite; `to` then holds anything.
bool convert_to_floats(const Kernels& kernels, const void* from, Dtype dtype, std::size_t count, float* to);

}  // namespace innerkv
