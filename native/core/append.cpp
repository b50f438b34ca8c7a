// Tokens on their way into windows and pages.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "../numerics/half.h"
#include "error.h"
#include "sequence.h"
#include "sequence_parts.h"

namespace innerkv {

namespace {

/// Compact zero points that the first `slots` slots of a tensor own: `known` when it is of so many, otherwise
/// the sign bits of its scales tell.
int count_zeros(Backend& backend, const TensorLayout& tensor, const std::uint8_t* base, int slots, int known,
                int counted) {
  if (!tensor.spec.compact_zeros() || slots == 0) return 0;
  if (slots == counted) return known;
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

/// Slots of a page that a call writes to, and what the page held before. It may hold more extents than it
/// needs, after truncation.
struct PageWrite {
  PageTable* table;
  std::size_t entry;  // of the table, or one behind its end
  std::shared_ptr<Page> page;
  int k_first, k_end, v_end;  // slots: of new keys, behind new values
  std::size_t k_extents, v_extents;
  int k_zeros, v_zeros;
  PageWrite(PageTable& of, std::size_t at_entry, std::shared_ptr<Page> own, int first_key, int end_key,
            int end_value)
      : table(&of),
        entry(at_entry),
        page(std::move(own)),
        k_first(first_key),
        k_end(end_key),
        v_end(end_value),
        k_extents(page->k_zeros.size()),
        v_extents(page->v_zeros.size()),
        k_zeros(page->k_zero_count),
        v_zeros(page->v_zero_count) {}
  void undo() const noexcept {
    page->k_zeros.resize(k_extents);
    page->v_zeros.resize(v_extents);
    page->k_zero_count = k_zeros;
    page->v_zero_count = v_zeros;
  }
  /// The table has room.
  void commit() noexcept {
    bool changed = false;
    for (int slot = k_first; slot < k_end; ++slot) {
      changed |= page->is_removed(slot);
      page->removed[slot / 64] &= ~(std::uint64_t{1} << (slot % 64));
    }
    page->k_counted = k_end;
    page->v_counted = v_end;
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

void check_items(Cache& cache, int layer, std::span<const AppendItem> items) {
  std::map<const Sequence*, std::size_t> seen;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const AppendItem& item = items[i];
    require(&item.sequence->cache() == &cache, "A sequence of another cache.");
    const int held = item.sequence->tokens(layer);
    require(item.tokens >= 0, "The number of tokens must not be negative.");
    require(item.tokens <= std::numeric_limits<int>::max() / 2 - held,
            "A sequence holds at most 2^30 tokens.");
    if (const auto [first, is_new] = seen.emplace(item.sequence, i); !is_new)
      throw Error(ErrorCode::kInvalidArgument, "Items " + std::to_string(first->second) + " and " +
                                                   std::to_string(i) +
                                                   " are the same sequence; a batch names each only once.");
  }
}

}  // namespace

std::vector<StagedTokens> stage(Cache& cache, std::span<const AppendItem> items) {
  const CacheConfig& config = cache.config();
  Backend& backend = cache.backend();
  const std::size_t row = at(config.kv_heads) * at(config.head_dim);
  std::vector<Intake> intake;
  std::vector<Staging> staging;
  const auto each_tensor = [&](auto&& visit) {  // (tensor, numbers, where it is to be known, name)
    for (std::size_t i = 0; i < items.size(); ++i) {
      const std::string of = items.size() > 1 ? " of item " + std::to_string(i) : "";
      const std::size_t numbers = row * at(items[i].tokens);
      if (numbers == 0) continue;
      visit(items[i].k, numbers, "k" + of, i, &StagedTokens::k);
      visit(items[i].v, numbers, "v" + of, i, &StagedTokens::v);
    }
  };
  each_tensor([&](const TensorView& given, std::size_t numbers, const std::string& name, auto...) {
    check_alignment(given.data, given.on_device, name);
    if (needs_intake(given, Dtype::kF16)) intake.push_back({given.data, given.dtype, numbers, Dtype::kF16});
    if (given.on_device) return;
    require(given.dtype == Dtype::kF16, "Keys and values on the host must be binary16.");
    staging.push_back({static_cast<const std::uint16_t*>(given.data), numbers});
  });
  if (!intake.empty()) backend.take(intake);
  std::vector<StagedTokens> staged(items.size());
  std::size_t taken = 0;
  each_tensor([&](const TensorView& given, std::size_t numbers, const std::string& name, std::size_t i,
                  auto part) {
    if (!given.on_device) return;
    staged[i].*part = static_cast<const std::uint16_t*>(given.data);
    if (!needs_intake(given, Dtype::kF16)) return;
    const Intake& result = intake[taken++];
    if (!result.finite)
      refuse_not_finite(backend, given, numbers, Dtype::kF16, {name, config.kv_heads, config.head_dim, 0});
    staged[i].*part = static_cast<const std::uint16_t*>(result.ready);
  });
  if (!staging.empty()) backend.stage(staging);
  std::size_t sent = 0;
  each_tensor([&](const TensorView& given, std::size_t, const std::string&, std::size_t i, auto part) {
    if (!given.on_device) staged[i].*part = staging[sent++].ready;
  });
  return staged;
}

/// One item of a batch on its way. Everything that can fail happens before commit(); until then the sequence
/// is as it was, but for undo().
class SequenceAppend {
 public:
  SequenceAppend(const AppendItem& item, int layer, const StagedTokens& added)
      : sequence_(*item.sequence),
        cache_(sequence_.cache()),
        scheme_(cache_.config().scheme(layer)),
        state_(sequence_.checked(layer)),
        online_(state_.online),
        reach_(sequence_.reach_after(state_, scheme_, item.tokens)),
        total_(state_.tokens + item.tokens) {
    const int heads = cache_.config().kv_heads, D = cache_.config().head_dim;
    if (!state_.windows) fresh_windows_ = cache_.pool().take(cache_.config().window_bytes(scheme_));
    const std::ptrdiff_t stride = std::ptrdiff_t{heads} * D;
    for (int head = 0; head < heads; ++head) {
      const auto w = sequence_.windows(state_, scheme_, head);
      const std::ptrdiff_t first = std::ptrdiff_t{head} * D;
      keys_.push_back({w.sink_k, w.ring_k, added.k + first, reach_.sink, scheme_.ring_tokens(), state_.tokens,
                       D, stride});
      values_.push_back({w.sink_v, w.ring_v, added.v + first, reach_.sink, scheme_.ring_tokens(),
                         state_.tokens, D, stride});
    }
  }

  const std::vector<TokenSource>& keys() const { return keys_; }

  /// How many first tokens of the sequence its statistics are to come from now, or 0. released_windows
  /// quantises before the statistics are complete: then they come from what there is.
  int statistics() const {
    if (!scheme_.online() || online_ || (reach_.k == 0 && reach_.v == 0)) return 0;
    return std::min(scheme_.stat_tokens, total_);
  }
  /// first_keys: [kv_heads][statistics()][D] on the host.
  void take_statistics(const std::uint16_t* first_keys) {
    LayerScheme first = scheme_;
    first.stat_tokens = statistics();
    const int D = cache_.config().head_dim;
    auto made = std::make_shared<std::vector<Basis>>();
    for (std::size_t head = 0; head < keys_.size(); ++head)
      made->push_back(online_basis(first, first_keys + head * at(first.stat_tokens) * at(D), D));
    online_ = std::move(made);
  }

  /// Takes every page and extent that may be needed.
  void take_pages(std::vector<QuantiseJob>& jobs) {
    const int first_page = std::min(state_.reach.k, state_.reach.v) / kPageTokens,
              end_page = ceil_div(std::max(reach_.k, reach_.v), kPageTokens);
    if (reach_.k == state_.reach.k && reach_.v == state_.reach.v) return;
    for (PageTable& table : state_.pages) table.reserve(at(end_page));
    for (int head = 0; head < static_cast<int>(keys_.size()); ++head)
      for (int page = first_page; page < end_page; ++page) take_page(head, page, jobs);
  }

  void undo() const noexcept {
    for (const PageWrite& one : written_) one.undo();
  }

  /// `copies` has room: tokens on their way into windows.
  static constexpr std::size_t kCopies = 6;  // a head: sink and two pieces of the ring, K and V
  void commit(std::vector<RowCopy>& copies) noexcept {
    if (fresh_windows_) state_.windows = std::move(fresh_windows_);
    for (PageWrite& one : written_) one.commit();
    state_.online = std::move(online_);
    for (std::size_t head = 0; head < keys_.size(); ++head) {
      const auto w = sequence_.windows(state_, scheme_, static_cast<int>(head));
      keep(copies, w.sink_k, w.ring_k, keys_[head], reach_.k);
      keep(copies, w.sink_v, w.ring_v, values_[head], reach_.v);
    }
    state_.tokens = total_;
    state_.reach = reach_;
  }

 private:
  void take_page(int head, int page, std::vector<QuantiseJob>& jobs) {
    const int begin = page * kPageTokens, end = begin + kPageTokens;
    const int k_first = std::clamp(state_.reach.k, begin, end), k_end = std::clamp(reach_.k, begin, end);
    const int v_first = std::clamp(state_.reach.v, begin, end), v_end = std::clamp(reach_.v, begin, end);
    if (k_first == k_end && v_first == v_end) return;
    Backend& backend = cache_.backend();
    const PageLayout layout(scheme_.k, scheme_.v, cache_.config().head_dim);
    PageTable& table = state_.pages[at(head)];
    const std::shared_ptr<Page> none, &held = at(page) < table.size() ? table[at(page)] : none;
    const std::shared_ptr<Page> own = sequence_.own_page(held, scheme_);
    if (!held) mark_removed(backend, layout, *own, k_first - begin);
    written_.emplace_back(table, at(page), own, k_first - begin, k_end - begin, v_end - begin);
    own->k_zero_count = count_zeros(backend, layout.k, own->bytes.data() + layout.k_at(), k_first - begin,
                                    own->k_zero_count, own->k_counted);
    own->v_zero_count = count_zeros(backend, layout.v, own->bytes.data() + layout.v_at(), v_first - begin,
                                    own->v_zero_count, own->v_counted);
    reserve_extents(cache_.pool(), layout.k, own->k_zeros, own->k_zero_count, k_end - k_first);
    reserve_extents(cache_.pool(), layout.v, own->v_zeros, own->v_zero_count, v_end - v_first);
    jobs.push_back({&scheme_, online_ ? &(*online_)[at(head)] : sequence_.basis(state_, scheme_, head),
                    own.get(), page, reach_.sink, k_first - begin, k_end - k_first, v_first - begin,
                    v_end - v_first, keys_[at(head)], values_[at(head)]});
  }

  /// New tokens below the sink, and those of token index `reached` on into the ring.
  void keep(std::vector<RowCopy>& copies, std::uint16_t* sink, std::uint16_t* ring, const TokenSource& source,
            int reached) const noexcept {
    const int D = source.head_dim, rows = source.ring_tokens;
    const auto copy = [&](std::uint16_t* to, int position, int count) {
      if (count > 0) copies.push_back({to, source.at_position(position), source.stride, count});
    };
    copy(sink + std::ptrdiff_t{state_.tokens} * D, state_.tokens,
         std::min(total_, reach_.sink) - state_.tokens);
    for (int position = std::max(state_.tokens, reach_.sink + reached); position < total_;) {
      const int row = (position - reach_.sink) % rows, count = std::min(total_ - position, rows - row);
      copy(ring + std::ptrdiff_t{row} * D, position, count);
      position += count;
    }
  }

  Sequence& sequence_;
  Cache& cache_;
  const LayerScheme& scheme_;
  LayerState& state_;
  std::shared_ptr<const std::vector<Basis>> online_;
  const Reach reach_;
  const int total_;
  Slot fresh_windows_;
  std::vector<TokenSource> keys_, values_;  // [kv_heads]
  std::vector<PageWrite> written_;
};

namespace {

/// Statistics of the sequences that have come so far, from keys gathered in one go.
void take_statistics(Cache& cache, std::span<SequenceAppend> appends) {
  const int D = cache.config().head_dim;
  std::size_t rows = 0;
  for (const SequenceAppend& append : appends) rows += append.keys().size() * at(append.statistics());
  if (rows == 0) return;
  std::vector<std::uint16_t> keys(rows * at(D));
  const Spare together = cache.spare(2 * keys.size());
  auto* next = reinterpret_cast<std::uint16_t*>(together.data());
  std::vector<RowCopy> gather;
  gather.reserve(rows);
  for (const SequenceAppend& append : appends)
    for (const TokenSource& source : append.keys())
      for (int t = 0; t < append.statistics(); ++t, next += D)
        gather.push_back({next, source.at_position(t), D, 1});
  cache.backend().copy_rows(gather, D);
  cache.backend().copy_memory(keys.data(), together.data(), 2 * keys.size());
  const std::uint16_t* first = keys.data();
  for (SequenceAppend& append : appends) {
    const int tokens = append.statistics();
    if (tokens == 0) continue;
    append.take_statistics(first);
    first += append.keys().size() * at(tokens) * at(D);
  }
}

}  // namespace

void append_batch(Cache& cache, int layer, std::span<const AppendItem> items) {
  const CacheConfig& config = cache.config();
  check_items(cache, layer, items);
  const std::vector<StagedTokens> staged = stage(cache, items);
  std::vector<SequenceAppend> appends;
  appends.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i)
    if (items[i].tokens > 0) appends.emplace_back(items[i], layer, staged[i]);
  take_statistics(cache, appends);
  std::vector<RowCopy> copies;
  copies.reserve(SequenceAppend::kCopies * at(config.kv_heads) * appends.size());
  try {
    std::vector<QuantiseJob> jobs;
    for (SequenceAppend& append : appends) append.take_pages(jobs);
    // Into slots that nobody reads yet. One call for all of one sink: only released_windows has several.
    std::stable_sort(jobs.begin(), jobs.end(),
                     [](const QuantiseJob& a, const QuantiseJob& b) { return a.sink < b.sink; });
    for (auto first = jobs.begin(); first != jobs.end();) {
      const auto end =
          std::find_if(first, jobs.end(), [&](const QuantiseJob& job) { return job.sink != first->sink; });
      cache.backend().quantise(config, std::span(first, end), cache.rotations());
      first = end;
    }
  } catch (...) {
    for (const SequenceAppend& append : appends) append.undo();
    throw;
  }
  // From here on nothing fails.
  for (SequenceAppend& append : appends) append.commit(copies);
  cache.backend().copy_rows(copies, config.head_dim);
}

void Sequence::append(int layer, const TensorView& k, const TensorView& v, int tokens) {
  const AppendItem item{this, k, v, tokens};
  append_batch(*cache_, layer, std::span(&item, 1));
}

}  // namespace innerkv
