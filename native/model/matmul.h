// Products of weights with the activations of several tokens.
#pragma once

#include <new>
#include <span>
#include <vector>

#include "../cpu/thread_pool.h"
#include "kernels.h"
#include "model.h"

namespace innerkv {

/// Memory on the boundaries of cache lines: vectors are as long as lines.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* at, std::size_t) noexcept { ::operator delete(at, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const = default;
};
template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

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
  Lines<float> values_;
};

/// One product: out[token * out_stride + row] = weight[row] . x[token].
struct Product {
  const Weight* weight;
  float* out;
  std::ptrdiff_t out_stride;
};

/// Tokens up to which rows of weights are not packed first: fewer do not pay for it.
inline constexpr int kMaxRowTokens = 8;

class Multiplier {
 public:
  Multiplier(const ModelKernels& kernels, ThreadPool& pool);

  /// All products of the same activations, in one loop over the threads; `bytes`: those with quantised
  /// weights round activations to 8 bits.
  void run(const Activations& x, int first, int tokens, std::span<const Product> products, bool bytes);

 private:
  const ModelKernels& kernels_;
  ThreadPool& pool_;
  struct Panel {  // kPanelRows rows of weights, dequantised or packed
    Lines<float> values, scales, offsets;
    Lines<std::uint8_t> codes;
    void resize(int columns);
  };
  void float_rows(const Product& product, const Activations& x, int first, int tokens, int row, int rows,
                  Panel& panel);
  void integer_rows(const Product& product, const ByteActivations& x, int tokens, int row, int rows,
                    Panel& panel);

  Lines<std::int8_t> codes_;
  Lines<float> steps_, totals_;
  std::vector<Panel> panels_;  // [threads]
};

}  // namespace innerkv
