#include <algorithm>
#include <climits>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "../core/error.h"
#include "device.h"
#include "gpu_model.h"
#include "mirrors.h"

namespace innerkv::gpu {

namespace {

constexpr std::size_t kPieceBytes = std::size_t{16} << 20;  // of a file on its way to the device
constexpr std::size_t kPanelBytes = std::size_t{16} << 20;  // of weights in binary16: they stay in L2

void check(cudaError_t error, const char* what) { device::check(error, what); }

int padded_row(int columns) { return (columns + kRowPadding - 1) / kRowPadding * kRowPadding; }

}  // namespace

// ---- weights ----

/// Walks over a model's tensors twice: first to count bytes, then to copy them to where they belong.
class GpuModel::Loader {
 public:
  explicit Loader(std::uint8_t* base) : base_(base) {}
  std::size_t used() const { return used_; }

  MatrixArgs matrix(const Weight& weight) {
    if (!weight) return {};
    std::size_t bytes = 0;
    MatrixArgs matrix =
        matrix_at(base_ ? base_ + used_ : nullptr, weight.type, weight.rows, weight.columns, &bytes);
    take(bytes);
    if (base_) copy(weight, matrix);
    matrix.scale = weight.scale;
    return matrix;
  }

  const float* vector(const std::vector<float>& values) {
    if (values.empty()) return nullptr;
    std::uint8_t* const there = base_ ? base_ + used_ : nullptr;
    take(sizeof(float) * values.size());
    if (base_) device::copy(there, values.data(), sizeof(float) * values.size());
    return reinterpret_cast<const float*>(there);
  }

 private:
  void take(std::size_t bytes) { used_ += (bytes + 255) / 256 * 256; }

  void copy(const Weight& weight, const MatrixArgs& to) {
    const std::size_t row_bytes = weight.row_bytes();
    const int piece = static_cast<int>(std::clamp<std::size_t>(kPieceBytes / row_bytes, 1, at(weight.rows)));
    for (int first = 0; first < weight.rows; first += piece) {
      const int count = std::min(piece, weight.rows - first);
      std::uint8_t* blocks = piece_.reserve(row_bytes * at(count));
      device::copy(blocks, weight.row(first), row_bytes * at(count));
      check(arrange(to, blocks, first, count, device::stream()), "Arranging weights");
    }
  }

  std::uint8_t* base_;
  std::size_t used_ = 0;
  DeviceBuffer piece_;
};

void GpuModel::load() {
  const auto walk = [&](Loader& loader) {
    layers_.clear();
    embed_ = loader.matrix(model_->embed());
    head_ = &model_->head() == &model_->embed() ? embed_ : loader.matrix(model_->head());
    norm_ = loader.vector(model_->norm());
    for (int i = 0; i < model_->config().layers; ++i) {
      const ModelLayer& from = model_->layer(i);
      Layer layer{};
      const std::pair<const Weight*, MatrixArgs*> matrices[] = {
          {&from.q, &layer.q},       {&from.k, &layer.k},   {&from.v, &layer.v},      {&from.o, &layer.o},
          {&from.gate, &layer.gate}, {&from.up, &layer.up}, {&from.down, &layer.down}};
      for (const auto& [weight, matrix] : matrices) *matrix = loader.matrix(*weight);
      const std::pair<const std::vector<float>*, const float**> vectors[] = {
          {&from.attn_norm, &layer.attn_norm}, {&from.ffn_norm, &layer.ffn_norm},
          {&from.q_bias, &layer.q_bias},       {&from.k_bias, &layer.k_bias},
          {&from.v_bias, &layer.v_bias},       {&from.q_norm, &layer.q_norm},
          {&from.k_norm, &layer.k_norm}};
      for (const auto& [values, there] : vectors) *there = loader.vector(*values);
      layers_.push_back(layer);
    }
    return loader.used();
  };
  Loader counting(nullptr);
  const std::size_t bytes = walk(counting);
  weights_ = static_cast<std::uint8_t*>(device::allocate(bytes));
  device::clear(weights_, bytes);  // rows are padded with zeros
  Loader loader(weights_);
  walk(loader);
  check(cudaSuccess, "Loading a model");
}

GpuModel::GpuModel(std::shared_ptr<const Model> model, std::unique_ptr<Cublas> cublas)
    : model_(std::move(model)), cublas_(std::move(cublas)) {
  const char* graphs = std::getenv("INNERKV_CUDA_GRAPHS");
  graphs_ = !graphs || std::string_view(graphs) != "0";
  try {
    load();
  } catch (...) {
    device::release(weights_);
    throw;
  }
}

GpuModel::~GpuModel() { device::release(weights_); }

std::string GpuModel::products() const { return cublas_ ? cublas_->name() : "our own tensor-core kernel"; }

// ---- rounds ----

/// Memory of a round, counted first and then handed out.
class GpuModel::Room {
 public:
  explicit Room(std::uint8_t* base) : base_(base) {}
  std::size_t used() const { return used_; }
  template <class T>
  void take(T*& to, std::size_t count) {
    to = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (sizeof(T) * count + 255) / 256 * 256;
  }

 private:
  std::uint8_t* base_;
  std::size_t used_ = 0;
};

void GpuModel::place(Room& room, int rows) {
  const ModelConfig& config = model_->config();
  const std::size_t n = at(rows), D = at(config.head_dim), cache_dim = at(config.cache_head_dim()),
                    queries = at(config.query_heads), keys = at(config.kv_heads),
                    vocabulary = at(config.vocabulary), inner = at(config.intermediate);
  const int widest = std::max({config.hidden, config.query_heads * config.head_dim, config.intermediate});
  const std::size_t stride = at(padded_row(widest)), scored = at(kScoredRows);
  room.take(residual_, n * at(config.hidden));
  room.take(qkv_, n * (queries + 2 * keys) * D);
  room.take(q_, n * queries * cache_dim);
  room.take(out_, n * queries * cache_dim);
  room.take(k_, n * keys * cache_dim);
  room.take(v_, n * keys * cache_dim);
  room.take(gate_, n * inner);
  room.take(up_, n * inner);
  room.take(observed_, observe_ ? n * (queries + keys) * D : 0);
  const std::size_t x_rows = std::max(n, scored);  // score() takes rows in other numbers than the round's
  room.take(x_.floats, x_rows * stride);
  room.take(x_.codes, at(kFewTokens) * stride);
  room.take(x_.steps, at(kFewTokens) * stride / 32);
  room.take(x_.totals, at(kFewTokens) * stride / 16);
  room.take(x_.scales, x_rows);
  room.take(logits_, std::min(n, scored) * vocabulary);
  room.take(nll_, scored);
  room.take(targets_, scored);
  x_.halves = reinterpret_cast<std::uint16_t*>(x_.floats);  // a product of many rows reads one of the two
  const bool many = bytes_ && rows > kFewTokens;
  panel_rows_ = std::min(std::max(kRowPadding, static_cast<int>(kPanelBytes / (2 * stride))), 32768);
  room.take(panel_, many ? at(panel_rows_) * stride : 0);
  room.take(sums_, many ? x_rows * at(panel_rows_) : 0);
}

void GpuModel::begin(const Round& round) {
  rows_ = round.rows();
  bytes_ = round.byte_activations;
  observe_ = round.observe;
  Room counting(nullptr);
  place(counting, rows_);
  Room room(rows_memory_.reserve(counting.used()));
  place(room, rows_);
  if (graphs_ && rows_ <= kFewTokens && !observe_) recording_.begin();

  const std::size_t angles = round.cos.size();
  Upload upload(uploads_,
                Upload::room<int>(at(rows_) + 1) + 2 * Upload::room<float>(angles) + Upload::room<int>(1));
  int *tokens, *bad;
  float *cos, *sin;
  const int* tokens_there = upload.add(at(rows_), &tokens);
  cos_ = upload.add(angles, &cos);
  sin_ = upload.add(angles, &sin);
  first_bad_ = upload.add(1, &bad);
  std::copy(round.tokens.begin(), round.tokens.end(), tokens);
  std::copy(round.cos.begin(), round.cos.end(), cos);
  std::copy(round.sin.begin(), round.sin.end(), sin);
  *bad = INT_MAX;
  upload.flush();
  check(embed(embed_, tokens_there, rows_, residual_, device::stream()), "Looking tokens up");
}

/// Of a layer: weighted, or bare where the model's are.
RowsArgs GpuModel::normed(const float* weight) const {
  RowsArgs rows;
  rows.rows = rows_;
  rows.weight = weight;
  rows.norm = model_->config().bare_norms ? RowNorm::kBare : RowNorm::kWeighted;
  return rows;
}

/// Before o and down, where only models with bare norms have one.
RowsArgs GpuModel::bare() const {
  RowsArgs rows = normed(nullptr);
  if (rows.norm == RowNorm::kWeighted) rows.norm = RowNorm::kNone;
  return rows;
}

RowForm GpuModel::form_of(const MatrixArgs& matrix, int rows) const {
  if (!bytes_) return RowForm::kFloats;
  if (rows > kFewTokens) return RowForm::kHalves;
  return is_quantised(matrix.type) ? RowForm::kBytes : RowForm::kFloats;
}

void GpuModel::multiply(RowSource source, RowsArgs rows, std::span<const ProductArgs> products) {
  rows.epsilon = model_->config().rms_epsilon;
  rows.head_dim = model_->config().head_dim;
  rows.cache_dim = model_->config().cache_head_dim();
  rows.out = x_;
  rows.out.stride = x_.stride = padded_row(rows.columns);
  for (const RowForm form : {RowForm::kBytes, RowForm::kFloats, RowForm::kHalves}) {
    std::vector<ProductArgs> wanted;
    for (const ProductArgs& product : products)
      if (form_of(product.weight, rows.rows) == form) wanted.push_back(product);
    if (wanted.empty()) continue;
    check(prepare_rows(source, form, rows, device::stream()), "Preparing rows");
    if (form == RowForm::kHalves) {
      for (const ProductArgs& product : wanted) multiply_many(product, rows.rows);
      continue;
    }
    const auto type = [](const ProductArgs& product) { return product.weight.type; };
    std::stable_sort(wanted.begin(), wanted.end(),
                     [&](const ProductArgs& a, const ProductArgs& b) { return type(a) < type(b); });
    for (std::size_t first = 0, end; first < wanted.size(); first = end) {
      for (end = first + 1; end < wanted.size() && type(wanted[end]) == type(wanted[first]);) ++end;
      const auto run = form == RowForm::kBytes ? multiply_bytes : multiply_floats;
      check(run(&wanted[first], static_cast<int>(end - first), x_, rows.rows, device::stream()),
            "Multiplying weights");
    }
  }
}

void GpuModel::multiply_many(const ProductArgs& product, int rows) {
  const MatrixArgs& matrix = product.weight;
  for (int first = 0; first < matrix.rows; first += panel_rows_) {
    const int count = std::min(panel_rows_, matrix.rows - first);
    check(dequantise_halves(matrix, first, count, panel_, x_.stride, device::stream()), "Unpacking weights");
    device::flush();  // cuBLAS knows nothing of recordings
    if (!cublas_ || !cublas_->multiply(panel_, x_.halves, count, rows, x_.stride, sums_))
      check(multiply_halves(panel_, x_.halves, count, rows, x_.stride, sums_, device::stream()),
            "Multiplying weights");
    check(finish_halves(product, sums_, x_.scales, first, count, rows, device::stream()),
          "Multiplying weights");
  }
}

HeadRows GpuModel::heads(int index) {
  const ModelConfig& config = model_->config();
  const Layer& layer = layers_[at(index)];
  const int D = config.head_dim, width = (config.query_heads + 2 * config.kv_heads) * D;
  float *const k_at = qkv_ + std::ptrdiff_t{config.query_heads} * D, *const v_at =
                                                                         k_at +
                                                                         std::ptrdiff_t{config.kv_heads} * D;
  const ProductArgs products[] = {{layer.q, layer.q_bias, qkv_, width, false},
                                  {layer.k, layer.k_bias, k_at, width, false},
                                  {layer.v, layer.v_bias, v_at, width, false}};
  RowsArgs rows = normed(layer.attn_norm);
  rows.x = residual_;
  rows.columns = config.hidden;
  multiply(RowSource::kPlain, rows, products);

  HeadsArgs heads;
  heads.qkv = qkv_;
  heads.q_norm = layer.q_norm;
  heads.k_norm = layer.k_norm;
  heads.cos = cos_;
  heads.sin = sin_;
  heads.q = q_;
  heads.k = k_;
  heads.v = v_;
  heads.observed = observe_ ? observed_ : nullptr;
  heads.first_bad = first_bad_;
  heads.rows = rows_;
  heads.query_heads = config.query_heads;
  heads.kv_heads = config.kv_heads;
  heads.head_dim = D;
  heads.cache_dim = config.cache_head_dim();
  heads.pairs = static_cast<int>(config.theta.size());
  heads.layer = index;
  heads.epsilon = config.rms_epsilon;
  heads.half_layout = config.half_layout;
  check(prepare_heads(heads, device::stream()), "Preparing heads");
  return {q_, out_, k_, v_, true};
}

ObservedRows GpuModel::observed() {
  const ModelConfig& config = model_->config();
  const std::ptrdiff_t D = config.head_dim, stride = (config.query_heads + config.kv_heads) * D;
  observed_rows_.resize(at(rows_) * static_cast<std::size_t>(stride));
  device::copy(observed_rows_.data(), observed_, sizeof(float) * observed_rows_.size());
  check(cudaSuccess, "Observing heads");
  return {observed_rows_.data(), observed_rows_.data() + config.query_heads * D, stride};
}

void GpuModel::finish(int index) {
  const ModelConfig& config = model_->config();
  const Layer& layer = layers_[at(index)];
  const auto add_to_residual = [&](const MatrixArgs& weight) {
    return ProductArgs{weight, nullptr, residual_, config.hidden, true};
  };
  RowsArgs rows = bare();
  rows.x = out_;
  rows.columns = config.query_heads * config.head_dim;
  const ProductArgs output = add_to_residual(layer.o);
  multiply(RowSource::kHeads, rows, {&output, 1});

  rows = normed(layer.ffn_norm);
  rows.x = residual_;
  rows.columns = config.hidden;
  const ProductArgs inner[] = {{layer.gate, nullptr, gate_, config.intermediate, false},
                               {layer.up, nullptr, up_, config.intermediate, false}};
  multiply(RowSource::kPlain, rows, inner);

  rows = bare();
  rows.x = gate_;
  rows.y = up_;
  rows.columns = config.intermediate;
  const ProductArgs down = add_to_residual(layer.down);
  multiply(RowSource::kGated, rows, {&down, 1});
}

void GpuModel::score(int first, std::span<const ScoredRow> scored) {
  const ModelConfig& config = model_->config();
  const std::size_t vocabulary = at(config.vocabulary), count = scored.size();
  RowsArgs rows;
  rows.x = residual_ + std::ptrdiff_t{first} * config.hidden;
  rows.weight = norm_;
  rows.norm = RowNorm::kWeighted;
  rows.rows = static_cast<int>(count);
  rows.columns = config.hidden;
  const ProductArgs head{head_, nullptr, logits_, config.vocabulary, false};
  multiply(RowSource::kPlain, rows, {&head, 1});
  // Rows that follow each other here and there are one copy.
  for (std::size_t i = 0, end; i < count; i = end) {
    const float* const from = logits_ + i * vocabulary;
    float* const to = scored[i].logits;
    for (end = i + 1; to && end < count && scored[end].logits == to + (end - i) * vocabulary;) ++end;
    if (to) device::copy(to, from, sizeof(float) * (end - i) * vocabulary);
  }
  if (std::any_of(scored.begin(), scored.end(), [](const ScoredRow& row) { return row.nll != nullptr; })) {
    std::int32_t targets[kScoredRows];
    float nll[kScoredRows];
    for (std::size_t i = 0; i < count; ++i) targets[i] = scored[i].nll ? scored[i].target : -1;
    device::copy(targets_, targets, sizeof(int) * count);
    check(score_rows(logits_, targets_, rows.rows, config.vocabulary, nll_, device::stream()),
          "Scoring tokens");
    device::copy(nll, nll_, sizeof(float) * count);
    for (std::size_t i = 0; i < count; ++i)
      if (scored[i].nll) *scored[i].nll = nll[i];
  }
  check(cudaSuccess, "Scoring tokens");
}

void GpuModel::end() {
  recording_.end();
  int layer = 0;
  device::copy(&layer, first_bad_, sizeof layer);
  check(cudaSuccess, "A forward pass");
  if (layer != INT_MAX) throw not_finite_in(layer);
}

}  // namespace innerkv::gpu
