// What the tests of sequences share: small caches of every scheme family, seeded tokens, and everything a
// sequence promises to remember as one comparable string of bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "core/save.h"
#include "core/sequence.h"
#include "cpu/cpu_backend.h"
#include "numerics/half.h"

namespace innerkv::test {

using Bytes = std::vector<std::uint8_t>;

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

// ---- caches ----

struct Family {
  const char* name;
  CacheConfig config;
  const LayerScheme& scheme() const { return config.schemes[0]; }
  bool editable() const {
    return scheme().per_token() && !scheme().k.compact_zeros() && !scheme().v.compact_zeros();
  }
};

inline CacheConfig config_of(const std::vector<LayerScheme>& schemes, int head_dim = 64, int kv_heads = 2) {
  CacheConfig config;
  config.layers = static_cast<int>(schemes.size());
  config.kv_heads = kv_heads;
  config.query_heads = 2 * kv_heads;
  config.head_dim = head_dim;
  config.schemes = schemes;
  for (int layer = 0; layer < config.layers; ++layer) config.scheme_of_layer.push_back(layer);
  config.window_of_layer.assign(schemes.size(), 0);
  for (int i = 0; i < head_dim / 2; ++i) config.rope.theta.push_back(std::pow(10000.0, -2.0 * i / head_dim));
  config.budget_bytes = std::size_t{64} << 20;
  config.softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return config;
}

inline LayerScheme scheme_of(TensorSpec k, TensorSpec v, int sink = 4, int recent = 8) {
  LayerScheme scheme;
  scheme.k = k;
  scheme.v = v;
  scheme.sink = sink;
  scheme.recent = recent;
  return scheme;
}

inline LayerScheme calibrated(int head_dim = 64, int kv_heads = 2, std::uint64_t seed = 9) {
  LayerScheme scheme = scheme_of({2, Group::kToken, Mode::kMidRise}, {2, Group::kToken, Mode::kMidRise});
  scheme.block_tokens = kPageTokens;
  scheme.hadamard_k = scheme.hadamard_v = scheme.unbiased_k = scheme.unbiased_v = true;
  scheme.clip_k = scheme.clip_v = {1.0f, 0.9f, 0.7f};
  check::Random random(seed);
  for (int head = 0; head < kv_heads; ++head) {
    Basis basis;
    for (int i = 0; i < head_dim; ++i) {
      basis.mean.push_back(0.3f * random.normal());
      basis.lam.push_back(0.5f + static_cast<float>(random.uniform()));
      basis.inv_lam.push_back(1.0f / basis.lam.back());
      basis.order.push_back(static_cast<std::uint8_t>(head_dim - 1 - i));
      basis.pivot.push_back(1.0f);
      for (int j = 0; j < head_dim; ++j) {
        basis.metric.push_back(i == j ? 1.0f : 0.01f);
        basis.feedback.push_back(j > i ? 0.02f * random.normal() : 0.0f);
      }
    }
    scheme.basis.push_back(std::move(basis));
  }
  return scheme;
}

inline LayerScheme innerq(int sink = 4, int recent = 8, int stat_tokens = 48) {
  LayerScheme scheme = scheme_of({3, Group::kChannels32, Mode::kZeroLevel},
                                 {2, Group::kTokens32, Mode::kHybrid}, sink, recent);
  scheme.online_lambda = scheme.online_mean = true;
  scheme.stat_tokens = stat_tokens;
  return scheme;
}

inline LayerScheme released(int sink = 4, int recent = 8) {
  LayerScheme scheme = scheme_of({3, Group::kChannels32, Mode::kZeroLevel},
                                 {2, Group::kTokens32, Mode::kHybridReleased}, sink, recent);
  scheme.released_windows = true;
  return scheme;
}

/// Keys and values in a Hadamard basis; `k` and `v` of each token's numbers are outliers.
inline LayerScheme rotated_with_outliers(int k, int v) {
  LayerScheme scheme =
      scheme_of({2, Group::kToken, Mode::kMidRise, k}, {2, Group::kToken, Mode::kMidRise, v});
  scheme.hadamard_k = scheme.hadamard_v = scheme.unbiased_v = true;
  scheme.clip_k = scheme.clip_v = {1.0f, 0.9f, 0.7f};
  return scheme;
}

/// One of each kind without outliers: every grouping, every mode, raw tensors, online statistics, compact and
/// dense zero points.
inline std::vector<Family> dense_families() {
  const TensorSpec raw{};
  return {
      {"calibrated", config_of({calibrated()})},
      {"innerq hybrid with its own statistics", config_of({innerq()})},
      {"hybrid per token", config_of({scheme_of({4, Group::kChannels64, Mode::kHybrid},
                                                {2, Group::kChannels32, Mode::kHybridReleased})},
                                     80)},
      {"asymmetric, values in blocks", config_of({scheme_of({4, Group::kChannels32, Mode::kAsymmetric},
                                                            {1, Group::kTokens32, Mode::kAsymmetric})})},
      {"asymmetric per token", config_of({scheme_of({2, Group::kToken, Mode::kAsymmetric},
                                                    {3, Group::kChannels64, Mode::kAsymmetric})},
                                         96)},
      {"16-bit keys, hybrid values", config_of({scheme_of(raw, {2, Group::kTokens32, Mode::kHybrid})})},
      {"8-bit signed keys, 16-bit values", config_of({scheme_of({8, Group::kToken, Mode::kSignedMax}, raw)})},
      {"16 bits", config_of({scheme_of(raw, raw)})},
      {"released windows", config_of({released()})},
      {"no windows", config_of({scheme_of({4, Group::kToken, Mode::kMidRise},
                                          {4, Group::kTokens32, Mode::kMidRise}, 0, 0)})},
  };
}

inline std::vector<Family> families() {
  std::vector<Family> all = dense_families();
  all.push_back({"rotated with outliers", config_of({rotated_with_outliers(2, 1)})});
  all.push_back({"hybrid keys and asymmetric values with outliers",
                 config_of({scheme_of({3, Group::kChannels32, Mode::kHybrid, 1},
                                      {4, Group::kChannels64, Mode::kAsymmetric, 8})},
                           80)});
  return all;
}

inline std::shared_ptr<Cache> cache_of(const CacheConfig& config, int threads = 1) {
  return std::make_shared<Cache>(std::make_shared<CpuBackend>(threads, nullptr), config);
}

// ---- tokens ----

struct Tokens {
  std::vector<std::uint16_t> k, v;
  std::size_t row = 0;  // numbers of one token
  int count() const { return static_cast<int>(k.size() / row); }
};

inline Tokens tokens_of(const CacheConfig& config, int count, std::uint64_t seed) {
  check::Random random(seed);
  Tokens tokens;
  tokens.row = at(config.kv_heads * config.head_dim);
  for (std::size_t i = 0; i < tokens.row * at(count); ++i) {
    tokens.k.push_back(half_bits(random.normal() * (i % 16 == 5 ? 6.0f : 1.0f)));
    tokens.v.push_back(half_bits(random.normal() + 0.5f * static_cast<float>(i % 3)));
  }
  return tokens;
}

inline void append(Sequence& sequence, const Tokens& tokens, int first, int count, int layer = 0) {
  sequence.append(layer, tokens.k.data() + tokens.row * at(first), tokens.v.data() + tokens.row * at(first),
                  count);
}

/// Tokens 0 ... count - 1 in every layer, in one call each.
inline std::unique_ptr<Sequence> filled(const std::shared_ptr<Cache>& cache, const Tokens& tokens,
                                        int count) {
  auto sequence = cache->sequence();
  for (int layer = 0; layer < cache->config().layers; ++layer) append(*sequence, tokens, 0, count, layer);
  return sequence;
}

// ---- what a sequence holds ----

inline int stored_slots(int quantised, int page) {
  return std::clamp(quantised - page * kPageTokens, 0, kPageTokens);
}

class Recorder {
 public:
  template <class T>
  void put(const T& value) {
    put(&value, sizeof value);
  }
  void put(const void* data, std::size_t size) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    bytes.insert(bytes.end(), from, from + size);
  }
  /// Codes, scales, zero points and outliers of the first `slots` slots of a tensor.
  void tensor(const TensorLayout& t, const std::uint8_t* base, const std::vector<Slot>& extents, int slots) {
    const auto half_at = [](const std::uint8_t* from, int index) {
      std::uint16_t bits;
      std::memcpy(&bits, from + 2 * index, 2);
      return bits;
    };
    if (t.spec.raw()) return put(base, at(2 * slots * t.head_dim));
    const bool blocks = t.spec.group == Group::kTokens32;
    const CodeShape codes = t.codes();
    const bool full = slots == kPageTokens;  // then every bit is one of a code
    if (full) put(base, codes.bytes());
    // Room for the most there can be: sanitizers make a call for every number expensive.
    const std::size_t before = bytes.size();
    bytes.resize(before + at(slots) * (at(t.head_dim) + 4 * at(t.groups()) + 4 + 6 * at(t.spec.outliers)) +
                 4);
    std::uint8_t* to = bytes.data() + before;
    const auto add = [&](const auto value) {
      std::memcpy(to, &value, sizeof value);
      to += sizeof value;
    };
    int zeros = 0;
    for (int slot = 0; slot < slots; ++slot) {
      for (int c = 0; c < t.head_dim && !full; ++c)
        *to++ = static_cast<std::uint8_t>(t.value ? get_code(base, codes, c, slot)
                                                  : get_code(base, codes, slot, c));
      for (int g = 0; g < t.groups() && (!blocks || slot % kBlockTokens32 == 0); ++g) {
        const std::uint16_t scale = half_at(base + t.scales_at(), t.scale_index(slot, g));
        add(scale);
        if (t.spec.dense_zeros()) add(half_at(base + t.zeros_at(), t.scale_index(slot, g)));
        if (t.spec.compact_zeros() && (scale & 0x8000)) {
          add(half_at(extents[at(zeros / kZeroExtent)].data(), zeros % kZeroExtent));
          ++zeros;
        }
      }
      const std::uint8_t* section = base + t.outliers_at();
      const int last = t.spec.outliers > 0 ? outlier_start(section, t.outliers(), slot + 1) : 0;
      add(last);
      for (int i = last - t.spec.outliers; i < last; ++i) {
        const Outlier outlier = outlier_at(section, t.outliers(), i);
        add(outlier.index);  // one by one: a struct's padding is anything
        add(outlier.value);
      }
    }
    add(zeros);
    bytes.resize(at(static_cast<int>(to - bytes.data())));
  }
  Bytes bytes;
};

/// Counts, windows, statistics, and every code, scale, zero point and removal mark in use.
inline Bytes contents(const Sequence& sequence) {
  const CacheConfig& config = sequence.cache().config();
  Recorder out;
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerState& state = sequence.layer_state(layer);
    const LayerScheme& scheme = config.scheme(layer);
    const PageLayout layout(scheme.k, scheme.v, config.head_dim);
    out.put(state.tokens);
    out.put(state.reach);
    out.put(state.removed);
    out.put(state.online != nullptr);
    for (int head = 0; head < config.kv_heads; ++head) {
      const HeadView view = sequence.view(layer, head);
      const std::size_t row = at(config.head_dim);
      if (state.online)
        for (const auto* part : {&view.basis->mean, &view.basis->lam, &view.basis->inv_lam})
          out.put(part->data(), sizeof(float) * part->size());
      if (view.sink > 0) {
        out.put(view.sink_k, 2 * row * at(view.sink));
        out.put(view.sink_v, 2 * row * at(view.sink));
      }
      const int body = state.tokens - view.sink;
      for (int t = view.k_quantised; t < body; ++t) out.put(view.ring_k + row * at(t % view.ring), 2 * row);
      for (int t = view.v_quantised; t < body; ++t) out.put(view.ring_v + row * at(t % view.ring), 2 * row);
      const auto& pages = state.pages[at(head)];
      out.put(pages.size());
      for (int i = 0; i < static_cast<int>(pages.size()); ++i) {
        const Page* page = pages[at(i)].get();
        const int k_slots = stored_slots(state.reach.k, i), v_slots = stored_slots(state.reach.v, i);
        for (int slot = 0; slot < k_slots; ++slot) out.put(!page || page->is_removed(slot));
        if (!page) continue;
        out.tensor(layout.k, page->bytes.data() + layout.k_at(), page->k_zeros, k_slots);
        out.tensor(layout.v, page->bytes.data() + layout.v_at(), page->v_zeros, v_slots);
      }
    }
  }
  return out.bytes;
}

/// The raw bytes of all pages, unused slots included.
inline Bytes raw_pages(const Sequence& sequence) {
  const CacheConfig& config = sequence.cache().config();
  Recorder out;
  for (int layer = 0; layer < config.layers; ++layer)
    for (const auto& table : sequence.layer_state(layer).pages)
      for (const auto& page : table)
        if (page)
          out.put(page->bytes.data(),
                  PageLayout(config.scheme(layer).k, config.scheme(layer).v, config.head_dim).bytes());
  return out.bytes;
}

/// What the pool must have handed out for a sequence that shares nothing.
inline std::size_t bytes_held(const Sequence& sequence) {
  const CacheConfig& config = sequence.cache().config();
  std::size_t bytes = 0;
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerState& state = sequence.layer_state(layer);
    const LayerScheme& scheme = config.scheme(layer);
    if (state.windows) bytes += config.window_bytes(scheme);
    for (const auto& table : state.pages)
      for (const auto& page : table)
        if (page)
          bytes += PageLayout(scheme.k, scheme.v, config.head_dim).bytes() +
                   2 * kZeroExtent * (page->k_zeros.size() + page->v_zeros.size());
  }
  return bytes;
}

struct Decoded {
  std::vector<float> k, v;  // [tokens][D]
};

inline Decoded read_back(const Sequence& sequence, int layer = 0, int head = 0) {
  const std::size_t size = at(sequence.tokens(layer) * sequence.cache().config().head_dim);
  Decoded decoded{std::vector<float>(size), std::vector<float>(size)};
  sequence.read_back(layer, head, decoded.k.data(), decoded.v.data());
  return decoded;
}

/// The attention of one fixed query: output, log-sum-exp and logits of all heads.
inline std::vector<float> attended(const Sequence& sequence, int layer = 0) {
  const CacheConfig& config = sequence.cache().config();
  check::Random random(77);
  const std::size_t row = at(config.query_heads * config.head_dim), heads = at(config.query_heads);
  std::vector<float> q(row), out(row), lse(heads), logits(heads * at(sequence.tokens(layer)));
  for (float& x : q) x = random.normal();
  const BatchItem item{&sequence, q.data(), out.data(), lse.data(), logits.data(), 1};
  CHECK(attend_batch(sequence.cache(), layer, std::span(&item, 1), true, nullptr));
  out.insert(out.end(), lse.begin(), lse.end());
  out.insert(out.end(), logits.begin(), logits.end());
  return out;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), sizeof(float) * a.size()) == 0);
}

/// The code of the Error that `body` throws, or -1.
inline int error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return static_cast<int>(error.code());
  }
  return -1;
}

// ---- files ----

inline Bytes saved(const Sequence& sequence) {
  Bytes all;
  SequenceWriter writer(sequence);
  for (Bytes piece = writer.next(); !piece.empty(); piece = writer.next())
    all.insert(all.end(), piece.begin(), piece.end());
  return all;
}

inline std::unique_ptr<Sequence> loaded(const std::shared_ptr<Cache>& cache, const Bytes& file,
                                        std::size_t piece = SIZE_MAX) {
  SequenceReader reader(cache);
  for (std::size_t i = 0; i < file.size(); i += std::min(piece, file.size() - i))
    reader.feed(file.data() + i, std::min(piece, file.size() - i));
  return reader.finish();
}

}  // namespace innerkv::test
