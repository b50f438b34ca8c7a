// A model on a GPU: weights and everything between two attentions. Host code only, like gpu_backend.h.
//
// Rows of activations stay on the device from the lookup of embeddings to the logits; the host waits for the
// device when it takes logits, losses or observed rows, and at the end of a round. Rounds of few tokens are
// recorded (recording.h); INNERKV_CUDA_GRAPHS=0 keeps them from it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../model/device.h"
#include "../model/model.h"
#include "buffers.h"
#include "cublas.h"
#include "products.h"
#include "recording.h"

namespace innerkv::gpu {

class GpuModel final : public ModelDevice {
 public:
  /// Copies the weights to the device. Without `cublas`, products of many rows are our own. Throws
  /// Error{kOutOfMemory}.
  GpuModel(std::shared_ptr<const Model> model, std::unique_ptr<Cublas> cublas);
  ~GpuModel() override;

  std::string products() const override;
  void begin(const Round& round) override;
  HeadRows heads(int layer) override;
  ObservedRows observed() override;
  void finish(int layer) override;
  void score(int first, std::span<const ScoredRow> rows) override;
  /// The host does not wait for them.
  double product_seconds() const override { return 0; }
  void end() override;
  void cancel() noexcept override { recording_.end(); }
  /// Of the kernels of decoding steps.
  const Recording::Counts& recorded() const { return recording_.counts(); }

 private:
  struct Layer {
    MatrixArgs q, k, v, o, gate, up, down;
    const float *attn_norm, *ffn_norm, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;
  };
  class Loader;
  class Room;

  void load();
  void place(Room& room, int rows);
  RowsArgs normed(const float* weight) const;
  RowsArgs bare() const;
  RowForm form_of(const MatrixArgs& matrix, int rows) const;
  /// All products of the same rows: each form of activations is made once, each type of weights is one
  /// launch.
  void multiply(RowSource source, RowsArgs rows, std::span<const ProductArgs> products);
  void multiply_many(const ProductArgs& product, int rows);

  std::shared_ptr<const Model> model_;
  std::unique_ptr<Cublas> cublas_;
  std::uint8_t* weights_ = nullptr;
  std::vector<Layer> layers_;
  MatrixArgs embed_, head_;
  const float* norm_ = nullptr;

  bool bytes_ = true, observe_ = false, graphs_;
  int rows_ = 0;
  DeviceBuffer rows_memory_, uploads_;
  // Device memory of the current round, [rows] each:
  float *residual_ = nullptr, *qkv_ = nullptr, *q_ = nullptr, *out_ = nullptr, *gate_ = nullptr,
        *up_ = nullptr, *observed_ = nullptr, *sums_ = nullptr, *logits_ = nullptr, *nll_ = nullptr;
  std::uint16_t *k_ = nullptr, *v_ = nullptr, *panel_ = nullptr;
  RowsOut x_;
  const float *cos_ = nullptr, *sin_ = nullptr;
  int *first_bad_ = nullptr, *targets_ = nullptr;
  int panel_rows_ = 0;
  std::vector<float> observed_rows_;
  Recording recording_;
};

}  // namespace innerkv::gpu
