// What the GPU benchmark computes on: caches of the compared schemes, filled by copying a few quantised pages
// as often as the context needs. Timing does not depend on values, only on where bytes lie, and every copy
// lies elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/sequence.h"
#include "numerics/half.h"

namespace innerkv::bench {

inline constexpr int kQueryHeads = 32, kKvHeads = 8, kHeadDim = 128, kSink = 32, kRecent = 96;

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

/// splitmix64; `number()` is in [-1, 1).
struct Numbers {
  std::uint64_t state;
  std::uint64_t bits() {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  float number() { return static_cast<float>(static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0); }
};

struct NamedScheme {
  std::string name;
  LayerScheme scheme;
};

/// A basis of the calibrated family with random numbers: the same work as a derived one.
inline std::vector<Basis> random_basis() {
  Numbers random{7};
  std::vector<Basis> all;
  for (int head = 0; head < kKvHeads; ++head) {
    Basis basis;
    for (int i = 0; i < kHeadDim; ++i) {
      basis.mean.push_back(0.3f * random.number());
      basis.lam.push_back(1.0f + 0.5f * random.number());
      basis.inv_lam.push_back(1.0f / basis.lam.back());
      basis.order.push_back(static_cast<std::uint8_t>(kHeadDim - 1 - i));
      basis.pivot.push_back(1.0f);
      for (int j = 0; j < kHeadDim; ++j) {
        basis.metric.push_back(i == j ? 1.0f : 0.01f);
        basis.feedback.push_back(j > i ? 0.02f * random.number() : 0.0f);
      }
    }
    all.push_back(std::move(basis));
  }
  return all;
}

/// The schemes of lib/schemes with their defaults; the first is the baseline.
inline std::vector<NamedScheme> compared_schemes() {
  const auto plain = [](TensorSpec k, TensorSpec v) {
    LayerScheme scheme;
    scheme.k = k;
    scheme.v = v;
    scheme.sink = kSink;
    scheme.recent = kRecent;
    return scheme;
  };
  const auto clip = [](int bits) {
    return bits == 1   ? std::vector<float>{}
           : bits == 2 ? std::vector<float>{1.1f, 1.0f, 0.92f, 0.85f, 0.78f, 0.7f, 0.62f, 0.55f}
                       : std::vector<float>{1.0f, 0.92f, 0.85f, 0.78f, 0.7f, 0.62f};
  };
  std::vector<NamedScheme> all{{"fp16", plain({}, {})}};
  const TensorSpec eight{8, Group::kChannels32, Mode::kZeroLevel};
  all.push_back({"q8", plain(eight, eight)});
  const auto basis = random_basis();
  for (const auto& [k, v] : {std::pair{4, 4}, {3, 3}, {2, 2}, {2, 1}}) {
    LayerScheme scheme = plain({k, Group::kToken, Mode::kMidRise}, {v, Group::kToken, Mode::kMidRise});
    scheme.block_tokens = kPageTokens;
    scheme.hadamard_k = scheme.hadamard_v = scheme.unbiased_k = scheme.unbiased_v = true;
    scheme.clip_k = clip(k);
    scheme.clip_v = clip(v);
    scheme.basis = basis;
    all.push_back({"calibrated-k" + std::to_string(k) + "v" + std::to_string(v), std::move(scheme)});
  }
  LayerScheme innerq =
      plain({3, Group::kChannels32, Mode::kZeroLevel}, {3, Group::kTokens32, Mode::kZeroLevel});
  innerq.online_lambda = true;
  innerq.stat_tokens = 64;
  all.push_back({"innerq-base", innerq});
  innerq.v = {2, Group::kTokens32, Mode::kHybrid};
  all.push_back({"innerq-hybrid", innerq});
  for (const int bits : {4, 3, 2})
    for (const int outliers : {0, 1}) {  // 1 of 128: 0.78 %
      const TensorSpec spec{bits, Group::kToken, Mode::kMidRise, outliers};
      LayerScheme scheme = plain(spec, spec);
      scheme.hadamard_k = scheme.hadamard_v = scheme.unbiased_v = scheme.online_mean = true;
      scheme.stat_tokens = 128;
      scheme.clip_k = scheme.clip_v = clip(bits);
      const std::string size = std::to_string(bits) + (outliers > 0 ? "o" + std::to_string(outliers) : "");
      all.push_back({"rotated-k" + size + "v" + size, std::move(scheme)});
    }
  return all;
}

inline CacheConfig config_of(const LayerScheme& scheme, int layers, std::size_t budget) {
  CacheConfig config;
  config.layers = layers;
  config.query_heads = kQueryHeads;
  config.kv_heads = kKvHeads;
  config.head_dim = kHeadDim;
  config.schemes = {scheme};
  config.scheme_of_layer.assign(at(layers), 0);
  config.window_of_layer.assign(at(layers), 0);
  for (int i = 0; i < kHeadDim / 2; ++i) config.rope.theta.push_back(std::pow(10000.0, -2.0 * i / kHeadDim));
  config.budget_bytes = budget;
  config.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  return config;
}

/// `tokens` tokens of all KV heads as binary16 bits.
inline std::vector<std::uint16_t> random_tokens(int tokens, std::uint64_t seed) {
  Numbers random{seed};
  std::vector<std::uint16_t> all(at(tokens * kKvHeads * kHeadDim));
  for (std::uint16_t& x : all) x = half_bits(random.number());
  return all;
}

/// One layer of `batch` sequences of `context` tokens. A cell of the benchmark takes some sequences and the
/// beginning of each.
class Batch {
 public:
  /// `context`: a multiple of 128, at least 384. Throws Error{kOutOfMemory}.
  Batch(std::shared_ptr<Backend> backend, const LayerScheme& scheme, int batch, int context,
        std::size_t budget)
      : cache_(std::make_shared<Cache>(std::move(backend), config_of(scheme, 1, budget))) {
    source_ = cache_->sequence();
    const int tokens = kSink + kRecent + kSourcePages * kPageTokens;
    source_->append(0, random_tokens(tokens, 1).data(), random_tokens(tokens, 2).data(), tokens);
    const LayerState& state = source_->layer_state(0);
    Backend& device = cache_->backend();
    const std::size_t window_bytes = cache_->config().window_bytes(scheme);
    const PageLayout layout(scheme.k, scheme.v, kHeadDim);
    const auto copied = [&](const Slot& from, std::size_t bytes) {
      Slot slot = cache_->pool().take(bytes);
      device.copy_memory(slot.data(), from.data(), bytes);
      return slot;
    };
    for (int s = 0; s < batch; ++s) {
      windows_.push_back(copied(state.windows, window_bytes));
      for (int head = 0; head < kKvHeads; ++head) {
        auto& pages = pages_.emplace_back();
        for (int p = 0; p < stored_tokens(context) / kPageTokens; ++p) {
          const Page& from = *state.pages[at(head)][at(p % kSourcePages)];
          auto page = std::make_shared<Page>();
          page->bytes = copied(from.bytes, layout.bytes());
          for (const Slot& zeros : from.k_zeros) page->k_zeros.push_back(copied(zeros, 2 * kZeroExtent));
          for (const Slot& zeros : from.v_zeros) page->v_zeros.push_back(copied(zeros, 2 * kZeroExtent));
          page->k_zero_count = from.k_zero_count;
          page->v_zero_count = from.v_zero_count;
          pages.push_back(std::move(page));
        }
      }
    }
    make_queries(batch);
  }

  Cache& cache() { return *cache_; }
  const std::vector<float>& out() const { return out_; }

  /// The last `q_tokens` tokens of the first `batch` sequences attend, at `context` tokens each: a decode
  /// step, or a piece of a prompt.
  void attend(int batch, int context, int q_tokens = 1) {
    make_queries(batch * q_tokens);
    const int row = q_tokens * kQueryHeads * kHeadDim;
    std::vector<HeadView> heads;
    const std::uint8_t* home = source_->layer_state(0).windows.data();
    for (int s = 0; s < batch; ++s)
      for (int head = 0; head < kKvHeads; ++head) {
        HeadView view = source_->view(0, head);
        const auto moved = [&](const std::uint16_t* numbers) {
          return reinterpret_cast<const std::uint16_t*>(
              windows_[at(s)].data() + (reinterpret_cast<const std::uint8_t*>(numbers) - home));
        };
        view.sink_k = moved(view.sink_k);
        view.sink_v = moved(view.sink_v);
        view.ring_k = moved(view.ring_k);
        view.ring_v = moved(view.ring_v);
        view.table = &pages_[at(s * kKvHeads + head)];
        view.tokens = context;
        view.k_quantised = view.v_quantised = stored_tokens(context);
        heads.push_back(view);
      }
    std::vector<AttendRequest> requests(at(batch));
    for (int s = 0; s < batch; ++s) {
      AttendRequest& request = requests[at(s)];
      request.heads = std::span(heads).subspan(at(s * kKvHeads), kKvHeads);
      request.q = q_.data() + s * row;
      request.out = out_.data() + s * row;
      request.q_tokens = q_tokens;
    }
    cache_->backend().attend(cache_->config(), requests, cache_->rotations(), nullptr);
  }

  /// Bytes of codes, scales, zero points and windows that such a step must read.
  double bytes(int batch, int context) const {
    const LayerScheme& scheme = cache_->config().schemes[0];
    const PageLayout layout(scheme.k, scheme.v, kHeadDim);
    double all = 0;
    for (int s = 0; s < batch; ++s)
      for (int head = 0; head < kKvHeads; ++head) {
        all += 2.0 * 2.0 * (context - stored_tokens(context)) * kHeadDim;
        for (int p = 0; p < stored_tokens(context) / kPageTokens; ++p) {
          const Page& page = *pages_[at(s * kKvHeads + head)][at(p)];
          all += static_cast<double>(layout.bytes()) + 2.0 * (page.k_zero_count + page.v_zero_count);
        }
      }
    return all;
  }

 private:
  static constexpr int kSourcePages = 2;
  static int stored_tokens(int context) { return context - kSink - kRecent; }
  void make_queries(int tokens) {
    const std::size_t numbers = at(tokens * kQueryHeads * kHeadDim);
    if (q_.size() >= numbers) return;
    Numbers random{3};
    q_.resize(numbers);
    for (float& x : q_) x = random.number();
    out_.resize(numbers);
  }

  std::shared_ptr<Cache> cache_;
  std::unique_ptr<Sequence> source_;
  std::vector<Slot> windows_;     // [batch]
  std::vector<PageTable> pages_;  // [batch * kv_heads]
  std::vector<float> q_, out_;
};

}  // namespace innerkv::bench
