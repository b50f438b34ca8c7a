// The GPU backend against the CPU backend: equal bits in pages and windows, attention within the width of
// integer queries and weights. Runs on the emulated GPU (gpu_backend_test) and on a real one
// (gpu_backend_gpu_test). Environment: INNERKV_GPU_SHAPES, how many random shapes;
// INNERKV_GPU_LONGEST, tokens of the longest sequence; INNERKV_GPU_SEED.
#include <cstdlib>

#include "simt/gpu_tensors.h"
#include "simt/gpu_under_test.h"
#include "support.h"

namespace innerkv::test {
namespace {

/// contents() of a sequence whose pages and windows are on the device: its file holds the same.
Bytes stored(const Sequence& sequence) { return saved(sequence); }

bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // infinities too
    if (!(std::abs(a[i] - b[i]) <= tolerance * (1.0f + std::abs(b[i])))) return false;
  }
  return true;
}

TEST("pages, windows and statistics have the bits of the CPU backend") {
  const auto schedules = simt::schedules();
  const auto all = families();
  for (std::size_t s = 0; s < schedules.size(); ++s) {
    simt::use(schedules[s]);
    for (std::size_t f = s % 4; f < all.size(); f += 4) {  // every family in three schedules
      const Family& family = all[f];
      const Tokens tokens = tokens_of(family.config, 215, 4);
      const auto cpu = cache_of(family.config), emulated = gpu_cache(family.config);
      const auto a = filled(cpu, tokens, 150), b = filled(emulated, tokens, 150);
      for (int t = 150; t < 215; ++t) {
        append(*a, tokens, t, 1);
        append(*b, tokens, t, 1);
      }
      CHECK_WITH(stored(*a) == stored(*b), family.name);
      const auto forked = b->fork();
      a->truncate(133);
      b->truncate(133);
      append(*a, tokens, 3, 70);
      append(*b, tokens, 3, 70);
      CHECK_WITH(stored(*a) == stored(*b), family.name);
      CHECK_WITH(stored(*forked) == stored(*loaded(emulated, stored(*forked))), family.name);
      CHECK_WITH(simt::take_reports().empty(), family.name);
    }
  }
}

TEST("attention agrees with the CPU backend to the width of its integer queries") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 300, 5);
    const auto a = filled(cache_of(family.config), tokens, 300),
               b = filled(gpu_cache(family.config), tokens, 300);
    if (family.editable()) {
      std::vector<int> positions{6, 40, 99};
      for (int p = 132; p < 260; ++p) positions.push_back(p);
      a->remove(0, 0, positions);
      b->remove(0, 0, positions);
    }
    CHECK_WITH(close(attended(*b), attended(*a), 2e-3f), family.name);
    CHECK_WITH(simt::take_reports().empty(), family.name);
  }
}

struct Shape {
  int k_bits, v_bits, head_dim, group, q_tokens;
  bool blocks;  // block-relative, centred, scaled, rotated keys
  int window = 0;
  float softcap = 0;
  bool causal = true, removed = false;
};

/// Outputs, log-sum-exps and logits of three sequences of different lengths in one call.
std::vector<float> batch(const std::shared_ptr<Cache>& cache, const Tokens& tokens, const Shape& shape) {
  const CacheConfig& config = cache->config();
  const std::size_t row = at(config.query_heads * config.head_dim), heads = at(config.query_heads);
  check::Random random(6);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::vector<float>> q, out, lse, logits;
  std::vector<BatchItem> items;
  for (const int length : {9, 141, 400}) {
    sequences.push_back(filled(cache, tokens, length));
    if (shape.removed && length == 400) {
      std::vector<int> positions{5, 77};
      for (int p = 132; p < 260; ++p) positions.push_back(p);  // all of the second page
      sequences.back()->remove(0, 1, positions);
    }
    std::vector<float> queries(row * at(shape.q_tokens));
    for (float& x : queries) x = random.normal();
    q.push_back(queries);
    out.emplace_back(queries.size());
    lse.emplace_back(heads * at(shape.q_tokens));
    logits.emplace_back(lse.back().size() * at(length));
  }
  for (std::size_t i = 0; i < sequences.size(); ++i)
    items.push_back(
        {sequences[i].get(), q[i].data(), out[i].data(), lse[i].data(), logits[i].data(), shape.q_tokens});
  CHECK(attend_batch(*cache, 0, items, shape.causal, nullptr));
  std::vector<float> all;
  for (const auto* part : {&out, &lse, &logits})
    for (const auto& one : *part) all.insert(all.end(), one.begin(), one.end());
  return all;
}

TEST("attention on integer tensor cores: every pair of bits, rows, masks, removed tokens, ragged batches") {
  std::vector<Shape> shapes;
  for (const auto& [k, v] : {std::pair{2, 1}, {2, 2}, {3, 2}, {3, 3}, {4, 2}, {4, 4}})
    for (const int head_dim : {64, 128}) shapes.push_back({k, v, head_dim, k + v - 2, 1, v == 2});
  shapes.push_back({2, 2, 128, 7, 1, true});
  shapes.push_back({3, 3, 64, 1, 5, true});
  shapes.push_back({4, 4, 128, 4, 2, false, 100});
  shapes.push_back({3, 2, 64, 3, 3, true, 0, 5.0f});
  shapes.push_back({2, 1, 128, 8, 1, false, 0, 0, true, true});
  shapes.push_back({4, 4, 64, 2, 2, true, 0, 0, false, true});
  shapes.push_back({8, 4, 96, 4, 2, true, 130, 3.0f, true, true});  // not one of the fast formats
  const auto schedules = simt::schedules();
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const Shape& shape = shapes[i];
    simt::use(schedules[i % schedules.size()]);
    LayerScheme scheme = shape.blocks ? calibrated(shape.head_dim) : scheme_of({}, {});
    scheme.k = {shape.k_bits, Group::kToken, Mode::kMidRise};
    scheme.v = {shape.v_bits, Group::kToken, Mode::kMidRise};
    if (shape.v_bits == 1) scheme.clip_v.clear();
    CacheConfig config = config_of({scheme}, shape.head_dim);
    config.query_heads = config.kv_heads * shape.group;
    config.window_of_layer = {shape.window};
    config.softcap = shape.softcap;
    const Tokens tokens = tokens_of(config, 400, 8);
    const std::vector<float> expected = batch(cache_of(config), tokens, shape);
    const std::vector<float> found = batch(gpu_cache(config), tokens, shape);
    CHECK_WITH(close(found, expected, 4e-4f),
               "K" + std::to_string(shape.k_bits) + "V" + std::to_string(shape.v_bits) + ", head_dim " +
                   std::to_string(shape.head_dim) + ", case " + std::to_string(i));
    CHECK(simt::take_reports().empty());
  }
}

TEST("plain attention over 16-bit and float32 rows") {
  for (const bool half : {true, false}) {
    const int tokens = 300, D = 80, heads = 6, kv_heads = 2;
    check::Random random(3);
    std::vector<float> k(at(kv_heads * tokens * D)), v(k.size()), q(at(2 * heads * D));
    std::vector<std::uint16_t> k16, v16;
    for (auto* values : {&k, &v, &q})
      for (float& x : *values) x = half_value(half_bits(random.normal()));
    for (const float x : k) k16.push_back(half_bits(x));
    for (const float x : v) v16.push_back(half_bits(x));
    std::vector<float> results[2];
    const auto device = gpu_backend();
    CpuBackend cpu(1, nullptr);
    for (const int which : {0, 1}) {
      std::vector<float> out(q.size()), lse(at(2 * heads)), logits(at(2 * heads * tokens));
      DenseRequest request;
      request.k = half ? static_cast<const void*>(k16.data()) : k.data();
      request.v = half ? static_cast<const void*>(v16.data()) : v.data();
      request.half = half;
      request.q = q.data();
      request.out = out.data();
      request.lse = lse.data();
      request.logits = logits.data();
      request.tokens = tokens;
      request.q_tokens = 2;
      request.query_heads = heads;
      request.kv_heads = kv_heads;
      request.head_dim = D;
      request.scale = 0.1f;
      request.sliding_window = 250;
      if (which == 0)
        cpu.attend_dense(request);
      else
        device->attend_dense(request);
      for (const auto* part : {&out, &lse, &logits})
        results[which].insert(results[which].end(), part->begin(), part->end());
    }
    CHECK(close(results[1], results[0], 1e-5f));
    CHECK(simt::take_reports().empty());
  }
}

// ---- random shapes ----

TensorSpec random_spec(check::Random& random, bool value) {
  const int bits = std::vector{2, 3, 4, 8, 16, 1}[at(random.below(value ? 6 : 5))];
  if (bits == 16) return {};
  const Group groups[] = {Group::kToken, Group::kChannels32, Group::kChannels64, Group::kTokens32};
  const Mode modes[] = {Mode::kMidRise, Mode::kSignedMax,  Mode::kZeroLevel,
                        Mode::kHybrid,  Mode::kAsymmetric, Mode::kHybridReleased};
  return {bits, groups[random.below(value ? 4 : 3)], modes[random.below(6)]};
}

/// A cache that the core accepts, drawn from everything that it accepts; half of them are fast formats.
CacheConfig random_config(check::Random& random) {
  for (;;) {
    const int head_dim = std::vector{64, 80, 96, 128, 256}[at(random.below(5))];
    const bool fast = random.below(2) == 0;
    const bool blocks = random.below(2) == 0;
    const int kv_heads = 1 + random.below(3);
    LayerScheme scheme = blocks ? calibrated(head_dim, kv_heads, random.bits()) : scheme_of({}, {});
    scheme.sink = random.below(40);
    scheme.recent = random.below(100);
    scheme.k = random_spec(random, false);
    scheme.v = random_spec(random, true);
    if (fast) {
      const std::pair<int, int> pairs[] = {{2, 1}, {2, 2}, {3, 2}, {3, 3}, {4, 2}, {4, 4}};
      const auto& [k, v] = pairs[random.below(6)];
      scheme.k = {k, Group::kToken, Mode::kMidRise};
      scheme.v = {v, Group::kToken, Mode::kMidRise};
    }
    if (blocks && random.below(2) == 0) scheme.block_tokens = 2 * kPageTokens;
    if (scheme.v.bits == 1) scheme.clip_v.clear();
    CacheConfig config = config_of({scheme}, fast && head_dim != 64 ? 128 : head_dim, kv_heads);
    if (fast && blocks && config.head_dim != head_dim) continue;
    config.query_heads = kv_heads * (1 + random.below(8));
    config.window_of_layer = {random.below(3) == 0 ? 1 + random.below(300) : 0};
    config.softcap = random.below(3) == 0 ? 5.0f : 0.0f;
    config.rope.half_layout = random.below(2) == 0;
    try {
      validate(config);
      return config;
    } catch (const Error&) {
    }
  }
}

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

struct Job {
  std::unique_ptr<Sequence> sequence;
  std::vector<float> q;
};

/// Output, log-sum-exp and logits of a batch.
std::vector<float> attended_batch(const std::shared_ptr<Cache>& cache, const std::vector<Job>& jobs,
                                  int q_tokens, bool causal, bool logits) {
  const CacheConfig& config = cache->config();
  std::vector<std::vector<float>> results;
  std::vector<BatchItem> items;
  for (const Job& job : jobs) {
    const std::size_t rows = at(config.query_heads * q_tokens), size = rows * at(job.sequence->tokens(0));
    results.emplace_back(job.q.size());
    results.emplace_back(rows);
    results.emplace_back(logits ? size : 0);
  }
  for (std::size_t i = 0; i < jobs.size(); ++i)
    items.push_back({jobs[i].sequence.get(), jobs[i].q.data(), results[3 * i].data(),
                     results[3 * i + 1].data(), logits ? results[3 * i + 2].data() : nullptr, q_tokens});
  CHECK(attend_batch(*cache, 0, items, causal, nullptr));
  std::vector<float> all;
  for (const auto& one : results) all.insert(all.end(), one.begin(), one.end());
  return all;
}

std::string text_of(const CacheConfig& config, int q_tokens) {
  const LayerScheme& scheme = config.schemes[0];
  const auto spec = [](const TensorSpec& s) {
    return std::to_string(s.bits) + " bits, group " + std::to_string(static_cast<int>(s.group)) + ", mode " +
           std::to_string(static_cast<int>(s.mode));
  };
  return "K " + spec(scheme.k) + "; V " + spec(scheme.v) + "; head_dim " + std::to_string(config.head_dim) +
         ", heads " + std::to_string(config.query_heads) + "/" + std::to_string(config.kv_heads) + ", " +
         std::to_string(q_tokens) + " queries, windows " + std::to_string(scheme.sink) + " + " +
         std::to_string(scheme.recent) + ", blocks of " + std::to_string(scheme.block_tokens);
}

TEST("random shapes: pages to the bit, ragged batches of attention") {
  const int shapes = from_environment("INNERKV_GPU_SHAPES", kOnGpu ? 200 : 10);
  const int longest = from_environment("INNERKV_GPU_LONGEST", kOnGpu ? 6000 : 500);
  const std::uint64_t seed = static_cast<std::uint64_t>(from_environment("INNERKV_GPU_SEED", 1));
  const auto schedules = simt::schedules();
  for (int i = 0; i < shapes; ++i) {
    check::Random random(seed * 100000 + static_cast<std::uint64_t>(i));
    simt::use(schedules[at(random.below(static_cast<int>(schedules.size())))]);
    const CacheConfig config = random_config(random);
    const int sequences = 1 + random.below(4), q_tokens = 1 + random.below(4) * random.below(3);
    const bool causal = random.below(4) != 0, logits = random.below(2) == 0;
    const auto cpu = cache_of(config), gpu = gpu_cache(config);
    std::vector<Job> a, b;
    for (int s = 0; s < sequences; ++s) {
      const int length = q_tokens + random.below(s == 0 ? longest : 300);
      const Tokens tokens = tokens_of(config, length, random.bits());
      a.push_back({cpu->sequence(), {}});
      b.push_back({gpu->sequence(), {}});
      for (int done = 0; done < length;) {
        const int count = std::min(length - done, 1 + random.below(400));
        append(*a.back().sequence, tokens, done, count);
        append(*b.back().sequence, tokens, done, count);
        done += count;
      }
      CHECK_WITH(stored(*a.back().sequence) == stored(*b.back().sequence), text_of(config, q_tokens));
      std::vector<float> q(at(q_tokens * config.query_heads * config.head_dim));
      for (float& x : q) x = random.normal();
      a.back().q = b.back().q = q;
    }
    CHECK_WITH(close(attended_batch(gpu, b, q_tokens, causal, logits),
                     attended_batch(cpu, a, q_tokens, causal, logits), 2e-3f),
               "shape " + std::to_string(i) + ": " + text_of(config, q_tokens));
    CHECK(simt::take_reports().empty());
  }
}

TEST("the same batch gives the same bits every time") {
  const int runs = kOnGpu ? 100 : 6;
  const auto schedules = simt::schedules();
  for (const bool fast : {true, false}) {
    LayerScheme scheme = fast ? calibrated(128) : innerq();
    CacheConfig config = config_of({scheme}, 128);
    config.query_heads = 8;
    config.budget_bytes = std::size_t{256} << 20;
    const auto cache = gpu_cache(config);
    std::vector<Job> jobs;
    check::Random random(12);
    for (const int length : {kOnGpu ? 20000 : 700, 300, 5}) {
      jobs.push_back({filled(cache, tokens_of(config, length, random.bits()), length), {}});
      jobs.back().q.resize(at(2 * config.query_heads * config.head_dim));
      for (float& x : jobs.back().q) x = random.normal();
    }
    std::vector<float> first;
    int different = 0;
    for (int run = 0; run < runs; ++run) {
      simt::use(schedules[at(run) % schedules.size()]);
      const std::vector<float> now = attended_batch(cache, jobs, 2, true, true);
      if (run == 0) first = now;
      different += !same_bits(first, now);
    }
    CHECK_WITH(different == 0, std::to_string(different) + " of " + std::to_string(runs));
    CHECK(simt::take_reports().empty());
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) {
  const char* name = innerkv::test::kOnGpu ? "gpu_backend_gpu" : "gpu_backend";
  if (!innerkv::test::gpu_at_hand(name)) return 77;
  return check::run(name, argc, argv);
}
