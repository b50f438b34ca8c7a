// How weights are stored. The names and the bytes are those of the GGUF format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace innerkv {

enum class TensorType : std::uint8_t {
  kF32,
  kF16,
  kBf16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ6_K,
  kTernary  // 2-bit two's complement, the first of four in the highest bits; the scale is the tensor's
};

struct TensorTypeInfo {
  const char* name;
  int elements, bytes;  // of one block
};

inline constexpr std::array<TensorTypeInfo, 11> kTensorTypes = {{{"F32", 1, 4},
                                                                 {"F16", 1, 2},
                                                                 {"BF16", 1, 2},
                                                                 {"Q8_0", 32, 34},
                                                                 {"Q4_0", 32, 18},
                                                                 {"Q4_1", 32, 20},
                                                                 {"Q5_0", 32, 22},
                                                                 {"Q5_1", 32, 24},
                                                                 {"Q4_K", 256, 144},
                                                                 {"Q6_K", 256, 210},
                                                                 {"TERNARY", 32, 8}}};

constexpr const TensorTypeInfo& info_of(TensorType type) {
  return kTensorTypes[static_cast<std::size_t>(type)];
}

/// Integers with scales, so that integer dot products serve.
constexpr bool is_quantised(TensorType type) { return type >= TensorType::kQ8_0; }

}  // namespace innerkv
