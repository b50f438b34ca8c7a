// From a type of weights at run time to one at compile time, for host code that picks kernels.
#pragma once

#include <type_traits>

#include "../model/tensor_type.h"

namespace innerkv::gpu {

/// Returns body(integral_constant of the type).
template <class Body>
auto with_tensor_type(TensorType type, Body&& body) {
#define INNERKV_CASE(name) \
  case TensorType::name:   \
    return body(std::integral_constant<TensorType, TensorType::name>{});
  switch (type) {
    INNERKV_CASE(kQ8_0)
    INNERKV_CASE(kQ4_0)
    INNERKV_CASE(kQ4_1)
    INNERKV_CASE(kQ5_0)
    INNERKV_CASE(kQ5_1)
    INNERKV_CASE(kQ4_K)
    INNERKV_CASE(kQ6_K)
    INNERKV_CASE(kTernary)
    INNERKV_CASE(kF16)
    INNERKV_CASE(kBf16)
    default:
      return body(std::integral_constant<TensorType, TensorType::kF32>{});
  }
#undef INNERKV_CASE
}

}  // namespace innerkv::gpu
