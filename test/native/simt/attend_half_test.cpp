// Attention on 16-bit tensor cores against float64: every number within its derived bound. Runs on the
// emulated GPU (attend_half_test) and on a real one (attend_half_gpu_test). Environment: INNERKV_GPU_SHAPES,
// how many random shapes; INNERKV_GPU_SEED.
#include <cstdlib>

#include "cuda/prefill_plan.h"
#include "simt/attention_reference.h"
#include "simt/gpu_under_test.h"
#include "support.h"

namespace innerkv::test {
namespace {

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

/// Both halves of a query or weight take part: 22 bits.
constexpr double kTwoParts = 0x1p-22;

struct Case {
  int head_dim = 64, group = 1, q_tokens = 1;
  int window = 0;
  float softcap = 0;
  bool causal = true, logits = true, removed = false;
  std::vector<int> lengths{40, 300};
  std::string text() const {
    return "head_dim " + std::to_string(head_dim) + ", group " + std::to_string(group) + ", " +
           std::to_string(q_tokens) + " queries, window " + std::to_string(window) + ", softcap " +
           std::to_string(softcap) + (causal ? "" : ", not causal") + (logits ? "" : ", no logits") +
           (removed ? ", removed tokens" : "");
  }
};

/// A batch of sequences, their results, and their tokens as the CPU backend reads them back.
struct Run {
  Case shape;
  CacheConfig config;
  std::vector<std::vector<float>> q, out, lse, logits;
  std::vector<std::vector<ReferenceTokens>> tokens;  // [sequence][KV head]
};

ReferenceTokens read_back(const Sequence& sequence, int head, int D) {
  const int count = sequence.tokens(0);
  std::vector<float> k(at(count * D)), v(k.size());
  sequence.read_back(0, head, k.data(), v.data());
  ReferenceTokens tokens;
  for (int t = 0; t < count; ++t) {
    tokens.removed.push_back(std::isnan(k[at(t * D)]));
    tokens.k.emplace_back(k.begin() + t * D, k.begin() + (t + 1) * D);
    tokens.v.emplace_back(v.begin() + t * D, v.begin() + (t + 1) * D);
  }
  return tokens;
}

Run run_of(const Case& shape, const LayerScheme& scheme, std::uint64_t seed) {
  Run run{shape, config_of({scheme}, shape.head_dim), {}, {}, {}, {}, {}};
  CacheConfig& config = run.config;
  config.query_heads = config.kv_heads * shape.group;
  config.window_of_layer = {shape.window};
  config.softcap = shape.softcap;
  const auto gpu = std::make_shared<Cache>(gpu_backend(), config), cpu = cache_of(config);
  check::Random random(seed);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<BatchItem> items;
  for (const int length : shape.lengths) {
    const Tokens tokens = tokens_of(config, length, random.bits());
    std::unique_ptr<Sequence> twin = cpu->sequence(), sequence = gpu->sequence();
    for (int done = 0; done < length;) {  // so that rings begin anywhere
      const int count = std::min(length - done, 1 + random.below(90));
      append(*twin, tokens, done, count);
      append(*sequence, tokens, done, count);
      done += count;
    }
    if (shape.removed && length >= 300 && scheme.per_token() && !scheme.k.compact_zeros() &&
        !scheme.v.compact_zeros()) {
      std::vector<int> positions{scheme.sink + 3, scheme.sink + 50};
      for (int p = 128; p < 256; ++p) positions.push_back(scheme.sink + p);  // all of a page
      if (twin->view(0, 1).k_quantised >= 256) {
        twin->remove(0, 1, positions);
        sequence->remove(0, 1, positions);
      }
    }
    auto& heads = run.tokens.emplace_back();
    for (int head = 0; head < config.kv_heads; ++head)
      heads.push_back(read_back(*twin, head, shape.head_dim));
    const std::size_t rows = at(config.query_heads * shape.q_tokens);
    std::vector<float> q(rows * at(shape.head_dim));
    for (float& x : q) x = random.normal() * (random.below(40) == 0 ? 8.0f : 1.0f);
    run.q.push_back(q);
    run.out.emplace_back(q.size(), NAN);
    run.lse.emplace_back(rows, NAN);
    run.logits.emplace_back(shape.logits ? rows * at(length) : 0, NAN);
    sequences.push_back(std::move(sequence));
  }
  for (std::size_t i = 0; i < sequences.size(); ++i)
    items.push_back({sequences[i].get(), run.q[i].data(), run.out[i].data(), run.lse[i].data(),
                     shape.logits ? run.logits[i].data() : nullptr, shape.q_tokens});
  try {
    CHECK(attend_batch(*gpu, 0, items, shape.causal, nullptr));
  } catch (const Error&) {
    simt::take_reports();  // prints why
    throw;
  }
  return run;
}

/// Largest error in units of its bound.
double check_run(const Run& run, ReferenceRules rules, const std::string& name) {
  const CacheConfig& config = run.config;
  const int D = config.head_dim;
  rules.scale = double{config.softmax_scale};
  rules.softcap = double{config.softcap};
  rules.window = run.shape.window;
  rules.causal = run.shape.causal;
  double worst = 0;
  for (std::size_t i = 0; i < run.q.size(); ++i)
    for (int query = 0; query < run.shape.q_tokens; ++query)
      for (int head = 0; head < config.query_heads; ++head) {
        const std::size_t row = at(query * config.query_heads + head);
        const ReferenceTokens& tokens = run.tokens[i][at(head / run.shape.group)];
        const ReferenceRow wanted =
            reference_row(run.q[i].data() + row * at(D), tokens, rules, query, run.shape.q_tokens);
        const std::string wrong =
            difference(wanted, run.out[i].data() + row * at(D), run.lse[i][row],
                       run.shape.logits ? run.logits[i].data() + row * tokens.k.size() : nullptr, &worst);
        CHECK_WITH(wrong.empty(), name + ", " + run.shape.text() + ", sequence " + std::to_string(i) +
                                      ", query " + std::to_string(query) + ", head " + std::to_string(head) +
                                      ": " + wrong);
      }
  CHECK_WITH(simt::take_reports().empty(), name + ", " + run.shape.text());
  return worst;
}

ReferenceRules two_parts() {
  ReferenceRules rules;
  rules.operand = kTwoParts;
  return rules;
}

TEST("decode over 16-bit pages and windows: every head_dim, row count and mask, in every schedule") {
  const auto schedules = simt::schedules();
  std::vector<Case> cases;
  for (const int head_dim : {64, 80, 96, 128, 256})
    for (const int group : {1, 3, 4, 8}) cases.push_back({head_dim, group});
  for (const int q_tokens : {2, 3, 5, 8}) {
    cases.push_back({128, 2, q_tokens});
    cases.push_back({80, 1, q_tokens, 70});
  }
  cases.push_back({128, 4, 1, 100, 5.0f});
  cases.push_back({96, 4, 4, 200, 0, false});
  cases.push_back({64, 7, 2, 0, 3.0f, true, true, true});
  cases.push_back({256, 5, 2, 50, 0, true, false, true});
  cases.push_back({128, 4, 1, 0, 0, true, false});
  cases.push_back({128, 4, 1, 0, 0, true, false, false, {1, 2, 3, 17, 33, 133, 700}});
  double worst = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    simt::use(schedules[i % schedules.size()]);
    const std::pair<int, int> windows[] = {{4, 8}, {0, 0}, {33, 100}, {0, 260}, {130, 16}};
    const auto& [sink, recent] = windows[i % 5];
    const Run run = run_of(cases[i], scheme_of({}, {}, sink, recent), 100 + i);
    worst = std::max(worst, check_run(run, two_parts(),
                                      "windows " + std::to_string(sink) + " + " + std::to_string(recent)));
  }
  std::printf("       largest error: %.3f of its bound\n", worst);
}

TEST("plain attention over binary16 rows: every head_dim") {
  for (const int D : {64, 80, 96, 128, 256}) {
    const int count = 290, heads = 6, kv_heads = 2, queries = 2;
    check::Random random(at(D));
    std::vector<std::uint16_t> k, v;
    std::vector<ReferenceTokens> tokens(at(kv_heads));
    for (int head = 0; head < kv_heads; ++head)
      for (int t = 0; t < count; ++t) {
        auto& of = tokens[at(head)];
        of.removed.push_back(false);
        for (auto [bits, to] : {std::pair{&k, &of.k}, {&v, &of.v}}) {
          to->emplace_back();
          for (int c = 0; c < D; ++c) {
            bits->push_back(half_bits(random.normal() * (c == 7 ? 100.0f : 1.0f)));
            to->back().push_back(double{half_value(bits->back())});
          }
        }
      }
    std::vector<float> q(at(queries * heads * D)), out(q.size()), lse(at(queries * heads)),
        logits(at(queries * heads * count));
    for (float& x : q) x = random.normal() * 1e-3f;  // too small for binary16 without a scale
    DenseRequest request;
    request.k = k.data();
    request.v = v.data();
    request.half = true;
    request.q = q.data();
    request.out = out.data();
    request.lse = lse.data();
    request.logits = logits.data();
    request.tokens = count;
    request.q_tokens = queries;
    request.query_heads = heads;
    request.kv_heads = kv_heads;
    request.head_dim = D;
    request.scale = 1.0f / std::sqrt(static_cast<float>(D));
    gpu_backend()->attend_dense(request);
    ReferenceRules rules = two_parts();
    rules.scale = double{request.scale};
    for (int query = 0; query < queries; ++query)
      for (int head = 0; head < heads; ++head) {
        const std::size_t row = at(query * heads + head);
        const auto wanted =
            reference_row(q.data() + row * at(D), tokens[at(head / 3)], rules, query, queries);
        const auto wrong =
            difference(wanted, out.data() + row * at(D), lse[row], logits.data() + row * at(count));
        CHECK_WITH(wrong.empty(), "head_dim " + std::to_string(D) + ": " + wrong);
      }
    CHECK(simt::take_reports().empty());
  }
}

TEST("random shapes of decode over 16-bit caches") {
  const int shapes = from_environment("INNERKV_GPU_SHAPES", kOnGpu ? 100 : 12);
  const auto seed = static_cast<std::uint64_t>(from_environment("INNERKV_GPU_SEED", 1));
  const auto schedules = simt::schedules();
  for (int i = 0; i < shapes; ++i) {
    check::Random random(seed * 7919 + static_cast<std::uint64_t>(i));
    simt::use(schedules[at(random.below(static_cast<int>(schedules.size())))]);
    Case shape;
    shape.head_dim = std::vector{64, 80, 96, 128, 256}[at(random.below(5))];
    shape.group = 1 + random.below(9);
    shape.q_tokens = 1 + random.below(8) * random.below(2);
    shape.window = random.below(2) * (1 + random.below(300));
    shape.softcap = random.below(3) == 0 ? 5.0f : 0.0f;
    shape.causal = random.below(4) != 0;
    shape.logits = random.below(2) == 0;
    shape.removed = random.below(3) == 0;
    shape.lengths.clear();
    for (int s = 0; s <= random.below(3); ++s)
      shape.lengths.push_back(shape.q_tokens + random.below(s == 0 ? 700 : 150));
    const Run run = run_of(shape, scheme_of({}, {}, random.below(150), random.below(300)), random.bits());
    check_run(run, two_parts(), "shape " + std::to_string(i));
  }
}

/// Queries, weights and dequantised numbers are rounded to binary16. Dequantisation and read_back() each take
/// some ten roundings of numbers that a row's norm bounds up to the ratio of a level's offset to the row's
/// numbers.
ReferenceRules prefill(bool quantised) {
  ReferenceRules rules;
  rules.operand = 0x1p-11;
  if (quantised) {
    rules.stored = 0x1p-11;
    rules.decoded = 2 * gamma_of(128);
  }
  return rules;
}

TEST("prefill over 16-bit caches: every head_dim, row count and mask") {
  const auto schedules = simt::schedules();
  std::vector<Case> cases;
  for (const auto& [head_dim, group, q_tokens] :
       {std::tuple{64, 4, 40}, {80, 3, 30}, {96, 8, 9}, {128, 4, 33}, {256, 2, 40}})
    cases.push_back({head_dim, group, q_tokens});
  cases.push_back({64, 1, 131, 70});
  cases.push_back({128, 3, 44, 0, 5.0f});
  cases.push_back({96, 4, 20, 100, 0, false});
  cases.push_back({64, 7, 10, 0, 3.0f, true, true, true, {60, 420}});
  cases.push_back({256, 5, 15, 50, 0, true, false, true, {20, 300}});
  cases.push_back({128, 8, 12, 0, 0, true, false, false, {12, 13, 75, 700}});
  double worst = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    simt::use(schedules[i % schedules.size()]);
    const std::pair<int, int> windows[] = {{4, 8}, {0, 0}, {33, 100}, {0, 260}, {130, 16}};
    const auto& [sink, recent] = windows[i % 5];
    if (i < 8) cases[i].lengths = {cases[i].q_tokens, 300};
    const Run run = run_of(cases[i], scheme_of({}, {}, sink, recent), 200 + i);
    worst = std::max(worst, check_run(run, prefill(false),
                                      "windows " + std::to_string(sink) + " + " + std::to_string(recent)));
  }
  std::printf("       largest error: %.3f of its bound\n", worst);
}

TEST("prefill over quantised pages: every family, removed tokens, several passes") {
  const auto schedules = simt::schedules();
  std::vector<Family> all = families();
  all.push_back({"calibrated 4 bits", config_of({calibrated(128)}, 128)});
  all.back().config.schemes[0].k.bits = all.back().config.schemes[0].v.bits = 4;
  all.push_back({"calibrated 3 bits", config_of({calibrated(80)}, 80)});
  all.back().config.schemes[0].k.bits = all.back().config.schemes[0].v.bits = 3;
  all.push_back({"8 bits", config_of({scheme_of({8, Group::kChannels32, Mode::kZeroLevel},
                                                {8, Group::kToken, Mode::kSignedMax}, 40, 90)},
                                     256)});
  const std::size_t usual = gpu::prefill_buffer_bytes;
  double worst = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if ((i + i / 2) % stride() != 0) continue;  // even ones and odd ones
    simt::use(schedules[i % schedules.size()]);
    const int head_dim = all[i].config.head_dim;
    Case shape{head_dim,   4,    18,       i % 3 == 1 ? 150 : 0, i % 4 == 2 ? 5.0f : 0.0f, i % 5 != 3,
               i % 2 == 0, true, {30, 400}};
    // All pages at once, or two at a time.
    gpu::prefill_buffer_bytes = i % 2 ? at(2 * 2 * 2 * 128 * head_dim * 2) : usual;
    const Run run = run_of(shape, all[i].scheme(), 300 + i);
    const bool quantised = !all[i].scheme().k.raw() || !all[i].scheme().v.raw();
    worst = std::max(worst, check_run(run, prefill(quantised), all[i].name));
  }
  // Passes of several splits each: the second continues the states of the first.
  gpu::prefill_buffer_bytes = at(2 * 6 * 2 * 128 * 64 * 2);
  const Run run = run_of({64, 4, 20, 0, 0, true, false, false, {1600}}, calibrated(64), 400);
  worst = std::max(worst, check_run(run, prefill(true), "two passes of two splits"));
  gpu::prefill_buffer_bytes = usual;
  std::printf("       largest error: %.3f of its bound\n", worst);
}

TEST("a row's result depends on nothing but its sequence") {
  Case alone, together;
  alone.head_dim = together.head_dim = 128;
  alone.group = together.group = 4;
  alone.logits = together.logits = false;
  alone.lengths = {450};
  together.lengths = {450, 20, 333};
  const LayerScheme scheme = scheme_of({}, {}, 20, 60);
  const Run a = run_of(alone, scheme, 5), b = run_of(together, scheme, 5);
  CHECK(same_bits(a.out[0], b.out[0]) && same_bits(a.lse[0], b.lse[0]));
  for (const simt::Schedule& schedule : simt::schedules()) {
    simt::use(schedule);
    const Run c = run_of(alone, scheme, 5);
    CHECK(same_bits(a.out[0], c.out[0]) && same_bits(a.lse[0], c.lse[0]));
  }
  CHECK(simt::take_reports().empty());
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("attend_half", argc, argv); }
