// Tokens on their way into windows and pages.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../numerics/half.h"
#include "error.h"
#include "sequence.h"
#include "sequence_parts.h"

namespace innerkv {

namespace {

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

/// A page that a call writes to, and what it held before. It may hold more extents than it needs, after
/// truncation.
struct PageWrite {
  PageTable* table;
  std::size_t entry;  // of the table, or one behind its end
  std::shared_ptr<Page> page;
  std::size_t k_extents, v_extents;
  int k_count, v_count;
  PageWrite(PageTable& of, std::size_t at_entry, std::shared_ptr<Page> own)
      : table(&of),
        entry(at_entry),
        page(std::move(own)),
        k_extents(page->k_zeros.size()),
        v_extents(page->v_zeros.size()),
        k_count(page->k_zero_count),
        v_count(page->v_zero_count) {}
  void undo() const noexcept {
    page->k_zeros.resize(k_extents);
    page->v_zeros.resize(v_extents);
    page->k_zero_count = k_count;
    page->v_zero_count = v_count;
  }
  /// The slots are those of new keys. `table` has room.
  void commit(int first_slot, int slots) noexcept {
    bool changed = false;
    for (int slot = first_slot; slot < first_slot + slots; ++slot) {
      changed |= page->is_removed(slot);
      page->removed[slot / 64] &= ~(std::uint64_t{1} << (slot % 64));
    }
    give_back_extents(*page);
    changed |= page->k_zeros.size() != k_extents || page->v_zeros.size() != v_extents;
    if (entry == table->size()) return table->push_back(std::move(page));
    if (changed) table->changed(entry);
    table->set(entry, std::move(page));
  }
};

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
  std::vector<PageWrite> written;
  std::vector<RowCopy> copies;
  copies.reserve(6 * at(heads));  // sink and two pieces of the ring, K and V
  if (writes) {
    try {
      for (int head = 0; head < heads; ++head)
        for (int page = first_page; page < end_page; ++page) {
          const int begin = page * kPageTokens, end = begin + kPageTokens;
          const int k_first = std::clamp(state.reach.k, begin, end), k_end = std::clamp(reach.k, begin, end);
          const int v_first = std::clamp(state.reach.v, begin, end), v_end = std::clamp(reach.v, begin, end);
          if (k_first == k_end && v_first == v_end) continue;
          PageTable& table = state.pages[at(head)];
          const std::shared_ptr<Page> none, &held = at(page) < table.size() ? table[at(page)] : none;
          const std::shared_ptr<Page> own = own_page(held, scheme);
          if (!held) mark_removed(backend, layout, *own, k_first - begin);
          written.emplace_back(table, at(page), own);
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
      for (PageTable& table : state.pages) table.reserve(at(end_page));
      backend.quantise(config, jobs, cache_->rotations());  // into slots that nobody reads yet
    } catch (...) {
      for (const PageWrite& one : written) one.undo();
      throw;
    }
  }

  // From here on nothing fails.
  if (fresh_windows) state.windows = std::move(fresh_windows);
  for (std::size_t i = 0; i < jobs.size(); ++i) written[i].commit(jobs[i].k_first, jobs[i].k_count);
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

}  // namespace innerkv
