// What a cache is made of, as plain data. TypeScript (lib/schemes) decides every value; the core only obeys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../format/page.h"

namespace innerkv {

/// Rotary embedding of the model: needed by block-relative keys only.
struct RopeConfig {
  std::vector<double> theta;  // [rotary_dims / 2] radians per position, scaling applied
  bool half_layout = true;    // pairs (i, i + rotary_dims/2); otherwise (2i, 2i + 1)
  int rotary_dims() const { return 2 * static_cast<int>(theta.size()); }
};

/// Change of basis of one KV head's keys. Empty vectors switch a step off. docs/format.md sections 5 and 6.
struct Basis {
  std::vector<float> mean;     // [D]
  std::vector<float> lam;      // [D], > 0
  std::vector<float> inv_lam;  // [D], float32(1 / lam)
  // Error feedback, everything in the order in which channels are rounded:
  std::vector<std::uint8_t> order;       // [D] a permutation of the channels
  std::vector<float> metric;             // W [D][D], symmetric
  std::vector<float> feedback;           // F [D][D], strictly upper
  std::vector<float> pivot;              // d [D]
  mutable std::shared_ptr<void> mirror;  // the backend's copy, made on first use; copies of a basis share it
};

struct LayerScheme {
  TensorSpec k, v;
  int sink = 32;         // first tokens kept in 16 bits
  int recent = 96;       // newest tokens kept in 16 bits, at least
  int block_tokens = 0;  // B of block-relative keys; 0 = keys keep their absolute rotation
  bool hadamard_k = false, hadamard_v = false;
  bool online_mean = false, online_lambda = false;  // statistics of the sequence's own first tokens
  int stat_tokens = 0;
  bool unbiased_k = false, unbiased_v = false;
  std::vector<float> clip_k, clip_v;  // clip ratios; empty = no search
  bool released_windows = false;      // InnerQ's released window trajectory, for comparison only
  std::vector<Basis> basis;           // [kv_heads] or empty

  bool feedback() const { return !basis.empty() && !basis[0].feedback.empty(); }
  bool online() const { return online_mean || online_lambda; }
  int flush_tokens() const { return v.flush_tokens(); }
  bool per_token() const { return k.per_token() && v.per_token(); }
  /// Tokens the ring of recent tokens must hold between two calls.
  int ring_tokens() const {
    const int breathing = recent + flush_tokens() - 1;
    const int waiting = online() ? stat_tokens - 1 - sink : 0;
    const int released = released_windows && recent < kBlockTokens32 ? kBlockTokens32 : 0;
    int ring = breathing > waiting ? breathing : waiting;
    if (released > ring) ring = released;
    return ring > 1 ? ring : 1;
  }
};

struct CacheConfig {
  int layers = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
  std::vector<LayerScheme> schemes;  // distinct schemes
  std::vector<int> scheme_of_layer;  // [layers] index into schemes
  std::vector<int> window_of_layer;  // [layers] sliding attention window in tokens, 0 = unlimited
  RopeConfig rope;
  std::size_t budget_bytes = 0;
  float softmax_scale = 0;  // multiplies q.k
  float softcap = 0;        // 0 = none

  const LayerScheme& scheme(int layer) const {
    return schemes[static_cast<std::size_t>(scheme_of_layer[static_cast<std::size_t>(layer)])];
  }
  int group_size() const { return query_heads / kv_heads; }
  std::size_t window_bytes(const LayerScheme& scheme) const {
    return std::size_t{2} * 2 * static_cast<std::size_t>(kv_heads) *
           static_cast<std::size_t>(scheme.sink + scheme.ring_tokens()) * static_cast<std::size_t>(head_dim);
  }
};

inline constexpr std::size_t kMaxClip = 8;

/// Throws Error{kInvalidArgument or kUnsupported} unless every field is usable.
void validate(const CacheConfig& config);

/// Hashes of what gives stored bytes their meaning: the format with everything around it, and the given bases
/// apart, so that a file made with another basis can be told from a file of another cache.
struct Fingerprints {
  std::uint64_t format, basis;
};
Fingerprints fingerprints(const CacheConfig& config);

}  // namespace innerkv
