// The GPU backend against the CPU backend: equal bits in pages and windows, attention within the width of
// integer queries and weights. Runs on the emulated GPU (gpu_backend_test) and on a real one
// (gpu_backend_gpu_test). Environment: INNERKV_GPU_SHAPES, how many random shapes;
// INNERKV_GPU_LONGEST, tokens of the longest sequence; INNERKV_GPU_SEED; INNERKV_GPU_REPEATS of one batch;
// INNERKV_GPU_STRIDE, for slow sanitizers: every so manieth case of what is enumerated.
// Long file: everything that can be asked of attention.
#include <cstdlib>

#include "cuda/routes.h"
#include "masses.h"
#include "simt/gpu_jobs.h"

namespace innerkv::test {
namespace {

TEST("pages, windows and statistics have the bits of the CPU backend") {
  const auto schedules = simt::schedules();
  const auto all = families();
  for (std::size_t s = 0; s < schedules.size(); ++s) {
    simt::use(schedules[s]);
    for (std::size_t f = s % 4; f < all.size(); f += 4) {  // every family in three schedules
      if ((s / 4 + f) % stride() != 0) continue;
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

TEST("attention agrees with the CPU backend to the bound of its arithmetic") {
  const auto all = families();
  for (std::size_t f = 0; f < all.size(); f += stride()) {
    const Family& family = all[f];
    const Tokens tokens = tokens_of(family.config, 300, 5);
    std::vector<Job> cpu(1), gpu(1);
    cpu[0].sequence = filled(cache_of(family.config), tokens, 300);
    gpu[0].sequence = filled(gpu_cache(family.config), tokens, 300);
    check::Random random(77);
    add_queries(family.config, 1, random, cpu[0], gpu[0]);
    if (family.editable()) {
      std::vector<int> positions{6, 40, 99};
      for (int p = 132; p < 260; ++p) positions.push_back(p);
      for (const auto* jobs : {&cpu, &gpu}) jobs->front().sequence->remove(0, 0, positions);
    }
    CHECK_WITH(agree(cpu, gpu, 1, true), family.name);
    CHECK_WITH(simt::take_reports().empty(), family.name);
  }
}

std::string text_of(const TensorSpec& spec) {
  if (spec.raw()) return "16 bits";
  return std::to_string(spec.bits) + " bits " + kGroupNames[at(static_cast<int>(spec.group))] + " " +
         kModeNames[at(static_cast<int>(spec.mode))] + " + " + std::to_string(spec.outliers);
}

struct Shape {
  TensorSpec k, v;
  int head_dim, group, q_tokens;
  bool blocks;  // block-relative, centred, scaled, rotated keys
  int window = 0;
  float softcap = 0;
  bool causal = true, removed = false;
};

/// Two sequences, one without a page and one of three pages.
std::vector<Job> jobs_of(const std::shared_ptr<Cache>& cache, const Tokens& tokens, const Shape& shape) {
  std::vector<Job> jobs;
  for (const int length : {9, 300}) {
    jobs.push_back({filled(cache, tokens, length), {}});
    if (!shape.removed || length < 300) continue;
    std::vector<int> positions{5, 77};
    for (int p = 132; p < 260; ++p) positions.push_back(p);  // all of the second page
    jobs.back().sequence->remove(0, cache->config().kv_heads - 1, positions);
  }
  return jobs;
}

TEST("attention on integer tensor cores: every route, rows, masks, removed tokens, ragged batches") {
  std::vector<Shape> shapes;
  for (const gpu::Route& route : gpu::kMmaRoutes)
    for (const int head_dim : gpu::kMmaHeadDims)
      for (const bool other : {false, true}) {  // spec, and 4 rows or 8 with masks
        const TensorSpec k = gpu::a_spec(route.k, route.k_bits, other),
                         v = gpu::a_spec(route.v, route.v_bits, other);
        const int group = 1 + static_cast<int>(shapes.size()) / 2 % 4;
        const bool blocks = route.k == gpu::Scales::kToken && route.v_bits == 2, editable = v.per_token();
        if (other)
          shapes.push_back({k, v, head_dim, 8 - group, 1, false, 150, 4.0f, true, editable});
        else
          shapes.push_back({k, v, head_dim, group, 1, blocks});
      }
  // Outliers on integer tensor cores: of both tensors, of one alone, with everything that hides tokens.
  for (const gpu::Route& route : gpu::kMmaRoutes)
    for (const int head_dim : gpu::kMmaHeadDims) {
      if (!route.outliers) continue;
      TensorSpec k = gpu::a_spec(route.k, route.k_bits), v = gpu::a_spec(route.v, route.v_bits);
      const int turn = static_cast<int>(shapes.size());
      k.outliers = turn % 3 == 1 ? 0 : 1 + turn % 2;
      v.outliers = turn % 3 == 2 ? 0 : 1 + turn / 2 % 3;
      shapes.push_back({k, v, head_dim, 1 + turn % 4, 1, true});
      k.outliers = 1;
      v.outliers = 8;
      shapes.push_back({k, v, head_dim, 7, 1, false, 150, 4.0f, true, true});
    }
  const auto per_token = [](int bits, int outliers = 0) {
    return TensorSpec{bits, Group::kToken, Mode::kMidRise, outliers};
  };
  const TensorSpec innerq_k{3, Group::kChannels32, Mode::kZeroLevel},
      innerq_v{2, Group::kTokens32, Mode::kHybrid};
  shapes.push_back({per_token(2), per_token(2), 128, 7, 1, true});
  shapes.push_back({per_token(3), per_token(3), 64, 1, 5, true});
  shapes.push_back({per_token(4), per_token(4), 128, 4, 2, false, 100});
  shapes.push_back({per_token(3), per_token(2), 64, 3, 3, true, 0, 5.0f});
  shapes.push_back({per_token(2), per_token(1), 128, 8, 1, false, 0, 0, true, true});
  shapes.push_back({per_token(4), per_token(4), 64, 2, 2, true, 0, 0, false, true});
  shapes.push_back({innerq_k, innerq_v, 64, 2, 4, false, 0, 0, false});
  shapes.push_back({per_token(2, 8), per_token(2, 1), 64, 4, 3, true, 0, 0, false, true});
  shapes.push_back({per_token(8), per_token(4), 96, 4, 2, true, 130, 3.0f, true, true});  // attend_any
  shapes.push_back({per_token(4, 1), per_token(2, 3), 128, 3, 2, false, 130, 3.0f, true, true});
  shapes.push_back({{3, Group::kChannels32, Mode::kHybrid, 2}, innerq_v, 256, 1, 1, false});
  shapes.push_back({{4, Group::kChannels64, Mode::kAsymmetric, 8}, per_token(1, 8), 80, 2, 1, true});
  const auto schedules = simt::schedules();
  for (std::size_t i = 0; i < shapes.size(); i += stride()) {
    const Shape& shape = shapes[i];
    simt::use(schedules[i % schedules.size()]);
    const int kv_heads = i % 4 == 0 ? 2 : 1;
    LayerScheme scheme = shape.blocks ? calibrated(shape.head_dim, kv_heads) : scheme_of({}, {});
    scheme.k = shape.k;
    scheme.v = shape.v;
    if (shape.k.outliers > 0)  // not with error feedback
      for (Basis& basis : scheme.basis) basis.order = {}, basis.metric = basis.feedback = basis.pivot = {};
    if (shape.v.bits == 1) scheme.clip_v.clear();
    CacheConfig config = config_of({scheme}, shape.head_dim, kv_heads);
    config.query_heads = config.kv_heads * shape.group;
    config.window_of_layer = {shape.window};
    config.softcap = shape.softcap;
    const Tokens tokens = tokens_of(config, 300, 8);
    std::vector<Job> cpu = jobs_of(cache_of(config), tokens, shape),
                     gpu = jobs_of(gpu_cache(config), tokens, shape);
    check::Random random(6);
    for (std::size_t j = 0; j < cpu.size(); ++j) add_queries(config, shape.q_tokens, random, cpu[j], gpu[j]);
    CHECK_WITH(agree(cpu, gpu, shape.q_tokens, shape.causal),
               "K " + text_of(shape.k) + ", V " + text_of(shape.v) + ", head_dim " +
                   std::to_string(shape.head_dim) + ", case " + std::to_string(i));
    CHECK(simt::take_reports().empty());
  }
}

/// Other outlier rows in all pages, as a scheme would leave them that chooses by a threshold: tokens with
/// none, tokens with many, no more in a page than before. Values of slot `huge` are beyond all others.
void make_uneven(const Sequence& sequence, std::uint64_t seed, int huge) {
  const CacheConfig& config = sequence.cache().config();
  const LayerScheme& scheme = config.schemes[0];
  const PageLayout layout(scheme.k, scheme.v, config.head_dim);
  const LayerState& state = sequence.layer_state(0);
  check::Random random(seed);
  for (const auto& table : state.pages)
    for (std::size_t p = 0; p < table.size(); ++p)
      for (const TensorLayout& tensor : {layout.k, layout.v}) {
        if (!table[p] || tensor.spec.outliers == 0) continue;
        const OutlierLayout rows = tensor.outliers();
        const int used = stored_slots(tensor.value ? state.reach.v : state.reach.k, static_cast<int>(p));
        std::vector<std::uint8_t> section(rows.bytes());
        for (int i = 0; i < rows.capacity; ++i)  // entries of no row
          put_outlier(section.data(), rows, i, {i % config.head_dim, half_bits(7.0f)});
        // The first rows are as they were; in the first page all but the last one.
        int first = 0, even = p == 0 ? kPageTokens - 1 : random.below(kPageTokens);
        for (int slot = 0; slot < used; ++slot) {
          std::vector<Outlier> row;
          const int most = std::min(rows.capacity - first, 2 * tensor.spec.outliers + 3);
          const int count = slot < even ? tensor.spec.outliers : p == 0 ? 0 : random.below(most + 1);
          for (int i = 0, c = random.below(5); i < count; ++i, c += 1 + random.below(5))
            row.push_back({c, half_bits(tensor.value && slot == huge ? 60000.0f : 4.0f * random.normal())});
          put_outlier_row(section.data(), rows, slot, first, row.data(), count);
          first += count;
        }
        CHECK(outliers_valid(section.data(), rows, used, config.head_dim));
        const std::size_t to = (tensor.value ? layout.v_at() : layout.k_at()) + tensor.outliers_at();
        sequence.cache().backend().copy_memory(table[p]->bytes.data() + to, section.data(), section.size());
      }
}

TEST("rows of outliers may be of any length") {
  const auto sparse = [](int bits, Mode mode, int outliers) {
    return TensorSpec{bits, Group::kToken, mode, outliers};
  };
  std::vector<LayerScheme> schemes;
  for (const auto& [k, v] : {std::pair{1, 1}, {2, 3}, {8, 8}}) {
    schemes.push_back(scheme_of(sparse(4, Mode::kMidRise, k), sparse(4, Mode::kMidRise, v)));
    schemes.push_back(scheme_of(sparse(3, Mode::kZeroLevel, k), sparse(2, Mode::kAsymmetric, v)));
  }
  const auto schedules = simt::schedules();
  for (std::size_t i = 0; i < schemes.size(); i += stride()) {
    simt::use(schedules[i % schedules.size()]);
    CacheConfig config = config_of({schemes[i]}, 128, 1);
    config.query_heads = i % 4 < 2 ? 3 : 8;
    Tokens tokens = tokens_of(config, 330, 21);
    const auto everywhere = [&](int slot) {  // in every page
      std::vector<int> positions;
      for (int page = 0; page < 3; ++page) positions.push_back(schemes[i].sink + page * kPageTokens + slot);
      return positions;
    };
    for (const int position : everywhere(10)) tokens.v[tokens.row * at(position) + 5] = half_bits(60000.0f);
    std::vector<Job> cpu(1), gpu(1);
    cpu[0].sequence = filled(cache_of(config), tokens, 330);
    gpu[0].sequence = filled(gpu_cache(config), tokens, 330);
    check::Random random(5);
    add_queries(config, 1, random, cpu[0], gpu[0]);
    const auto without = [&](const std::vector<int>& positions, const std::string& what) {
      for (const auto* jobs : {&cpu, &gpu}) jobs->front().sequence->remove(0, 0, positions);
      CHECK_WITH(agree(cpu, gpu, 1, true), what + ", scheme " + std::to_string(i));
    };
    without(everywhere(10), "sums are fine when what made them coarse is removed");
    make_uneven(*cpu[0].sequence, i, 20);
    make_uneven(*gpu[0].sequence, i, 20);
    without({}, "uneven");
    without({7, 150, 151}, "removed tokens");
    without(everywhere(20), "uneven and fine");
    CHECK(simt::take_reports().empty());
  }
}

TEST("tasks of several pages: states, blocks of keys and sums of outliers from one page to the next") {
  LayerScheme blocks = calibrated(64, 1),
              rows = scheme_of({4, Group::kToken, Mode::kMidRise, 2}, {4, Group::kToken, Mode::kMidRise, 1});
  blocks.basis[0].order = {};  // not with error feedback
  blocks.basis[0].metric = blocks.basis[0].feedback = blocks.basis[0].pivot = {};
  blocks.k.outliers = 1;
  blocks.v.outliers = 2;
  const auto schedules = simt::schedules();
  std::size_t turn = 0;
  for (const LayerScheme& scheme : {calibrated(64, 1), blocks, rows}) {
    simt::use(schedules[++turn]);
    CacheConfig config = config_of({scheme}, 64, 1);
    config.query_heads = 3;
    const int length = 37 * kPageTokens + 50;  // more than 32 pages: two of them a task
    std::vector<Job> cpu(1), gpu(1);
    cpu[0].sequence = filled(cache_of(config), tokens_of(config, length, 31), length);
    gpu[0].sequence = loaded(gpu_cache(config), saved(*cpu[0].sequence));
    check::Random random(9);
    add_queries(config, 1, random, cpu[0], gpu[0]);
    CHECK_WITH(agree(cpu, gpu, 1, true), "scheme " + std::to_string(turn));
    CHECK(simt::take_reports().empty());
  }
}

TEST("the table of routes holds every scheme that names its kernel, and nothing twice") {
  const auto backend = gpu_backend();
  const auto fast = [&](const TensorSpec& k, const TensorSpec& v, int head_dim) {
    return std::string(backend->attention_path(k, v, head_dim)).starts_with("attend_mma");
  };
  for (int i = 0; i < static_cast<int>(std::size(gpu::kMmaRoutes)); ++i)
    for (const bool other : {false, true}) {
      const gpu::Route& route = gpu::kMmaRoutes[i];
      const TensorSpec k = gpu::a_spec(route.k, route.k_bits, other),
                       v = gpu::a_spec(route.v, route.v_bits, other);
      CHECK_WITH(is_supported(k, false) && is_supported(v, true), text_of(k) + ", " + text_of(v));
      for (const int head_dim : kHeadDims) {
        const bool listed = head_dim == 64 || head_dim == 128;
        CHECK_WITH(gpu::mma_route(k, v, head_dim) == (listed ? i : -1), text_of(k) + ", " + text_of(v));
        CHECK(fast(k, v, head_dim) == listed);
        for (const auto& [of_k, of_v] : {std::pair{1, 0}, {0, 8}, {2, 3}}) {
          TensorSpec k_with = k, v_with = v;
          k_with.outliers = of_k;
          v_with.outliers = of_v;
          CHECK(fast(k_with, v_with, head_dim) == (listed && route.outliers));
        }
      }
    }
  const TensorSpec per_token{3, Group::kToken, Mode::kMidRise};
  for (const TensorSpec& other : {TensorSpec{}, TensorSpec{3, Group::kToken, Mode::kAsymmetric},
                                  TensorSpec{3, Group::kChannels32, Mode::kHybrid},
                                  TensorSpec{3, Group::kChannels64, Mode::kZeroLevel}})
    CHECK_WITH(!fast(other, per_token, 128) && !fast(per_token, other, 128), text_of(other));
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
    Attended results[2];
    const auto device = gpu_backend();
    CpuBackend backend(1, nullptr);
    for (const int which : {0, 1}) {
      Attended& to = results[which];
      to = {std::vector<float>(q.size()), std::vector<float>(at(2 * heads)),
            std::vector<float>(at(2 * heads * tokens))};
      DenseRequest request;
      request.k = half ? static_cast<const void*>(k16.data()) : k.data();
      request.v = half ? static_cast<const void*>(v16.data()) : v.data();
      request.half = half;
      request.q = q.data();
      request.out = to.out.data();
      request.lse = to.lse.data();
      request.logits = to.logits.data();
      request.tokens = tokens;
      request.q_tokens = 2;
      request.query_heads = heads;
      request.kv_heads = kv_heads;
      request.head_dim = D;
      request.scale = 0.1f;
      request.sliding_window = 250;
      if (which == 0)
        backend.attend_dense(request);
      else
        device->attend_dense(request);
    }
    LayerScheme raw;
    CacheConfig config;
    config.head_dim = D;
    config.softmax_scale = 0.1f;
    Attended bound;
    for (int row = 0; row < 2 * heads; ++row) {
      const int kv = row % heads / (heads / kv_heads), first = kv * tokens * D;
      bounds::Head(config, raw, tokens, k.data() + first, v.data() + first)
          .bound(q.data() + row * D, results[0].logits.data() + row * tokens, bound);
    }
    CHECK(within(results[1], results[0], bound));
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
  const Group group = groups[random.below(value ? 4 : 3)];
  const int outliers = group != Group::kTokens32 && random.below(2) == 0 ? 1 + random.below(8) : 0;
  return {bits, group, modes[random.below(6)], outliers};
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
      const gpu::Route& route = gpu::kMmaRoutes[random.below(static_cast<int>(std::size(gpu::kMmaRoutes)))];
      scheme.k = gpu::a_spec(route.k, route.k_bits, random.below(2) == 0);
      scheme.v = gpu::a_spec(route.v, route.v_bits, random.below(2) == 0);
      if (route.outliers && random.below(2) == 0) {
        scheme.k.outliers = random.below(3);
        scheme.v.outliers = random.below(9);
      }
    }
    if (scheme.k.outliers > 0 || random.below(4) == 0)  // not with error feedback
      for (Basis& basis : scheme.basis) basis.order = {}, basis.metric = basis.feedback = basis.pivot = {};
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

std::string text_of(const CacheConfig& config, int q_tokens) {
  const LayerScheme& scheme = config.schemes[0];
  return "K " + text_of(scheme.k) + "; V " + text_of(scheme.v) + "; head_dim " +
         std::to_string(config.head_dim) + ", heads " + std::to_string(config.query_heads) + "/" +
         std::to_string(config.kv_heads) + ", " + std::to_string(q_tokens) + " queries, windows " +
         std::to_string(scheme.sink) + " + " + std::to_string(scheme.recent) + ", blocks of " +
         std::to_string(scheme.block_tokens);
}

TEST("random shapes: pages to the bit, ragged batches of attention") {
  const long shapes = check::number_from("INNERKV_GPU_SHAPES", kOnGpu ? 200 : 10);
  const int longest = static_cast<int>(check::number_from("INNERKV_GPU_LONGEST", kOnGpu ? 6000 : 500));
  const std::uint64_t seed = static_cast<std::uint64_t>(check::number_from("INNERKV_GPU_SEED", 1));
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
      add_queries(config, q_tokens, random, a.back(), b.back());
    }
    CHECK_WITH(agree(a, b, q_tokens, causal, logits),
               "shape " + std::to_string(i) + ": " + text_of(config, q_tokens));
    CHECK(simt::take_reports().empty());
  }
}

TEST("masses are the probabilities of the same attention, whatever reads the pages") {
  const auto schedules = simt::schedules();
  int run = 0;
  for (const LayerScheme& scheme :
       {calibrated(), innerq(), scheme_of({}, {}), rotated_with_outliers(1, 1),
        scheme_of({8, Group::kToken, Mode::kMidRise, 3}, {4, Group::kToken, Mode::kAsymmetric, 2})})
    for (const int q_tokens : {1, 3, 20}) {  // 20 tokens of 4 heads are a prefill
      simt::use(schedules[at(run++) % schedules.size()]);
      if (at(run) % std::min<std::size_t>(stride(), 4) != 0) continue;
      CacheConfig config = config_of({scheme});
      config.query_heads = 4 * config.kv_heads;
      const auto cache = gpu_cache(config);
      const int tokens = 300;
      const auto sequence = filled(cache, tokens_of(config, tokens, 3), tokens);
      check::Random random(8);
      const std::size_t rows = at(q_tokens * config.query_heads);
      std::vector<float> q(rows * at(config.head_dim)), out(q.size()), lse(rows), logits(rows * at(tokens));
      for (float& x : q) x = random.normal();
      const BatchItem item{sequence.get(), q.data(), out.data(), lse.data(), logits.data(), q_tokens};
      CHECK(attend_batch(*cache, 0, std::span(&item, 1), true, nullptr));
      check_masses(*cache, item, logits, lse, q_tokens == 3, std::to_string(q_tokens) + " tokens");
      CHECK(simt::take_reports().empty());
    }
}

TEST("the same batch gives the same bits every time") {
  const int runs = static_cast<int>(check::number_from("INNERKV_GPU_REPEATS", kOnGpu ? 100 : 6));
  const auto schedules = simt::schedules();
  const TensorSpec sparse{4, Group::kToken, Mode::kMidRise, 8}, slow{4, Group::kToken, Mode::kAsymmetric, 8};
  std::size_t turn = 0;
  for (const LayerScheme& scheme :
       {calibrated(128), innerq(), scheme_of(slow, slow), scheme_of(sparse, sparse)}) {
    if (turn++ % std::min<std::size_t>(stride(), 3) != 0) continue;
    CacheConfig config = config_of({scheme}, 128);
    config.query_heads = 8;
    config.budget_bytes = std::size_t{256} << 20;
    const auto cache = gpu_cache(config);
    std::vector<Job> jobs;
    check::Random random(12);
    for (const int length : {kOnGpu ? 20000 : stride() > 1 ? 280 : 700, 300, 5}) {
      jobs.push_back({filled(cache, tokens_of(config, length, random.bits()), length), {}});
      jobs.back().q.resize(at(2 * config.query_heads * config.head_dim));
      for (float& x : jobs.back().q) x = random.normal();
    }
    std::vector<Attended> first;
    int different = 0;
    for (int run = 0; run < runs; ++run) {
      simt::use(schedules[at(run) % schedules.size()]);
      const std::vector<Attended> now = attended_batch(jobs, 2, true, true);
      if (run == 0) first = now;
      for (std::size_t i = 0; i < now.size(); ++i)
        different += !same_bits(first[i].out, now[i].out) || !same_bits(first[i].lse, now[i].lse) ||
                     !same_bits(first[i].logits, now[i].logits);
    }
    CHECK_WITH(different == 0, std::to_string(different) + " of " + std::to_string(runs));
    CHECK(simt::take_reports().empty());
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("gpu_backend", argc, argv); }
