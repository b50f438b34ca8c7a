// Tokens of many sequences appended in one call: the bits of one call each, one call of the backend for all,
// and all or nothing.
#include <bit>
#include <cmath>
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

/// The CPU backend, counted; quantise() fails when `allowed` calls of it have been made.
class CountingBackend final : public CpuBackend {
 public:
  CountingBackend() : CpuBackend(2, nullptr) {}
  int stages = 0, takes = 0, quantises = 0, copies = 0, reads = 0, allowed = 1 << 30;
  void copy_memory(void* to, const void* from, std::size_t bytes) noexcept override {
    ++reads;
    CpuBackend::copy_memory(to, from, bytes);
  }
  void stage(std::span<Staging> numbers) override {
    ++stages;
    CpuBackend::stage(numbers);
  }
  void take(std::span<Intake> tensors) override {
    ++takes;
    CpuBackend::take(tensors);
  }
  void copy_rows(std::span<const RowCopy> rows, int row) noexcept override {
    ++copies;
    CpuBackend::copy_rows(rows, row);
  }
  void quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                const RotationTable& rotations) override {
    if (quantises++ == allowed) throw Error(ErrorCode::kOutOfMemory, "refused");
    for (const QuantiseJob& job : jobs) CHECK(job.sink == jobs[0].sink && job.scheme == jobs[0].scheme);
    CpuBackend::quantise(config, jobs, rotations);
  }
};

using Sequences = std::vector<std::unique_ptr<Sequence>>;

AppendItem item_of(Sequence& sequence, const Tokens& tokens, int first, int count) {
  const std::size_t from = tokens.row * at(first);
  return {&sequence, tokens.k.data() + from, tokens.v.data() + from, count};
}

/// Sequences of all lengths, some that share pages, one that was truncated.
Sequences some_sequences(const std::shared_ptr<Cache>& cache, const Tokens& tokens) {
  Sequences all;
  for (const int length : {0, 1, 7, 47, 139, 175, 300}) all.push_back(filled(cache, tokens, length));
  all.push_back(all[5]->fork());
  all.push_back(all[6]->fork());
  all[6]->truncate(150);
  return all;
}

Bytes everything(const Sequences& sequences) {
  Bytes all;
  for (const auto& sequence : sequences) {
    const Bytes one = contents(*sequence);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

TEST("a batch leaves the bits of one append each, in pages, windows, statistics and files") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 600, 1);
    const auto backend = std::make_shared<CountingBackend>();
    const auto one = cache_of(family.config), many = std::make_shared<Cache>(backend, family.config);
    Sequences singles = some_sequences(one, tokens), batch = some_sequences(many, tokens);
    for (const int added : {1, 1, 40, 130, 1}) {
      std::vector<AppendItem> items;
      for (std::size_t i = 0; i < batch.size(); ++i) {
        const int count = i == 3 ? 0 : added + static_cast<int>(i) % 2 * 5, first = static_cast<int>(11 * i);
        append(*singles[i], tokens, first, count);
        items.push_back(item_of(*batch[i], tokens, first, count));
      }
      backend->stages = backend->quantises = backend->copies = 0;
      append_batch(*many, 0, items);
      CHECK_WITH(backend->stages == 1 && backend->takes == 0, family.name);
      CHECK_WITH(backend->quantises <= (family.scheme().released_windows ? 2 : 1), family.name);
      CHECK_WITH(backend->copies <= (family.scheme().online() ? 2 : 1), family.name);
      for (std::size_t i = 0; i < batch.size(); ++i) {
        CHECK_WITH(contents(*batch[i]) == contents(*singles[i]), family.name);
        CHECK_WITH(saved(*batch[i]) == saved(*singles[i]), family.name);
        CHECK_WITH(same_bits(attended(*batch[i], 0), attended(*singles[i], 0)) || batch[i]->tokens(0) == 0,
                   family.name);
      }
    }
    CHECK(many->pool().used_bytes() == one->pool().used_bytes());
  }
}

TEST("a decoding step reads nothing back: zero points are counted once") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 500, 4);
    const auto backend = std::make_shared<CountingBackend>();
    const auto cache = std::make_shared<Cache>(backend, family.config);
    auto sequence = filled(cache, tokens, 150);
    for (int round = 0; round < 3; ++round) {
      backend->reads = 0;
      for (int t = 0; t < 150; ++t) {
        const Checkpoint point = sequence->checkpoint(1);
        append(*sequence, tokens, t, 1);
        if (t % 7 == 0) sequence->restore(point);
      }
      CHECK_WITH(backend->reads == 0, family.name + std::string(": ") + std::to_string(backend->reads));
      if (round == 1) sequence->truncate(sequence->tokens(0) - 20);
      if (round < 2) sequence = loaded(cache, saved(*sequence));
    }
  }
}

TEST("host and device, float32, bfloat16 and binary16 go together in one batch") {
  const Family family = families().front();
  const Tokens tokens = tokens_of(family.config, 300, 2);
  const auto backend = std::make_shared<CountingBackend>();
  const auto cache = std::make_shared<Cache>(backend, family.config);
  const std::size_t numbers = tokens.row * 200;
  std::vector<float> floats;
  std::vector<std::uint16_t> brains, rounded[2];  // what bfloat16 keeps of the numbers
  for (const auto* from : {&tokens.k, &tokens.v})
    for (std::size_t i = 0; i < numbers; ++i) {
      const float x = half_value((*from)[i]);
      floats.push_back(x);
      brains.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16));
      rounded[from == &tokens.v].push_back(
          half_bits(std::bit_cast<float>(std::uint32_t{brains.back()} << 16)));
    }
  auto* memory = static_cast<std::uint8_t*>(backend->allocate_memory(12 * numbers));
  std::memcpy(memory, floats.data(), 8 * numbers);
  std::memcpy(memory + 8 * numbers, brains.data(), 4 * numbers);
  Sequences singles, batch;
  for (int i = 0; i < 4; ++i) {
    singles.push_back(filled(cache, tokens, 60 * i));
    batch.push_back(filled(cache, tokens, 60 * i));
  }
  const int counts[] = {200, 3, 150, 9};
  const auto device = [&](std::size_t from, Dtype dtype) { return TensorView::device(memory + from, dtype); };
  append_batch(
      *cache, 0,
      std::vector<AppendItem>{
          {batch[0].get(), device(0, Dtype::kF32), device(4 * numbers, Dtype::kF32), counts[0]},
          item_of(*batch[1], tokens, 0, counts[1]),
          {batch[2].get(), device(8 * numbers, Dtype::kBf16), device(10 * numbers, Dtype::kBf16), counts[2]},
          {batch[3].get(), tokens.k.data(), device(4 * numbers, Dtype::kF32), counts[3]}});
  CHECK(backend->takes == 1);
  for (const std::size_t i : {0, 1, 3}) append(*singles[i], tokens, 0, counts[i]);
  singles[2]->append(0, rounded[0].data(), rounded[1].data(), counts[2]);
  CHECK(everything(batch) == everything(singles));
  backend->free_memory(memory, 12 * numbers);
}

TEST("what cannot be appended is refused by name, and no sequence has changed") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 400, 3);
    const auto backend = std::make_shared<CountingBackend>();
    const auto cache = std::make_shared<Cache>(backend, family.config), other = cache_of(family.config);
    const Sequences all = some_sequences(cache, tokens);
    const auto stranger = other->sequence();
    std::vector<AppendItem> good;
    for (std::size_t i = 0; i < all.size(); ++i) good.push_back(item_of(*all[i], tokens, 0, 150));
    const Bytes before = everything(all);
    const std::size_t used = cache->pool().used_bytes();
    const auto refused = [&](ErrorCode code, const std::string& text, int layer,
                             const std::vector<AppendItem>& items) {
      try {
        append_batch(*cache, layer, items);
        return false;
      } catch (const Error& error) {
        CHECK_WITH(error.code() == code && std::string(error.what()).find(text) != std::string::npos,
                   error.what());
      }
      return everything(all) == before && cache->pool().used_bytes() == used;
    };
    const auto with = [&](std::size_t i, const AppendItem& item) {
      std::vector<AppendItem> items = good;
      items[i] = item;
      return items;
    };
    constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;
    CHECK(refused(kBad, "Items 2 and 5 are the same sequence", 0, with(5, good[2])));
    CHECK(refused(kBad, "another cache", 0, with(5, item_of(*stranger, tokens, 0, 1))));
    CHECK(refused(kBad, "Layer 1 does not exist", 1, good));
    CHECK(refused(kBad, "must not be negative", 0, with(5, item_of(*all[5], tokens, 0, -1))));
    CHECK(refused(kBad, "at most 2^30", 0, with(5, item_of(*all[5], tokens, 0, (1 << 30) - 10))));
    const std::size_t bytes = 4 * tokens.row * 150;
    auto* memory = static_cast<float*>(backend->allocate_memory(bytes));
    backend->clear_memory(memory, bytes);
    memory[tokens.row * 7 + 3] = std::nanf("");
    CHECK(refused(ErrorCode::kNotFinite, "v of item 5 at token 7, head 0, channel 3 is NaN", 0,
                  with(5, {all[5].get(), tokens.k.data(), TensorView::device(memory, Dtype::kF32), 150})));
    CHECK(
        refused(kBad, "k of item 5 must be aligned", 0,
                with(5, {all[5].get(), TensorView::device(memory + 1, Dtype::kF32), tokens.v.data(), 150})));
    backend->free_memory(memory, bytes);
    for (int calls = 0;; ++calls) {  // with released windows there is one for every length of the sink
      backend->quantises = 0;
      backend->allowed = calls;
      if (!refused(ErrorCode::kOutOfMemory, "refused", 0, good)) break;
      CHECK_WITH(calls < (family.scheme().released_windows ? 2 : 1), family.name);
    }
    // That one went through, and is what it would have been without all this.
    const auto fresh = cache_of(family.config);
    const Sequences expected = some_sequences(fresh, tokens);
    for (const auto& sequence : expected) append(*sequence, tokens, 0, 150);
    CHECK_WITH(everything(all) == everything(expected), family.name);
    append_batch(*cache, 0, {});
    CHECK(everything(all) == everything(expected));
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("append_batch", argc, argv); }
