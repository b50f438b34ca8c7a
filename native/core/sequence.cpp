// Long file: one class whose operations share the window and page bookkeeping.
#include "sequence.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "../numerics/half.h"
#include "decode.h"
#include "error.h"

namespace innerkv {

namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Compact zero points that the first `slots` slots of a tensor own: the sign bits of its scales tell.
int count_zeros(Backend& backend, const TensorLayout& tensor, const std::uint8_t* base, int slots) {
  if (!tensor.spec.compact_zeros() || slots == 0) return 0;
  std::vector<std::uint16_t> scales(at(tensor.scales()));
  backend.copy_memory(scales.data(), base + tensor.scales_at(), 2 * scales.size());
  const int span = tensor.spec.flush_tokens();
  int zeros = 0;
  for (int slot = 0; slot < slots; slot += span)
    for (int g = 0; g < tensor.groups(); ++g) zeros += scales[at(tensor.scale_index(slot, g))] >> 15;
  return zeros;
}

/// Reserves extents for the worst case of `slots` more slots; give_back_extents() returns what was not
/// needed.
void reserve_extents(Pool& pool, const TensorLayout& tensor, std::vector<Slot>& extents, int zeros,
                     int slots) {
  if (!tensor.spec.compact_zeros()) return;
  const int worst = zeros + slots / tensor.spec.flush_tokens() * tensor.groups();
  while (static_cast<int>(extents.size()) * kZeroExtent < worst)
    extents.push_back(pool.take(2 * kZeroExtent));
}

void give_back_extents(Page& page) {
  page.k_zeros.resize(at(ceil_div(page.k_zero_count, kZeroExtent)));
  page.v_zeros.resize(at(ceil_div(page.v_zero_count, kZeroExtent)));
}

/// The extents a page had before a call reserved more. A page may hold more than it needs, after truncation.
struct HeldExtents {
  Page* page;
  std::size_t k, v;
  int k_count, v_count;
  explicit HeldExtents(Page& of)
      : page(&of),
        k(of.k_zeros.size()),
        v(of.v_zeros.size()),
        k_count(of.k_zero_count),
        v_count(of.v_zero_count) {}
  void restore() const {
    page->k_zeros.resize(k);
    page->v_zeros.resize(v);
    page->k_zero_count = k_count;
    page->v_zero_count = v_count;
  }
};

void clear_removed(Page& page, int first, int count) {
  for (int slot = first; slot < first + count; ++slot)
    page.removed[slot / 64] &= ~(std::uint64_t{1} << (slot % 64));
}

/// Outlier rows 0 ... rows - 1 with entries that add nothing.
void put_empty_outliers(Backend& backend, const TensorLayout& tensor, std::uint8_t* base, int rows) {
  const int count = tensor.spec.outliers;
  if (count == 0 || rows == 0) return;
  const OutlierLayout layout = tensor.outliers();
  std::vector<std::uint8_t> section(layout.bytes());
  Outlier none[kMaxOutliers];
  for (int i = 0; i < count; ++i) none[i] = {i, 0};
  for (int row = 0; row < rows; ++row) put_outlier_row(section.data(), layout, row, row * count, none, count);
  backend.copy_memory(base + tensor.outliers_at(), section.data(), section.size());
}

/// A fresh page in the place of one that was given back: the tokens before `slots` are still removed.
void mark_removed(Backend& backend, const PageLayout& layout, Page& page, int slots) {
  for (int slot = 0; slot < slots; ++slot) page.removed[slot / 64] |= std::uint64_t{1} << (slot % 64);
  put_empty_outliers(backend, layout.k, page.bytes.data() + layout.k_at(), slots);
  put_empty_outliers(backend, layout.v, page.bytes.data() + layout.v_at(), slots);
}

}  // namespace

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
  return own;
}

namespace {

/// The first keys of every head on the host: [heads][tokens][D], gathered in one go.
std::vector<std::uint16_t> first_keys(Cache& cache, std::span<const TokenSource> sources, int tokens) {
  const int D = cache.config().head_dim;
  std::vector<std::uint16_t> keys(sources.size() * at(tokens) * at(D));
  const Spare together = cache.spare(2 * keys.size());
  auto* next = reinterpret_cast<std::uint16_t*>(together.data());
  std::vector<RowCopy> rows;
  for (const TokenSource& source : sources)
    for (int t = 0; t < tokens; ++t, next += D) rows.push_back({next, source.at_position(t), D, 1});
  cache.backend().copy_rows(rows, D);
  cache.backend().copy_memory(keys.data(), together.data(), 2 * keys.size());
  return keys;
}

/// Statistics of the first tokens of a sequence, keys [stat_tokens][D]: docs/format.md section 5.
Basis online_basis(const LayerScheme& scheme, const std::uint16_t* keys, int D) {
  Basis basis;
  if (scheme.online_mean) {
    basis.mean.assign(at(D), 0.0f);
    for (int t = 0; t < scheme.stat_tokens; ++t)
      for (int c = 0; c < D; ++c) basis.mean[at(c)] += half_value(keys[t * D + c]);
    for (float& mean : basis.mean) mean /= static_cast<float>(scheme.stat_tokens);
  }
  if (scheme.online_lambda) {
    basis.lam.assign(at(D), 0.0f);
    for (int t = 0; t < scheme.stat_tokens; ++t)
      for (int c = 0; c < D; ++c)
        basis.lam[at(c)] = std::max(basis.lam[at(c)], std::abs(half_value(keys[t * D + c])));
    for (float& lam : basis.lam) lam = std::max(std::sqrt(lam), 0x1p-10f);
    for (const float lam : basis.lam) basis.inv_lam.push_back(1.0f / lam);
  }
  return basis;
}

}  // namespace

namespace {

void check_alignment(const void* memory, bool on_device, const char* name) {
  if (on_device && reinterpret_cast<std::uintptr_t>(memory) % kTensorAlign != 0)
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " must be aligned to " +
                                                 std::to_string(kTensorAlign) + " bytes on the device.");
}

/// What a call has to be given of a device tensor, or nothing when it can be used as it is.
bool needs_intake(const TensorView& tensor, Dtype as) {
  return tensor.on_device && !(tensor.finite && tensor.dtype == as);
}

}  // namespace

/// k and v in device memory as binary16.
Sequence::Staged Sequence::stage(const TensorView& k, const TensorView& v, int tokens) const {
  const CacheConfig& config = cache_->config();
  Backend& backend = cache_->backend();
  const std::size_t numbers = at(tokens) * at(config.kv_heads) * at(config.head_dim);
  const TensorView* given[] = {&k, &v};
  const std::uint16_t* staged[2];
  const char* names[] = {"k", "v"};
  std::vector<Intake> intake;
  for (const int i : {0, 1}) {
    check_alignment(given[i]->data, given[i]->on_device, names[i]);
    if (needs_intake(*given[i], Dtype::kF16))
      intake.push_back({given[i]->data, given[i]->dtype, numbers, Dtype::kF16});
  }
  if (!intake.empty()) backend.take(intake);
  for (std::size_t i = 0, taken = 0; i < 2; ++i) {
    const TensorView& tensor = *given[i];
    if (!tensor.on_device) {
      require(tensor.dtype == Dtype::kF16, "Keys and values on the host must be binary16.");
      staged[i] = backend.stage(static_cast<int>(i), static_cast<const std::uint16_t*>(tensor.data), numbers);
      continue;
    }
    staged[i] = static_cast<const std::uint16_t*>(tensor.data);
    if (!needs_intake(tensor, Dtype::kF16)) continue;
    const Intake& result = intake[taken++];
    if (!result.finite)
      refuse_not_finite(backend, tensor, numbers, Dtype::kF16,
                        {names[i], config.kv_heads, config.head_dim, 0});
    staged[i] = static_cast<const std::uint16_t*>(result.ready);
  }
  return {staged[0], staged[1]};
}

void Sequence::append(int layer, const TensorView& k_given, const TensorView& v_given, int tokens) {
  LayerState& state = checked(layer);
  const CacheConfig& config = cache_->config();
  const LayerScheme& scheme = config.scheme(layer);
  const int heads = config.kv_heads, D = config.head_dim;
  require(tokens >= 0, "The number of tokens must not be negative.");
  require(tokens <= std::numeric_limits<int>::max() / 2 - state.tokens,
          "A sequence holds at most 2^30 tokens.");
  if (tokens == 0) return;

  Slot fresh_windows;
  if (!state.windows) fresh_windows = cache_->pool().take(config.window_bytes(scheme));
  const Reach reach = reach_after(state, scheme, tokens);
  const PageLayout layout(scheme.k, scheme.v, D);

  Backend& backend = cache_->backend();
  const auto [k, v] = stage(k_given, v_given, tokens);
  std::vector<TokenSource> key_source, value_source;
  for (int head = 0; head < heads; ++head) {
    const Windows w = windows(state, scheme, head);
    const std::ptrdiff_t stride = std::ptrdiff_t{heads} * D;
    key_source.push_back({w.sink_k, w.ring_k, k + std::ptrdiff_t{head} * D, reach.sink, scheme.ring_tokens(),
                          state.tokens, D, stride});
    value_source.push_back({w.sink_v, w.ring_v, v + std::ptrdiff_t{head} * D, reach.sink,
                            scheme.ring_tokens(), state.tokens, D, stride});
  }
  std::shared_ptr<const std::vector<Basis>> online = state.online;
  if (scheme.online() && !online && (reach.k > 0 || reach.v > 0)) {
    auto made = std::make_shared<std::vector<Basis>>();
    // released_windows quantises before the statistics are complete: then they come from what there is.
    LayerScheme first = scheme;
    first.stat_tokens = std::min(scheme.stat_tokens, state.tokens + tokens);
    const std::vector<std::uint16_t> keys = first_keys(*cache_, key_source, first.stat_tokens);
    for (int head = 0; head < heads; ++head)
      made->push_back(online_basis(first, keys.data() + std::ptrdiff_t{head} * first.stat_tokens * D, D));
    online = std::move(made);
  }

  // Pages: take everything that may be needed before anything is written.
  const int first_page = std::min(state.reach.k, state.reach.v) / kPageTokens,
            end_page = ceil_div(std::max(reach.k, reach.v), kPageTokens);
  const bool writes = reach.k > state.reach.k || reach.v > state.reach.v;
  std::vector<QuantiseJob> jobs;
  std::vector<std::vector<std::shared_ptr<Page>>> pages(at(heads));
  std::vector<HeldExtents> before;
  std::vector<RowCopy> copies;
  copies.reserve(6 * at(heads));  // sink and two pieces of the ring, K and V
  if (writes) {
    try {
      for (int head = 0; head < heads; ++head)
        for (int page = first_page; page < end_page; ++page) {
          const int begin = page * kPageTokens, end = begin + kPageTokens;
          const int k_first = std::clamp(state.reach.k, begin, end), k_end = std::clamp(reach.k, begin, end);
          const int v_first = std::clamp(state.reach.v, begin, end), v_end = std::clamp(reach.v, begin, end);
          const auto& table = state.pages[at(head)];
          std::shared_ptr<Page> held = page < static_cast<int>(table.size()) ? table[at(page)] : nullptr;
          if (k_first == k_end && v_first == v_end) {
            pages[at(head)].push_back(std::move(held));
            continue;
          }
          const std::shared_ptr<Page> shared = held;
          held.reset();
          // `shared` is one extra holder besides the table.
          std::shared_ptr<Page> own = shared && shared.use_count() == 2 ? shared : own_page(shared, scheme);
          if (!shared) mark_removed(backend, layout, *own, k_first - begin);
          pages[at(head)].push_back(own);
          before.emplace_back(*own);
          own->k_zero_count =
              count_zeros(backend, layout.k, own->bytes.data() + layout.k_at(), k_first - begin);
          own->v_zero_count =
              count_zeros(backend, layout.v, own->bytes.data() + layout.v_at(), v_first - begin);
          reserve_extents(cache_->pool(), layout.k, own->k_zeros, own->k_zero_count, k_end - k_first);
          reserve_extents(cache_->pool(), layout.v, own->v_zeros, own->v_zero_count, v_end - v_first);
          QuantiseJob job{&scheme,
                          online ? &(*online)[at(head)] : basis(state, scheme, head),
                          own.get(),
                          page,
                          reach.sink,
                          k_first - begin,
                          k_end - k_first,
                          v_first - begin,
                          v_end - v_first,
                          key_source[at(head)],
                          value_source[at(head)]};
          jobs.push_back(job);
        }
      for (auto& table : state.pages) table.reserve(at(end_page));
      backend.quantise(config, jobs, cache_->rotations());  // into slots that nobody reads yet
    } catch (...) {
      for (const HeldExtents& held : before) held.restore();
      throw;
    }
  }

  // From here on nothing fails.
  if (fresh_windows) state.windows = std::move(fresh_windows);
  for (const QuantiseJob& job : jobs) clear_removed(*job.page, job.k_first, job.k_count);
  for (const QuantiseJob& job : jobs) give_back_extents(*job.page);
  for (int head = 0; head < heads && writes; ++head) {
    auto& table = state.pages[at(head)];
    table.resize(at(std::max(end_page, static_cast<int>(table.size()))));
    for (int page = first_page; page < end_page; ++page)
      table[at(page)] = std::move(pages[at(head)][at(page - first_page)]);
  }
  state.online = std::move(online);

  const int total = state.tokens + tokens, ring = scheme.ring_tokens();
  for (int head = 0; head < heads; ++head) {
    const Windows w = windows(state, scheme, head);
    const auto copy = [&](std::uint16_t* to, const TokenSource& source, int position, int count) {
      if (count > 0) copies.push_back({to, source.at_position(position), source.stride, count});
    };
    const auto keep = [&](std::uint16_t* to, const TokenSource& source, int reached) {
      for (int position = std::max(state.tokens, reach.sink + reached); position < total;) {
        const int row = (position - reach.sink) % ring, count = std::min(total - position, ring - row);
        copy(to + std::ptrdiff_t{row} * D, source, position, count);
        position += count;
      }
    };
    const std::ptrdiff_t sink_row = std::ptrdiff_t{state.tokens} * D;
    const int sink_rows = std::min(total, reach.sink) - state.tokens;
    copy(w.sink_k + sink_row, key_source[at(head)], state.tokens, sink_rows);
    copy(w.sink_v + sink_row, value_source[at(head)], state.tokens, sink_rows);
    keep(w.ring_k, key_source[at(head)], reach.k);
    keep(w.ring_v, value_source[at(head)], reach.v);
  }
  backend.copy_rows(copies, D);
  state.tokens = total;
  state.reach = reach;
}

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
    table.resize(at(ceil_div(std::max(reach.k, reach.v), kPageTokens)));
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
      for (std::size_t i = at(std::min(state.reach.k, state.reach.v) / kPageTokens); i < table.size(); ++i)
        saved.open_pages.back().push_back(
            table[i] ? Checkpoint::ZeroCounts{table[i]->k_zero_count, table[i]->v_zero_count}
                     : Checkpoint::ZeroCounts{0, 0});
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
      table.resize(saved.pages[at(head)]);
      const auto& counts = saved.open_pages[at(head)];
      for (std::size_t i = 0; i < counts.size(); ++i) {
        Page* page = table[table.size() - counts.size() + i].get();
        if (!page) continue;
        page->k_zero_count = counts[i].k;
        page->v_zero_count = counts[i].v;
        give_back_extents(*page);
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
  const auto [k, v] = stage(k_given, v_given, 1);
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
    state.pages[at(head)][at(page)] = std::move(own[at(head)]);
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
    for (const int token : tokens)
      if (token / kPageTokens == change.page && !page.is_removed(token % kPageTokens)) {
        page.removed[token % kPageTokens / 64] |= std::uint64_t{1} << (token % 64);
        ++state.removed;
      }
    const bool full = std::min(state.reach.k, state.reach.v) >= (change.page + 1) * kPageTokens;
    const bool empty = full && ~page.removed[0] == 0 && ~page.removed[1] == 0;
    state.pages[at(change.head)][at(change.page)] = empty ? nullptr : std::move(change.own);
  }
}

HeadView Sequence::view(int layer, int head) const {
  const LayerState& state = layer_state(layer);
  const LayerScheme& scheme = cache_->config().scheme(layer);
  const Windows w = windows(state, scheme, head);
  return {&scheme,
          basis(state, scheme, head),
          state.pages[at(head)].data(),
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
    Page* held = token < std::max(view.k_quantised, view.v_quantised) ? view.pages[page].get() : nullptr;
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

void check_attend(const Sequence& sequence, int layer, int q_tokens, bool causal) {
  const int tokens = sequence.tokens(layer);
  require(q_tokens >= 1, "Attention needs at least one query token.");
  if (causal && q_tokens > tokens)
    throw Error(ErrorCode::kInvalidArgument,
                std::to_string(q_tokens) + " query tokens, but layer " + std::to_string(layer) +
                    " holds only " + std::to_string(tokens) +
                    " tokens. Append the tokens of the queries first, or pass causal: false.");
}

namespace {

/// The queries of each item as float32, on the device if they were there. Throws NotFinite.
std::vector<const float*> take_queries(Cache& cache, std::span<const BatchItem> items) {
  const CacheConfig& config = cache.config();
  const int heads = config.query_heads, D = config.head_dim;
  const auto numbers = [&](const BatchItem& item) { return at(item.q_tokens) * at(heads) * at(D); };
  std::vector<const float*> queries;
  std::vector<Intake> intake;
  for (const BatchItem& item : items) {
    require(item.q.on_device || item.q.dtype == Dtype::kF32, "Queries on the host must be float32.");
    check_alignment(item.q.data, item.q.on_device, "q");
    check_alignment(item.out.data, item.out.on_device, "out");
    queries.push_back(static_cast<const float*>(item.q.data));
    if (needs_intake(item.q, Dtype::kF32))
      intake.push_back({item.q.data, item.q.dtype, numbers(item), Dtype::kF32});
  }
  if (intake.empty()) return queries;
  cache.backend().take(intake);
  std::size_t taken = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (!needs_intake(items[i].q, Dtype::kF32)) continue;
    const Intake& result = intake[taken++];
    if (!result.finite)
      refuse_not_finite(cache.backend(), items[i].q, numbers(items[i]), Dtype::kF32,
                        {items.size() > 1 ? "q of item " + std::to_string(i) : "q", heads, D, 0});
    queries[i] = static_cast<const float*>(result.ready);
  }
  return queries;
}

}  // namespace

bool attend_batch(Cache& cache, int layer, std::span<const BatchItem> items, bool causal,
                  const std::atomic<bool>* aborted, std::size_t mass_numbers) {
  const CacheConfig& config = cache.config();
  const int heads = config.query_heads, D = config.head_dim;
  // Masses need every probability of a query until its sum is known, so long queries are cut.
  std::vector<int> steps;
  int parts = 1;
  for (const BatchItem& item : items) {
    require(&item.sequence->cache() == &cache, "A sequence of another cache.");
    check_attend(*item.sequence, layer, item.q_tokens, causal);
    const std::size_t tokens = at(item.sequence->tokens(layer));
    const std::size_t most = mass_numbers / (at(heads) * std::max<std::size_t>(tokens, 1));
    const bool cut = item.mass && !item.logits && most < at(item.q_tokens);  // logits are of this size anyway
    steps.push_back(cut ? std::max(1, static_cast<int>(most)) : item.q_tokens);
    parts = std::max(parts, (item.q_tokens + steps.back() - 1) / steps.back());
  }
  const std::vector<const float*> queries = take_queries(cache, items);
  for (const BatchItem& item : items)
    if (item.mass) std::fill_n(item.mass, at(config.kv_heads) * at(item.sequence->tokens(layer)), 0.0f);
  std::vector<HeadView> views;
  std::vector<AttendRequest> requests;
  for (int part = 0; part < parts; ++part) {
    views.clear();
    views.reserve(items.size() * at(config.kv_heads));
    requests.clear();
    for (std::size_t i = 0; i < items.size(); ++i) {
      const BatchItem& item = items[i];
      const int first = part * steps[i], count = std::min(steps[i], item.q_tokens - first);
      if (count <= 0) continue;
      const std::size_t first_view = views.size();
      for (int head = 0; head < config.kv_heads; ++head) views.push_back(item.sequence->view(layer, head));
      AttendRequest request;
      request.heads = std::span(views).subspan(first_view, at(config.kv_heads));
      request.q = queries[i] + std::ptrdiff_t{first} * heads * D;
      request.q_on_device = item.q.on_device;
      request.out = item.out.data + std::ptrdiff_t{first} * heads * D;
      request.out_on_device = item.out.on_device;
      request.lse = item.lse.data ? item.lse.data + std::ptrdiff_t{first} * heads : nullptr;
      request.lse_on_device = item.lse.on_device;
      request.logits = item.logits;
      request.q_tokens = count;
      request.q_behind = item.q_tokens - first - count;
      request.sliding_window = config.window_of_layer[at(layer)];
      request.causal = causal;
      request.mass = item.mass;
      request.mass_stride = item.sequence->tokens(layer);
      requests.push_back(request);
    }
    if (!cache.backend().attend(config, requests, cache.rotations(), aborted)) return false;
  }
  return true;
}

}  // namespace innerkv
