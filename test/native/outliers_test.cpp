// Which numbers are outliers; outlier rows against test/golden/outliers.txt, which the TypeScript reference
// wrote: the same rows give the same bytes, and the bytes give the rows back.
#include "format/outliers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

namespace innerkv::test {
namespace {

struct Section {
  OutlierLayout layout;
  int head_dim = 0;
  std::vector<std::vector<Outlier>> rows{kPageTokens};
  std::vector<std::uint8_t> bytes;
};

std::vector<Section> golden() {
  std::ifstream file("test/golden/outliers.txt");
  std::vector<Section> sections;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "section") {
      sections.emplace_back();
      std::size_t size = 0;
      words >> sections.back().layout.capacity >> sections.back().head_dim >> size;
      CHECK(sections.back().layout.bytes() == size);
    } else if (kind == "row") {
      std::size_t slot = 0;
      words >> slot;
      for (std::string entry; words >> entry;)
        sections.back().rows.at(slot).push_back(
            {std::stoi(entry),
             static_cast<std::uint16_t>(std::stoi(entry.substr(entry.find(':') + 1), nullptr, 16))});
    } else if (kind == "bytes") {
      std::string hex;
      words >> hex;
      for (std::size_t i = 0; i < hex.size(); i += 2)
        sections.back().bytes.push_back(static_cast<std::uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    }
  }
  return sections;
}

TEST("native code writes the outlier rows that the reference writes, byte for byte") {
  const auto sections = golden();
  CHECK(sections.size() == 8);
  for (const Section& section : sections) {
    std::vector<std::uint8_t> bytes(section.layout.bytes());
    for (int row = 0, first = 0; row < kPageTokens; ++row) {
      const auto& entries = section.rows[static_cast<std::size_t>(row)];
      const int count = static_cast<int>(entries.size());
      put_outlier_row(bytes.data(), section.layout, row, first, entries.data(), count);
      first += count;
    }
    CHECK_WITH(bytes == section.bytes, std::to_string(section.layout.capacity));
  }
}

TEST("native code reads the rows that the reference wrote") {
  for (const Section& section : golden()) {
    const std::uint8_t* bytes = section.bytes.data();
    CHECK(section.bytes.size() == section.layout.bytes());
    CHECK(outliers_valid(bytes, section.layout, kPageTokens, section.head_dim));
    int entry = 0;
    for (int row = 0; row < kPageTokens; ++row) {
      CHECK(outlier_start(bytes, section.layout, row) == entry);
      for (const Outlier& expected : section.rows[static_cast<std::size_t>(row)]) {
        const Outlier got = outlier_at(bytes, section.layout, entry++);
        CHECK(got.index == expected.index && got.value == expected.value);
      }
    }
    CHECK(outlier_start(bytes, section.layout, kPageTokens) == entry && entry <= section.layout.capacity);
  }
}

struct Chosen {
  std::vector<std::uint8_t> channels;
  std::vector<float> x;
};

/// docs/format.md section 8, word by word.
Chosen taken_by_the_book(std::vector<float>& x, int group, int count) {
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return std::abs(x[a]) > std::abs(x[b]); });
  const std::set<std::size_t> chosen(order.begin(), order.begin() + count);
  Chosen taken;
  for (const std::size_t c : chosen) {
    taken.channels.push_back(static_cast<std::uint8_t>(c));
    taken.x.push_back(x[c]);
  }
  const auto length = static_cast<std::size_t>(group);
  for (const std::size_t c : chosen) {
    float low = INFINITY, high = -INFINITY;
    for (std::size_t other = c / length * length; other < std::min(x.size(), (c / length + 1) * length);
         ++other)
      if (!chosen.contains(other)) {
        low = std::min(low, x[other]);
        high = std::max(high, x[other]);
      }
    x[c] = std::min(std::max(x[c], low), high) + 0.0f;
  }
  return taken;
}

TEST("every instruction set takes the outliers that the format names, ties and zeros included") {
  check::Random random(6);
  for (int round = 0; round < 4000; ++round) {
    const int D = kHeadDims[static_cast<std::size_t>(round) % kHeadDims.size()],
              group = std::min(D, 32 << random.below(4)), count = 1 + random.below(kMaxOutliers),
              levels = random.below(3) == 0 ? 0 : 1 + random.below(6);
    std::vector<float> x(static_cast<std::size_t>(D));
    for (float& number : x) {  // few levels make many ties; zeros of both signs are among them
      number = levels == 0 ? random.normal() : static_cast<float>(random.below(levels)) * 0.5f;
      if (random.below(2)) number = -number;
      if (random.below(40) == 0) number *= 100.0f;
    }
    std::vector<float> expected = x;
    const Chosen by_the_book = taken_by_the_book(expected, group, count);
    const auto same = [](const void* a, const auto& b) {
      return std::memcmp(a, b.data(), b.size() * sizeof(b[0])) == 0;
    };
    for (const Kernels* const* isa = available_kernels(); *isa; ++isa) {
      std::vector<float> rest = x;
      TakenOutliers taken;
      (*isa)->take_outliers(rest.data(), D, group, count, taken);
      CHECK_WITH(same(taken.channel, by_the_book.channels) && same(taken.x, by_the_book.x), (*isa)->isa);
      CHECK_WITH(same(rest.data(), expected), (*isa)->isa);
    }
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("outliers", argc, argv); }
