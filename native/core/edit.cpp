// Undoing and changing what was appended.
#include <algorithm>
#include <string>

#include "../numerics/half.h"
#include "decode.h"
#include "error.h"
#include "sequence.h"
#include "sequence_parts.h"

namespace innerkv {

void Sequence::truncate(int tokens) {
  require(tokens >= 0, "A sequence cannot be truncated to fewer than 0 tokens.");
  for (int layer = 0; layer < cache_->config().layers; ++layer)
    truncate_layer(layers_[at(layer)], cache_->config().scheme(layer), tokens);
}

void Sequence::truncate_layer(LayerState& state, const LayerScheme& scheme, int tokens) {
  if (tokens >= state.tokens) return;
  const CacheConfig& config = cache_->config();
  const int D = config.head_dim, body = std::max(0, tokens - state.reach.sink),
            flush = scheme.v.flush_tokens();
  Reach reach = state.reach;
  reach.k = std::min(reach.k, body);
  if (reach.v > body) {
    reach.v = body / flush * flush;
    // Values that shared their scales with truncated tokens go back to the 16-bit window as what they decode
    // to.
    if (reach.v < body) {
      std::vector<float> k(at(kPageTokens * D)), v(at(kPageTokens * D));
      const int page = reach.v / kPageTokens, first = reach.v % kPageTokens;
      for (int head = 0; head < config.kv_heads; ++head) {
        Page* held = state.pages[at(head)][at(page)].get();
        decode_page(cache_->backend(), D,
                    {&scheme, basis(state, scheme, head), held, page, state.reach.sink, 0,
                     std::min(first + flush, kPageTokens)},
                    cache_->rotations(), k.data(), v.data());
        std::uint16_t* ring = windows(state, scheme, head).ring_v;
        std::vector<std::uint16_t> row(at(D));
        for (int t = reach.v; t < body; ++t) {
          for (int c = 0; c < D; ++c) row[at(c)] = half_bits(v[at((t % kPageTokens) * D + c)]);
          cache_->backend().copy_memory(ring + std::ptrdiff_t{t % scheme.ring_tokens()} * D, row.data(),
                                        2 * at(D));
        }
      }
    }
  }
  state.removed = 0;
  for (auto& table : state.pages) {
    table.truncate(at(ceil_div(std::max(reach.k, reach.v), kPageTokens)));
    for (std::size_t i = 0; i < table.size(); ++i) {
      const int stored = std::min(kPageTokens, reach.k - static_cast<int>(i) * kPageTokens);
      for (int slot = 0; slot < stored; ++slot) state.removed += !table[i] || table[i]->is_removed(slot);
    }
  }
  if (reach.k == 0 && reach.v == 0) state.online.reset();
  state.tokens = tokens;
  if (scheme.released_windows) reach.sink = std::min(reach.sink, tokens);  // only a prefill fills the sink
  state.reach = tokens == 0 ? Reach{} : reach;
}

namespace {

/// Calls visit(first row, rows) for the pieces of a ring that `added` tokens after the first `tokens`
/// overwrite.
template <class Visit>
void for_overwritten(const LayerScheme& scheme, int tokens, int sink, int added, Visit&& visit) {
  const int ring = scheme.ring_tokens(), first = std::max(0, tokens - sink) % ring;
  const int count = std::min(std::max(0, added - std::max(0, sink - tokens)), ring);
  const int before_end = std::min(count, ring - first);
  if (before_end > 0) visit(first, before_end);
  if (count > before_end) visit(0, count - before_end);
}

}  // namespace

Checkpoint Sequence::checkpoint(int added) const {
  const CacheConfig& config = cache_->config();
  const std::size_t D = at(config.head_dim);
  Checkpoint point;
  std::size_t rows = 0;
  const auto each_row = [&](auto&& visit) {  // (first of some rows of a ring, how many)
    for (int layer = 0; layer < config.layers; ++layer) {
      const LayerState& state = layers_[at(layer)];
      const LayerScheme& scheme = config.scheme(layer);
      for (int head = 0; head < config.kv_heads && state.tokens > 0; ++head) {
        const Windows w = windows(state, scheme, head);
        for (std::uint16_t* ring : {w.ring_k, w.ring_v})
          for_overwritten(scheme, state.tokens, state.reach.sink, added,
                          [&](int first, int count) { visit(ring + at(first) * D, count); });
      }
    }
  };
  each_row([&](std::uint16_t*, int count) { rows += at(count); });
  if (rows > 0) {  // all layers in one gather, and back in one scatter
    point.rows = cache_->spare(2 * rows * D);
    auto* saved = reinterpret_cast<std::uint16_t*>(point.rows.data());
    std::vector<RowCopy> gather;
    each_row([&](std::uint16_t* ring, int count) {
      gather.push_back({saved, ring, config.head_dim, count});
      point.way_back.push_back({ring, saved, config.head_dim, count});
      saved += at(count) * D;
    });
    cache_->backend().copy_rows(gather, config.head_dim);
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerState& state = layers_[at(layer)];
    Checkpoint::Layer saved{state.tokens, state.reach, state.online, {}, {}};
    for (int head = 0; head < config.kv_heads; ++head) {
      const auto& table = state.pages[at(head)];
      saved.pages.push_back(table.size());
      saved.open_pages.emplace_back();
      for (std::size_t i = at(std::min(state.reach.k, state.reach.v) / kPageTokens); i < table.size(); ++i) {
        Checkpoint::ZeroCounts& counts = saved.open_pages.back().emplace_back();
        if (const Page* page = table[i].get())
          counts = {page->k_zero_count, page->v_zero_count, page->k_counted, page->v_counted};
      }
    }
    point.layers.push_back(std::move(saved));
  }
  return point;
}

void Sequence::restore(const Checkpoint& point) noexcept {
  const CacheConfig& config = cache_->config();
  cache_->backend().copy_rows(point.way_back, config.head_dim);
  for (int layer = 0; layer < config.layers; ++layer) {
    LayerState& state = layers_[at(layer)];
    const Checkpoint::Layer& saved = point.layers[at(layer)];
    if (state.tokens == saved.tokens) continue;
    for (int head = 0; head < config.kv_heads; ++head) {
      auto& table = state.pages[at(head)];
      table.truncate(saved.pages[at(head)]);
      const auto& counts = saved.open_pages[at(head)];
      for (std::size_t i = 0; i < counts.size(); ++i) {
        const std::size_t entry = table.size() - counts.size() + i;
        Page* page = table[entry].get();
        if (!page || table[entry].use_count() > 1) continue;  // as it was, or shared by a later fork
        // Either count is enough for what is in use; after truncation the saved one may be the larger, whose
        // extents an append gave back.
        if (page->k_zero_count >= counts[i].k) {
          page->k_zero_count = counts[i].k;
          page->k_counted = counts[i].k_counted;
        }
        if (page->v_zero_count >= counts[i].v) {
          page->v_zero_count = counts[i].v;
          page->v_counted = counts[i].v_counted;
        }
        if (give_back_extents(*page)) table.changed(entry);
      }
    }
    state.tokens = saved.tokens;
    state.reach = saved.reach;
    state.online = saved.online;
    if (saved.tokens == 0) state.windows.reset();
  }
}

int Sequence::stored_token(const LayerState& state, const LayerScheme& scheme, int position) const {
  if (!scheme.per_token() || scheme.k.compact_zeros() || scheme.v.compact_zeros())
    throw Error(ErrorCode::kUnsupported,
                "Single tokens can be replaced or removed only in schemes whose tokens do not share scales "
                "or zero points.");
  const int token = position - state.reach.sink;
  if (token < 0 || token >= std::min(state.reach.k, state.reach.v))
    throw Error(ErrorCode::kInvalidArgument,
                "Position " + std::to_string(position) + " is not a quantised token: quantised are " +
                    std::to_string(state.reach.sink) + " to " +
                    std::to_string(state.reach.sink + std::min(state.reach.k, state.reach.v) - 1) +
                    " (none if that is empty); windows are protected.");
  return token;
}

void Sequence::replace(int layer, int position, const TensorView& k_given, const TensorView& v_given) {
  LayerState& state = checked(layer);
  const CacheConfig& config = cache_->config();
  const LayerScheme& scheme = config.scheme(layer);
  const int token = stored_token(state, scheme, position), page = token / kPageTokens,
            slot = token % kPageTokens;
  std::vector<std::shared_ptr<Page>> own;
  std::vector<QuantiseJob> jobs;
  const AppendItem item{this, k_given, v_given, 1};
  const auto [k, v] = stage(*cache_, std::span(&item, 1))[0];
  for (int head = 0; head < config.kv_heads; ++head) {
    const auto& held = state.pages[at(head)][at(page)];
    if (!held || held->is_removed(slot))
      throw Error(ErrorCode::kInvalidArgument, "Position " + std::to_string(position) +
                                                   " was removed from head " + std::to_string(head) +
                                                   " and cannot be replaced.");
    own.push_back(own_page(held, scheme));
    const std::ptrdiff_t offset = std::ptrdiff_t{head} * config.head_dim;
    jobs.push_back({&scheme,
                    basis(state, scheme, head),
                    own.back().get(),
                    page,
                    state.reach.sink,
                    slot,
                    1,
                    slot,
                    1,
                    {nullptr, nullptr, k + offset, 0, 1, position, config.head_dim, 0},
                    {nullptr, nullptr, v + offset, 0, 1, position, config.head_dim, 0}});
  }
  cache_->backend().quantise(config, jobs, cache_->rotations());
  for (int head = 0; head < config.kv_heads; ++head)
    state.pages[at(head)].set(at(page), std::move(own[at(head)]));
}

void Sequence::remove(int layer, int head, std::span<const int> positions) {
  LayerState& state = checked(layer);
  const CacheConfig& config = cache_->config();
  const LayerScheme& scheme = config.scheme(layer);
  require(head >= -1 && head < config.kv_heads, "No such KV head.");
  std::vector<int> tokens;
  for (const int position : positions) tokens.push_back(stored_token(state, scheme, position));
  std::sort(tokens.begin(), tokens.end());
  const int first = head < 0 ? 0 : head, end = head < 0 ? config.kv_heads : head + 1;
  struct Change {
    int head, page;
    std::shared_ptr<Page> own;
    std::size_t removed = 0;
  };
  std::vector<Change>
      changes;  // bits are set on commit, so that a failure leaves shared and own pages alike untouched
  for (int h = first; h < end; ++h)
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const int page = tokens[i] / kPageTokens;
      if (i > 0 && page == tokens[i - 1] / kPageTokens) continue;
      const auto& held = state.pages[at(h)][at(page)];
      if (held) changes.push_back({h, page, own_page(held, scheme)});
    }
  for (Change& change : changes) {
    Page& page = *change.own;
    PageTable& table = state.pages[at(change.head)];
    for (const int token : tokens)
      if (token / kPageTokens == change.page && !page.is_removed(token % kPageTokens)) {
        page.removed[token % kPageTokens / 64] |= std::uint64_t{1} << (token % 64);
        ++state.removed;
        table.changed(at(change.page));
      }
    const bool full = std::min(state.reach.k, state.reach.v) >= (change.page + 1) * kPageTokens;
    const bool empty = full && ~page.removed[0] == 0 && ~page.removed[1] == 0;
    table.set(at(change.page), empty ? nullptr : std::move(change.own));
  }
}

}  // namespace innerkv
