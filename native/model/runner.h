// Runs a model: everything but attention, which is the cache's own append and attend.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "../core/sequence.h"
#include "../cpu/thread_pool.h"
#include "device.h"
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

/// Where a pass spent its time, in seconds; the rest is norms, rotations and the like. Of a device that works
/// on while the host goes ahead only `all` is known, and the others are 0.
struct PassTimes {
  double all = 0, products = 0, append = 0, attend = 0;
};

class Runner {
 public:
  /// `pool`: for what is computed here whatever the device is; it must outlive the runner.
  Runner(std::shared_ptr<const Model> model, std::unique_ptr<ModelDevice> device, ThreadPool& pool);

  const Model& model() const { return *model_; }
  const ModelDevice& device() const { return *device_; }

  /// Appends the tokens of every item to its sequence. All sequences belong to one cache of the device and
  /// differ. Throws Error, and then every sequence is as it was before.
  void forward(std::span<const ForwardItem> items, const ForwardOptions& options, Moments* moments,
               const std::atomic<bool>* aborted);
  /// Of the last pass.
  const PassTimes& times() const { return times_; }

 private:
  /// Some tokens of one item on their way through the layers.
  struct Part {
    const ForwardItem* item;
    int first, count;  // of the item's tokens
    int row;           // of the first one among the round's rows
    int position;      // of the first one in its sequence
  };
  void check(std::span<const ForwardItem> items) const;
  void run(std::span<const Part> parts, const ForwardOptions& options, Moments* moments,
           const std::atomic<bool>* aborted);
  void attend(int layer, const HeadRows& heads, std::span<const Part> parts, int step,
              const std::atomic<bool>* aborted);
  void score(std::span<const Part> parts) const;

  std::shared_ptr<const Model> model_;
  std::unique_ptr<ModelDevice> device_;
  ThreadPool& pool_;
  PassTimes times_;
};

}  // namespace innerkv
