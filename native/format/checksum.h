// CRC-32C (Castagnoli), the checksum of everything that leaves memory. Table driven, eight bytes a step.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace innerkv {

namespace detail {
constexpr auto crc_tables() {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1u ? 0x82f63b78u : 0u);
    tables[0][byte] = crc;
  }
  for (std::uint32_t byte = 0; byte < 256; ++byte)
    for (int k = 1; k < 8; ++k)
      tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 0xffu];
  return tables;
}
inline constexpr auto kCrcTables = crc_tables();
}  // namespace detail

/// Continues `crc` (0 for a fresh start) over `size` bytes.
constexpr std::uint32_t crc32c(const std::uint8_t* data, std::size_t size, std::uint32_t crc = 0) {
  const auto& t = detail::kCrcTables;
  crc = ~crc;
  for (; size >= 8; size -= 8, data += 8) {
    const std::uint32_t low =
        crc ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<std::uint32_t>(data[3]) << 24);
    crc = t[7][low & 0xffu] ^ t[6][low >> 8 & 0xffu] ^ t[5][low >> 16 & 0xffu] ^ t[4][low >> 24] ^
          t[3][data[4]] ^ t[2][data[5]] ^ t[1][data[6]] ^ t[0][data[7]];
  }
  for (; size > 0; --size, ++data) crc = crc >> 8 ^ t[0][(crc ^ *data) & 0xffu];
  return ~crc;
}

namespace detail {
inline constexpr std::uint8_t kCrcProbe[9] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
static_assert(crc32c(kCrcProbe, 9) == 0xe3069283u);
}  // namespace detail

}  // namespace innerkv
