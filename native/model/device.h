// The seam between the runner, which decides what goes through a model in which order, and a device that
// computes it: cpu_model.h is the CPU's, native/cuda/gpu_model.h a GPU's.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "../core/error.h"

namespace innerkv {

/// Tokens on their way through the layers together: one row each.
struct Round {
  std::vector<std::int32_t> tokens;  // [rows]
  std::vector<float> cos, sin;       // [rows][pairs] of the rotation at each token's position
  bool byte_activations = true;      // in products with few rows
  bool observe = false;              // whether observed() will be asked for

  int rows() const { return static_cast<int>(tokens.size()); }
};

/// What a layer gives to its cache and gets from it, in memory of the cache's backend.
struct HeadRows {
  const float* q = nullptr;          // [rows][query_heads][cache_head_dim]
  float* out = nullptr;              // the same shape
  const std::uint16_t *k = nullptr,  // [rows][kv_heads][cache_head_dim] binary16, finite
      *v = nullptr;
  bool on_device = false;  // device memory, which the host must not touch
};

/// Heads before RoPE and after their norms, on the host: q [query_heads][D] and k [kv_heads][D] of each row.
struct ObservedRows {
  const float *q = nullptr, *k = nullptr;
  std::ptrdiff_t stride = 0;
};

/// What is wanted of a row of a round: logits, or the loss of what follows, or both. On the host.
struct ScoredRow {
  float* logits = nullptr;  // [vocabulary]
  std::int32_t target = 0;  // when there is an nll
  float* nll = nullptr;     // -log p(target)
};
inline constexpr int kScoredRows = 64;  // in one score()

inline Error not_finite_in(int layer) {
  return Error(ErrorCode::kNotFinite, "Layer " + std::to_string(layer) +
                                          " of the model made a key or value that binary16 cannot hold.");
}

/// A model on a device. A round is begin(), for every layer heads() and finish(), any number of score(),
/// end(). Everything may throw; the round is then over with cancel(). Not for two threads at once.
class ModelDevice {
 public:
  virtual ~ModelDevice() = default;
  /// What computes products of many rows, for those who report results.
  virtual std::string products() const = 0;
  /// Looks the tokens up.
  virtual void begin(const Round& round) = 0;
  /// Norm, projections, head norms, RoPE, rounding of keys and values.
  virtual HeadRows heads(int layer) = 0;
  /// Of the last heads(), in a round that observes.
  virtual ObservedRows observed() = 0;
  /// Attention's output through the rest of the layer.
  virtual void finish(int layer) = 0;
  /// Rows `first` and on, whoever's they are: the weights of the vocabulary are read once for all of them.
  virtual void score(int first, std::span<const ScoredRow> rows) = 0;
  /// Time that products with weights took in this round, 0 where that is not known.
  virtual double product_seconds() const = 0;
  /// Throws Error{kNotFinite} when a key or value of this round was beyond binary16, if heads() has not.
  virtual void end() = 0;
  /// Instead of end(), after anything has thrown.
  virtual void cancel() noexcept {}
};

}  // namespace innerkv
