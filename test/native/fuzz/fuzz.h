// What fuzz targets and the program that replays them agree on. A target is one file with the two functions
// below: with INNERKV_FUZZ=ON (clang) it becomes a libFuzzer program, and always a ctest program that replays
// a seeded run of mutations of its seeds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace innerkv::test {

/// Honest inputs to start from.
std::vector<std::vector<std::uint8_t>> fuzz_seeds();

/// Ends the program when something that always holds does not, for libFuzzer and ctest alike.
inline void always(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

}  // namespace innerkv::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
