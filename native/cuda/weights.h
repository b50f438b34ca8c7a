// A matrix of weights on the device: the bytes of its stored form, sorted so that lanes read 16 of them at a
// time.
//
// A block of the file mixes codes with scales and begins at any even address. Here the codes of a row follow
// each other, so do its upper bits (5- and 6-bit types), and so do its scales: three planes of rows, each row
// padded with zeros to a multiple of 16 bytes. Nothing is rounded; a matrix takes its stored bytes and the
// padding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../model/tensor_type.h"

namespace innerkv::gpu {

/// Where the planes of a block lie in the file, in bytes.
struct BlockPlanes {
  int codes_at, codes, high_at, high, scales_at, scales;
};

constexpr BlockPlanes planes_of(TensorType type) {
  switch (type) {
    case TensorType::kQ8_0:
      return {2, 32, 0, 0, 0, 2};
    case TensorType::kQ4_0:
      return {2, 16, 0, 0, 0, 2};
    case TensorType::kQ4_1:
      return {4, 16, 0, 0, 0, 4};
    case TensorType::kQ5_0:
      return {6, 16, 2, 4, 0, 2};
    case TensorType::kQ5_1:
      return {8, 16, 4, 4, 0, 4};
    case TensorType::kQ4_K:
      return {16, 128, 0, 0, 0, 16};
    case TensorType::kQ6_K:
      return {0, 128, 128, 64, 192, 18};
    case TensorType::kTernary:
      return {0, 8, 0, 0, 0, 0};
    case TensorType::kF32:
      return {0, 4, 0, 0, 0, 0};
    case TensorType::kF16:
    case TensorType::kBf16:
      return {0, 2, 0, 0, 0, 0};
  }
  return {};
}

struct MatrixArgs {
  const std::uint8_t *codes = nullptr, *high = nullptr, *scales = nullptr;  // planes; nullptr: empty
  int code_stride = 0, high_stride = 0, scale_stride = 0;                   // bytes from row to row
  int rows = 0, columns = 0;
  TensorType type = TensorType::kF32;
  float scale = 1;  // of all numbers; those who read weights leave it out
};

/// A matrix of the given shape in memory at `base` (which may be nullptr to ask for `*bytes` only).
inline MatrixArgs matrix_at(std::uint8_t* base, TensorType type, int rows, int columns, std::size_t* bytes) {
  const BlockPlanes planes = planes_of(type);
  const int blocks = columns / info_of(type).elements;
  std::size_t used = 0;
  MatrixArgs matrix;
  const auto plane = [&](int block_bytes, const std::uint8_t*& to, int& stride) {
    if (block_bytes == 0) return;
    stride = (block_bytes * blocks + 15) / 16 * 16;
    to = base ? base + used : nullptr;
    used += static_cast<std::size_t>(stride) * static_cast<std::size_t>(rows);
  };
  plane(planes.codes, matrix.codes, matrix.code_stride);
  plane(planes.high, matrix.high, matrix.high_stride);
  plane(planes.scales, matrix.scales, matrix.scale_stride);
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.type = type;
  *bytes = used;
  return matrix;
}

}  // namespace innerkv::gpu
