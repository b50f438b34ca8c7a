// Sequences come and go at random: appended, forked, truncated, edited, attended, saved whole and in part,
// loaded from good, cut and flipped files, dropped, under a budget that runs out all the time. After every
// call the pool holds what the sequences hold, page by shared page; a call that fails changes nothing and a
// call on one sequence changes no other; after every cycle nothing is held at all, to the byte.
//
// INNERKV_CHURN_OPS sets the number of calls (default 30000), INNERKV_CHURN_SECONDS a duration instead,
// INNERKV_CHURN_SEED the seed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string_view>
#include <vector>

#include "format/checksum.h"
#include "heap.h"
#include "support.h"

namespace innerkv::test {
namespace {

/// The CPU backend, counting what it has given out.
class CountingBackend final : public CpuBackend {
 public:
  CountingBackend() : CpuBackend(2, nullptr) {}
  std::size_t held = 0;
  void* allocate_memory(std::size_t bytes) override {
    void* memory = CpuBackend::allocate_memory(bytes);
    held += bytes;
    return memory;
  }
  void free_memory(void* memory, std::size_t bytes) noexcept override {
    held -= bytes;
    CpuBackend::free_memory(memory, bytes);
  }
};

std::uint32_t print_of(const Sequence& sequence) {
  const Bytes bytes = contents(sequence);
  return crc32c(bytes.data(), bytes.size());
}

enum Act { kCreate, kAppend, kDecode, kFork, kTruncate, kReplace, kRemove, kAttend, kSave, kLoad, kDrop };
constexpr const char* kActNames[] = {"create", "append", "append one", "fork", "truncate", "replace",
                                     "remove", "attend", "save",       "load", "drop"};
constexpr int kWeights[] = {4, 8, 16, 6, 5, 6, 6, 6, 4, 6, 5};

/// One cache and what lives in it.
class World {
 public:
  World(std::shared_ptr<Backend> backend, const Family& family, const Tokens& tokens, check::Random& random)
      : family_(family),
        cache_(std::make_shared<Cache>(std::move(backend), family.config)),
        tokens_(tokens),
        random_(random) {}

  void cycle(int calls) {
    for (int i = 0; i < calls; ++i) step();
    sequences_.clear();
    prints_.clear();
    writer_.reset();
    reader_.reset();
    Bytes().swap(file_);
    const Pool& pool = cache_->pool();
    CHECK_WITH(pool.used_bytes() == 0 && pool.reserved_bytes() <= pool.budget_bytes(), family_.name);
  }

  static inline long done[std::size(kActNames)] = {}, failed[std::size(kActNames)] = {};

 private:
  int below(int n) { return random_.below(n); }
  std::size_t any() { return at(below(static_cast<int>(sequences_.size()))); }

  /// What all sequences hold together, shared pages once.
  std::size_t held() const {
    std::set<const Page*> seen;
    std::size_t bytes = 0;
    for (const auto& sequence : sequences_)
      for (int layer = 0; layer < family_.config.layers; ++layer) {
        const LayerState& state = sequence->layer_state(layer);
        const LayerScheme& scheme = family_.config.scheme(layer);
        if (state.windows) bytes += family_.config.window_bytes(scheme);
        for (const auto& table : state.pages)
          for (const auto& page : table)
            if (page && seen.insert(page.get()).second)
              bytes += PageLayout(scheme.k, scheme.v, family_.config.head_dim).bytes() +
                       2 * kZeroExtent * (page->k_zeros.size() + page->v_zeros.size());
      }
    return bytes;
  }

  void step() {
    int pick = below(72);  // the sum of the weights
    int act = 0;
    while (pick >= kWeights[act]) pick -= kWeights[act++];
    if (sequences_.empty()) act = kCreate;
    const std::size_t target = sequences_.empty() ? 0 : any();
    const int code = error_of([&] { perform(static_cast<Act>(act), target); });
    ++done[act];
    failed[act] += code >= 0;
    CHECK_WITH(code != static_cast<int>(ErrorCode::kInternal), kActNames[act]);
    const std::string what = std::string(family_.name) + ": " + kActNames[act];
    // A half-written and a half-read file hold slots of their own: then only bounds are known.
    const std::size_t used = cache_->pool().used_bytes(), sum = held();
    CHECK_WITH(writer_ || reader_ ? used >= sum : used == sum, what);
    CHECK_WITH(cache_->pool().reserved_bytes() <= cache_->pool().budget_bytes(), what);
    const bool changes =
        act == kAppend || act == kDecode || act == kTruncate || act == kReplace || act == kRemove;
    if (act == kDrop && code < 0) return;
    if (changes && code >= 0) CHECK_WITH(print_of(*sequences_[target]) == prints_[target], what);
    if (changes && code < 0) prints_[target] = print_of(*sequences_[target]);
    const std::size_t other = any();
    CHECK_WITH(print_of(*sequences_[other]) == prints_[other], what);
  }

  void keep(std::unique_ptr<Sequence> sequence) {
    prints_.push_back(print_of(*sequence));
    sequences_.push_back(std::move(sequence));
  }

  void drop(std::size_t i) {
    sequences_[i] = std::move(sequences_.back());
    prints_[i] = prints_.back();
    sequences_.pop_back();
    prints_.pop_back();
  }

  void perform(Act act, std::size_t target) {
    constexpr std::size_t kMany = 8;
    Sequence* sequence = sequences_.empty() ? nullptr : sequences_[target].get();
    const int layer = below(family_.config.layers), n = sequence ? sequence->tokens(layer) : 0;
    const auto token = [&] { return tokens_.row * at(below(tokens_.count())); };
    switch (act) {
      case kCreate:
        if (sequences_.size() >= kMany) drop(target);
        return keep(cache_->sequence());
      case kAppend:
      case kDecode: {
        const int count = act == kDecode ? 1 : below(3) ? below(40) : below(300);
        if (n + count > 600) return sequence->truncate(below(n));
        return append(*sequence, tokens_, below(tokens_.count() - count), count, layer);
      }
      case kFork: {
        auto fork = sequence->fork();
        if (sequences_.size() >= kMany) drop(any());
        return keep(std::move(fork));
      }
      case kTruncate:
        return sequence->truncate(below(n + 2) - below(4) / 3);
      case kReplace:
        return sequence->replace(layer, below(n + 2) - 1, tokens_.k.data() + token(),
                                 tokens_.v.data() + token());
      case kRemove: {
        std::vector<int> positions;
        const int first = below(n + 2) - 1;
        for (int i = below(3) ? below(4) : below(200); i >= 0; --i)
          positions.push_back(std::min(first + i, n));
        return sequence->remove(layer, below(family_.config.kv_heads + 2) - 1, positions);
      }
      case kAttend:
        return attend(layer);
      case kSave:
        if (writer_ && below(3)) {
          const int pieces = below(4);
          for (int i = 0; i < pieces; ++i) writer_->next();
          if (below(2)) writer_.reset();
          return;
        }
        if (below(3) == 0) {
          writer_ = std::make_unique<SequenceWriter>(*sequence);
          return;
        }
        file_ = saved(*sequence);
        file_print_ = prints_[target];
        return;
      case kLoad:
        return load();
      case kDrop:
        return drop(target);
    }
  }

  void attend(int layer) {
    const CacheConfig& config = family_.config;
    const std::size_t row = at(config.query_heads * config.head_dim);
    std::vector<BatchItem> items;
    std::vector<std::vector<float>> q, out;
    for (const auto& sequence : sequences_) {
      const int tokens = 1 + below(3);
      q.emplace_back(row * at(tokens), 0.25f);
      out.emplace_back(row * at(tokens));
      items.push_back({sequence.get(), q.back().data(), out.back().data(), nullptr, nullptr, tokens});
    }
    const std::atomic<bool> aborted{below(4) == 0};
    const bool finished = attend_batch(*cache_, layer, items, below(2) == 0, &aborted);
    bool finite = true;
    if (finished)
      for (const auto& values : out)
        for (const float value : values) finite &= std::isfinite(value);
    CHECK_WITH(finite && finished == !aborted, family_.name);
  }

  void load() {
    if (file_.empty()) return;
    if (reader_) {
      reader_.reset();
      return;
    }
    Bytes bytes = file_;
    const int kind = below(5);
    const std::size_t at_byte = at(below(static_cast<int>(bytes.size())));
    if (kind == 0) {  // left half-read
      auto reader = std::make_unique<SequenceReader>(cache_);
      reader->feed(bytes.data(), at_byte);
      reader_ = std::move(reader);
      return;
    }
    if (kind == 1) bytes.resize(at_byte);
    if (kind == 2) bytes[at_byte] ^= static_cast<std::uint8_t>(1 << below(8));
    auto sequence = loaded(cache_, bytes, kind == 3 ? at(1 + below(5000)) : SIZE_MAX);
    CHECK_WITH(kind > 2 && print_of(*sequence) == file_print_, family_.name);
    if (sequences_.size() >= 8) drop(any());
    keep(std::move(sequence));
  }

  Family family_;
  std::shared_ptr<Cache> cache_;
  const Tokens& tokens_;
  check::Random& random_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<std::uint32_t> prints_;
  std::unique_ptr<SequenceWriter> writer_;
  std::unique_ptr<SequenceReader> reader_;
  Bytes file_;
  std::uint32_t file_print_ = 0;
};

/// Resident bytes, or 0 where they say nothing: sanitizers and emulators keep memory of their own.
std::size_t resident() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 0;
#else
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  unsigned long size = 0, pages = 0;
  if (!file || std::fscanf(file, "%lu %lu", &size, &pages) != 2) pages = 0;
  if (file) std::fclose(file);
  return pages * 4096;
#endif
}

TEST("whatever comes and goes, the pool accounts for it, failures change nothing, and nothing stays behind") {
  const long calls = check::number_from("INNERKV_CHURN_OPS", 30000),
             seconds = check::number_from("INNERKV_CHURN_SECONDS", 0);
  check::Random random(static_cast<std::uint64_t>(check::number_from("INNERKV_CHURN_SEED", 1)));
  std::vector<Family> all = families();
  all.push_back({"layers of different kinds", config_of({calibrated(), innerq(), scheme_of({}, {})})});
  for (Family& family : all) family.config.budget_bytes = std::size_t{384} << 10;
  const auto backend = std::make_shared<CountingBackend>();
  std::vector<Tokens> tokens;
  for (const Family& family : all) tokens.push_back(tokens_of(family.config, 320, 5));
  std::vector<std::unique_ptr<World>> lasting;  // caches that see one cycle after another
  for (std::size_t i = 0; i < all.size(); ++i)
    lasting.push_back(std::make_unique<World>(backend, all[i], tokens[i], random));

  constexpr int kCalls = 200;
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  std::size_t heap_before = 0, resident_before = 0, heap_most = 0, resident_most = 0;
  long cycles = 0;
  const long warm = 4 * static_cast<long>(all.size());
  for (; cycles < warm || (seconds > 0 ? elapsed() < static_cast<double>(seconds) : cycles * kCalls < calls);
       ++cycles) {
    const std::size_t i = at(static_cast<int>(cycles % static_cast<long>(all.size())));
    if (cycles / static_cast<long>(all.size()) % 2 == 0) {
      lasting[i]->cycle(kCalls);
    } else {
      const std::size_t heap = heap_bytes, held = backend->held;
      {
        World brief(backend, all[i], tokens[i], random);
        brief.cycle(kCalls);
      }
      const bool nothing_left = heap_bytes == heap && backend->held == held;  // exactly
      CHECK_WITH(nothing_left, all[i].name);
    }
    if (cycles == warm) {
      heap_before = heap_bytes;
      resident_before = resident();
    }
    if (cycles < warm) continue;
    heap_most = std::max<std::size_t>(heap_most, heap_bytes);
    resident_most = std::max(resident_most, resident());
  }
  // Lasting caches keep slabs within their budgets and a few vectors that describe them; slack for
  // allocators.
  CHECK(heap_most <= heap_before + (std::size_t{32} << 10));
  CHECK(resident_most <= resident_before + (std::size_t{16} << 20));
  lasting.clear();
  CHECK(backend->held == 0);
  for (std::size_t act = 0; act < std::size(kActNames); ++act)
    std::printf("    %-10s %8ld, %ld of them refused\n", kActNames[act], World::done[act],
                World::failed[act]);
  std::printf(
      "    %ld cycles in %.0f s; heap %zu bytes, then at most %zu; resident %.1f MiB, then at most %.1f\n",
      cycles, elapsed(), heap_before, heap_most, static_cast<double>(resident_before) / 1048576,
      static_cast<double>(resident_most) / 1048576);
  CHECK(World::failed[kAppend] > 0 && World::failed[kFork] > 0 && World::failed[kLoad] > 0);
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("churn", argc, argv); }
