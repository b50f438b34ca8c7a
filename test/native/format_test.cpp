// native/format and native/numerics against independent formulations: ldexp arithmetic for binary16, the
// table of docs/format.md section 2 for codes, the bitwise definition for the checksum, one accumulator array
// for sum32.
// Long file: one table of cases per part of the format.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "format/checksum.h"
#include "format/outliers.h"
#include "format/page.h"
#include "numerics/hadamard.h"
#include "numerics/half.h"
#include "numerics/ordered_sum.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace innerkv {
namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }
std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
std::string hex(std::uint32_t bits) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", bits);
  return text;
}

// ---- binary16 ----

float expected_value(int half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return static_cast<float>(fraction ? NAN : sign * HUGE_VAL);
  return static_cast<float>(
      sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25)));
}

std::uint16_t expected_half(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(value));
  if (std::isnan(value)) return sign | 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  const int exponent = magnitude == 0 ? -14 : std::max(-14, std::ilogb(magnitude));
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // ties to even
  const double rounded = std::ldexp(units, exponent - 10);
  if (rounded >= 65536) return sign | 0x7c00;
  if (rounded < std::ldexp(1, -14))
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(rounded, 24)));
  const int power = std::ilogb(rounded);
  return static_cast<std::uint16_t>(sign | (power + 15) << 10 |
                                    (static_cast<int>(std::ldexp(rounded, 10 - power)) - 1024));
}

void check_half(float value) {
  const std::uint16_t expected = expected_half(value), ieee = half_bits_ieee(value),
                      saturated = half_bits(value);
  CHECK_WITH(ieee == expected, hex(bits_of(value)));
  const bool infinite = (expected & 0x7fff) == 0x7c00;
  CHECK_WITH(saturated == (infinite ? (expected & 0x8000) | 0x7bff : expected), hex(bits_of(value)));
}

TEST("each of the 65,536 binary16 patterns has the value that ldexp gives, and comes back from it") {
  for (int half = 0; half < 65536; ++half) {
    const std::uint16_t pattern = static_cast<std::uint16_t>(half);
    const float value = half_value(pattern), expected = expected_value(half);
    if (std::isnan(expected)) {
      CHECK(std::isnan(value) && std::signbit(value) == (half >> 15) && !half_is_finite(pattern));
      continue;
    }
    CHECK_WITH(bits_of(value) == bits_of(expected), std::to_string(half));
    CHECK(half_bits_ieee(value) == pattern && half_is_finite(pattern) == std::isfinite(value));
    CHECK(std::isinf(value) || bits_of(round_half(value)) == bits_of(value));
  }
}

TEST(
    "float to binary16 rounds every tie between neighbours to even, and the floats beside each tie to the "
    "nearer") {
  for (int half = 0; half < 0x7c00; ++half)
    for (const float sign : {1.0f, -1.0f}) {
      const double low = expected_value(half),
                   high = half == 0x7bff ? 65536.0 : static_cast<double>(expected_value(half + 1));
      const float tie = sign * static_cast<float>((low + high) / 2);  // exact: one bit more than binary16 has
      const int even = half % 2 == 0 ? half : half + 1;
      CHECK_WITH((half_bits_ieee(tie) & 0x7fff) == even, std::to_string(half));
      CHECK((half_bits_ieee(std::nextafterf(tie, 0)) & 0x7fff) == half);
      CHECK((half_bits_ieee(std::nextafterf(tie, sign * HUGE_VALF)) & 0x7fff) == half + 1);
      const float value = sign * expected_value(half);
      for (const float x : {value, std::nextafterf(value, 0), std::nextafterf(value, sign * HUGE_VALF), tie})
        check_half(x);
    }
  for (const float x : {65504.0f, 65519.996f, 65520.0f, 65536.0f, 3.4e38f, HUGE_VALF, -HUGE_VALF, NAN,
                        0x1p-25f, 0x1.000002p-25f, 0x1p-149f, -0.0f})
    check_half(x);
  for (std::uint64_t pattern = 0; pattern < (std::uint64_t{1} << 32); pattern += 8209)
    check_half(float_of(static_cast<std::uint32_t>(pattern)));
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) float hardware_value(std::uint16_t half) { return _cvtsh_ss(half); }
__attribute__((target("f16c"))) std::uint16_t hardware_half(float value) { return _cvtss_sh(value, 0); }

TEST("binary16 conversions agree with the F16C instructions") {
  if (!__builtin_cpu_supports("f16c")) {
    std::printf("    not compared: this CPU has no F16C\n");
    return CHECK(true);
  }
  for (int half = 0; half < 65536; ++half) {
    const float own = half_value(static_cast<std::uint16_t>(half)),
                theirs = hardware_value(static_cast<std::uint16_t>(half));
    CHECK(std::isnan(own) ? std::isnan(theirs) : bits_of(own) == bits_of(theirs));
  }
  int differences = 0;
  for (std::uint64_t pattern = 0; pattern < (std::uint64_t{1} << 32); pattern += 257) {
    const float value = float_of(static_cast<std::uint32_t>(pattern));
    const int own = half_bits_ieee(value), theirs = hardware_half(value);
    differences +=
        own != theirs && !(std::isnan(value) && (theirs & 0x7c00) == 0x7c00 && (theirs & 0x3ff) != 0);
  }
  CHECK(differences == 0);
}
#endif

// ---- codes ----

constexpr int kBits[] = {1, 2, 3, 4, 8};

std::vector<CodeShape> all_shapes() {
  std::vector<CodeShape> shapes;
  for (const int bits : kBits)
    for (const int D : kHeadDims)
      for (const bool value : {false, true})
        shapes.push_back(TensorLayout{{bits, Group::kToken, Mode::kMidRise}, value, D}.codes());
  return shapes;
}

std::string text(const CodeShape& s) {
  return std::to_string(s.bits) + " bits, " + std::to_string(s.rows) + " rows, " + std::to_string(s.quads) +
         " quads";
}

struct Place {
  std::size_t byte;
  int bit;
};

/// Where docs/format.md section 2 puts the bits of (row, element), the lowest bit first.
std::vector<Place> documented_places(const CodeShape& s, int row, int element) {
  const int classes = s.bits == 3 ? 8 : 8 / s.bits, planes = s.bits == 3 ? 3 : 1, X = s.rows / classes;
  const int c = row / X, x = row % X, q = element / 4, j = element % 4;
  const auto place = [&](int plane, int bit) {
    return Place{at(4 * ((q * planes + plane) * X + x) + j), bit};
  };
  std::vector<Place> places;
  if (s.bits != 3) {
    for (int bit = 0; bit < s.bits; ++bit) places.push_back(place(0, s.bits * c + bit));
  } else if (c < 6) {
    for (int bit = 0; bit < 3; ++bit) places.push_back(place(c / 2, 3 * (c % 2) + bit));
  } else {
    places = {place(2, c), place(c - 6, 6), place(c - 6, 7)};
  }
  return places;
}

TEST("every code lies in the bits that the documentation names, which no other code shares") {
  for (const CodeShape& s : all_shapes()) {
    CHECK(s.bytes() == at(s.rows * s.quads * 4 * s.bits) / 8);
    std::vector<std::uint8_t> owned(s.bytes()), zeros(s.bytes()), ones(s.bytes(), 0xff);
    bool own = true, exact = true;
    for (int row = 0; row < s.rows; ++row)
      for (int k = 0; k < 4 * s.quads; ++k) {
        const auto places = documented_places(s, row, k);
        for (int b = 0; b < s.bits; ++b) {
          const Place p = places[at(b)];
          own &= !(owned[p.byte] >> p.bit & 1);
          owned[p.byte] = static_cast<std::uint8_t>(owned[p.byte] | 1 << p.bit);
          // One bit of a code set among zeros, and cleared among ones, in exactly the documented place.
          put_code(zeros.data(), s, row, k, 1u << b);
          exact &= zeros[p.byte] == 1 << p.bit && get_code(zeros.data(), s, row, k) == 1u << b;
          zeros[p.byte] = 0;
          put_code(ones.data(), s, row, k, ~(1u << b));
          exact &= ones[p.byte] == (0xff & ~(1 << p.bit));
          ones[p.byte] = 0xff;
        }
      }
    CHECK_WITH(own && exact, text(s));
    CHECK_WITH(std::all_of(owned.begin(), owned.end(), [](auto byte) { return byte == 0xff; }),
               text(s) + ": a bit belongs to nobody");
    CHECK_WITH(std::all_of(zeros.begin(), zeros.end(), [](auto byte) { return byte == 0; }),
               text(s) + ": put_code wrote elsewhere");
    CHECK_WITH(std::all_of(ones.begin(), ones.end(), [](auto byte) { return byte == 0xff; }),
               text(s) + ": put_code cleared elsewhere");
  }
}

TEST("codes written in any order over old ones read back, and rows and columns equal single codes") {
  check::Random random(1);
  for (const CodeShape& s : all_shapes()) {
    const int columns = 4 * s.quads, mask = (1 << s.bits) - 1;
    std::vector<std::uint8_t> codes(at(s.rows * columns)), singly(s.bytes() + 8), rows, cols;
    for (auto& byte : singly) byte = static_cast<std::uint8_t>(random.bits());
    const std::vector<std::uint8_t> guard(singly.end() - 8, singly.end());
    rows = cols = singly;
    for (int pass = 0; pass < 2; ++pass) {
      for (auto& code : codes) code = static_cast<std::uint8_t>(random.below(256) & mask);
      const int step = s.rows * columns - 1;  // visits every place, neighbours at different times
      for (int i = 0, p = 7; i < s.rows * columns; ++i, p = (p + step) % (s.rows * columns))
        put_code(singly.data(), s, p / columns, p % columns, codes[at(p)] | 0xffffff00u << s.bits % 8);
    }
    for (int row = 0; row < s.rows; ++row)
      put_row(rows.data(), s, row, codes.data() + row * columns, columns);
    for (int k = 0; k < columns; ++k) {
      std::vector<std::uint8_t> column(at(s.rows));
      for (int row = 0; row < s.rows; ++row) column[at(row)] = codes[at(row * columns + k)];
      put_column(cols.data(), s, k, column.data());
    }
    bool same = true;
    for (int p = 0; p < s.rows * columns; ++p)
      same &= get_code(singly.data(), s, p / columns, p % columns) == codes[at(p)];
    CHECK_WITH(same, text(s));
    CHECK_WITH(rows == singly && cols == singly, text(s));
    CHECK_WITH(std::equal(guard.begin(), guard.end(), singly.end() - 8), text(s));
  }
}

// ---- pages ----

TEST("sections of every page are aligned, in order, and do not overlap; every scale has its own place") {
  for (const int D : kHeadDims)
    for (const bool value : {false, true})
      for (const int bits : {1, 2, 3, 4, 8, 16})
        for (int g = 0; g < 4; ++g)
          for (int m = 0; m < 6; ++m) {
            const int outliers = (m + g + D) % 10 - 1;
            const TensorSpec spec{bits, static_cast<Group>(g), static_cast<Mode>(m), std::max(0, outliers)};
            if (!is_supported(spec, value)) continue;
            const TensorLayout t{spec, value, D};
            const std::size_t rows = outliers > 0 ? at(129 * (outliers > 1 ? 2 : 1) + 3 * 128 * outliers) : 0;
            CHECK(t.code_bytes() == at(kPageTokens * D * bits) / 8);
            const bool blocks = spec.group == Group::kTokens32 && !spec.raw(), raw = spec.raw();
            const int channels = g == 0 ? 32 : g == 1 ? 64 : D, per_token = (D + channels - 1) / channels;
            const int scales = raw ? 0 : blocks ? 4 * D : kPageTokens * per_token;
            CHECK(t.scales() == scales);
            CHECK(t.scales_at() % 64 == 0 && t.scales_at() >= t.code_bytes() &&
                  t.scales_at() < t.code_bytes() + 64);
            CHECK(t.zeros_at() % 64 == 0 && t.zeros_at() >= t.scales_at() + at(2 * scales));
            const std::size_t zeros = !raw && spec.mode == Mode::kAsymmetric ? at(2 * scales) : 0;
            CHECK(t.outliers_at() % 64 == 0 && t.outliers_at() >= t.zeros_at() + zeros &&
                  t.outliers_at() < t.zeros_at() + zeros + 64);
            CHECK(t.bytes() % 64 == 0 && t.bytes() >= t.outliers_at() + rows &&
                  t.bytes() < t.outliers_at() + rows + 65);
            CHECK(std::abs(bits_per_value(t) -
                           (bits + 8.0 * static_cast<double>(at(2 * scales) + zeros + rows) /
                                       (kPageTokens * D))) < 1e-12);
            const PageLayout page = value ? PageLayout({}, spec, D) : PageLayout(spec, {}, D);
            CHECK(page.k_at() == 0 && page.v_at() == page.k.bytes() &&
                  page.bytes() == page.k.bytes() + page.v.bytes());
            if (raw) continue;
            std::set<int> used;
            for (int slot = 0; slot < kPageTokens; slot += blocks ? 32 : 1)
              for (int group = 0; group < t.groups(); ++group) used.insert(t.scale_index(slot, group));
            CHECK(static_cast<int>(used.size()) == scales && *used.begin() == 0 &&
                  *used.rbegin() == scales - 1);
            if (blocks) continue;
            int end = 0;
            for (int group = 0; group < t.groups(); ++group) {
              CHECK(t.group_begin(group) == end && t.group_end(group) > end &&
                    t.group_end(group) - end <= channels);
              end = t.group_end(group);
            }
            CHECK(end == D);
          }
}

TEST("outliers go with every format of codes by token, up to eight, and with nothing else") {
  int with = 0, without = 0;
  for (const bool value : {false, true})
    for (const int bits : {1, 2, 3, 4, 8, 16})
      for (int g = 0; g < 4; ++g)
        for (int m = 0; m < 6; ++m) {
          TensorSpec spec{bits, static_cast<Group>(g), static_cast<Mode>(m)};
          if (!is_supported(spec, value)) continue;
          const bool able = bits != 16 && spec.group != Group::kTokens32;
          ++(able ? with : without);
          for (const int outliers : {-2147483647, -1, 1, 2, 7, 8, 9, 256, 2147483647}) {
            spec.outliers = outliers;
            CHECK(is_supported(spec, value) == (able && outliers >= 1 && outliers <= 8));
          }
        }
  CHECK(with == 3 * (6 * 4 * 2 + 2) && without == 1 + 1 + 6 * 4 + 2);
}

// ---- outlier rows ----

TEST("outlier rows with 8-bit and 16-bit starts read back, and each writes its own bytes only") {
  check::Random random(2);
  for (const int capacity : {0, 1, 2, 254, 255, 256, 257, 4096}) {
    const OutlierLayout layout{capacity, kPageTokens};
    CHECK(layout.start_bytes() == (capacity <= 255 ? 1 : 2) && layout.values_at() % 2 == 0 &&
          layout.bytes() % 64 == 0);
    CHECK(layout.indices_at() >= at(129 * layout.start_bytes()) &&
          layout.values_at() >= layout.indices_at() + at(capacity));
    CHECK(layout.bytes() >= layout.values_at() + at(2 * capacity));
    std::vector<std::uint8_t> section(layout.bytes(), 0xee);
    std::vector<std::vector<Outlier>> rows;
    int left = capacity;
    for (int row = 0; row < kPageTokens; ++row) {
      std::vector<Outlier> entries;
      for (int index = random.below(40); index < 256 && static_cast<int>(entries.size()) < std::min(left, 40);
           index += 1 + random.below(20))
        entries.push_back({index, static_cast<std::uint16_t>(random.bits() & 0xbbff)});  // finite
      const int first = capacity - left, count = static_cast<int>(entries.size());
      const auto before = section;
      put_outlier_row(section.data(), layout, row, first, entries.data(), count);
      for (std::size_t i = 0; i < section.size(); ++i) {
        const auto within = [&](std::size_t from, int begin, int end, int size) {
          return i >= from + at(begin * size) && i < from + at(end * size);
        };
        CHECK(section[i] == before[i] || (row == 0 && within(0, 0, 1, layout.start_bytes())) ||
              within(0, row + 1, row + 2, layout.start_bytes()) ||
              within(layout.indices_at(), first, first + count, 1) ||
              within(layout.values_at(), first, first + count, 2));
      }
      left -= count;
      rows.push_back(std::move(entries));
    }
    CHECK(outliers_valid(section.data(), layout, kPageTokens, 256));
    int entry = 0;
    for (int row = 0; row < kPageTokens; ++row) {
      CHECK(outlier_start(section.data(), layout, row) == entry);
      for (const Outlier& expected : rows[at(row)]) {
        const Outlier got = outlier_at(section.data(), layout, entry++);
        CHECK(got.index == expected.index && got.value == expected.value);
      }
    }
    CHECK(outlier_start(section.data(), layout, kPageTokens) == entry);
  }
}

TEST("random bytes are judged as outlier rows without reading outside, and damaged rows are refused") {
  check::Random random(3);
  int accepted = 0;
  for (int run = 0; run < 20000; ++run) {
    const OutlierLayout layout{random.below(2) ? random.below(300) : random.below(12),
                               1 + random.below(kPageTokens)};
    std::vector<std::uint8_t> section(layout.bytes());  // its exact size: AddressSanitizer sees a read beyond
    const int spread = 1 + random.below(random.below(2) ? 256 : 3);
    for (auto& byte : section) byte = static_cast<std::uint8_t>(random.below(spread));
    accepted += outliers_valid(section.data(), layout, random.below(layout.rows + 1), 1 + random.below(256));
    CHECK(!outliers_valid(section.data(), layout, layout.rows + 1, 256) &&
          !outliers_valid(section.data(), layout, -1, 256));
  }
  CHECK(accepted > 0 && accepted < 20000);
  const OutlierLayout layout{8, 4};
  const auto section_of = [&] {
    std::vector<std::uint8_t> section(layout.bytes());
    const Outlier entries[] = {{3, 1}, {7, 2}, {200, 3}};
    for (int row = 0; row < 2; ++row) put_outlier_row(section.data(), layout, row, 3 * row, entries, 3);
    return section;
  };
  CHECK(outliers_valid(section_of().data(), layout, 2, 256));
  CHECK(!outliers_valid(section_of().data(), layout, 2, 200));  // an index beyond the row
  for (const auto& [offset, byte] :
       std::vector<std::pair<std::size_t, int>>{{0, 1},
                                                {1, 7},
                                                {2, 9},
                                                {2, 2},
                                                {layout.indices_at(), 7},
                                                {layout.indices_at() + 4, 1},
                                                {layout.values_at() + 1, 0x7c}}) {
    auto section = section_of();
    section[offset] = static_cast<std::uint8_t>(byte);
    CHECK_WITH(!outliers_valid(section.data(), layout, 2, 256), std::to_string(offset));
  }
}

// ---- sums and transforms ----

TEST("the checksum equals its bitwise definition for every length and alignment, in one piece or two") {
  const auto bitwise = [](const std::uint8_t* data, std::size_t size) {
    std::uint32_t crc = 0xffffffffu;
    for (std::size_t i = 0; i < size; ++i)
      for (int bit = 0; bit < 8; ++bit) {
        const std::uint32_t odd = (crc ^ static_cast<std::uint32_t>(data[i] >> bit)) & 1u;
        crc = crc >> 1 ^ (odd ? 0x82f63b78u : 0u);
      }
    return ~crc;
  };
  check::Random random(4);
  std::vector<std::uint8_t> data(300);
  for (auto& byte : data) byte = static_cast<std::uint8_t>(random.bits());
  for (std::size_t begin = 0; begin < 9; ++begin)
    for (std::size_t size = 0; size <= 260; ++size) {
      CHECK(crc32c(data.data() + begin, size) == bitwise(data.data() + begin, size));
      const std::size_t cut = size * 5 / 13;
      CHECK(crc32c(data.data() + begin + cut, size - cut, crc32c(data.data() + begin, cut)) ==
            bitwise(data.data() + begin, size));
    }
  std::vector<std::uint8_t> block(32);  // RFC 3720, appendix B.4
  CHECK(crc32c(block.data(), 32) == 0x8a9136aau);
  std::fill(block.begin(), block.end(), 0xff);
  CHECK(crc32c(block.data(), 32) == 0x62a8ab43u);
  for (int i = 0; i < 32; ++i) block[at(i)] = static_cast<std::uint8_t>(i);
  CHECK(crc32c(block.data(), 32) == 0x46dd794eu);
}

TEST("sum32 adds in the documented order, bit for bit") {
  check::Random random(5);
  for (int count = 0; count <= 300; ++count) {
    std::vector<float> x(at(count));
    for (float& value : x) value = random.normal() * std::exp2(static_cast<float>(random.below(40) - 20));
    float lanes[32] = {};
    for (int i = 0; i < count; ++i) lanes[i % 32] += x[at(i)];
    for (int h = 16; h >= 1; h /= 2)
      for (int l = 0; l < h; ++l) lanes[l] = lanes[l] + lanes[l + h];
    CHECK(bits_of(ordered_sum(count, [&](int i) { return x[at(i)]; })) == bits_of(lanes[0]));
  }
}

TEST("the Hadamard transform is the block-diagonal Sylvester matrix and its own inverse") {
  check::Random random(6);
  for (const int D : kHeadDims) {
    std::vector<float> x(at(D)), y;
    for (float& value : x) value = random.normal();
    y = x;
    hadamard(y.data(), D);
    for (int begin = 0; begin < D;) {
      int n = 256;
      while (n > D - begin) n /= 2;
      for (int i = 0; i < n; ++i) {
        double sum = 0;
        for (int j = 0; j < n; ++j)
          sum += (__builtin_popcount(static_cast<unsigned>(i & j)) % 2 ? -1.0 : 1.0) *
                 static_cast<double>(x[at(begin + j)]);
        CHECK(std::abs(sum / std::sqrt(n) - static_cast<double>(y[at(begin + i)])) < 1e-5);
      }
      CHECK(hadamard_norm(n) == static_cast<float>(1 / std::sqrt(static_cast<double>(n))));
      begin += n;
    }
    hadamard(y.data(), D);
    for (int c = 0; c < D; ++c) CHECK(std::abs(x[at(c)] - y[at(c)]) < 1e-5f);
  }
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("format", argc, argv); }
