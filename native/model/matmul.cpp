#include "matmul.h"

#include <algorithm>

namespace innerkv {

namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }
int panels_of(const Product& product) { return (product.weight->rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

Multiplier::Multiplier(const ModelKernels& kernels, ThreadPool& pool)
    : kernels_(kernels), pool_(pool), panels_(at(pool.threads())) {}

void Multiplier::Panel::resize(int columns) {
  const std::size_t size = std::max(values.size(), at(kPanelRows) * at(padded(columns)));
  values.resize(size);
  codes.resize(size);
  scales.resize(size / 16);
  offsets.resize(size / 16);
}

void Multiplier::run(const Activations& x, int first, int tokens, std::span<const Product> products,
                     bool bytes) {
  const int columns = x.columns();
  const auto integers = [&](const Product& product) { return bytes && is_quantised(product.weight->type); };
  ByteActivations codes{};
  if (std::any_of(products.begin(), products.end(), integers)) {
    codes_.resize(at(tokens) * at(columns));
    steps_.resize(at(tokens) * at(columns / 32));
    totals_.resize(at(tokens) * at(columns / 16));
    codes = {codes_.data(), steps_.data(), totals_.data()};
    constexpr int kShare = 8;
    pool_.run((tokens + kShare - 1) / kShare, [&](int item, int) {
      for (int t = kShare * item; t < std::min(tokens, kShare * (item + 1)); ++t)
        kernels_.quantise(x.row(first + t), columns,
                          {codes.codes + at(t) * at(columns), codes.steps + at(t) * at(columns / 32),
                           codes.totals + at(t) * at(columns / 16)});
    });
  }
  for (Panel& panel : panels_) panel.resize(columns);
  int panels = 0;
  for (const Product& product : products) panels += panels_of(product);
  pool_.run(panels, [&](int item, int thread) {
    const Product* product = products.data();
    for (; item >= panels_of(*product); ++product) item -= panels_of(*product);
    const Weight& weight = *product->weight;
    const int row = item * kPanelRows, rows = std::min(kPanelRows, weight.rows - row);
    if (integers(*product))
      integer_rows(*product, codes, tokens, row, rows, panels_[at(thread)]);
    else
      float_rows(*product, x, first, tokens, row, rows, panels_[at(thread)]);
    if (weight.scale == 1) return;
    for (int t = 0; t < tokens; ++t)
      for (int r = row; r < row + rows; ++r) product->out[t * product->out_stride + r] *= weight.scale;
  });
}

void Multiplier::integer_rows(const Product& product, const ByteActivations& x, int tokens, int row, int rows,
                              Panel& panel) {
  const Weight& weight = *product.weight;
  float* out = product.out + row;
  if (tokens <= kMaxRowTokens) {
    kernels_.integer_dot({weight.type, weight.row(row), weight.row_bytes(), rows, weight.columns, tokens, x,
                          out, product.out_stride});
    return;
  }
  const PackedRows packed{panel.codes.data(), panel.scales.data(), panel.offsets.data()};
  kernels_.pack({weight.type, weight.row(row), weight.row_bytes(), rows, weight.columns, packed});
  kernels_.packed_dot({weight.type, packed, rows, weight.columns, tokens, x, out, product.out_stride});
}

void Multiplier::float_rows(const Product& product, const Activations& x, int first, int tokens, int row,
                            int rows, Panel& panel) {
  const Weight& weight = *product.weight;
  for (int r = 0; r < rows; ++r) {
    float* to = panel.values.data() + r * x.stride();
    kernels_.dequantise(weight.type, weight.row(row + r), weight.columns, to);
    std::fill(to + weight.columns, to + x.stride(), 0.0f);
  }
  kernels_.float_dot(
      {panel.values.data(), x.row(first), x.stride(), rows, tokens, product.out + row, product.out_stride});
}

}  // namespace innerkv
