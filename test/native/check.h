// The smallest test harness that can fail: CHECK counts, report() prints the total and gives the exit code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace check {

inline int passed = 0, failed = 0;

inline void that(bool condition, const char* what, const char* file, int line, const std::string& detail = "") {
  if (condition) {
    ++passed;
    return;
  }
  if (++failed <= 20) std::fprintf(stderr, "%s:%d: failed: %s %s\n", file, line, what, detail.c_str());
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, passed, failed);
  return failed > 0 || passed == 0 ? 1 : 0;
}

/// Seeded, portable random numbers (splitmix64).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normal() { return static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform())); }

 private:
  std::uint64_t state_;
};

}  // namespace check

#define CHECK(condition) check::that((condition), #condition, __FILE__, __LINE__)
#define CHECK_WITH(condition, detail) check::that((condition), #condition, __FILE__, __LINE__, (detail))
