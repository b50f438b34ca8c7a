// Runs a model: everything but attention, which is the cache's own append and attend.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "../core/sequence.h"
#include "../cpu/cpu_backend.h"
#include "matmul.h"
#include "model.h"
#include "moments.h"

namespace innerkv {

/// New tokens of one sequence.
struct ForwardItem {
  Sequence* sequence;
  std::span<const std::int32_t> tokens;
  float* logits = nullptr;                     // [logit_rows][vocabulary]
  int logit_rows = 0;                          // of the last tokens: 0, 1 or all
  std::span<const std::int32_t> targets = {};  // what follows each token, negative: not scored; or empty
  float* nll = nullptr;                        // [tokens] -log p(target), 0 where not scored
};

struct ForwardOptions {
  int chunk = 512;  // tokens that go through the layers together, over all sequences
  /// Tokens of a sequence that a layer appends before it attends. With 1 every query sees the cache as it was
  /// when its token was the newest, as in decoding.
  int step = 512;
  bool byte_activations = true;  // in products with quantised weights
};

/// Where a pass spent its time, in seconds; the rest is norms, rotations and the like.
struct PassTimes {
  double all = 0, products = 0, append = 0, attend = 0;
};

class Runner {
 public:
  Runner(std::shared_ptr<const Model> model, std::shared_ptr<CpuBackend> backend);

  const Model& model() const { return *model_; }

  /// Appends the tokens of every item to its sequence. All sequences belong to one cache and differ. Throws
  /// Error, and then every sequence is as it was before.
  void forward(std::span<const ForwardItem> items, const ForwardOptions& options, Moments* moments,
               const std::atomic<bool>* aborted);
  /// Of the last pass.
  const PassTimes& times() const { return times_; }

 private:
  /// Some tokens of one item on their way through the layers.
  struct Part {
    const ForwardItem* item;
    int first, count;  // of the item's tokens
    int row;           // of the first one among the activations
    int position;      // of the first one in its sequence
  };
  void check(std::span<const ForwardItem> items) const;
  void round(std::span<const Part> parts, int rows, const ForwardOptions& options, Moments* moments,
             const std::atomic<bool>* aborted);
  void attention(int layer, std::span<const Part> parts, int rows, const ForwardOptions& options,
                 Moments* moments, const std::atomic<bool>* aborted);
  void feed_forward(const ModelLayer& layer, int rows, bool bytes);
  void rotate_row(const ModelLayer& layer, int row, int index);
  void score(std::span<const Part> parts, bool bytes);
  void multiply(const Activations& x, int rows, std::span<const Product> products, bool bytes);
  void normalise(const std::vector<float>& weight, int rows);
  void add_residual(int rows);
  void each_row(int rows, auto&& body);

  std::shared_ptr<const Model> model_;
  std::shared_ptr<CpuBackend> backend_;
  const ModelKernels& kernels_;
  Multiplier multiplier_;
  // [rows] of the current chunk:
  std::vector<float> residual_, delta_;     // [hidden]
  Activations input_, heads_out_, hidden_;  // normalised; attention's output; gate and then gate * up
  std::vector<float> up_;                   // [padded intermediate]
  std::vector<float> qkv_;                  // [query_heads + 2 kv_heads][head_dim]
  std::vector<float> q_, out_;              // [query_heads][cache_head_dim]
  std::vector<std::uint16_t> k_, v_;        // [kv_heads][cache_head_dim]
  std::vector<float> cos_, sin_;            // [pairs]
  std::vector<float> logits_;
  PassTimes times_;
};

}  // namespace innerkv
