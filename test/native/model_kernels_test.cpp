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

TEST("integer dot products are exact but for the roundings of their scales") {
  check::Random random(2);
  for (const ModelKernels* table : tables())
    for (const TensorType type :
         {TensorType::kQ8_0, TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ5_0, TensorType::kQ5_1,
          TensorType::kQ4_K, TensorType::kQ6_K, TensorType::kTernary})
      for (const int vectors : {1, 3, 4, 9}) {
        const int columns = 512, rows = 5;
        const double offset = type == TensorType::kTernary ? 5 : 1.5;  // largest code and offset
        const Blocks weights = blocks_of(type, rows * columns, random);
        const std::vector<float> x = normals(vectors * columns, random);
        std::vector<std::int8_t> codes(at(vectors * columns));
        std::vector<float> steps(at(vectors * columns / 32)), totals(at(vectors * columns / 16));
        const auto of = [&](int v) {
          return ByteActivations{codes.data() + v * columns, steps.data() + v * columns / 32,
                                 totals.data() + v * columns / 16};
        };
        for (int v = 0; v < vectors; ++v) table->quantise(x.data() + v * columns, columns, of(v));
        const int stride = rows + 2;
        std::vector<float> out(at(vectors * stride), 77.0f), w(at(rows * columns));
        table->integer_dot({type, weights.data(),
                            w.size() / at(rows * info_of(type).elements) * at(info_of(type).bytes), rows,
                            columns, vectors, of(0), out.data(), stride});
        table->dequantise(type, weights.data(), rows * columns, w.data());
        for (int v = 0; v < vectors; ++v) {
          for (int r = 0; r < rows; ++r) {
            double exact = 0, size = 0;
            for (int k = 0; k < columns; ++k) {
              const double value =
                  codes[at(v * columns + k)] * static_cast<double>(steps[at((v * columns + k) / 32)]);
              exact += static_cast<double>(w[at(r * columns + k)]) * value;
              size += (std::abs(static_cast<double>(w[at(r * columns + k)])) + offset) * std::abs(value);
            }
            CHECK_WITH(std::abs(static_cast<double>(out[at(v * stride + r)]) - exact) <= 32 * kUnit * size,
                       std::string(table->isa) + " " + info_of(type).name);
          }
          CHECK(out[at(v * stride + rows)] == 77.0f);
        }
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
