// Outlier rows against test/golden/outliers.txt, which the TypeScript reference wrote: the same rows give the
// same bytes, and the bytes give the rows back.
#include "format/outliers.h"

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"

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
    for (int row = 0; row < kPageTokens; ++row) {
      const auto& entries = section.rows[static_cast<std::size_t>(row)];
      CHECK(append_outlier_row(bytes.data(), section.layout, row, entries.data(),
                               static_cast<int>(entries.size()), section.head_dim));
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

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("outliers", argc, argv); }
