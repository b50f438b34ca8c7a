// The seam between the core, which decides, and a device, which moves and computes: cpu/ and cuda/ implement
// it.
//
// Arguments are plain structs of pointers. Pages, extents, windows, staged tokens and tensors that say
// `on_device` are device memory, which only the backend may read and write; everything else is host memory.
// Everything is done, or looks as if it were, in the order in which it was asked for; host memory has been
// read or written when a call returns.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../platform.h"
#include "config.h"
#include "page_table.h"
#include "pool.h"
#include "rotation.h"
#include "tensor.h"

namespace innerkv {

/// 128 consecutive token indices of one KV head of one layer. Several tables may show it; then nobody changes
/// it.
struct Page {
  Slot bytes;                          // PageLayout
  std::uint64_t removed[2] = {0, 0};   // bit per slot: evicted by hand
  std::vector<Slot> k_zeros, v_zeros;  // extents of kZeroExtent compact zero points
  int k_zero_count = 0, v_zero_count = 0;
  int k_counted = 0, v_counted = 0;  // first slots whose zero points these are

  bool is_removed(int slot) const { return removed[slot / 64] >> (slot % 64) & 1u; }
};

/// One KV head of one layer of one sequence, as attention sees it.
struct HeadView {
  const LayerScheme* scheme = nullptr;
  const Basis* basis = nullptr;                              // nullptr: keys are stored as they came
  const PageTable* table = nullptr;                          // may show more pages than these tokens need
  int tokens = 0;                                            // appended tokens, windows included
  int sink = 0;                                              // tokens of the sink window in use
  int k_quantised = 0, v_quantised = 0;                      // token indices below live in pages
  const std::uint16_t *sink_k = nullptr, *sink_v = nullptr;  // [sink][D] binary16
  const std::uint16_t *ring_k = nullptr,
                      *ring_v = nullptr;  // [ring][D] binary16, token index t at row t % ring
  int ring = 1;
};

/// Tokens of one head, binary16, finite: old ones lie in the windows, new ones in what append() was given.
struct TokenSource {
  const std::uint16_t *sink = nullptr, *ring = nullptr,
                      *added = nullptr;  // added: row of the first new token
  int sink_tokens = 0, ring_tokens = 1, old_tokens = 0, head_dim = 0;
  std::ptrdiff_t stride = 0;  // numbers from one new token to the next

  INNERKV_HD const std::uint16_t* at_position(int position) const {
    if (position >= old_tokens) return added + (position - old_tokens) * stride;
    if (position < sink_tokens) return sink + std::ptrdiff_t{position} * head_dim;
    return ring + std::ptrdiff_t{(position - sink_tokens) % ring_tokens} * head_dim;
  }
};

/// Rows of new tokens on their way into a window: `to` rows follow each other, `from` rows are `stride`
/// apart.
struct RowCopy {
  std::uint16_t* to;
  const std::uint16_t* from;
  std::ptrdiff_t stride;
  int rows;
};

/// Quantises consecutive tokens of one head into one page. K and V ranges may differ (values may flush 32 at
/// a time).
struct QuantiseJob {
  const LayerScheme* scheme;
  const Basis* basis;
  Page* page;
  int page_index;
  int sink;                      // positions = sink + token index
  int k_first = 0, k_count = 0;  // slots
  int v_first = 0, v_count = 0;
  TokenSource k, v;

  INNERKV_HD int position(int slot) const { return sink + page_index * kPageTokens + slot; }
};

/// Attention of one sequence in one layer. Query token i is token tokens - q_behind - q_tokens + i when
/// causal.
struct AttendRequest {
  std::span<const HeadView> heads;  // [kv_heads]
  const float* q = nullptr;         // [q_tokens][query_heads][D]
  float* out = nullptr;             // the same shape
  float* lse = nullptr;     // [q_tokens][query_heads] natural log-sum-exp of the scaled logits, or nullptr
  float* logits = nullptr;  // [q_tokens][query_heads][tokens], -inf where masked, or nullptr
  int q_tokens = 0;
  int q_behind = 0;        // tokens after the last query token, which no query sees when causal
  int sliding_window = 0;  // 0 = unlimited
  bool causal = true;
  bool q_on_device = false, out_on_device = false, lse_on_device = false;
  /// [kv_heads][tokens], or nullptr: to these is added how much attention each token got, its probabilities
  /// summed over the query tokens and the query heads of a KV head. Heads are `mass_stride` numbers apart.
  float* mass = nullptr;
  std::ptrdiff_t mass_stride = 0;
};

/// A caller's numbers on the host on their way into a call.
struct Staging {
  const std::uint16_t* from;
  std::size_t count;
  const std::uint16_t* ready = nullptr;  // out: device memory with the same numbers
};

/// A caller's tensor in device memory on its way into a call.
struct Intake {
  const void* from;
  Dtype dtype;
  std::size_t count;
  Dtype as;                     // kF16 or kF32: what is wanted
  const void* ready = nullptr;  // out: device memory of that type, `from` itself when it is
  bool finite = true;           // out: all are finite, as binary16 too when that is wanted
};

/// A piece of device memory that other processes can open, as CUDA has it.
inline constexpr std::size_t kHandleBytes = 64;
using MemoryHandle = std::array<std::uint8_t, kHandleBytes>;

/// Plain attention over uncompressed K and V: the baseline of the benchmarks, exact prefill, and the 16-bit
/// truth of the demo.
struct DenseRequest {
  const void *k = nullptr, *v = nullptr;  // [kv_heads][tokens][D]
  bool half = false;                      // binary16 instead of float32
  const float* q = nullptr;               // [q_tokens][query_heads][D]
  float* out = nullptr;
  float* lse = nullptr;
  float* logits = nullptr;
  int tokens = 0, q_tokens = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0, softcap = 0;
  int sliding_window = 0;
  bool causal = true;
  /// Called at most once, before out or lse is written, when some score or weighted value is not finite, as
  /// every NaN or infinity in k or v makes it. May throw. So nobody has to look at k and v beforehand.
  std::function<void()> suspect;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual void* allocate_memory(std::size_t bytes) = 0;  // throws Error{kOutOfMemory}
  virtual void free_memory(void* memory, std::size_t bytes) noexcept = 0;
  virtual void clear_memory(void* memory, std::size_t bytes) noexcept = 0;
  /// Any mix of host and device memory; what was asked of the backend before is done before.
  virtual void copy_memory(void* to, const void* from, std::size_t bytes) noexcept = 0;
  /// Brings host memory to the device, all in one go. What is `ready` stays until the next call. Throws
  /// Error{kOutOfMemory}.
  virtual void stage(std::span<Staging> numbers) = 0;
  /// Converts and searches device tensors, all in one go. What is `ready` stays until the next call.
  virtual void take(std::span<Intake> tensors) = 0;
  /// Rows of `row` numbers; windows of one call do not overlap. Takes no memory.
  virtual void copy_rows(std::span<const RowCopy> copies, int row) noexcept = 0;

  /// Writes the jobs' slots and counts their zero points; throws before it writes.
  virtual void quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                        const RotationTable& rotations) = 0;
  /// Returns false when `aborted` became true before everything was computed (outputs are then unspecified).
  virtual bool attend(const CacheConfig& config, std::span<const AttendRequest> requests,
                      const RotationTable& rotations, const std::atomic<bool>* aborted) = 0;
  virtual void attend_dense(const DenseRequest& request) = 0;

  // Callers with device memory of their own.

  /// Why [memory, memory + bytes) cannot be device memory of this backend, as far as the system can tell; ""
  /// when it can.
  virtual std::string objection(const void* memory, std::size_t bytes) = 0;
  /// For memory of allocate_memory(). Throws Error{kUnsupported} where there is no such thing.
  virtual MemoryHandle export_memory(void* memory);
  /// Memory that another process exported, until close_memory(). Throws Error.
  virtual void* import_memory(const MemoryHandle& handle);
  virtual void close_memory(void*) noexcept {}
  /// What is asked next happens after what the caller has enqueued on his own stream by now, if he has one.
  virtual void follow_caller() {}
  /// What the caller enqueues on his stream from now on happens after everything asked so far; if he has
  /// none, everything asked so far is done when this returns. Throws Error when some of it failed.
  virtual void settle() {}
  /// What reads stored keys and values of these formats: for cache.plan().
  virtual const char* attention_path(const TensorSpec& k, const TensorSpec& v,
                                     [[maybe_unused]] int head_dim) const {
    return k.raw() && v.raw() ? "binary16 dot products" : "integer dot products on packed codes";
  }
};

}  // namespace innerkv
