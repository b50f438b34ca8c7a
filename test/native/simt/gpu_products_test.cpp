// The kernels of the model runner on the GPU against its CPU kernels: equal bits where nothing but integers
// and single roundings is involved, else within the error of the stated order of sums. Runs on the emulated
// GPU (gpu_products_test) and on a real one (gpu_products_gpu_test).
// Long file: every kernel of a model, in the order of a layer.
#include <cmath>
#include <map>

#include "cuda/products.h"
#include "model/kernels.h"
#include "model_support.h"
#include "simt/buffer.h"
#include "simt/gpu_under_test.h"
#include "support.h"

namespace innerkv::test {
namespace {

using gpu::MatrixArgs;
using gpu::ProductArgs;
using gpu::RowForm;
using gpu::RowNorm;
using gpu::RowsArgs;
using gpu::RowSource;
using simt::Buffer;

constexpr double kUnit = 0x1p-24;
double wide(float x) { return static_cast<double>(x); }

/// A matrix on both sides.
struct Matrix {
  std::vector<std::uint8_t> bytes;
  TensorType type;
  int rows, columns;
  MatrixArgs args;
  std::unique_ptr<Buffer<std::uint8_t>> memory;

  Matrix(TensorType stored, int row_count, int column_count, std::vector<std::uint8_t> blocks)
      : bytes(std::move(blocks)), type(stored), rows(row_count), columns(column_count) {
    std::size_t size = 0;
    gpu::matrix_at(nullptr, type, rows, columns, &size);
    memory = std::make_unique<Buffer<std::uint8_t>>(std::vector<std::uint8_t>(size));
    args = gpu::matrix_at(memory->get(), type, rows, columns, &size);
    args.scale = type == TensorType::kTernary ? 0.25f : 1.0f;
    const Buffer<std::uint8_t> there(bytes);
    const int first = rows / 2;  // in two pieces
    CHECK(gpu::arrange(args, there.get(), 0, first, nullptr) == cudaSuccess);
    CHECK(gpu::arrange(args, there.get() + row_bytes() * at(first), first, rows - first, nullptr) ==
          cudaSuccess);
  }
  Matrix(TensorType stored, int row_count, int column_count, check::Random& random)
      : Matrix(stored, row_count, column_count,
               random_blocks(stored, row_count * column_count,
                             1 / std::sqrt(static_cast<float>(column_count)), random)) {}

  std::size_t row_bytes() const { return at(columns / info_of(type).elements) * at(info_of(type).bytes); }
  /// Without the scale of the whole matrix.
  std::vector<float> values() const {
    std::vector<float> w(at(rows * columns));
    scalar_model_kernels()->dequantise(type, bytes.data(), rows * columns, w.data());
    return w;
  }
};

int columns_of(TensorType type, bool many = false) {
  return is_quantised(type) ? (many ? 1536 : 512) : type == TensorType::kF32 ? 20 : 36;
}

TEST("weights of every type are decoded to the bits of the CPU, and to binary16 rounded once") {
  check::Random random(1);
  const auto schedules = simt::schedules();
  for (const TensorType type : kAllTypes) {
    simt::use(schedules[static_cast<std::size_t>(type) % schedules.size()]);
    const int columns = columns_of(type), rows = 7, stride = (columns + 63) / 64 * 64;
    const Matrix matrix(type, rows, columns, random);
    const std::vector<float> expected = matrix.values();
    const std::vector<int> picked{6, 0, 3, 3};
    const Buffer<int> tokens(picked);
    Buffer<float> out(at(4 * columns));
    CHECK(gpu::embed(matrix.args, tokens.get(), 4, out.get(), nullptr) == cudaSuccess);
    const std::vector<float> found = out.download();
    int different = 0;
    for (int i = 0; i < 4; ++i)
      for (int c = 0; c < columns; ++c)
        different +=
            found[at(i * columns + c)] != expected[at(picked[at(i)] * columns + c)] * matrix.args.scale;
    CHECK_WITH(different == 0, info_of(type).name);
    Buffer<std::uint16_t> halves(at(5 * stride));
    CHECK(gpu::dequantise_halves(matrix.args, 2, 5, halves.get(), stride, nullptr) == cudaSuccess);
    const std::vector<std::uint16_t> panel = halves.download();
    int wrong = 0;
    for (int r = 0; r < 5; ++r)
      for (int c = 0; c < stride; ++c)
        wrong += panel[at(r * stride + c)] !=
                 (c < columns ? half_bits_ieee(expected[at((r + 2) * columns + c)]) : 0);
    CHECK_WITH(wrong == 0, info_of(type).name);
    CHECK_WITH(simt::take_reports().empty(), info_of(type).name);
  }
}

/// Rows in all three forms.
struct Rows {
  int rows, columns, stride;
  Buffer<float> floats, steps, totals, scales;
  Buffer<std::int8_t> codes;
  Buffer<std::uint16_t> halves;
  gpu::RowsOut out;
  Rows(int row_count, int column_count)
      : rows(row_count),
        columns(column_count),
        stride((column_count + 63) / 64 * 64),
        floats(at(rows * stride)),
        steps(at(rows * (columns / 32) + 1)),
        totals(at(rows * (columns / 16) + 1)),
        scales(at(rows)),
        codes(at(rows * columns)),
        halves(at(rows * stride)) {
    out = {floats.get(), codes.get(), steps.get(), totals.get(), halves.get(), scales.get(), stride};
  }
  void prepare(RowSource source, RowForm form, RowsArgs args) {
    args.rows = rows;
    args.columns = columns;
    args.out = out;
    CHECK(gpu::prepare_rows(source, form, args, nullptr) == cudaSuccess);
  }
  /// These numbers in a form, untouched: one head without padding.
  void fill(const std::vector<float>& x, RowForm form) {
    const Buffer<float> there(x);
    RowsArgs args;
    args.x = there.get();
    args.head_dim = args.cache_dim = columns;
    prepare(RowSource::kHeads, form, args);
  }
};

std::vector<float> normals(int count, check::Random& random, float spread = 1) {
  std::vector<float> values(at(count));
  for (float& value : values) value = spread * random.normal();
  return values;
}

TEST("rows of 8 bits have the CPU's codes, steps and totals") {
  check::Random random(2);
  for (const simt::Schedule& schedule : simt::schedules()) {
    simt::use(schedule);
    const int columns = 2080, rows = 2;
    std::vector<float> x = normals(rows * columns, random);
    std::fill_n(x.begin() + 32, 32, 0.0f);
    x[64] = 1e30f;
    x[96] = 1e-40f;
    Rows there(rows, columns);
    there.fill(x, RowForm::kBytes);
    std::vector<std::int8_t> codes(x.size());
    std::vector<float> steps(x.size() / 32), totals(x.size() / 16);
    for (int r = 0; r < rows; ++r)
      scalar_model_kernels()->quantise(
          x.data() + r * columns, columns,
          {codes.data() + r * columns, steps.data() + r * columns / 32, totals.data() + r * columns / 16});
    CHECK(there.codes.download() == codes);
    std::vector<float> found = there.steps.download();
    found.resize(steps.size());
    CHECK(same_bits(found, steps));
    found = there.totals.download();
    found.resize(totals.size());
    CHECK(same_bits(found, totals));
    CHECK(simt::take_reports().empty());
  }
}

TEST("norms, heads and SwiGLU: the CPU's numbers, padded with zeros, and binary16 at the best scale") {
  check::Random random(3);
  const auto schedules = simt::schedules();
  for (const int columns : {20, 96, 2112}) {
    simt::use(schedules[at(columns) % schedules.size()]);
    const int rows = 3, D = columns / 4, cache_dim = D + 12;
    const std::vector<float> x = normals(rows * columns, random, 4), y = normals(rows * columns, random),
                             heads = normals(rows * 4 * cache_dim, random, 1e-3f);
    const Buffer<float> x_there(x), y_there(y), heads_there(heads);
    for (const auto& [source, kind] : {std::pair{RowSource::kPlain, RowNorm::kNone},
                                       {RowSource::kPlain, RowNorm::kWeighted},
                                       {RowSource::kPlain, RowNorm::kBare},
                                       {RowSource::kHeads, RowNorm::kNone},
                                       {RowSource::kHeads, RowNorm::kBare},
                                       {RowSource::kGated, RowNorm::kNone},
                                       {RowSource::kGated, RowNorm::kBare}}) {
      RowsArgs args;
      args.weight = y_there.get();
      args.norm = kind;
      args.x = source == RowSource::kHeads ? heads_there.get() : x_there.get();
      args.y = y_there.get();
      args.head_dim = D;
      args.cache_dim = cache_dim;
      args.epsilon = 1e-5f;
      Rows there(rows, columns);
      there.prepare(source, RowForm::kFloats, args);
      there.prepare(source, RowForm::kHalves, args);
      const std::vector<float> floats = there.floats.download(), scales = there.scales.download();
      const std::vector<std::uint16_t> halves = there.halves.download();
      for (int r = 0; r < rows; ++r) {
        std::vector<double> row;
        double squares = 0;
        for (int c = 0; c < columns; ++c) {
          const double a = wide(x[at(r * columns + c)]);
          row.push_back(source == RowSource::kPlain ? a
                        : source == RowSource::kHeads
                            ? wide(heads[at((4 * r + c / D) * cache_dim + c % D)])
                            : a / (1 + std::exp(-a)) * wide(y[at(r * columns + c)]));
          squares += row.back() * row.back();
        }
        if (kind != RowNorm::kNone)
          for (int c = 0; c < columns; ++c)
            row[at(c)] *= kind == RowNorm::kBare
                              ? 1 / std::sqrt(squares / columns)
                              : wide(y[at(c)]) / std::sqrt(squares / columns + wide(1e-5f));
        float largest = 0;
        for (int c = 0; c < there.stride; ++c) {
          const float found = floats[at(r * there.stride + c)];
          largest = std::max(largest, std::abs(found));
          if (c >= columns) {
            CHECK(found == 0.0f && halves[at(r * there.stride + c)] == 0);
            continue;
          }
          // exp (2 ulp), a sum, a quotient and a product; then the norm, made of such numbers, and its
          // products.
          CHECK(std::abs(wide(found) - row[at(c)]) <= 16 * kUnit * std::abs(row[at(c)]));
        }
        const float scale = scales[at(r)];
        CHECK(largest / scale >= 8192 && largest / scale < 16384);
        for (int c = 0; c < columns; ++c)
          CHECK(halves[at(r * there.stride + c)] == half_bits_ieee(floats[at(r * there.stride + c)] / scale));
      }
      CHECK(simt::take_reports().empty());
    }
  }
}

TEST("a bare norm leaves zeros alone") {
  Rows there(1, 96);
  const Buffer<float> zeros(std::vector<float>(96));
  RowsArgs args;
  args.x = zeros.get();
  args.norm = RowNorm::kBare;
  there.prepare(RowSource::kPlain, RowForm::kFloats, args);
  CHECK(there.floats.download() == std::vector<float>(128));
  CHECK(simt::take_reports().empty());
}

/// Weights times rows in a form; `bias` and what is added to as wanted.
std::vector<float> multiplied(const std::vector<const Matrix*>& matrices, const Rows& x, int tokens,
                              RowForm form, const std::vector<float>& bias = {},
                              const std::vector<float>& before = {}) {
  int rows = 0;
  for (const Matrix* matrix : matrices) rows += matrix->rows;
  const Buffer<float> bias_there(bias.empty() ? std::vector<float>(at(rows)) : bias);
  const Buffer<float> out(before.empty() ? std::vector<float>(at(tokens * rows), 77.0f) : before);
  std::vector<ProductArgs> products;
  int first = 0;
  for (const Matrix* matrix : matrices) {
    products.push_back({matrix->args, bias.empty() ? nullptr : bias_there.get() + first, out.get() + first,
                        rows, !before.empty()});
    first += matrix->rows;
  }
  const auto run = form == RowForm::kBytes ? gpu::multiply_bytes : gpu::multiply_floats;
  CHECK(run(products.data(), static_cast<int>(products.size()), x.out, tokens, nullptr) == cudaSuccess);
  return out.download();
}

TEST("products in 8 bits: the CPU's bits when every scale is a power of two") {
  check::Random random(4);
  const auto schedules = simt::schedules();
  for (const TensorType type : kAllTypes) {
    if (!is_quantised(type)) continue;
    const int columns = columns_of(type), rows = 6, tokens = 3;
    std::vector<std::uint8_t> blocks = random_blocks(type, rows * columns, 1, random);
    const TensorTypeInfo& info = info_of(type);
    for (std::size_t b = 0; b < blocks.size(); b += at(info.bytes)) {
      const auto half = [&](int place, float value) {
        const std::uint16_t bits = half_bits(value);
        std::memcpy(blocks.data() + b + at(place), &bits, 2);
      };
      if (type == TensorType::kTernary) continue;
      half(type == TensorType::kQ6_K ? 208 : 0, 0.25f);
      if (type == TensorType::kQ4_1 || type == TensorType::kQ5_1 || type == TensorType::kQ4_K) half(2, -0.5f);
    }
    const Matrix matrix(type, rows, columns, std::move(blocks));
    // The largest number of every 32 is 127, so steps are 1 and all sums are integers / 4 below 2^24.
    std::vector<float> x(at(tokens * columns));
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = i % 32 == 7 ? 127.0f : static_cast<float>(random.below(21) - 10);
    Rows there(tokens, columns);
    there.fill(x, RowForm::kBytes);
    std::vector<std::int8_t> codes(x.size());
    std::vector<float> steps(x.size() / 32), totals(x.size() / 16), expected(at(tokens * rows));
    for (int t = 0; t < tokens; ++t)
      scalar_model_kernels()->quantise(
          x.data() + t * columns, columns,
          {codes.data() + t * columns, steps.data() + t * columns / 32, totals.data() + t * columns / 16});
    scalar_model_kernels()->integer_dot({type,
                                         matrix.bytes.data(),
                                         matrix.row_bytes(),
                                         rows,
                                         columns,
                                         tokens,
                                         {codes.data(), steps.data(), totals.data()},
                                         expected.data(),
                                         rows});
    for (float& sum : expected) sum *= matrix.args.scale;
    simt::use(schedules[static_cast<std::size_t>(type) % schedules.size()]);
    CHECK_WITH(same_bits(multiplied({&matrix}, there, tokens, RowForm::kBytes), expected), info.name);
    CHECK(simt::take_reports().empty());
  }
}

/// Every product within the error of its sums, and the same whatever the other tokens are.
void check_products(TensorType type, RowForm form, int columns, const std::vector<int>& token_counts,
                    check::Random& random) {
  const Matrix a(type, 9, columns, random), b(type, 4, columns, random), c(type, 1, columns, random);
  const int rows = 14;
  std::vector<float> w;
  for (const Matrix* matrix : {&a, &b, &c}) {
    std::vector<float> values = matrix->values();
    for (float& value : values) value *= matrix->args.scale;
    w.insert(w.end(), values.begin(), values.end());
  }
  const std::vector<float> bias = normals(rows, random);
  for (const int tokens : token_counts) {
    const std::vector<float> x = normals(tokens * columns, random), before = normals(tokens * rows, random);
    Rows there(tokens, columns);
    there.fill(x, form);
    std::vector<double> values(x.begin(), x.end());
    if (form == RowForm::kBytes) {
      const std::vector<std::int8_t> codes = there.codes.download();
      const std::vector<float> steps = there.steps.download();
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = codes[i] * wide(steps[i / 32]);
    }
    const std::vector<float> plain = multiplied({&a, &b, &c}, there, tokens, form),
                             biased = multiplied({&a, &b, &c}, there, tokens, form, bias),
                             added = multiplied({&a, &b, &c}, there, tokens, form, {}, before);
    // Additions of one lane, the butterfly's 5, and the roundings of a value, its scale and its product.
    const double roundings = (form == RowForm::kBytes ? 4 : 32) * std::ceil(columns / 1024.0) + 5 + 6;
    for (int t = 0; t < tokens; ++t) {
      Rows alone(1, columns);
      alone.fill({x.begin() + t * columns, x.begin() + (t + 1) * columns}, form);
      const std::vector<float> single = multiplied({&a, &b, &c}, alone, 1, form);
      for (int r = 0; r < rows; ++r) {
        double exact = 0, size = 0;
        for (int k = 0; k < columns; ++k) {
          const double weight = wide(w[at(r * columns + k)]), value = values[at(t * columns + k)];
          exact += weight * value;
          // scale * code and offset are summed apart: together they are at most 33 times a value's reach.
          size += (std::abs(weight) + (is_quantised(type) ? 1.0 : 0.0)) * std::abs(value);
        }
        const std::size_t i = at(t * rows + r);
        CHECK_WITH(std::abs(wide(plain[i]) - exact) <= roundings * kUnit * size,
                   std::string(info_of(type).name) + " " + std::to_string(columns));
        CHECK_WITH(plain[i] == single[at(r)], info_of(type).name);
        CHECK(biased[i] == plain[i] + bias[at(r)]);
        CHECK(added[i] == before[i] + plain[i]);
      }
    }
    CHECK(simt::take_reports().empty());
  }
}

TEST("products in 8 bits: three matrices at once, 1 to 8 tokens, none depends on another") {
  check::Random random(5);
  const auto schedules = simt::schedules();
  for (const TensorType type : kAllTypes) {
    if (!is_quantised(type)) continue;
    simt::use(schedules[static_cast<std::size_t>(type) % schedules.size()]);
    check_products(type, RowForm::kBytes, columns_of(type), {1, 3, 8}, random);
    check_products(type, RowForm::kBytes, columns_of(type, true), {2}, random);
  }
}

TEST("products in float32: every type, any number of tokens, none depends on another") {
  check::Random random(6);
  const auto schedules = simt::schedules();
  for (const TensorType type : kAllTypes) {
    simt::use(schedules[static_cast<std::size_t>(type) % schedules.size()]);
    check_products(type, RowForm::kFloats, columns_of(type), {1, 4, 19}, random);
  }
  check_products(TensorType::kF32, RowForm::kFloats, 148, {2}, random);
}

TEST("products in binary16 on tensor cores") {
  check::Random random(7);
  const auto schedules = simt::schedules();
  int round = 0;
  for (const auto& [rows, tokens, stride] :
       {std::tuple{64, 64, 64}, {1, 9, 128}, {70, 65, 192}, {130, 20, 320}}) {
    simt::use(schedules[at(round++)]);
    std::vector<std::uint16_t> w(at(rows * stride)), x(at(tokens * stride));
    for (auto* matrix : {&w, &x})
      for (auto& bits : *matrix) bits = half_bits(random.normal());
    const Buffer<std::uint16_t> w_there(w), x_there(x);
    const Buffer<float> sums(at(tokens * rows));
    CHECK(gpu::multiply_halves(w_there.get(), x_there.get(), rows, tokens, stride, sums.get(), nullptr) ==
          cudaSuccess);
    const std::vector<float> found = sums.download();
    const std::vector<float> bias = normals(rows + 3, random), scales(at(tokens), 0.25f);
    const Buffer<float> bias_there(bias), scales_there(scales);
    for (const bool add : {false, true}) {
      const std::vector<float> before = normals(tokens * (rows + 5), random);
      const Buffer<float> out(before);
      ProductArgs product;
      product.weight.scale = 0.5f;
      product.bias = add ? nullptr : bias_there.get();
      product.out = out.get();
      product.stride = rows + 5;
      product.add = add;
      CHECK(gpu::finish_halves(product, sums.get(), scales_there.get(), 3, rows, tokens, nullptr) ==
            cudaSuccess);
      const std::vector<float> finished = out.download();
      int wrong = 0;
      for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < rows + 5; ++c) {
          const std::size_t i = at(t * (rows + 5) + c);
          float expected = before[i];
          if (c >= 3 && c < rows + 3) {
            const float value = found[at(t * rows + c - 3)] * 0.25f * 0.5f;
            expected = add ? expected + value : value + bias[at(c)];
          }
          wrong += finished[i] != expected;
        }
      CHECK(wrong == 0);
    }
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r) {
        double exact = 0, size = 0;
        for (int k = 0; k < stride; ++k) {
          const double term =
              wide(half_value(w[at(r * stride + k)])) * wide(half_value(x[at(t * stride + k)]));
          exact += term;
          size += std::abs(term);
        }
        // A tensor core aligns 16 products to the largest and truncates: 2^-22 of the size a step is ample.
        CHECK(std::abs(wide(found[at(t * rows + r)]) - exact) <= stride / 16 * 0x1p-22 * size);
      }
    CHECK(simt::take_reports().empty());
  }
  CHECK(gpu::multiply_halves(nullptr, nullptr, 1, 1, 32, nullptr, nullptr) == cudaErrorInvalidValue);
}

TEST(
    "heads: norms, RoPE in both layouts, binary16 to the bit, and a key beyond it is noted and stored as "
    "zero") {
  check::Random random(8);
  const auto schedules = simt::schedules();
  int round = 0;
  for (const bool half_layout : {true, false})
    for (const bool norms : {true, false})
      for (const int D : {8, 64, 80}) {
        simt::use(schedules[at(round++) % schedules.size()]);
        const int rows = 3, queries = 4, keys = 2, pairs = D / 2 - 1, cache_dim = D == 80 ? 80 : 64,
                  width = (queries + 2 * keys) * D;
        std::vector<float> qkv = normals(rows * width, random, 3), q_norm = normals(D, random),
                           k_norm = normals(D, random), cos(at(rows * pairs)), sin(cos.size());
        for (std::size_t i = 0; i < cos.size(); ++i) {
          const double angle = static_cast<double>(i);
          cos[i] = static_cast<float>(std::cos(angle));
          sin[i] = static_cast<float>(std::sin(angle));
        }
        const Buffer<float> qkv_there(qkv), q_norm_there(q_norm), k_norm_there(k_norm), cos_there(cos),
            sin_there(sin), q(at(rows * queries * cache_dim)), observed(at(rows * (queries + keys) * D));
        const Buffer<std::uint16_t> k(at(rows * keys * cache_dim)), v(at(rows * keys * cache_dim));
        const Buffer<int> bad(std::vector<int>{99});
        gpu::HeadsArgs args;
        args.qkv = qkv_there.get();
        args.q_norm = norms ? q_norm_there.get() : nullptr;
        args.k_norm = norms ? k_norm_there.get() : nullptr;
        args.cos = cos_there.get();
        args.sin = sin_there.get();
        args.q = q.get();
        args.k = k.get();
        args.v = v.get();
        args.observed = observed.get();
        args.first_bad = bad.get();
        args.rows = rows;
        args.query_heads = queries;
        args.kv_heads = keys;
        args.head_dim = D;
        args.cache_dim = cache_dim;
        args.pairs = pairs;
        args.layer = 5;
        args.epsilon = 1e-6f;
        args.half_layout = half_layout;
        CHECK(gpu::prepare_heads(args, nullptr) == cudaSuccess);
        const std::vector<float> q_found = q.download(), seen = observed.download();
        const std::vector<std::uint16_t> k_found = k.download(), v_found = v.download();
        CHECK(bad.download()[0] == 99);
        for (int row = 0; row < rows; ++row)
          for (int head = 0; head < queries + 2 * keys; ++head) {
            std::vector<float> x(qkv.begin() + row * width + head * D,
                                 qkv.begin() + row * width + (head + 1) * D);
            const bool value = head >= queries + keys;
            const std::vector<float>& weight = head < queries ? q_norm : k_norm;
            if (norms && !value) {
              double squares = 0;
              for (const float one : x) squares += wide(one) * wide(one);
              const float norm = static_cast<float>(1 / std::sqrt(squares / D + wide(1e-6f)));
              for (int c = 0; c < D; ++c) x[at(c)] = x[at(c)] * norm * weight[at(c)];
            }
            int wrong = 0;
            for (int c = 0; c < D && !value; ++c)
              wrong += std::abs(seen[at((row * (queries + keys) + head) * D + c)] - x[at(c)]) >
                       2 * static_cast<float>(kUnit) * std::abs(x[at(c)]);
            for (int pair = 0; pair < pairs && !value; ++pair) {
              float &a = x[at(half_layout ? pair : 2 * pair)],
                    &b = x[at(half_layout ? pair + pairs : 2 * pair + 1)];
              const float cs = cos[at(row * pairs + pair)], sn = sin[at(row * pairs + pair)];
              const float first = a * cs - b * sn, second = b * cs + a * sn;
              a = first;
              b = second;
            }
            x.resize(at(cache_dim));
            for (int c = 0; c < cache_dim; ++c) {
              // The square root of float64 sums in another order rounds to the same float32, or to its
              // neighbour.
              const float slack = norms ? 8 * static_cast<float>(kUnit) * 12 : 0.0f;
              if (head < queries) {
                wrong += std::abs(q_found[at((row * queries + head) * cache_dim + c)] - x[at(c)]) > slack;
              } else {
                const auto& found = value ? v_found : k_found;
                const int kv = value ? head - queries - keys : head - queries;
                const float stored = half_value(found[at((row * keys + kv) * cache_dim + c)]);
                wrong += norms && !value
                             ? std::abs(stored - x[at(c)]) > 0x1p-11f * std::abs(x[at(c)]) + slack
                             : found[at((row * keys + kv) * cache_dim + c)] != half_bits_ieee(x[at(c)]);
              }
            }
            CHECK_WITH(wrong == 0, "head " + std::to_string(head) + " of " + std::to_string(D));
          }
        CHECK(simt::take_reports().empty());
      }
  // One value beyond binary16, in the last head of the last row.
  std::vector<float> qkv(at(2 * 3 * 64), 1.0f);
  qkv.back() = 65520.0f;
  const Buffer<float> there(qkv), q(at(2 * 64));
  const Buffer<std::uint16_t> k(at(2 * 64)), v(at(2 * 64));
  const Buffer<int> bad(std::vector<int>{99});
  gpu::HeadsArgs args;
  args.qkv = there.get();
  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  args.first_bad = bad.get();
  args.rows = 2;
  args.query_heads = args.kv_heads = 1;
  args.head_dim = args.cache_dim = 64;
  args.layer = 5;
  CHECK(gpu::prepare_heads(args, nullptr) == cudaSuccess);
  CHECK(bad.download()[0] == 5);
  CHECK(v.download().back() == 0 && v.download()[0] == 0x3c00);
  CHECK(simt::take_reports().empty());
}

TEST("losses of rows of logits") {
  check::Random random(9);
  for (const int vocabulary : {1, 7, 300, 5000}) {
    const std::vector<float> logits = normals(3 * vocabulary, random, 8);
    const std::vector<int> targets{vocabulary - 1, -1, vocabulary / 2};
    const Buffer<float> there(logits), nll(3);
    const Buffer<int> targets_there(targets);
    CHECK(gpu::score_rows(there.get(), targets_there.get(), 3, vocabulary, nll.get(), nullptr) ==
          cudaSuccess);
    const std::vector<float> found = nll.download();
    for (int row = 0; row < 3; ++row) {
      double sum = 0;
      for (int i = 0; i < vocabulary; ++i) sum += std::exp(wide(logits[at(row * vocabulary + i)]));
      const double exact =
          targets[at(row)] < 0 ? 0 : std::log(sum) - wide(logits[at(row * vocabulary + targets[at(row)])]);
      // exp is off by 2 ulp, its argument by one rounding of numbers below 2^6.
      CHECK(std::abs(wide(found[at(row)]) - exact) <= 64 * kUnit + 4 * kUnit * std::abs(exact));
    }
    CHECK(simt::take_reports().empty());
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("gpu_products", argc, argv); }
