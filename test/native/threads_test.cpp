// What may run at the same time, does: items of one loop on the pool's threads, whole backends side by side,
// jobs on the executor's dispatcher beside calls of its owner, garbage dropped from anywhere. What must not
// overlap (calls on one cache) is kept apart by the executor. Results are those of one thread, bit for bit.
// Made for ThreadSanitizer.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "addon/executor.h"
#include "support.h"

namespace innerkv::test {
namespace {

void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

TEST("a loop visits every item once, whichever thread calls it, and threads have numbers of their own") {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    std::mutex turn;  // one loop at a time is the pool's contract; its caller may change
    std::atomic<int> wrong{0};
    in_threads(3, [&](int caller) {
      check::Random random(static_cast<std::uint64_t>(caller));
      for (int round = 0; round < 300; ++round) {
        const int items = random.below(4) ? random.below(20) : random.below(500);
        std::vector<int> visits(at(items)), inside(at(threads));  // plain: a double visit would be a race
        const std::lock_guard lock(turn);
        pool.run(items, [&](int item, int thread) {
          ++visits[at(item)];
          if (thread < 0 || thread >= threads || ++inside[at(thread)] != 1) ++wrong;
          --inside[at(thread)];
        });
        for (const int count : visits) wrong += count != 1;
      }
    });
    CHECK(wrong == 0 && pool.threads() == threads);
  }
}

TEST("threads that fell asleep, and a caller that waits longer than it would stay awake") {
  using std::chrono::microseconds;
  for (const int threads : {2, 5}) {
    ThreadPool pool(threads);
    std::atomic<int> visits{0};
    for (int round = 0; round < 40; ++round) {
      pool.run(2 * threads, [&](int item, int) {
        ++visits;
        if (round % 2 && item >= threads) std::this_thread::sleep_for(microseconds(300));
      });
      CHECK(visits == 2 * threads * (round + 1));
      if (round % 4 > 1) std::this_thread::sleep_for(microseconds(300));
    }
  }
}

TEST("rotations are made once, whoever asks first, and stay where they are") {
  const CacheConfig config = config_of({calibrated()});
  const RotationTable table(config.rope, config.head_dim), alone(config.rope, config.head_dim);
  // Some of them a multiple of 1,024 blocks apart.
  const auto position_of = [](int i, int thread) {
    return ((i * 37 + thread * 11) % 50 + i % 3 * 1024) * std::int64_t{128};
  };
  std::vector<std::vector<const Rotation*>> seen(4);
  in_threads(4, [&](int thread) {
    for (int i = 0; i < 200; ++i) seen[at(thread)].push_back(&table.at(position_of(i, thread)));
  });
  std::size_t same = 0;
  for (int thread = 0; thread < 4; ++thread)
    for (int i = 0; i < 200; ++i) {
      const std::int64_t position = position_of(i, thread);
      const Rotation& rotation = *seen[at(thread)][at(i)];
      same += &rotation == &table.at(position) && rotation.cos == alone.at(position).cos &&
              rotation.sin == alone.at(position).sin;
    }
  CHECK(same == 800);
}

/// What one cache gives for a fixed programme of calls on several sequences.
struct Outcome {
  Bytes contents;
  std::vector<float> outputs;
  bool operator==(const Outcome& other) const {
    return contents == other.contents && same_bits(outputs, other.outputs);
  }
};

constexpr int kSequences = 6, kRounds = 5;

/// Tokens that sequence `s` gets in round `round`.
int count_of(int s, int round) { return (s * 31 + round * 47) % 70 + (round == 0 ? 60 : 0); }

void record(const Sequence& sequence, Outcome& outcome) {
  const Bytes bytes = contents(sequence);
  outcome.contents.insert(outcome.contents.end(), bytes.begin(), bytes.end());
}

Outcome serial(const std::shared_ptr<Cache>& cache, const Tokens& tokens) {
  Outcome outcome;
  for (int s = 0; s < kSequences; ++s) {
    const auto sequence = cache->sequence();
    for (int round = 0, n = 0; round < kRounds; n += count_of(s, round++)) {
      append(*sequence, tokens, n, count_of(s, round));
      const auto out = attended(*sequence);
      outcome.outputs.insert(outcome.outputs.end(), out.begin(), out.end());
    }
    record(*sequence, outcome);
  }
  return outcome;
}

TEST("the number of threads leaves no trace in pages, windows and attention") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 420, 3);
    const Outcome expected = serial(cache_of(family.config, 1), tokens);
    for (const int threads : {2, 5})
      CHECK_WITH(serial(cache_of(family.config, threads), tokens) == expected, family.name);
  }
}

TEST("backends share nothing: side by side, in threads of their own, they give what one gives alone") {
  const auto all = families();
  std::vector<Outcome> expected;
  std::vector<Tokens> tokens;
  for (const Family& family : all) {
    tokens.push_back(tokens_of(family.config, 420, 4));
    expected.push_back(serial(cache_of(family.config), tokens.back()));
  }
  std::atomic<int> same{0};
  in_threads(4, [&](int thread) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::size_t which = (i + at(3 * thread)) % all.size();
      const auto cache = cache_of(all[which].config, 1 + thread % 3);
      same += serial(cache, tokens[which]) == expected[which];
    }
  });
  CHECK(same == static_cast<int>(4 * all.size()));
}

// ---- the executor ----

class Task final : public Job {
 public:
  explicit Task(std::function<void()> body) : body_(std::move(body)) {}
  void execute() noexcept override { body_(); }

 private:
  std::function<void()> body_;
};

struct HeldSequence final : Garbage {
  explicit HeldSequence(std::unique_ptr<Sequence> object) : sequence(std::move(object)) {}
  std::unique_ptr<Sequence> sequence;
};

struct Counted final : Garbage {
  explicit Counted(std::atomic<int>& counter) : gone(counter) {}
  ~Counted() override { ++gone; }
  std::atomic<int>& gone;
};

TEST("queued jobs, calls that wait and garbage from anywhere never overlap on a cache, and order is kept") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 420, 5);
    const Outcome expected = serial(cache_of(family.config), tokens);
    const auto cache = cache_of(family.config, 2);
    std::atomic<int> notified{0};
    Executor executor([](void* context) { ++*static_cast<std::atomic<int>*>(context); }, &notified);

    std::vector<std::shared_ptr<Sequence>> sequences;
    std::vector<std::vector<float>> outputs(kSequences);
    int submitted = 0;
    const auto submit = [&](std::function<void()> body) {
      executor.submit(std::make_shared<Task>(std::move(body)));
      ++submitted;
    };
    // Forks that collectors of other threads drop while jobs run: their slots must go back between two jobs.
    std::mutex mutex;
    std::vector<HeldSequence*> garbage;
    std::atomic<bool> finished{false};
    std::vector<std::thread> collectors;
    for (int i = 0; i < 2; ++i)
      collectors.emplace_back([&] {
        while (!finished) {
          HeldSequence* one = nullptr;
          {
            const std::lock_guard lock(mutex);
            if (!garbage.empty()) {
              one = garbage.back();
              garbage.pop_back();
            }
          }
          if (one)
            executor.discard(one);
          else
            std::this_thread::yield();
        }
      });

    for (int s = 0; s < kSequences; ++s)
      submit([&, s] {
        sequences.push_back(cache->sequence());
        CHECK(static_cast<int>(sequences.size()) == s + 1);
      });
    for (int round = 0; round < kRounds; ++round)
      for (int s = 0; s < kSequences; ++s) {
        const auto body = [&, s, round] {
          int n = 0;
          for (int before = 0; before < round; ++before) n += count_of(s, before);
          append(*sequences[at(s)], tokens, n, count_of(s, round));
          auto fork = std::make_unique<HeldSequence>(sequences[at(s)]->fork());
          const auto out = attended(*sequences[at(s)]);
          outputs[at(s)].insert(outputs[at(s)].end(), out.begin(), out.end());
          const std::lock_guard lock(mutex);
          garbage.push_back(fork.release());
        };
        if ((s + round) % 3 == 0) {  // a call that waits: it must come after what is queued
          Task task(body);
          executor.run(task);
        } else {
          submit(body);
        }
        executor.between([&] { CHECK(cache->pool().used_bytes() <= cache->pool().budget_bytes()); });
      }
    while (notified < submitted) std::this_thread::yield();
    std::size_t done = 0;
    for (Jobs jobs = executor.take_done(); !jobs.empty(); jobs = executor.take_done()) done += jobs.size();
    CHECK(done == at(submitted));
    for (;;) {
      const std::lock_guard lock(mutex);
      if (garbage.empty()) break;
    }
    finished = true;
    for (std::thread& collector : collectors) collector.join();
    CHECK(executor.stop().empty());

    Outcome outcome;
    Task last([&] {
      for (int s = 0; s < kSequences; ++s) {
        record(*sequences[at(s)], outcome);
        outcome.outputs.insert(outcome.outputs.end(), outputs[at(s)].begin(), outputs[at(s)].end());
      }
      std::size_t held = 0;
      for (const auto& sequence : sequences) held += bytes_held(*sequence);
      CHECK_WITH(cache->pool().used_bytes() == held, family.name);
    });
    executor.run(last);  // runs here, and collects the last garbage first
    CHECK_WITH(outcome == expected, family.name);
  }
}

TEST("a call that is aborted from another thread says so or finishes, and the next one is not affected") {
  const CacheConfig config = config_of({calibrated()});
  const auto cache = cache_of(config, 3);
  const Tokens tokens = tokens_of(config, 900, 6);
  const auto sequence = filled(cache, tokens, 900);
  const std::vector<float> expected = attended(*sequence);
  const Bytes before = contents(*sequence);
  std::vector<float> q(at(config.query_heads * config.head_dim) * 64, 0.5f), out(q.size());
  int aborted_calls = 0;
  for (int round = 0; round < 60; ++round) {
    std::atomic<bool> aborted{round == 0}, started{false};
    std::thread other([&] {
      while (!started) std::this_thread::yield();
      for (int i = 0; i < round * 5; ++i) std::this_thread::yield();
      aborted = true;
    });
    const BatchItem item{sequence.get(), q.data(), out.data(), nullptr, nullptr, 64};
    started = true;
    aborted_calls += !attend_batch(*cache, 0, std::span(&item, 1), true, &aborted);
    other.join();
    CHECK(same_bits(attended(*sequence), expected));
  }
  CHECK(aborted_calls > 0 && contents(*sequence) == before);
}

TEST("an executor that stops drops what did not start, and its end takes all garbage with it") {
  std::atomic<int> ran{0}, gone{0};
  int made = 0, dropped = 0;
  for (int round = 0; round < 100; ++round) {
    Executor executor([](void*) {}, nullptr);
    std::atomic<bool> go{false};
    for (int i = 0; i < 5; ++i, ++made)
      executor.submit(std::make_shared<Task>([&] {
        while (!go) std::this_thread::yield();
        ++ran;
      }));
    for (int i = 0; i < 5; ++i) executor.discard(new Counted(gone));
    std::thread other([&] {
      for (int i = 0; i < 5; ++i) executor.discard(new Counted(gone));
      go = true;
    });
    if (round % 2 == 0) other.join();
    dropped += static_cast<int>(executor.stop().size());
    if (other.joinable()) other.join();
    Task task([&] { ++ran; });
    executor.run(task);  // there is no dispatcher any more: it runs here
    ++made;
    if (round % 3 == 0) {  // a stopped executor may start again
      executor.submit(std::make_shared<Task>([&] { ++ran; }));
      ++made;
      dropped += static_cast<int>(executor.stop().size());
    }
    executor.discard(new Counted(gone));
  }
  CHECK(ran + dropped == made);
  CHECK(gone == 1100);
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("threads", argc, argv); }
