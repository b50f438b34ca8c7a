// Weights in the registers of a lane. A unit is what a lane reads with 16-byte loads: 32 columns of a
// quantised row (one or two loads of codes, half of one if they have 2 bits), 8 columns of 16-bit and 4 of
// 32-bit floats. Lane l of a warp takes units l, l + 32, ..., so its loads lie side by side.
//
// A quantised unit is two pieces of 16 columns; a piece lies in one segment (16 columns that begin at a
// multiple of 16) and has one scale and one offset: value = scale * code + offset. In Q4_K and Q6_K the two
// nibbles of a byte belong to segments apart, because a lane takes 16 bytes of nibbles as they are stored.
#pragma once

#include "portable.h"
#include "ptx.h"
#include "weights.h"

namespace innerkv::gpu {

INNERKV_DEVICE float float_of_half(std::uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

/// Bit i of the low 4 as the value 16 or 0 of byte i.
INNERKV_DEVICE std::uint32_t fifth_bits(std::uint32_t bits) {
  return ((bits & 15u) * 0x00204081u & 0x01010101u) << 4;
}

template <TensorType kType, bool kQuantised = is_quantised(kType)>
struct Weights;

template <TensorType kType>
struct Weights<kType, true> {
  static constexpr int kColumns = 32, kQuads = 8;
  static constexpr bool kTernary = kType == TensorType::kTernary;
  static constexpr bool kSigned = kType == TensorType::kQ8_0 || kTernary, kOffset = !kSigned;
  /// Whether both pieces have the scale of one group of 32 activations.
  static constexpr bool kOneScale = kType != TensorType::kQ4_K && kType != TensorType::kQ6_K;

  std::uint32_t words[2][4];
  float scale[2], offset[2];

  static INNERKV_DEVICE int segment(int unit, int piece) {
    if constexpr (kType == TensorType::kQ4_K) return 4 * (unit / 2) + 2 * piece + unit % 2;
    if constexpr (kType == TensorType::kQ6_K) return 8 * (unit / 4) + 4 * piece + unit % 4;
    return 2 * unit + piece;
  }
  /// First column of four whose codes are bytes of one word.
  static INNERKV_DEVICE int column(int unit, int quad) {
    return 16 * segment(unit, quad / 4) + 4 * (quad % 4);
  }

  INNERKV_DEVICE void load(const MatrixArgs& matrix, int row, int unit) {
    const std::uint8_t* codes = matrix.codes + std::ptrdiff_t{row} * matrix.code_stride;
    const std::uint8_t* scales = matrix.scales + std::ptrdiff_t{row} * matrix.scale_stride;
    const auto sixteen = [](const std::uint8_t* from) {
      return ptx::load_streaming(reinterpret_cast<const uint4*>(from));
    };
    const auto half_at = [](const std::uint8_t* from) {
      return float_of_half(*reinterpret_cast<const std::uint16_t*>(from));
    };
    if constexpr (kType == TensorType::kQ8_0) {
      put(0, sixteen(codes + 32 * unit));
      put(1, sixteen(codes + 32 * unit + 16));
      scale[0] = scale[1] = half_at(scales + 2 * unit);
      offset[0] = offset[1] = 0.0f;
      return;
    }
    if constexpr (kTernary) {  // four codes of two bits a byte, the first in the highest bits
      const uint2 all = ptx::load_streaming(reinterpret_cast<const uint2*>(codes + 8 * unit));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const std::uint32_t byte = (i < 4 ? all.x : all.y) >> 8 * (i % 4);
        const std::uint32_t four =
            (byte >> 6 & 3u) | (byte >> 4 & 3u) << 8 | (byte >> 2 & 3u) << 16 | (byte & 3u) << 24;
        words[i / 4][i % 4] = four | (four & 0x02020202u) * 126u;  // the sign in all upper bits
      }
      scale[0] = scale[1] = 1.0f;
      offset[0] = offset[1] = 0.0f;
      return;
    }
    const uint4 both = sixteen(codes + 16 * unit);
    put(0, both, 0, 0x0f0f0f0fu);
    put(1, both, 4, 0x0f0f0f0fu);
    if constexpr (kType == TensorType::kQ5_0 || kType == TensorType::kQ5_1) {
      const std::uint8_t* high = matrix.high + std::ptrdiff_t{row} * matrix.high_stride + 4 * unit;
      const std::uint32_t bits = ptx::load_streaming(reinterpret_cast<const unsigned*>(high));
#pragma unroll
      for (int piece = 0; piece < 2; ++piece)
#pragma unroll
        for (int i = 0; i < 4; ++i) words[piece][i] |= fifth_bits(bits >> (16 * piece + 4 * i));
    }
    if constexpr (kType == TensorType::kQ4_0 || kType == TensorType::kQ5_0) {
      scale[0] = scale[1] = half_at(scales + 2 * unit);
      offset[0] = offset[1] = (kType == TensorType::kQ4_0 ? -8.0f : -16.0f) * scale[0];
    }
    if constexpr (kType == TensorType::kQ4_1 || kType == TensorType::kQ5_1) {
      const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(scales + 4 * unit);
      scale[0] = scale[1] = float_of_half(pair & 0xffffu);
      offset[0] = offset[1] = float_of_half(pair >> 16);
    }
    if constexpr (kType == TensorType::kQ4_K) {
      // Two halves, then 8 scales and 8 minima of 6 bits in the bytes of three words.
      const uint4 packed = *reinterpret_cast<const uint4*>(scales + 16 * (unit / 8));
      const float d = float_of_half(packed.x & 0xffffu), minimum = float_of_half(packed.x >> 16);
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int part = unit % 8 / 2 * 2 + piece, shift = 8 * (part % 4);
        const std::uint32_t y = packed.y >> shift & 255u, z = packed.z >> shift & 255u,
                            w = packed.w >> shift & 255u;
        const std::uint32_t s = part < 4 ? y & 63u : (w & 15u) | y >> 6 << 4,
                            m = part < 4 ? z & 63u : w >> 4 | z >> 6 << 4;
        scale[piece] = d * static_cast<float>(s);
        offset[piece] = -(minimum * static_cast<float>(m));
      }
    }
    if constexpr (kType == TensorType::kQ6_K) {
      const int within = unit % 8, half = within / 4, quarter = within % 4 / 2;
      const std::uint8_t* high = matrix.high + std::ptrdiff_t{row} * matrix.high_stride + 64 * (unit / 8) +
                                 32 * half + 16 * (within % 2);
      const uint4 upper = sixteen(high);
      const std::uint32_t from[4] = {upper.x, upper.y, upper.z, upper.w};
#pragma unroll
      for (int piece = 0; piece < 2; ++piece)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[piece][i] |= (from[i] >> (4 * piece + 2 * quarter) & 0x03030303u) << 4;
      const std::uint8_t* block = scales + 18 * (unit / 8);
      const float d = half_at(block + 16);
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int part = 4 * half + 2 * piece + quarter;
        scale[piece] = d * static_cast<float>(static_cast<std::int8_t>(block[2 * part + within % 2]));
        offset[piece] = -32 * scale[piece];
      }
    }
  }

  INNERKV_DEVICE void quad(int index, float (&w)[4]) const {
    const std::uint32_t word = words[index / 4][index % 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t byte = word >> 8 * i & 255u;
      const float code = kSigned ? static_cast<float>(static_cast<std::int8_t>(byte))
                                 : static_cast<float>(static_cast<std::uint8_t>(byte));
      w[i] = code * scale[index / 4] + offset[index / 4];
    }
  }

 private:
  INNERKV_DEVICE void put(int piece, const uint4& from, int shift = 0, std::uint32_t mask = 0xffffffffu) {
    words[piece][0] = from.x >> shift & mask;
    words[piece][1] = from.y >> shift & mask;
    words[piece][2] = from.z >> shift & mask;
    words[piece][3] = from.w >> shift & mask;
  }
};

template <TensorType kType>
struct Weights<kType, false> {
  static constexpr int kColumns = kType == TensorType::kF32 ? 4 : 8, kQuads = kColumns / 4;

  std::uint32_t words[4];

  static INNERKV_DEVICE int column(int unit, int quad) { return kColumns * unit + 4 * quad; }

  INNERKV_DEVICE void load(const MatrixArgs& matrix, int row, int unit) {
    const uint4 from = ptx::load_streaming(
        reinterpret_cast<const uint4*>(matrix.codes + std::ptrdiff_t{row} * matrix.code_stride + 16 * unit));
    words[0] = from.x;
    words[1] = from.y;
    words[2] = from.z;
    words[3] = from.w;
  }

  INNERKV_DEVICE void quad(int index, float (&w)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == TensorType::kF32) {
        w[i] = __uint_as_float(words[i]);
      } else {
        const std::uint32_t word = words[2 * index + i / 2], bits = i % 2 ? word >> 16 : word & 0xffffu;
        w[i] = kType == TensorType::kF16 ? float_of_half(bits) : __uint_as_float(bits << 16);
      }
    }
  }
};

/// Units of a row; the last one may be padding in part.
template <TensorType kType>
INNERKV_DEVICE int units_of(int columns) {
  return (columns + Weights<kType>::kColumns - 1) / Weights<kType>::kColumns;
}

}  // namespace innerkv::gpu
