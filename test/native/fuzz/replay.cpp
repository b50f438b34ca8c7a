// Runs a fuzz target without a fuzzing engine: its seeds, then INNERKV_FUZZ_RUNS (default 3000) seeded
// mutations of them. Arguments are files to run instead, such as a crash that libFuzzer wrote; "--seeds
// FOLDER" writes the seeds there, for libFuzzer to begin with.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "../check.h"
#include "fuzz.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes mutated(Bytes bytes, const std::vector<Bytes>& seeds, check::Random& random) {
  for (int changes = 1 + random.below(4); changes > 0; --changes) {
    const int size = static_cast<int>(bytes.size());
    if (size == 0) return bytes;
    // Half of the changes meet the first bytes, where the numbers are that steer a reader.
    const std::size_t at =
        static_cast<std::size_t>(random.below(random.below(2) ? size : std::min(size, 160)));
    const auto here = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    constexpr std::uint8_t kSpecial[] = {0, 1, 0x7f, 0x80, 0xff, 0x7c, 32, 127, 128};
    switch (random.below(8)) {
      case 0:
        bytes.resize(at);
        break;
      case 1:
        bytes.insert(here, static_cast<std::size_t>(1 + random.below(20)),
                     static_cast<std::uint8_t>(random.bits()));
        break;
      case 2:
        bytes.erase(here, here + std::min<std::ptrdiff_t>(1 + random.below(20), bytes.end() - here));
        break;
      case 3: {  // a run of another input
        const Bytes& other = seeds[static_cast<std::size_t>(random.below(static_cast<int>(seeds.size())))];
        const std::size_t run = std::min({bytes.size() - at, other.size() - std::min(other.size(), at),
                                          static_cast<std::size_t>(1 + random.below(200))});
        std::copy_n(other.begin() + static_cast<std::ptrdiff_t>(std::min(at, other.size())), run, here);
        break;
      }
      case 4:
        *here = kSpecial[random.below(static_cast<int>(std::size(kSpecial)))];
        break;
      case 5:
        for (auto i = here; i < bytes.end() && i < here + 4; ++i)
          *i = kSpecial[random.below(static_cast<int>(std::size(kSpecial)))];
        break;
      case 6:
        *here = static_cast<std::uint8_t>(*here + random.below(5) - 2);
        break;
      default:
        *here = static_cast<std::uint8_t>(*here ^ 1 << random.below(8));
    }
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  const auto seeds = innerkv::test::fuzz_seeds();
  if (argc == 3 && std::strcmp(argv[1], "--seeds") == 0) {
    for (std::size_t i = 0; i < seeds.size(); ++i)
      std::ofstream(std::string(argv[2]) + "/seed" + std::to_string(i), std::ios::binary)
          .write(reinterpret_cast<const char*>(seeds[i].data()),
                 static_cast<std::streamsize>(seeds[i].size()));
    return 0;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  if (argc > 1) return 0;
  const long runs = check::number_from("INNERKV_FUZZ_RUNS", 3000);
  check::Random random(1);
  for (const Bytes& seed : seeds) LLVMFuzzerTestOneInput(seed.data(), seed.size());
  for (long run = 0; run < runs; ++run) {
    const Bytes& seed = seeds[static_cast<std::size_t>(random.below(static_cast<int>(seeds.size())))];
    const Bytes input = mutated(seed, seeds, random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu seeds and %ld mutations replayed\n", seeds.size(), runs);
  return seeds.empty() ? 1 : 0;
}
