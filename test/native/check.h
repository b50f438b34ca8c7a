// The smallest test harness that can fail: CHECK counts, report() prints the total and gives the exit code.
//
//   TEST("a sentence that is true") { CHECK(...); }    in a program whose main() returns check::run("name",
//   argc, argv)
// An argument runs only the tests whose sentence contains it; "--part=2/3" the second, fifth, eighth ... of
// all, so that the parts 1/3, 2/3 and 3/3 together are the whole program.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace check {

inline std::atomic<int> passed{0}, failed{0};

inline void that(bool condition, const char* what, const char* file, int line,
                 const std::string& detail = "") {
  if (condition) {
    ++passed;
    return;
  }
  if (++failed <= 20) std::fprintf(stderr, "%s:%d: failed: %s %s\n", file, line, what, detail.c_str());
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, passed.load(), failed.load());
  return failed > 0 || passed == 0 ? 1 : 0;
}

/// A number that the environment gives, or the usual one.
inline long number_from(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

struct Test {
  const char* sentence;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline bool add(const char* sentence, void (*body)()) {
  tests().push_back({sentence, body});
  return true;
}

/// Of test number `index` (from 0) in "2/3"; what is no part of anything holds nothing, and the program
/// fails.
inline bool in_part(std::size_t index, const char* part) {
  unsigned which = 0, of = 0;
  int end = 0;
  if (std::sscanf(part, "%u/%u%n", &which, &of, &end) != 2 || part[end] != '\0') return false;
  return which >= 1 && which <= of && index % of == which - 1;
}

inline int run(const char* name, int argc, char** argv) {
  static const char kPart[] = "--part=";
  constexpr std::size_t kPartLength = sizeof kPart - 1;
  const bool in_parts = argc > 1 && !std::strncmp(argv[1], kPart, kPartLength);
  for (std::size_t i = 0; i < tests().size(); ++i) {
    const Test& test = tests()[i];
    if (in_parts ? !in_part(i, argv[1] + kPartLength) : argc > 1 && !std::strstr(test.sentence, argv[1]))
      continue;
    const int passed_before = passed, failed_before = failed;
    const auto begin = std::chrono::steady_clock::now();
    try {
      test.body();
      that(passed + failed > passed_before + failed_before, "the test checks something", __FILE__, __LINE__);
    } catch (const std::exception& error) {
      that(false, "no exception escapes", __FILE__, __LINE__, error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%s %s (%d checks, %.2f s)\n", failed == failed_before ? "  ok " : "FAILED", test.sentence,
                passed - passed_before, seconds);
    std::fflush(stdout);
  }
  return report(name);
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
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) *
                              std::cos(6.283185307179586 * uniform()));
  }

 private:
  std::uint64_t state_;
};

}  // namespace check

#define CHECK(condition) check::that((condition), #condition, __FILE__, __LINE__)
#define CHECK_WITH(condition, detail) check::that((condition), #condition, __FILE__, __LINE__, (detail))

#define CHECK_JOIN_(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN_(a, b)
#define TEST(sentence)                                                                                \
  static void CHECK_JOIN(test_, __LINE__)();                                                          \
  static const bool CHECK_JOIN(added_, __LINE__) = check::add(sentence, CHECK_JOIN(test_, __LINE__)); \
  static void CHECK_JOIN(test_, __LINE__)()
