// Memory runs out at every point where it can: each call that takes memory is tried again and again with a
// little more of the budget free, and with a machine that refuses its first, second, third ... request. A
// call that fails leaves its sequence, its forks and the pool exactly as they were; the one that succeeds
// gives what a call with ample memory gives.
//
// INNERKV_BUDGET_STRIDE: try every so many sizes of the budget only (default 1).
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

/// The CPU backend on a machine that refuses memory after `left` more requests.
class RefusingBackend final : public CpuBackend {
 public:
  RefusingBackend() : CpuBackend(1, nullptr) {}
  int left = 1 << 30;
  void* allocate_memory(std::size_t bytes) override {
    if (left-- <= 0) throw Error(ErrorCode::kOutOfMemory, "refused");
    return CpuBackend::allocate_memory(bytes);
  }
};

struct World {
  std::shared_ptr<RefusingBackend> backend = std::make_shared<RefusingBackend>();
  std::shared_ptr<Cache> cache;
  std::vector<std::unique_ptr<Sequence>> sequences;  // [0] is the one that is worked on, [1] shares its pages
  Bytes file;

  World(const CacheConfig& config, const Tokens& tokens) : cache(std::make_shared<Cache>(backend, config)) {
    sequences.push_back(filled(cache, tokens, 250));
    sequences.push_back(sequences[0]->fork());
    sequences.push_back(cache->sequence());
    sequences.push_back(filled(cache, tokens, 250));  // [3] owns its pages, and they hold more than it needs
    sequences[3]->truncate(170);
    file = saved(*sequences[0]);
  }
  Bytes everything() const {
    Bytes all;
    for (const auto& sequence : sequences) {
      const Bytes one = contents(*sequence);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
};

struct Operation {
  const char* name;
  bool editable_only;
  void (*run)(World&, const Tokens&);
};

void append_all(Sequence& sequence, const Tokens& tokens, int first, int count) {
  append(sequence, tokens, first, count, sequence.cache().config().layers - 1);
}

const Operation kOperations[] = {
    {"appending behind a shared page", false,
     [](World& w, const Tokens& t) { append_all(*w.sequences[0], t, 250, 150); }},
    {"a first append", false, [](World& w, const Tokens& t) { append_all(*w.sequences[2], t, 0, 200); }},
    {"appending one token", false,
     [](World& w, const Tokens& t) { append_all(*w.sequences[1], t, 250, 40); }},
    {"appending behind truncated tokens", false,
     [](World& w, const Tokens& t) { append_all(*w.sequences[3], t, 170, 200); }},
    {"appending a batch", false,
     [](World& w, const Tokens& t) {
       const auto item = [&](std::size_t i, int first, int count) {
         const std::size_t from = t.row * at(first);
         return AppendItem{w.sequences[i].get(), t.k.data() + from, t.v.data() + from, count};
       };
       const AppendItem items[] = {item(0, 250, 150), item(1, 250, 40), item(2, 0, 200), item(3, 170, 200)};
       append_batch(*w.cache, w.cache->config().layers - 1, items);
     }},
    {"forking", false, [](World& w, const Tokens&) { w.sequences.push_back(w.sequences[0]->fork()); }},
    {"loading", false, [](World& w, const Tokens&) { w.sequences.push_back(loaded(w.cache, w.file, 1000)); }},
    {"replacing in a shared page", true,
     [](World& w, const Tokens& t) { w.sequences[0]->replace(0, 100, t.k.data(), t.v.data()); }},
    {"removing from shared pages", true,
     [](World& w, const Tokens&) {
       const int positions[] = {20, 100, 140, 141, 200};
       w.sequences[0]->remove(0, -1, positions);
     }},
};

/// Holds all that the pool could still give out, idle slots of its slabs included, but for `left` bytes.
std::vector<Slot> all_but(Cache& cache, std::size_t left) {
  Pool& pool = cache.pool();
  std::vector<Slot> ballast;
  const auto hog = [&](std::size_t bytes) {
    return error_of([&] { ballast.push_back(pool.take(bytes)); }) < 0;
  };
  Slot spare;
  if (left > 0) spare = pool.take(left);
  const std::size_t rest = pool.budget_bytes() - pool.reserved_bytes();
  if (rest > 0) hog(rest);
  for (int layer = 0; layer < cache.config().layers; ++layer) {
    const LayerScheme& scheme = cache.config().scheme(layer);
    for (const std::size_t bytes :
         {cache.config().window_bytes(scheme),
          PageLayout(scheme.k, scheme.v, cache.config().head_dim).bytes(), std::size_t{2} * kZeroExtent})
      while (hog(bytes)) {
      }
  }
  return ballast;  // and `spare` goes back
}

std::vector<Family> worlds() {
  std::vector<Family> all = families();
  all.push_back({"layers of different size", config_of({calibrated(), innerq(), scheme_of({}, {})})});
  for (Family& family : all) family.config.budget_bytes = std::size_t{1} << 20;
  return all;
}

TEST(
    "whatever part of the budget is left, a call that fails changes nothing, and one more try with enough "
    "succeeds") {
  const auto stride = static_cast<std::size_t>(check::number_from("INNERKV_BUDGET_STRIDE", 1));
  for (const Family& family : worlds()) {
    const Tokens tokens = tokens_of(family.config, 400, 1);
    for (const Operation& operation : kOperations) {
      if (operation.editable_only && !family.editable()) continue;
      const std::string what = std::string(family.name) + ": " + operation.name;
      World ample(family.config, tokens);
      operation.run(ample, tokens);
      const Bytes expected = ample.everything();
      World world(family.config, tokens);
      Pool& pool = world.cache->pool();
      const Bytes before = world.everything();
      const std::size_t used = pool.used_bytes(),
                        smallest = family.scheme().k.compact_zeros() || family.scheme().v.compact_zeros()
                                       ? 256
                                       : 1024,
                        step = smallest * stride;
      int failures = 0, code = 0;
      for (std::size_t left = 0; left < pool.budget_bytes(); left += step) {
        const std::vector<Slot> ballast = all_but(*world.cache, left);
        const std::size_t held = pool.used_bytes();
        code = error_of([&] { operation.run(world, tokens); });
        if (code < 0) break;
        ++failures;
        CHECK_WITH(code == static_cast<int>(ErrorCode::kOutOfMemory), what);
        CHECK_WITH(pool.used_bytes() == held && pool.reserved_bytes() <= pool.budget_bytes(), what);
        CHECK_WITH(world.everything() == before, what);
      }
      CHECK_WITH(code < 0 && failures > 0, what);
      CHECK_WITH(world.everything() == expected, what);
      CHECK_WITH(pool.used_bytes() > used, what);
      CHECK(same_bits(attended(*world.sequences[0]), attended(*ample.sequences[0])));
      world.sequences.clear();
      CHECK_WITH(pool.used_bytes() == 0, what);
    }
  }
}

TEST("a machine that refuses memory at any request leaves everything as it was") {
  for (const Family& family : worlds()) {
    const Tokens tokens = tokens_of(family.config, 400, 2);
    for (const Operation& operation : kOperations) {
      if (operation.editable_only && !family.editable()) continue;
      const std::string what = std::string(family.name) + ": " + operation.name;
      World world(family.config, tokens);
      const Bytes before = world.everything();
      const std::size_t used = world.cache->pool().used_bytes();
      int code = 0;
      // Slabs with free slots serve requests without asking the machine: then the first try may succeed.
      for (int allowed = 0; code >= 0 && allowed < 1000; ++allowed) {
        world.backend->left = allowed;
        code = error_of([&] { operation.run(world, tokens); });
        if (code < 0) break;
        CHECK_WITH(code == static_cast<int>(ErrorCode::kOutOfMemory), what);
        CHECK_WITH(world.cache->pool().used_bytes() == used && world.everything() == before, what);
      }
      CHECK_WITH(code < 0, what);
    }
  }
}

TEST(
    "the pool hands out zero-filled slots that do not overlap, never more than its budget, and reuses what "
    "comes back") {
  RefusingBackend backend;
  Pool pool(backend, 100000);
  check::Random random(3);
  std::vector<std::pair<Slot, std::size_t>> held;
  std::size_t total = 0;
  int refused = 0;
  for (int run = 0; run < 20000; ++run) {
    if (random.below(5) < 3) {
      const std::size_t sizes[] = {64, 256, 4096, 6400, 30000}, bytes = sizes[random.below(5)];
      Slot slot;
      if (error_of([&] { slot = pool.take(bytes); }) >= 0) {
        ++refused;
        CHECK(total + bytes > 50000 || pool.reserved_bytes() + bytes > pool.budget_bytes());
      } else {
        CHECK(reinterpret_cast<std::uintptr_t>(slot.data()) % 64 == 0);
        CHECK(std::all_of(slot.data(), slot.data() + bytes, [](int byte) { return byte == 0; }));
        std::memset(slot.data(), 1 + run % 255, bytes);
        held.emplace_back(std::move(slot), bytes);
        total += bytes;
      }
    } else if (!held.empty()) {
      const std::size_t i = at(random.below(static_cast<int>(held.size())));
      const std::uint8_t mark = held[i].first.data()[0];
      CHECK(std::all_of(held[i].first.data(), held[i].first.data() + held[i].second,
                        [&](int byte) { return byte == mark; }));
      total -= held[i].second;
      held[i] = std::move(held.back());
      held.pop_back();
    }
    CHECK(pool.used_bytes() == total && pool.used_bytes() <= pool.reserved_bytes() &&
          pool.reserved_bytes() <= pool.budget_bytes());
  }
  CHECK(refused > 0);
  held.clear();
  CHECK(pool.used_bytes() == 0);
  const Slot all = pool.take(100000);  // idle slabs of every other size make room
  CHECK(all.data() != nullptr && pool.reserved_bytes() == 100000);
  CHECK(error_of([&] { pool.take(1); }) == static_cast<int>(ErrorCode::kOutOfMemory));
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("budget", argc, argv); }
