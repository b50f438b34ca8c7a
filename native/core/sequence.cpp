// Windows and pages of a sequence: where they are, where they will be, and reading them.
#include "sequence.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "../numerics/half.h"
#include "decode.h"
#include "error.h"
#include "sequence_parts.h"

namespace innerkv {

Sequence::Sequence(std::shared_ptr<Cache> cache)
    : cache_(std::move(cache)), layers_(at(cache_->config().layers)) {
  for (LayerState& state : layers_) state.pages.resize(at(cache_->config().kv_heads));
}

const LayerState& Sequence::layer_state(int layer) const {
  if (layer < 0 || layer >= cache_->config().layers)
    throw Error(ErrorCode::kInvalidArgument, "Layer " + std::to_string(layer) +
                                                 " does not exist; the cache has " +
                                                 std::to_string(cache_->config().layers) + ".");
  return layers_[at(layer)];
}

LayerState& Sequence::checked(int layer) { return const_cast<LayerState&>(layer_state(layer)); }

std::size_t Sequence::page_bytes(const LayerScheme& scheme) const {
  return PageLayout(scheme.k, scheme.v, cache_->config().head_dim).bytes();
}

Sequence::Windows Sequence::windows(const LayerState& state, const LayerScheme& scheme, int head) const {
  const int D = cache_->config().head_dim;
  auto* base = reinterpret_cast<std::uint16_t*>(state.windows.data());
  if (!base) return {};
  base += std::ptrdiff_t{head} * 2 * (scheme.sink + scheme.ring_tokens()) * D;
  const std::ptrdiff_t sink = std::ptrdiff_t{scheme.sink} * D,
                       ring = std::ptrdiff_t{scheme.ring_tokens()} * D;
  return {base, base + sink, base + 2 * sink, base + 2 * sink + ring};
}

const Basis* Sequence::basis(const LayerState& state, const LayerScheme& scheme, int head) const {
  if (state.online) return &(*state.online)[at(head)];
  return scheme.basis.empty() ? nullptr : &scheme.basis[at(head)];
}

/// Where the windows end after `added` more tokens. docs/format.md and docs/windows: a flush of f tokens
/// happens when the recent window would reach recent + f; `released_windows` repeats InnerQ's released code,
/// whose windows shrink.
Reach Sequence::reach_after(const LayerState& state, const LayerScheme& scheme, int added) const {
  const int total = state.tokens + added, k_flush = scheme.k.flush_tokens(),
            v_flush = scheme.v.flush_tokens();
  Reach reach = state.reach;
  if (!scheme.released_windows) {
    reach.sink = scheme.sink;
    if (scheme.online() && total < scheme.stat_tokens) return reach;
    const int body = std::max(0, total - scheme.sink - scheme.recent);
    reach.k = std::max(reach.k, body / k_flush * k_flush);
    reach.v = std::max(reach.v, body / v_flush * v_flush);
    return reach;
  }
  int steps = added;
  if (state.tokens == 0) {  // the first call is the prefill
    reach.sink = std::min(scheme.sink, total);
    const int body = total - reach.sink, middle = body - std::min(scheme.recent, body);
    const auto whole = [&](int flush) {
      return ceil_div(middle, flush) * flush <= body ? ceil_div(middle, flush) * flush
                                                     : middle / flush * flush;
    };
    reach.k = whole(k_flush);
    reach.v = whole(v_flush);
    steps = 0;
  }
  for (int body = total - steps - reach.sink + 1; body <= total - reach.sink; ++body) {
    if (body - reach.k >= k_flush) reach.k += k_flush;
    if (body - reach.v >= v_flush) reach.v += v_flush;
  }
  return reach;
}

/// `page` itself when nobody else holds it, otherwise a copy (copy on write); a fresh page for nullptr.
std::shared_ptr<Page> Sequence::own_page(const std::shared_ptr<Page>& page, const LayerScheme& scheme) const {
  if (page && page.use_count() == 1) return page;
  Pool& pool = cache_->pool();
  auto own = std::make_shared<Page>();
  own->bytes = pool.take(page_bytes(scheme));
  if (!page) return own;
  const auto copy_extents = [&](const std::vector<Slot>& from, std::vector<Slot>& to) {
    for (const Slot& extent : from) {
      to.push_back(pool.take(2 * kZeroExtent));
      cache_->backend().copy_memory(to.back().data(), extent.data(), 2 * kZeroExtent);
    }
  };
  copy_extents(page->k_zeros, own->k_zeros);
  copy_extents(page->v_zeros, own->v_zeros);
  cache_->backend().copy_memory(own->bytes.data(), page->bytes.data(), page_bytes(scheme));
  std::copy(std::begin(page->removed), std::end(page->removed), std::begin(own->removed));
  own->k_zero_count = page->k_zero_count;
  own->v_zero_count = page->v_zero_count;
  own->k_counted = page->k_counted;
  own->v_counted = page->v_counted;
  return own;
}

std::unique_ptr<Sequence> Sequence::fork() const {
  auto copy = std::make_unique<Sequence>(cache_);
  for (int layer = 0; layer < cache_->config().layers; ++layer) {
    const LayerState& from = layers_[at(layer)];
    LayerState& to = copy->layers_[at(layer)];
    const std::size_t bytes = cache_->config().window_bytes(cache_->config().scheme(layer));
    to.tokens = from.tokens;
    to.reach = from.reach;
    to.pages = from.pages;
    to.online = from.online;
    to.removed = from.removed;
    if (!from.windows) continue;
    to.windows = cache_->pool().take(bytes);
    cache_->backend().copy_memory(to.windows.data(), from.windows.data(), bytes);
  }
  return copy;
}

HeadView Sequence::view(int layer, int head) const {
  const LayerState& state = layer_state(layer);
  const LayerScheme& scheme = cache_->config().scheme(layer);
  const Windows w = windows(state, scheme, head);
  return {&scheme,
          basis(state, scheme, head),
          &state.pages[at(head)],
          state.tokens,
          std::min(state.tokens, state.reach.sink),
          state.reach.k,
          state.reach.v,
          w.sink_k,
          w.sink_v,
          w.ring_k,
          w.ring_v,
          scheme.ring_tokens()};
}

void Sequence::read_back(int layer, int head, float* k, float* v) const {
  const LayerState& state = layer_state(layer);
  const CacheConfig& config = cache_->config();
  require(head >= 0 && head < config.kv_heads, "No such KV head.");
  const LayerScheme& scheme = config.scheme(layer);
  const HeadView view = this->view(layer, head);
  const int D = config.head_dim;
  std::vector<float> page_k(at(kPageTokens * D)), page_v(at(kPageTokens * D));
  std::vector<std::uint16_t> row(at(D));
  for (int t = 0; t < state.tokens; ++t) {
    const int token = t - view.sink;
    float *to_k = k + std::ptrdiff_t{t} * D, *to_v = v + std::ptrdiff_t{t} * D;
    const auto from_half = [&](const std::uint16_t* from, float* to) {
      cache_->backend().copy_memory(row.data(), from, 2 * at(D));
      for (int c = 0; c < D; ++c) to[c] = half_value(row[at(c)]);
    };
    if (token < 0) {
      from_half(view.sink_k + std::ptrdiff_t{t} * D, to_k);
      from_half(view.sink_v + std::ptrdiff_t{t} * D, to_v);
      continue;
    }
    const int slot = token % kPageTokens, page = token / kPageTokens;
    Page* held =
        token < std::max(view.k_quantised, view.v_quantised) ? (*view.table)[at(page)].get() : nullptr;
    if (slot == 0 && held) {
      const auto slots = [&](int quantised) { return std::clamp(quantised - token, 0, kPageTokens); };
      decode_page(
          cache_->backend(), D,
          {&scheme, view.basis, held, page, view.sink, slots(view.k_quantised), slots(view.v_quantised)},
          cache_->rotations(), page_k.data(), page_v.data());
    }
    const std::ptrdiff_t in_ring = std::ptrdiff_t{token % view.ring} * D;
    if (token >= view.k_quantised)
      from_half(view.ring_k + in_ring, to_k);
    else
      std::memcpy(to_k, page_k.data() + slot * D, sizeof(float) * at(D));
    if (token >= view.v_quantised)
      from_half(view.ring_v + in_ring, to_v);
    else
      std::memcpy(to_v, page_v.data() + slot * D, sizeof(float) * at(D));
    if (token < view.k_quantised && (!held || held->is_removed(slot))) {
      std::fill_n(to_k, D, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(to_v, D, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

}  // namespace innerkv
