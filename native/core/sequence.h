// One sequence: per layer a sink window, a ring of recent tokens, and page tables per KV head.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache.h"

namespace innerkv {

/// How far the windows reach: token indices below `k` (`v`) are quantised. Position = sink + token index.
struct Reach {
  int sink = 0, k = 0, v = 0;
  bool operator==(const Reach&) const = default;
};

struct LayerState {
  int tokens = 0;
  Reach reach;
  Slot windows;                                      // empty until the first append
  std::vector<PageTable> pages;                      // [kv_heads]
  std::shared_ptr<const std::vector<Basis>> online;  // statistics of the sequence's own first tokens
  std::size_t removed = 0;                           // tokens removed by hand, over all heads
};

/// What append() may overwrite, so that it can be undone to the bit. Lives no longer than the sequence.
struct Checkpoint {
  struct ZeroCounts {
    int k = 0, v = 0, k_counted = 0, v_counted = 0;
  };
  struct Layer {
    int tokens = 0;
    Reach reach;
    std::shared_ptr<const std::vector<Basis>> online;
    std::vector<std::size_t> pages;                   // [kv_heads]
    std::vector<std::vector<ZeroCounts>> open_pages;  // [kv_heads][pages that more tokens may go to]
  };
  std::vector<Layer> layers;
  Spare rows;                     // of the rings of all layers, on the device
  std::vector<RowCopy> way_back;  // of these rows into the rings
};

/// New tokens of one sequence in append_batch().
struct AppendItem {
  Sequence* sequence;
  TensorView k, v;  // [tokens][kv_heads][D], each on the host or on the device
  int tokens;
};

/// One layer of one sequence in attend_batch().
struct BatchItem {
  const Sequence* sequence;
  TensorView q;  // [q_tokens][query_heads][D]
  Target out;    // the same shape; must not overlap q
  Target lse;    // [q_tokens][query_heads], or nullptr
  float* logits;
  int q_tokens;
  float* mass = nullptr;  // [kv_heads][tokens], AttendRequest::mass from zero on
};

/// Probabilities that a call with masses keeps at once; longer queries are attended to in parts.
inline constexpr std::size_t kMassNumbers = std::size_t{1} << 24;

class Sequence {
 public:
  explicit Sequence(std::shared_ptr<Cache> cache);

  Cache& cache() const { return *cache_; }
  int tokens(int layer) const { return layer_state(layer).tokens; }
  const LayerState& layer_state(int layer) const;

  /// append_batch() of this sequence alone.
  void append(int layer, const TensorView& k, const TensorView& v, int tokens);
  /// Keeps the first `tokens` tokens of every layer that has more.
  void truncate(int tokens);
  std::unique_ptr<Sequence> fork() const;
  /// A point to go back to from after appending at most `added` tokens to any layer.
  Checkpoint checkpoint(int added) const;
  /// Undoes the appends since checkpoint(); nothing else may have changed the sequence in between. Unlike
  /// truncate() it brings back the 16-bit windows of that time.
  void restore(const Checkpoint& point) noexcept;
  /// Requantises one stored token in all heads. k, v: [kv_heads][D] as in append().
  void replace(int layer, int position, const TensorView& k, const TensorView& v);
  /// Forgets stored tokens of one head (or of all, head = -1). Pages with nothing left are given back.
  void remove(int layer, int head, std::span<const int> positions);

  HeadView view(int layer, int head) const;
  /// Decodes token positions [0, tokens) of one head to float32, windows included: k, v [tokens][D]. Removed
  /// tokens are NaN.
  void read_back(int layer, int head, float* k, float* v) const;

 private:
  friend class SequenceAppend;
  friend class SequenceWriter;
  friend class SequenceReader;

  struct Windows {
    std::uint16_t *sink_k, *sink_v, *ring_k, *ring_v;
  };
  Windows windows(const LayerState& state, const LayerScheme& scheme, int head) const;
  Reach reach_after(const LayerState& state, const LayerScheme& scheme, int added) const;
  const Basis* basis(const LayerState& state, const LayerScheme& scheme, int head) const;
  std::shared_ptr<Page> own_page(const std::shared_ptr<Page>& page, const LayerScheme& scheme) const;
  std::size_t page_bytes(const LayerScheme& scheme) const;
  LayerState& checked(int layer);
  int stored_token(const LayerState& state, const LayerScheme& scheme, int position) const;
  void truncate_layer(LayerState& state, const LayerScheme& scheme, int tokens);

  std::shared_ptr<Cache> cache_;
  std::vector<LayerState> layers_;
};

/// Appends tokens to one layer of several sequences of one cache, no sequence twice: all of it, or nothing
/// when it throws. Throws NotFinite for tensors that are searched. Device memory is read when the backend
/// gets to it: see Backend::settle().
void append_batch(Cache& cache, int layer, std::span<const AppendItem> items);

/// Attention of one layer for several sequences of one cache in one pass. Returns false when aborted.
bool attend_batch(Cache& cache, int layer, std::span<const BatchItem> items, bool causal,
                  const std::atomic<bool>* aborted, std::size_t mass_numbers = kMassNumbers);

/// Throws unless the item may attend: known layer, enough tokens for the queries.
void check_attend(const Sequence& sequence, int layer, int q_tokens, bool causal);

}  // namespace innerkv
