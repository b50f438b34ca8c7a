// Kernels put down, enqueued and replayed as graphs, between everything else that can be asked of the device,
// against a host that does all of it at once. Runs on the emulated GPU (recording_test) and on a real one
// (recording_gpu_test).
#include "cuda/recording.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>

#include "core/error.h"
#include "simt/gpu_under_test.h"
#ifndef INNERKV_ON_GPU
#include "simt/device_log.h"
#endif

namespace innerkv::test {
namespace {

using gpu::DeviceBuffer;
using gpu::Recording;
using gpu::Upload;
namespace device = gpu::device;
using Word = std::uint32_t;

constexpr int kWords = 64;
using State = std::array<Word, kWords>;

struct MixArgs {
  const Word* from;
  int count;
  bool twice;  // padding follows
};

INNERKV_KERNEL(kWords) void mix(Word* state, MixArgs args) {
  const int i = static_cast<int>(threadIdx.x);
  for (int pass = 0; pass <= args.twice; ++pass)
    for (int j = i; j < args.count; j += kWords) state[i] = state[i] * 31 + args.from[j];
}

INNERKV_KERNEL(kWords) void turn(Word* state, Word by) {
  if (blockIdx.x == 0) state[threadIdx.x] = state[threadIdx.x] * 7 + by + gridDim.x;
}

/// The state of a device, of which everything is asked, and what it has to be.
class Pair {
 public:
  explicit Pair(std::uint64_t seed) : data_(seed) {
    state_ = static_cast<Word*>(device::allocate(sizeof(State)));
    device::clear(state_, sizeof(State));
  }
  ~Pair() { device::release(state_); }

  void mix_in(int count, bool twice, const std::function<void()>& while_filling = nullptr,
              const std::function<void()>& when_filled = nullptr) {
    std::vector<Word> words;
    for (int i = 0; i < count; ++i) words.push_back(static_cast<Word>(data_.bits()));
    Upload upload(buffers_[while_filling != nullptr], Upload::room<Word>(words.size()));
    Word* here;
    const Word* there = upload.add(words.size(), &here);
    std::copy_n(words.begin(), words.size() / 2, here);
    if (while_filling) while_filling();
    std::copy(words.begin(), words.end(), here);
    upload.flush();
    if (when_filled) when_filled();
    run(mix, 1, MixArgs{there, count, twice});
    mix_here(words, twice);
  }
  /// From memory that is released while the kernel may still be waiting.
  void mix_borrowed(int count) {
    std::vector<Word> words(static_cast<std::size_t>(count), static_cast<Word>(data_.bits()));
    auto* there = static_cast<Word*>(device::allocate(sizeof(Word) * words.size()));
    device::copy(there, words.data(), sizeof(Word) * words.size());
    run(mix, 1, MixArgs{there, count, false});
    device::release(there);
    mix_here(words, false);
  }
  void turn_by(unsigned grid) {
    const auto by = static_cast<Word>(data_.bits() % 3);
    run(turn, grid, by);
    for (Word& word : expected_) word = word * 7 + by + grid;
  }
  void overwrite(int first, int count) {
    for (int i = 0; i < count; ++i)
      expected_[static_cast<std::size_t>(first + i)] = static_cast<Word>(data_.bits());
    device::copy(state_ + first, &expected_[static_cast<std::size_t>(first)],
                 sizeof(Word) * static_cast<std::size_t>(count));
  }
  void clear(int first, int count) {
    device::clear(state_ + first, sizeof(Word) * static_cast<std::size_t>(count));
    std::fill_n(expected_.begin() + first, count, Word{0});
  }
  void look() {
    State found;
    device::copy(found.data(), state_, sizeof found);
    CHECK(found == expected_);
  }

 private:
  template <class... P, class... A>
  void run(void (*kernel)(P...), unsigned grid, A... arguments) {
    device::check(launch(kernel, dim3(grid), dim3(kWords), 0, device::stream(), state_, arguments...),
                  "a kernel");
  }
  void mix_here(const std::vector<Word>& words, bool twice) {
    for (int pass = 0; pass <= twice; ++pass)
      for (std::size_t j = 0; j < words.size(); ++j) {
        Word& word = expected_[j % kWords];
        word = word * 31 + words[j];
      }
  }

  check::Random data_;
  DeviceBuffer buffers_[2];
  Word* state_;
  State expected_{};
};

/// What a round asks: the same things for the same pattern, in other numbers every time.
void play(Pair& pair, int pattern, check::Random& chance) {
  check::Random fixed(static_cast<std::uint64_t>(pattern) * 77 + 5);
  for (int op = 0; op < 20 + 10 * pattern; ++op) {
    const int kind = fixed.below(pattern < 2 ? 17 : 24), size = 1 + fixed.below(pattern == 3 ? 30000 : 300);
    if (kind < 9)
      pair.mix_in(size, chance.below(9) == 0);
    else if (kind < 17)
      pair.turn_by(1 + (chance.below(5) == 0));
    else if (kind == 17)
      pair.overwrite(size % 32, 1 + size % 32);
    else if (kind == 18)
      pair.clear(size % 32, 1 + size % 32);
    else if (kind == 19)
      pair.mix_borrowed(1 + size % 100);
    else if (kind == 20)
      pair.mix_in(size, false, [&] { pair.overwrite(0, 9); });
    else if (kind == 21)
      pair.mix_in(size, false, [&] {  // two at once, then a flush
        pair.mix_in(40, false);
        pair.overwrite(0, 9);
      });
    else if (kind == 22)
      pair.mix_in(100000, false);  // more than there is room for at first
    else
      pair.look();
  }
}

TEST("whatever is asked in between, the device does what was asked, in order") {
  check::Random chance(3);
  Pair pair(4);
  Recording recording;
  for (int round = 0; round < 60; ++round) {
    if (round % 10 != 9) recording.begin();
    play(pair, round < 30 ? round % 2 : round % 5, chance);
    if (round % 3 == 0) pair.look();
    recording.end();
    if (round % 3 != 0) pair.look();
  }
  const Recording::Counts& counts = recording.counts();
  CHECK_WITH(counts.alone > 0 && counts.made > 5 && counts.launched > 20 && counts.set > 0,
             std::to_string(counts.alone) + " " + std::to_string(counts.made) + " " +
                 std::to_string(counts.launched) + " " + std::to_string(counts.set));
  CHECK(simt::take_reports().empty());
}

TEST(
    "the same kernels become a graph the second time; a grid or a parameter that differs is set, others are "
    "not") {
  Pair pair(1);
  Recording recording;
  const auto round = [&](unsigned grid) {
    recording.begin();
    for (int i = 0; i < 3; ++i) {
      pair.mix_in(10, false);
      pair.turn_by(i == 1 ? grid : 1);
      pair.mix_in(10, false);
    }
    recording.end();
    pair.look();
  };
  round(1);
  CHECK(recording.counts().alone == 9 && recording.counts().made == 0);
  round(1);
  CHECK(recording.counts().made == 1 && recording.counts().launched == 1 && recording.counts().set == 0);
  std::size_t before = 0;
  for (const unsigned grid : {1u, 2u, 2u, 1u}) {
    round(grid);
    // turn_by() draws one of three numbers, so up to three kernels differ.
    CHECK(recording.counts().set - before <= 3);
    before = recording.counts().set;
  }
  CHECK(recording.counts().made == 1 && recording.counts().launched == 5 && recording.counts().alone == 9);
  CHECK(before >= 2);
  CHECK(simt::take_reports().empty());
}

TEST("the same kernels with arguments of their own and with arguments that went ahead are two graphs") {
  Pair pair(8);
  Recording recording;
  for (const bool ahead : {false, false, true, true, false, true}) {
    recording.begin();
    pair.mix_in(10, false, nullptr, [&] {
      if (ahead) pair.clear(3, 1);
    });
    for (int i = 0; i < 6; ++i) pair.turn_by(1);
    recording.end();
    pair.look();
  }
  CHECK(recording.counts().made == 2 && recording.counts().launched == 4);
  CHECK(simt::take_reports().empty());
}

TEST("one recording is open at a time, and one that ends its life open has enqueued everything") {
  Pair pair(2);
  Recording first;
  first.begin();
  pair.turn_by(1);
  {
    Recording second;
    second.begin();
    CHECK(Recording::open() == &second);
    pair.turn_by(1);
    first.end();  // closed by the second
    CHECK(Recording::open() == &second);
    pair.mix_in(3, false);
  }
  CHECK(Recording::open() == nullptr);
  pair.look();
  CHECK(simt::take_reports().empty());
}

#ifndef INNERKV_ON_GPU
TEST("the n-th graph or launch refused, with some parameters set: kernels are enqueued one by one") {
  for (int granted = 0; granted < 30; ++granted) {
    check::Random chance(9);
    Pair pair(5);
    Recording recording;
    simt::graphs_refused = granted;
    for (int round = 0; round < 12; ++round) {
      if (round == 8) simt::graphs_refused = -1;
      recording.begin();
      play(pair, round % 2, chance);
      recording.end();
      pair.look();
    }
  }
  CHECK(simt::take_reports().empty());
}

TEST("no memory at the n-th allocation: nothing is open, and the next round is none the worse") {
  int refused = 0;
  for (int n = 0;; ++n) {
    Pair pair(6);
    Recording recording;
    simt::allocations_left = n;
    bool failed = false;
    try {
      recording.begin();
    } catch (const Error& error) {
      failed = error.code() == ErrorCode::kOutOfMemory;
    }
    simt::allocations_left = std::numeric_limits<int>::max();
    CHECK((Recording::open() == nullptr) == failed);
    if (!failed) break;
    ++refused;
    recording.begin();
    pair.turn_by(1);
    recording.end();
    pair.look();
  }
  CHECK(refused == 5);  // the device's block and four in turn on the host
  CHECK(simt::take_reports().empty());
}

#endif

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("recording", argc, argv); }
