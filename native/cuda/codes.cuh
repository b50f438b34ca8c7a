// Codes of a page in the registers of a warp, as the A operand of an 8-bit matrix product.
#pragma once

#include "../format/codes.h"
#include "ptx.h"

namespace innerkv::gpu {

/// How a lane reads a matrix of codes: NW words per plane and quad, in vectors of W; a unit is a (class,
/// word) pair, that is one row of this lane, and two units make a 16-row tile.
template <int kBits, int kMatrixRows>
struct Codes {
  static constexpr CodeShape kShape{kBits, kMatrixRows, 1};
  static constexpr int kX = kShape.words(), kPlanes = kShape.planes(), kClasses = kShape.classes();
  static constexpr int kWords = kX / 8, kVector = kWords < 4 ? kWords : 4;
  static constexpr int kUnits = kMatrixRows / 8, kTiles = kUnits / 2;
  static_assert(kWords >= 1 && kWords * 8 == kX && (kWords == 1 || kWords % 2 == 0));

  static INNERKV_DEVICE constexpr int cls(int unit) { return unit / kWords; }
  static INNERKV_DEVICE constexpr int word(int unit) { return unit % kWords; }
  /// Row of a unit, x + X * class: one part is the lane's, the other a constant.
  static INNERKV_DEVICE constexpr int unit_row(int unit) {
    return word(unit) % kVector + 8 * kVector * (word(unit) / kVector) + kX * cls(unit);
  }
  static INNERKV_DEVICE constexpr int lane_row(int g) { return kVector * g; }
  static INNERKV_DEVICE constexpr int row(int g, int unit) { return lane_row(g) + unit_row(unit); }
  /// Log2 of the factor that the class mask leaves.
  static INNERKV_DEVICE constexpr int shift(int unit) {
    return kBits == 3 ? (cls(unit) < 6 ? 3 * (cls(unit) % 2) : 0) : kBits == 8 ? 0 : kBits * cls(unit);
  }

  std::uint32_t words[kPlanes][kWords];

  /// Words `first` to `first + count - 1` of a quad's, whole vectors.
  INNERKV_DEVICE void load(const std::uint32_t* base, int quad, int g, int first = 0, int count = kWords) {
    base += quad * kPlanes * kX + lane_row(g);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const std::uint32_t* from = base + plane * kX;
#pragma unroll
      for (int v = first; v < first + count; v += kVector) {
        if constexpr (kVector == 4) {
          const uint4 four = *reinterpret_cast<const uint4*>(from + 8 * v);
          words[plane][v] = four.x;
          words[plane][v + 1] = four.y;
          words[plane][v + 2] = four.z;
          words[plane][v + 3] = four.w;
        } else if constexpr (kVector == 2) {
          const uint2 two = *reinterpret_cast<const uint2*>(from + 8 * v);
          words[plane][v] = two.x;
          words[plane][v + 1] = two.y;
        } else {
          words[plane][v] = from[8 * v];
        }
      }
    }
  }

  /// Class `first` becomes class 0, and so on; of the first vector.
  INNERKV_DEVICE void drop_classes(int first) {
    static_assert(kPlanes == 1);
#pragma unroll
    for (int w = 0; w < kVector; ++w) words[0][w] >>= kBits * first;
  }

  /// The four codes of a unit, times 2^shift(unit).
  INNERKV_DEVICE std::uint32_t fragment(int unit) const {
    const int c = cls(unit), w = word(unit);
    if constexpr (kBits == 8) return words[0][w];
    if constexpr (kBits == 3) {
      if (c < 6) return words[c / 2 < kPlanes ? c / 2 : 0][w] & (0x07070707u << (3 * (c % 2)));
      return (words[c - 6 < kPlanes ? c - 6 : 0][w] >> 5 & 0x06060606u) |
             (words[kPlanes - 1][w] >> c & 0x01010101u);
    }
    return words[0][w] & (0x01010101u * ((1u << kBits) - 1u)) << (kBits * c);
  }
};

/// The binary16 numbers of this lane's rows, one a unit, in vectors of Codes::kVector.
template <class Matrix>
INNERKV_DEVICE void load_units(const std::uint16_t* from, int g, float (&to)[Matrix::kUnits]) {
  constexpr int kVector = Matrix::kVector;
  from += Matrix::lane_row(g);
#pragma unroll
  for (int unit = 0; unit < Matrix::kUnits; unit += kVector) {
    const std::uint16_t* at = from + Matrix::unit_row(unit);
    std::uint32_t pairs[2] = {};
    if constexpr (kVector == 4) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      pairs[0] = two.x;
      pairs[1] = two.y;
    } else if constexpr (kVector == 2) {
      pairs[0] = *reinterpret_cast<const std::uint32_t*>(at);
    } else {
      pairs[0] = *at;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float2 two = ptx::floats_of(pairs[i / 2]);
      to[unit + i] = i % 2 ? two.y : two.x;
    }
  }
}

}  // namespace innerkv::gpu
