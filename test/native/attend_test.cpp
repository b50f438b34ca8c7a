// Attention of every instruction set against float64 attention over what the cache says it holds (read_back),
// for every kind of scale grouping and mode, head size, GQA ratio and length around the boundaries. Bits of
// pages across instruction sets are compared exactly. INNERKV_ATTEND_LENGTHS: how many lengths, default all.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "core/sequence.h"
#include "cpu/cpu_backend.h"
#include "masses.h"
#include "numerics/half.h"

namespace innerkv {
namespace {

using test::check_masses;

struct Case {
  TensorSpec k, v;
  int head_dim, group;
  bool basis;
};

CacheConfig config_of(const Case& c, check::Random& random) {
  CacheConfig config;
  config.layers = 1;
  config.kv_heads = 2;
  config.query_heads = 2 * c.group;
  config.head_dim = c.head_dim;
  config.budget_bytes = std::size_t{64} << 20;
  config.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  LayerScheme scheme;
  scheme.k = c.k;
  scheme.v = c.v;
  scheme.sink = 3;
  scheme.recent = 5;
  if (c.basis) {
    scheme.block_tokens = kPageTokens;
    scheme.hadamard_k = scheme.hadamard_v = true;
    scheme.unbiased_k = scheme.unbiased_v = true;
    scheme.clip_k = scheme.clip_v = {1.0f, 0.9f, 0.7f};
    for (int i = 0; i < c.head_dim / 2; ++i)
      config.rope.theta.push_back(std::pow(10000.0, -2.0 * i / c.head_dim));
    for (int head = 0; head < config.kv_heads; ++head) {
      Basis basis;
      for (int i = 0; i < c.head_dim; ++i) {
        basis.mean.push_back(0.3f * random.normal());
        basis.lam.push_back(0.5f + static_cast<float>(random.uniform()));
        basis.inv_lam.push_back(1.0f / basis.lam.back());
        basis.order.push_back(static_cast<std::uint8_t>(c.head_dim - 1 - i));
        basis.pivot.push_back(1.0f);
        for (int j = 0; j < c.head_dim; ++j) {
          basis.metric.push_back(i == j ? 1.0f : 0.01f);
          basis.feedback.push_back(j > i ? 0.02f * random.normal() : 0.0f);
        }
      }
      scheme.basis.push_back(std::move(basis));
    }
  }
  config.schemes = {scheme};
  config.scheme_of_layer = {0};
  config.window_of_layer = {0};
  return config;
}

std::string name(const Case& c, int tokens, const char* isa) {
  return std::string(isa) + " K" + std::to_string(c.k.bits) +
         kGroupNames[static_cast<std::size_t>(c.k.group)] + kModeNames[static_cast<std::size_t>(c.k.mode)] +
         "+" + std::to_string(c.k.outliers) + " V" + std::to_string(c.v.bits) +
         kGroupNames[static_cast<std::size_t>(c.v.group)] + kModeNames[static_cast<std::size_t>(c.v.mode)] +
         "+" + std::to_string(c.v.outliers) + " D" + std::to_string(c.head_dim) + " GQA" +
         std::to_string(c.group) + " n" + std::to_string(tokens);
}

void run(const Case& c, int tokens) {
  check::Random random(static_cast<std::uint64_t>(tokens * 131 + c.head_dim + c.group));
  const CacheConfig config = config_of(c, random);
  const std::size_t D = static_cast<std::size_t>(c.head_dim), row = 2 * D;
  std::vector<std::uint16_t> k(row * static_cast<std::size_t>(tokens)), v(k.size());
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = half_bits(random.normal() * (i % D == 5 ? 6.0f : 1.0f));
    v[i] = half_bits(random.normal() + 0.2f);
  }
  const int q_tokens = std::min(tokens, 2);
  const std::size_t heads = static_cast<std::size_t>(config.query_heads);
  std::vector<float> q(static_cast<std::size_t>(q_tokens) * heads * D);
  for (float& x : q) x = random.normal();
  std::vector<std::uint8_t> first_pages;
  for (const Kernels* const* table = available_kernels(); *table; ++table) {
    const char* isa = (*table)->isa;
    auto cache = std::make_shared<Cache>(std::make_shared<CpuBackend>(2, isa), config);
    auto sequence = cache->sequence();
    for (int t = 0; t < tokens;) {  // ragged appends
      const int count = std::min(tokens - t, 1 + random.below(40));
      sequence->append(0, k.data() + row * static_cast<std::size_t>(t),
                       v.data() + row * static_cast<std::size_t>(t), count);
      t += count;
    }
    std::vector<std::uint8_t> pages;
    for (int head = 0; head < 2; ++head)
      for (const auto& page : sequence->layer_state(0).pages[static_cast<std::size_t>(head)])
        pages.insert(pages.end(), page->bytes.data(),
                     page->bytes.data() + PageLayout(c.k, c.v, c.head_dim).bytes());
    if (table == available_kernels()) first_pages = pages;
    CHECK_WITH(pages == first_pages, name(c, tokens, isa) + ": pages differ between instruction sets");

    std::vector<float> out(q.size(), NAN), lse(static_cast<std::size_t>(q_tokens) * heads, NAN),
        logits(lse.size() * static_cast<std::size_t>(tokens), NAN);
    const BatchItem item{sequence.get(), q.data(), out.data(), lse.data(), logits.data(), q_tokens};
    CHECK(attend_batch(*cache, 0, std::span(&item, 1), true, nullptr));
    if (tokens == 9 || tokens == 137) check_masses(*cache, item, logits, lse, true, name(c, tokens, isa));
    for (int head = 0; head < 2; ++head) {
      std::vector<float> rk(D * static_cast<std::size_t>(tokens)), rv(rk.size());
      sequence->read_back(0, head, rk.data(), rv.data());
      for (int i = 0; i < q_tokens; ++i)
        for (int g = 0; g < c.group; ++g) {
          const std::size_t at =
              static_cast<std::size_t>(i) * heads + static_cast<std::size_t>(head * c.group + g);
          const int visible = tokens - q_tokens + i + 1;
          std::vector<double> s(static_cast<std::size_t>(visible)), o(D);
          double largest = -1e300, sum = 0, spread = 0;
          for (int t = 0; t < visible; ++t) {
            double dot = 0;
            for (std::size_t d = 0; d < D; ++d)
              dot += static_cast<double>(q[at * D + d]) *
                     static_cast<double>(rk[static_cast<std::size_t>(t) * D + d]);
            s[static_cast<std::size_t>(t)] = dot * static_cast<double>(config.softmax_scale);
            largest = std::max(largest, s[static_cast<std::size_t>(t)]);
          }
          for (int t = 0; t < visible; ++t) sum += std::exp(s[static_cast<std::size_t>(t)] - largest);
          for (int t = 0; t < visible; ++t)
            for (std::size_t d = 0; d < D; ++d) {
              const double value = static_cast<double>(rv[static_cast<std::size_t>(t) * D + d]);
              o[d] += std::exp(s[static_cast<std::size_t>(t)] - largest) / sum * value;
              spread = std::max(spread, std::abs(value));
            }
          double worst = 0;
          for (std::size_t d = 0; d < D; ++d)
            worst = std::max(worst, std::abs(o[d] - static_cast<double>(out[at * D + d])));
          // 128 probabilities of a page are rounded to 1/32639 of the largest; queries to 1/32639 of their
          // largest element.
          CHECK_WITH(worst <= spread * 128.0 / (2 * 32639.0) + 1e-3 * spread,
                     name(c, tokens, isa) + ": error " + std::to_string(worst));
          CHECK(std::abs(static_cast<double>(lse[at]) - (largest + std::log(sum))) < 2e-3);
          for (int t = 0; t < tokens; ++t) {
            const double logit = static_cast<double>(
                logits[at * static_cast<std::size_t>(tokens) + static_cast<std::size_t>(t)]);
            CHECK(t < visible ? std::abs(logit - s[static_cast<std::size_t>(t)]) < 2e-3 : std::isinf(logit));
          }
        }
    }
  }
}

}  // namespace
}  // namespace innerkv

int main() {
  using namespace innerkv;
  const TensorSpec raw{};
  std::vector<Case> cases;
  for (const int bits : {2, 3, 4, 8})
    for (const int D : {64, 80, 96, 128, 256})
      cases.push_back({{bits, Group::kToken, Mode::kMidRise},
                       {bits, Group::kToken, Mode::kMidRise},
                       D,
                       D == 64 ? 3 : 4,
                       true});
  cases.push_back({{2, Group::kToken, Mode::kMidRise}, {1, Group::kToken, Mode::kMidRise}, 128, 8, true});
  cases.push_back({raw, raw, 64, 7, false});
  cases.push_back({raw, {2, Group::kTokens32, Mode::kHybrid}, 128, 1, false});
  cases.push_back({{4, Group::kToken, Mode::kAsymmetric}, raw, 80, 1, false});
  for (const Mode mode : {Mode::kMidRise, Mode::kZeroLevel, Mode::kSignedMax, Mode::kAsymmetric,
                          Mode::kHybrid, Mode::kHybridReleased})
    for (const Group group : {Group::kChannels32, Group::kChannels64, Group::kToken, Group::kTokens32}) {
      const int bits = 2 + static_cast<int>(mode) % 3;
      cases.push_back({{bits, group == Group::kTokens32 ? Group::kChannels32 : group, mode},
                       {bits, group, mode},
                       group == Group::kChannels32 ? 80 : 96,
                       2,
                       false});
      cases.push_back({{bits, group == Group::kTokens32 ? Group::kChannels64 : group, mode},
                       {bits, group, mode},
                       128,
                       1,
                       false});
      if (group == Group::kTokens32) continue;
      const int outliers = 1 + static_cast<int>(mode) + static_cast<int>(group) % 3;  // 1 ... 8
      cases.push_back({{bits, group, mode, outliers}, {bits, group, mode, 9 - outliers}, 80, 3, false});
      cases.push_back({{bits, group, mode, 1}, {bits, group, mode, 2}, 128, 2, false});
    }
  const std::vector<int> lengths = {137, 9, 41, 300, 136, 40, 8, 3, 1};
  const auto count = static_cast<std::size_t>(check::number_from("INNERKV_ATTEND_LENGTHS", 9));
  for (const Case& c : cases)
    for (std::size_t i = 0; i < std::min(count, lengths.size()); ++i) run(c, lengths[i]);
  return check::report("attend");
}
