// The GPU backend on the emulated GPU against the CPU backend: equal bits in pages and windows, attention
// within float32 rounding of a float64 sum over the decoded tokens.
#include "cuda/gpu_backend.cu"

#include "cuda/attend_mma.cu"
#include "cuda/gpu_attend.cu"
#include "cuda/merge.cu"
#include "support.h"

namespace innerkv::test {
namespace {

std::shared_ptr<Cache> gpu_cache(const CacheConfig& config) {
  return std::make_shared<Cache>(std::make_shared<gpu::GpuBackend>(), config);
}

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
    gpu::GpuBackend emulated;
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
        emulated.attend_dense(request);
      for (const auto* part : {&out, &lse, &logits})
        results[which].insert(results[which].end(), part->begin(), part->end());
    }
    CHECK(close(results[1], results[0], 1e-5f));
    CHECK(simt::take_reports().empty());
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("gpu_backend", argc, argv); }
