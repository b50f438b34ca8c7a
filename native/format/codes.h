// Byte-lane code layout: where the b bits of element (row, k) of a matrix sit. docs/format.md section 2.
//
// A 32-bit word holds, in byte j, element j of a quad (four consecutive elements of the reduction dimension)
// for the rows x, x + X, x + 2X, ... (the classes). A mask isolates a class; the power of two it leaves
// behind belongs to the row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../platform.h"

namespace innerkv {

struct CodeShape {
  int bits;   // 1, 2, 3, 4, 8
  int rows;   // a multiple of 8
  int quads;  // reduction elements / 4

  constexpr INNERKV_HD int classes() const { return bits == 3 ? 8 : 8 / bits; }
  constexpr INNERKV_HD int planes() const { return bits == 3 ? 3 : 1; }
  constexpr INNERKV_HD int words() const { return rows / classes(); }  // X: words of one plane of one quad
  constexpr INNERKV_HD std::size_t quad_bytes() const { return std::size_t{4} * planes() * words(); }
  constexpr INNERKV_HD std::size_t bytes() const { return quad_bytes() * quads; }
};

/// Byte that holds the first bits of (row, k), plane 0.
constexpr INNERKV_HD std::size_t code_byte(const CodeShape& shape, int row, int k) {
  return (k / 4) * shape.quad_bytes() + std::size_t{4} * (row % shape.words()) + k % 4;
}

constexpr INNERKV_HD unsigned get_code(const std::uint8_t* codes, const CodeShape& shape, int row, int k) {
  const std::uint8_t* at = codes + code_byte(shape, row, k);
  const int cls = row / shape.words();
  if (shape.bits != 3) return at[0] >> (shape.bits * cls) & ((1u << shape.bits) - 1u);
  const int plane = 4 * shape.words();
  if (cls < 6) return at[(cls / 2) * plane] >> (3 * (cls % 2)) & 7u;
  return (at[(cls - 6) * plane] >> 6 & 3u) << 1 | (at[2 * plane] >> cls & 1u);
}

constexpr INNERKV_HD void put_bits(std::uint8_t* byte, int shift, unsigned mask, unsigned value) {
  *byte = static_cast<std::uint8_t>((*byte & ~(mask << shift)) | (value & mask) << shift);
}

constexpr INNERKV_HD void put_code(std::uint8_t* codes, const CodeShape& shape, int row, int k,
                                   unsigned code) {
  std::uint8_t* at = codes + code_byte(shape, row, k);
  const int cls = row / shape.words();
  if (shape.bits != 3) return put_bits(at, shape.bits * cls, (1u << shape.bits) - 1u, code);
  const int plane = 4 * shape.words();
  if (cls < 6) return put_bits(at + (cls / 2) * plane, 3 * (cls % 2), 7u, code);
  put_bits(at + (cls - 6) * plane, 6, 3u, code >> 1);
  put_bits(at + 2 * plane, cls, 1u, code & 1u);
}

/// Writes the codes of one row, k = first ... first + count - 1: a token's key.
INNERKV_HD void put_row(std::uint8_t* codes, const CodeShape& shape, int row, const std::uint8_t* values,
                        int count) {
  const int cls = row / shape.words();
  const std::size_t quad_bytes = shape.quad_bytes();
  std::uint8_t* at = codes + std::size_t{4} * (row % shape.words());
  if (shape.bits != 3) {
    const int shift = shape.bits * cls;
    const unsigned mask = (1u << shape.bits) - 1u;
    for (int k = 0; k < count; ++k) put_bits(at + (k / 4) * quad_bytes + k % 4, shift, mask, values[k]);
    return;
  }
  for (int k = 0; k < count; ++k) put_code(codes, shape, row, k, values[k]);
}

/// Writes the codes of all rows at one k: a token's value.
INNERKV_HD void put_column(std::uint8_t* codes, const CodeShape& shape, int k, const std::uint8_t* values) {
  if (shape.bits == 3) {
    for (int row = 0; row < shape.rows; ++row) put_code(codes, shape, row, k, values[row]);
    return;
  }
  const int words = shape.words(), classes = shape.classes();
  const unsigned mask = (1u << shape.bits) - 1u;
  std::uint8_t* at = codes + code_byte(shape, 0, k);
  for (int c = 0; c < classes; ++c)
    for (int x = 0; x < words; ++x) put_bits(at + 4 * x, shape.bits * c, mask, values[c * words + x]);
}

namespace detail {
constexpr bool codes_round_trip(int bits) {
  const CodeShape shape{bits, 16, 2};
  std::uint8_t bytes[512] = {};
  for (int pass = 0; pass < 2; ++pass)  // the second pass overwrites: no bit may leak into a neighbour
    for (int row = 0; row < shape.rows; ++row)
      for (int k = 0; k < 8; ++k)
        put_code(bytes, shape, row, k, static_cast<unsigned>(row * 5 + k * 3 + pass * 7));
  for (int row = 0; row < shape.rows; ++row)
    for (int k = 0; k < 8; ++k)
      if (get_code(bytes, shape, row, k) !=
          (static_cast<unsigned>(row * 5 + k * 3 + 7) & ((1u << bits) - 1u)))
        return false;
  return true;
}
static_assert(codes_round_trip(1) && codes_round_trip(2) && codes_round_trip(3) && codes_round_trip(4) &&
              codes_round_trip(8));
}  // namespace detail

}  // namespace innerkv
