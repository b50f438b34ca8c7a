// The model runner's kernels: every instruction set against the scalar table, and that against plain float64.
// What the stored types mean is proven against the TypeScript reference.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "model/kernels.h"
#include "numerics/half.h"
#include "support.h"

namespace innerkv::test {
namespace {

constexpr double kUnit = 0x1p-24;

std::vector<const ModelKernels*> tables() {
  std::vector<const ModelKernels*> found;
  for (const Kernels* const* table = available_kernels(); *table; ++table)
    found.push_back(&model_kernels((*table)->isa));
  return found;
}

/// Random blocks whose scales are sane numbers, one byte off every alignment.
struct Blocks {
  std::vector<std::uint8_t> bytes;
  const std::uint8_t* data() const { return bytes.data() + 1; }
};

Blocks blocks_of(TensorType type, int count, check::Random& random) {
  const TensorTypeInfo& info = info_of(type);
  const int blocks = count / info.elements;
  Blocks made{std::vector<std::uint8_t>(at(1 + blocks * info.bytes))};
  for (auto& byte : made.bytes) byte = static_cast<std::uint8_t>(random.below(256));
  const auto put_half = [&](int block, int offset) {
    const std::uint16_t bits = half_bits(0.01f * random.normal());
    std::memcpy(made.bytes.data() + 1 + block * info.bytes + offset, &bits, 2);
  };
  for (int b = 0; b < blocks; ++b) {
    if (type == TensorType::kF32) {
      const float value = random.normal();
      std::memcpy(made.bytes.data() + 1 + 4 * b, &value, 4);
    } else if (type == TensorType::kTernary) {  // has no scale of its own
    } else if (type == TensorType::kQ6_K) {
      put_half(b, 208);
    } else {
      put_half(b, 0);
      if (info.bytes > 4) put_half(b, 2);
    }
  }
  return made;
}

std::vector<float> normals(int count, check::Random& random) {
  std::vector<float> values(at(count));
  for (float& value : values) value = random.normal();
  return values;
}

TEST("dequantised weights and rounded activations are the same bits everywhere") {
  check::Random random(1);
  for (const ModelKernels* table : tables())
    for (std::size_t type = 0; type < kTensorTypes.size(); ++type) {
      const Blocks blocks = blocks_of(static_cast<TensorType>(type), 768, random);
      std::vector<float> ours(768), scalar(768);
      table->dequantise(static_cast<TensorType>(type), blocks.data(), 768, ours.data());
      scalar_model_kernels()->dequantise(static_cast<TensorType>(type), blocks.data(), 768, scalar.data());
      CHECK_WITH(same_bits(ours, scalar), std::string(table->isa) + " " + kTensorTypes[type].name);
    }
  std::vector<float> x = normals(256, random);
  std::fill_n(x.begin() + 32, 32, 0.0f);
  x[64] = 1e30f;
  x[96] = 1e-40f;
  const auto quantised = [&](const ModelKernels& table) {
    std::vector<std::int8_t> codes(256);
    std::vector<float> numbers(24);
    table.quantise(x.data(), 256, {codes.data(), numbers.data(), numbers.data() + 8});
    return std::pair(codes, numbers);
  };
  const auto [codes, numbers] = quantised(*scalar_model_kernels());
  for (const ModelKernels* table : tables()) {
    const auto [other_codes, other_numbers] = quantised(*table);
    CHECK_WITH(codes == other_codes && same_bits(numbers, other_numbers), table->isa);
  }
  for (int i = 0; i < 256; ++i) {
    const double step = static_cast<double>(numbers[at(i / 32)]);
    CHECK(std::abs(codes[at(i)] * step - static_cast<double>(x[at(i)])) <= step * 0.5001 + 1e-30);
  }
}

/// Products of random rows of weights and vectors of bytes, and what they should be.
struct Products {
  TensorType type;
  int rows, columns, vectors;
  Blocks weights;
  std::vector<std::int8_t> codes;
  std::vector<float> steps, totals;

  Products(const ModelKernels& table, TensorType kind, int r, int c, int v, check::Random& random)
      : type(kind),
        rows(r),
        columns(c),
        vectors(v),
        weights(blocks_of(kind, r * c, random)),
        codes(at(v * c)),
        steps(at(v * c / 32)),
        totals(at(v * c / 16)) {
    const std::vector<float> x = normals(v * c, random);
    for (int i = 0; i < v; ++i) table.quantise(x.data() + i * c, c, of(i));
  }

  std::size_t row_bytes() const { return at(columns / info_of(type).elements * info_of(type).bytes); }
  ByteActivations of(int v) {
    return {codes.data() + v * columns, steps.data() + v * columns / 32, totals.data() + v * columns / 16};
  }

  /// Checks out[vector * stride + row]; a product rounds scales, offsets and sums.
  void check(const ModelKernels& table, const std::vector<float>& out, int stride) {
    std::vector<float> w(at(rows * columns));
    table.dequantise(type, weights.data(), rows * columns, w.data());
    const double offset = type == TensorType::kTernary ? 5 : 1.5;  // largest code and offset
    for (int v = 0; v < vectors; ++v)
      for (int r = 0; r < rows; ++r) {
        double exact = 0, size = 0;
        for (int k = 0; k < columns; ++k) {
          const double weight = static_cast<double>(w[at(r * columns + k)]),
                       value = codes[at(v * columns + k)] *
                               static_cast<double>(steps[at((v * columns + k) / 32)]);
          exact += weight * value;
          size += (std::abs(weight) + offset) * std::abs(value);
        }
        CHECK_WITH(std::abs(static_cast<double>(out[at(v * stride + r)]) - exact) <= 32 * kUnit * size,
                   std::string(table.isa) + " " + info_of(type).name);
      }
  }
};

constexpr TensorType kQuantised[] = {TensorType::kQ8_0, TensorType::kQ4_0,   TensorType::kQ4_1,
                                     TensorType::kQ5_0, TensorType::kQ5_1,   TensorType::kQ4_K,
                                     TensorType::kQ6_K, TensorType::kTernary};

TEST(
    "integer dot products are exact but for the roundings of their scales, and no vector depends on "
    "another") {
  check::Random random(2);
  for (const ModelKernels* table : tables())
    for (const TensorType type : kQuantised)
      for (const int columns : {256, 768, 1536})  // whole runs of blocks, and some blocks more
        for (const int vectors : {1, 3, 4, 9}) {
          Products products(*table, type, 5, columns, vectors, random);
          const int stride = products.rows + 2;
          std::vector<float> out(at(vectors * stride), 77.0f), alone(at(products.rows));
          IntegerDotArgs args{type,    products.weights.data(), products.row_bytes(), products.rows, columns,
                              vectors, products.of(0),          out.data(),           stride};
          table->integer_dot(args);
          products.check(*table, out, stride);
          args.vectors = 1;
          args.out = alone.data();
          for (int v = 0; v < vectors; ++v) {
            args.x = products.of(v);
            table->integer_dot(args);
            for (int r = 0; r < products.rows; ++r) CHECK(out[at(v * stride + r)] == alone[at(r)]);
            CHECK(out[at(v * stride + products.rows)] == 77.0f);
          }
        }
}

TEST("packed products: likewise, for any number of rows") {
  check::Random random(5);
  for (const ModelKernels* table : tables())
    for (const TensorType type : kQuantised)
      for (const int rows : {1, 7, 16, 19, kPanelRows})
        for (const int vectors : {1, 2, 6, 13}) {
          const int columns = 512, stride = rows + 2;
          Products products(*table, type, rows, columns, vectors, random);
          std::vector<std::uint8_t> codes(at(columns * kPanelRows), 0x5a);
          std::vector<float> scales(at(columns * kPanelRows / 16), 1e30f), offsets = scales;
          const PackedRows panel{codes.data(), scales.data(), offsets.data()};
          table->pack({type, products.weights.data(), products.row_bytes(), rows, columns, panel});
          std::vector<float> out(at(vectors * stride), 77.0f), alone(at(rows));
          table->packed_dot({type, panel, rows, columns, vectors, products.of(0), out.data(), stride});
          products.check(*table, out, stride);
          for (int v = 0; v < vectors; ++v) {
            table->packed_dot({type, panel, rows, columns, 1, products.of(v), alone.data(), rows});
            for (int r = 0; r < rows; ++r) CHECK(out[at(v * stride + r)] == alone[at(r)]);
            CHECK(out[at(v * stride + rows)] == 77.0f && out[at(v * stride + rows + 1)] == 77.0f);
          }
        }
}

TEST("packed products of the largest codes and activations do not overflow") {
  check::Random random(6);
  for (const ModelKernels* table : tables())
    for (const TensorType type : kQuantised)
      for (const std::int8_t x : {std::int8_t{127}, std::int8_t{-127}})
        for (const int fill : {0x00, 0x7f, 0x80, 0xff}) {
          const int columns = 256;
          Blocks weights = blocks_of(type, columns, random);
          const TensorTypeInfo& info = info_of(type);
          const int first =
              type == TensorType::kQ4_1 || type == TensorType::kQ5_1 || type == TensorType::kQ4_K ? 4
              : type == TensorType::kQ6_K || type == TensorType::kTernary                         ? 0
                                                                                                  : 2;
          const int end = type == TensorType::kQ6_K ? 208 : info.bytes;  // its scale stands behind the codes
          for (int b = 0; b < columns / info.elements; ++b)
            std::fill_n(weights.bytes.begin() + 1 + b * info.bytes + first, end - first,
                        static_cast<std::uint8_t>(fill));
          std::vector<std::int8_t> bytes(at(columns), x);
          std::vector<float> steps(at(columns / 32), 1.0f),
              totals(at(columns / 16), 16.0f * static_cast<float>(x));
          const ByteActivations activations{bytes.data(), steps.data(), totals.data()};
          std::vector<std::uint8_t> codes(at(columns * kPanelRows));
          std::vector<float> scales(at(columns * kPanelRows / 16)), offsets = scales, w(at(columns));
          const PackedRows panel{codes.data(), scales.data(), offsets.data()};
          const std::size_t row_bytes = weights.bytes.size() - 1;
          float packed = 0, plain = 0;
          table->pack({type, weights.data(), row_bytes, 1, columns, panel});
          table->packed_dot({type, panel, 1, columns, 1, activations, &packed, 1});
          table->integer_dot({type, weights.data(), row_bytes, 1, columns, 1, activations, &plain, 1});
          table->dequantise(type, weights.data(), columns, w.data());
          double exact = 0, size = 0;
          for (const float weight : w) {
            exact += static_cast<double>(weight) * x;
            size += (2 * std::abs(static_cast<double>(weight)) + 5) * 127;
          }
          for (const float found : {packed, plain})
            CHECK_WITH(std::abs(static_cast<double>(found) - exact) <= 32 * kUnit * size,
                       std::string(table->isa) + " " + info_of(type).name);
        }
}

TEST("float32 products: within the error of their sums, and no token depends on another") {
  check::Random random(3);
  for (const ModelKernels* table : tables())
    for (const int columns : {1, 16, 100, 576})
      for (const int rows : {1, 4, 7})
        for (const int tokens : {1, 5, 6, 13}) {
          const int stride = padded(columns);
          std::vector<float> w(at(rows * stride)), x(at(tokens * stride)), out(at(tokens * rows));
          for (auto* matrix : {&w, &x})
            for (std::size_t i = 0; i < matrix->size(); ++i)
              if (static_cast<int>(i % at(stride)) < columns) (*matrix)[i] = random.normal();
          table->float_dot({w.data(), x.data(), stride, rows, tokens, out.data(), rows});
          for (int t = 0; t < tokens; ++t) {
            std::vector<float> alone(at(rows));
            table->float_dot({w.data(), x.data() + t * stride, stride, rows, 1, alone.data(), rows});
            for (int r = 0; r < rows; ++r) {
              double exact = 0, size = 0;
              for (int k = 0; k < columns; ++k) {
                const double term =
                    static_cast<double>(w[at(r * stride + k)]) * static_cast<double>(x[at(t * stride + k)]);
                exact += term;
                size += std::abs(term);
              }
              const float value = out[at(t * rows + r)];
              CHECK_WITH(std::abs(static_cast<double>(value) - exact) <= (columns + 2) * kUnit * size,
                         table->isa);
              CHECK_WITH(value == alone[at(r)], table->isa);
            }
          }
        }
}

TEST("SwiGLU and sums of exponentials") {
  check::Random random(4);
  for (const ModelKernels* table : tables()) {
    std::vector<float> gate, up;
    for (int i = 0; i < 4096; ++i) {
      gate.push_back(i < 8 ? (i % 2 ? 1e4f : -1e4f) : 12 * random.normal());
      up.push_back(random.normal());
    }
    std::vector<float> result = gate;
    table->swiglu(result.data(), up.data(), 4096);
    for (std::size_t i = 0; i < gate.size(); ++i) {
      const double g = static_cast<double>(gate[i]),
                   exact = g / (1 + std::exp(-g)) * static_cast<double>(up[i]);
      CHECK_WITH(std::abs(static_cast<double>(result[i]) - exact) <= 8 * kUnit * std::abs(exact) + 1e-30,
                 table->isa);
    }
    for (const int count : {1, 7, 250, 4096}) {
      double exact = 0;
      for (int i = 0; i < count; ++i) exact += std::exp(static_cast<double>(up[at(i)]) - 5);
      const double sum = table->sum_exp(up.data(), count, 5);
      CHECK_WITH(std::abs(sum - exact) <= 32 * kUnit * exact, table->isa);
    }
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("model_kernels", argc, argv); }
