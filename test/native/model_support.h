// Random weights in every stored type, for tests of the model runner's kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "model/tensor_type.h"
#include "numerics/half.h"

namespace innerkv::test {

inline constexpr TensorType kAllTypes[] = {TensorType::kF32,  TensorType::kF16,    TensorType::kBf16,
                                           TensorType::kQ8_0, TensorType::kQ4_0,   TensorType::kQ4_1,
                                           TensorType::kQ5_0, TensorType::kQ5_1,   TensorType::kQ4_K,
                                           TensorType::kQ6_K, TensorType::kTernary};

/// `count` numbers as whole blocks: codes of every value, numbers of standard deviation of about `spread`.
inline std::vector<std::uint8_t> random_blocks(TensorType type, int count, float spread,
                                               check::Random& random) {
  const TensorTypeInfo& info = info_of(type);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count / info.elements * info.bytes));
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
  for (std::uint8_t* block = bytes.data(); block < bytes.data() + bytes.size(); block += info.bytes) {
    const auto half = [&](int place, float value) {
      const std::uint16_t bits = half_bits(value);
      std::memcpy(block + place, &bits, 2);
    };
    const float factor = spread * (0.5f + static_cast<float>(random.uniform())),
                number = spread * random.normal();
    // A uniform code of n levels has a standard deviation of n / sqrt(12).
    const auto affine = [&](int levels, bool minimum) {
      const float d = factor * 3.46f / static_cast<float>(levels);
      half(0, d);
      if (minimum) half(2, -d * 0.5f * static_cast<float>(levels - 1));
    };
    switch (type) {
      case TensorType::kF32:
        std::memcpy(block, &number, 4);
        break;
      case TensorType::kF16:
        half(0, number);
        break;
      case TensorType::kBf16: {
        std::uint32_t bits;
        std::memcpy(&bits, &number, 4);
        bits >>= 16;
        std::memcpy(block, &bits, 2);
        break;
      }
      case TensorType::kQ8_0:
        affine(256, false);
        break;
      case TensorType::kQ4_0:
        affine(16, false);
        break;
      case TensorType::kQ4_1:
        affine(16, true);
        break;
      case TensorType::kQ5_0:
        affine(32, false);
        break;
      case TensorType::kQ5_1:
        affine(32, true);
        break;
      case TensorType::kQ4_K:
        half(0, factor / (32 * 4.6f));
        half(2, 7.5f * factor / (32 * 4.6f));
        break;
      case TensorType::kTernary:  // codes of -2 to 1, and the scale is the tensor's
        break;
      case TensorType::kQ6_K:
        half(208, factor / (74 * 18.5f));
        break;
    }
  }
  return bytes;
}

}  // namespace innerkv::test
