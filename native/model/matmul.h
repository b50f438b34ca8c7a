// Products of weights with the activations of several tokens.
#pragma once

#include <span>
#include <vector>

#include "../cpu/thread_pool.h"
#include "kernels.h"
#include "model.h"

namespace innerkv {

/// Rows of activations, each padded with zeros to a multiple of 16 floats.
class Activations {
 public:
  void resize(int rows, int columns) {
    columns_ = columns;
    values_.assign(static_cast<std::size_t>(rows) * static_cast<std::size_t>(padded(columns)), 0.0f);
  }
  int columns() const { return columns_; }
  std::ptrdiff_t stride() const { return padded(columns_); }
  float* row(int index) { return values_.data() + index * stride(); }
  const float* row(int index) const { return values_.data() + index * stride(); }

 private:
  int columns_ = 0;
  std::vector<float> values_;
};

/// One product: out[token * out_stride + row] = weight[row] . x[token].
struct Product {
  const Weight* weight;
  float* out;
  std::ptrdiff_t out_stride;
};

/// Tokens up to which 8-bit activations are used when the caller allows them: beyond, a dequantised weight
/// serves so many tokens that float32 products are as fast.
inline constexpr int kMaxByteTokens = 8;

class Multiplier {
 public:
  Multiplier(const ModelKernels& kernels, ThreadPool& pool);

  /// All products of the same activations, in one loop over the threads.
  void run(const Activations& x, int first, int tokens, std::span<const Product> products, bool bytes);

 private:
  const ModelKernels& kernels_;
  ThreadPool& pool_;
  std::vector<std::int8_t> codes_;
  std::vector<float> steps_, totals_;
  std::vector<std::vector<float>> panels_;  // [threads] dequantised rows
};

}  // namespace innerkv
