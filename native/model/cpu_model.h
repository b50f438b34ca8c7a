// A model on the cores of this machine.
#pragma once

#include <memory>
#include <vector>

#include "../cpu/cpu_backend.h"
#include "device.h"
#include "matmul.h"
#include "model.h"

namespace innerkv {

class CpuModel final : public ModelDevice {
 public:
  CpuModel(std::shared_ptr<const Model> model, std::shared_ptr<CpuBackend> backend);

  std::string products() const override { return backend_->isa(); }
  void begin(const Round& round) override;
  HeadRows heads(int layer) override;
  ObservedRows observed() override;
  void finish(int layer) override;
  void score(int first, std::span<const ScoredRow> rows) override;
  double product_seconds() const override { return product_seconds_; }
  void end() override {}

 private:
  void rotate_row(int row, int index);
  void normalise(const std::vector<float>* weight, int first, int rows);
  void multiply(const Activations& x, int rows, std::span<const Product> products);
  void add_residual();
  void each_row(int rows, auto&& body);

  std::shared_ptr<const Model> model_;
  std::shared_ptr<CpuBackend> backend_;
  const ModelKernels& kernels_;
  Multiplier multiplier_;
  bool bytes_ = true, observe_ = false;
  int rows_ = 0;
  double product_seconds_ = 0;
  std::vector<float> cos_, sin_;  // [rows][pairs]
  // [rows] of the current round:
  std::vector<float> residual_, delta_;     // [hidden]
  Activations input_, heads_out_, hidden_;  // normalised; attention's output; gate and then gate * up
  std::vector<float> up_;                   // [padded intermediate]
  std::vector<float> qkv_;                  // [query_heads + 2 kv_heads][head_dim]
  std::vector<float> before_;               // qkv_ before RoPE, when observed
  std::vector<float> q_, out_;              // [query_heads][cache_head_dim]
  std::vector<std::uint16_t> k_, v_;        // [kv_heads][cache_head_dim]
  std::vector<float> logits_;
};

}  // namespace innerkv
