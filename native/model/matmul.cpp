#include "matmul.h"

#include <algorithm>

namespace innerkv {

namespace {

constexpr int kPanelRows = 32;  // of float32: they stay in the second-level cache
std::size_t at(int i) { return static_cast<std::size_t>(i); }

}  // namespace

Multiplier::Multiplier(const ModelKernels& kernels, ThreadPool& pool)
    : kernels_(kernels), pool_(pool), panels_(at(pool.threads())) {}

void Multiplier::run(const Activations& x, int first, int tokens, std::span<const Product> products,
                     bool bytes) {
  const int columns = x.columns();
  const auto integers = [&](const Weight& weight) {
    return bytes && tokens <= kMaxByteTokens && is_quantised(weight.type);
  };
  ByteActivations codes{};
  if (std::any_of(products.begin(), products.end(), [&](const Product& p) { return integers(*p.weight); })) {
    codes_.resize(at(tokens) * at(columns));
    steps_.resize(at(tokens) * at(columns / 32));
    totals_.resize(at(tokens) * at(columns / 16));
    codes = {codes_.data(), steps_.data(), totals_.data()};
    for (int t = 0; t < tokens; ++t)
      kernels_.quantise(x.row(first + t), columns,
                        {codes.codes + at(t) * at(columns), codes.steps + at(t) * at(columns / 32),
                         codes.totals + at(t) * at(columns / 16)});
  }
  for (auto& panel : panels_) panel.resize(std::max(panel.size(), at(kPanelRows) * at(padded(columns))));
  int panels = 0;
  for (const Product& product : products) panels += (product.weight->rows + kPanelRows - 1) / kPanelRows;
  pool_.run(panels, [&](int item, int thread) {
    const Product* product = products.data();
    for (int count; item >= (count = (product->weight->rows + kPanelRows - 1) / kPanelRows); ++product)
      item -= count;
    const Weight& weight = *product->weight;
    const int row = item * kPanelRows, rows = std::min(kPanelRows, weight.rows - row);
    float* out = product->out + row;
    if (integers(weight)) {
      kernels_.integer_dot({weight.type, weight.row(row), weight.row_bytes(), rows, columns, tokens, codes,
                            out, product->out_stride});
    } else {
      std::vector<float>& panel = panels_[at(thread)];
      for (int r = 0; r < rows; ++r) {
        float* to = panel.data() + r * x.stride();
        kernels_.dequantise(weight.type, weight.row(row + r), columns, to);
        std::fill(to + columns, to + x.stride(), 0.0f);
      }
      kernels_.float_dot({panel.data(), x.row(first), x.stride(), rows, tokens, out, product->out_stride});
    }
    if (weight.scale != 1)
      for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < rows; ++r) out[t * product->out_stride + r] *= weight.scale;
  });
}

}  // namespace innerkv
