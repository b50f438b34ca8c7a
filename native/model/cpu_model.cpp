#include "cpu_model.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../core/error.h"
#include "stopwatch.h"

namespace innerkv {

namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

/// x / rms(x) * weight
void rms_norm(const float* x, const float* weight, int count, float epsilon, float* out) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float scale = static_cast<float>(1 / std::sqrt(sum / count + static_cast<double>(epsilon)));
  for (int i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

/// x / rms(x), and zeros stay
void bare_norm(const float* x, int count, float* out) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float scale = sum > 0 ? static_cast<float>(1 / std::sqrt(sum / count)) : 0.0f;
  for (int i = 0; i < count; ++i) out[i] = x[i] * scale;
}

void add_bias(float* x, const std::vector<float>& bias) {
  for (std::size_t i = 0; i < bias.size(); ++i) x[i] += bias[i];
}

}  // namespace

CpuModel::CpuModel(std::shared_ptr<const Model> model, std::shared_ptr<CpuBackend> backend)
    : model_(std::move(model)),
      backend_(std::move(backend)),
      kernels_(model_kernels(backend_->isa())),
      multiplier_(kernels_, backend_->pool()) {}

void CpuModel::each_row(int rows, auto&& body) {
  constexpr int kRun = 8;
  backend_->pool().run((rows + kRun - 1) / kRun, [&](int item, int) {
    for (int row = kRun * item; row < std::min(rows, kRun * (item + 1)); ++row) body(row);
  });
}

/// Without a weight: a bare norm.
void CpuModel::normalise(const std::vector<float>* weight, int first, int rows) {
  const int hidden = model_->config().hidden;
  each_row(rows, [&](int row) {
    const float* x = residual_.data() + at(first + row) * at(hidden);
    if (weight)
      rms_norm(x, weight->data(), hidden, model_->config().rms_epsilon, input_.row(row));
    else
      bare_norm(x, hidden, input_.row(row));
  });
}

void CpuModel::multiply(const Activations& x, int rows, std::span<const Product> products) {
  const Stopwatch time(product_seconds_);
  multiplier_.run(x, 0, rows, products, bytes_);
}

void CpuModel::add_residual() {
  const std::size_t hidden = at(model_->config().hidden);
  each_row(rows_, [&](int row) {
    for (std::size_t i = at(row) * hidden; i < at(row + 1) * hidden; ++i) residual_[i] += delta_[i];
  });
}

void CpuModel::begin(const Round& round) {
  const ModelConfig& config = model_->config();
  const int D = config.head_dim, cache_dim = config.cache_head_dim(),
            all_heads = config.query_heads + 2 * config.kv_heads, rows = round.rows();
  rows_ = rows;
  bytes_ = round.byte_activations;
  observe_ = round.observe;
  cos_ = round.cos;
  sin_ = round.sin;
  residual_.resize(at(rows) * at(config.hidden));
  delta_.resize(residual_.size());
  input_.resize(rows, config.hidden);
  heads_out_.resize(rows, config.query_heads * D);
  hidden_.resize(rows, config.intermediate);
  up_.assign(at(rows) * at(padded(config.intermediate)), 0.0f);
  qkv_.resize(at(rows) * at(all_heads) * at(D));
  q_.assign(at(rows) * at(config.query_heads) * at(cache_dim), 0.0f);
  out_.resize(q_.size());
  k_.assign(at(rows) * at(config.kv_heads) * at(cache_dim), 0);
  v_.assign(k_.size(), 0);
  product_seconds_ = 0;
  const Weight& embed = model_->embed();
  for (int row = 0; row < rows; ++row) {
    float* embedded = residual_.data() + at(row) * at(config.hidden);
    kernels_.dequantise(embed.type, embed.row(round.tokens[at(row)]), config.hidden, embedded);
    if (embed.scale != 1)
      for (int c = 0; c < config.hidden; ++c) embedded[c] *= embed.scale;
  }
}

/// Rotates head `index` of a row of qkv_, queries first, then keys, in place.
void CpuModel::rotate_row(int row, int index) {
  const ModelConfig& config = model_->config();
  const int D = config.head_dim, pairs = static_cast<int>(config.theta.size());
  const int all_heads = config.query_heads + 2 * config.kv_heads;
  float* x = qkv_.data() + (at(row) * at(all_heads) + at(index)) * at(D);
  const float *c = cos_.data() + at(row) * at(pairs), *s = sin_.data() + at(row) * at(pairs);
  for (int pair = 0; pair < pairs; ++pair) {
    float &a = x[config.half_layout ? pair : 2 * pair],
          &b = x[config.half_layout ? pair + pairs : 2 * pair + 1];
    const float first = a * c[pair] - b * s[pair], second = b * c[pair] + a * s[pair];
    a = first;
    b = second;
  }
}

HeadRows CpuModel::heads(int layer_index) {
  const ModelConfig& config = model_->config();
  const ModelLayer& layer = model_->layer(layer_index);
  const int D = config.head_dim, cache_dim = config.cache_head_dim(), queries = config.query_heads,
            keys = config.kv_heads;
  const std::ptrdiff_t width = std::ptrdiff_t{queries + 2 * keys} * D, k_at = std::ptrdiff_t{queries} * D,
                       v_at = k_at + std::ptrdiff_t{keys} * D;
  normalise(config.bare_norms ? nullptr : &layer.attn_norm, 0, rows_);
  const Product projections[] = {{&layer.q, qkv_.data(), width},
                                 {&layer.k, qkv_.data() + k_at, width},
                                 {&layer.v, qkv_.data() + v_at, width}};
  multiply(input_, rows_, projections);
  each_row(rows_, [&](int row) {
    float* x = qkv_.data() + row * width;
    add_bias(x, layer.q_bias);
    add_bias(x + k_at, layer.k_bias);
    add_bias(x + v_at, layer.v_bias);
    const auto norm = [&](const std::vector<float>& weight, float* head) {
      if (!weight.empty()) rms_norm(head, weight.data(), D, config.rms_epsilon, head);
    };
    for (int head = 0; head < queries; ++head) norm(layer.q_norm, x + std::ptrdiff_t{head} * D);
    for (int head = 0; head < keys; ++head) norm(layer.k_norm, x + k_at + std::ptrdiff_t{head} * D);
  });
  if (observe_) before_ = qkv_;

  std::atomic<bool> finite{true};
  each_row(rows_, [&](int row) {
    const float* x = qkv_.data() + row * width;
    for (int head = 0; head < queries + keys; ++head) rotate_row(row, head);
    bool good = true;
    for (int head = 0; head < queries; ++head)
      std::copy_n(x + std::ptrdiff_t{head} * D, D,
                  q_.data() + (at(row) * at(queries) + at(head)) * at(cache_dim));
    for (int head = 0; head < keys; ++head) {
      const std::size_t to = (at(row) * at(keys) + at(head)) * at(cache_dim);
      good &= backend_->kernels().float_to_half(x + k_at + std::ptrdiff_t{head} * D, k_.data() + to, at(D));
      good &= backend_->kernels().float_to_half(x + v_at + std::ptrdiff_t{head} * D, v_.data() + to, at(D));
    }
    if (!good) finite = false;
  });
  if (!finite) throw not_finite_in(layer_index);
  return {q_.data(), out_.data(), k_.data(), v_.data(), false};
}

ObservedRows CpuModel::observed() {
  const ModelConfig& config = model_->config();
  const std::ptrdiff_t D = config.head_dim;
  return {before_.data(), before_.data() + config.query_heads * D,
          (config.query_heads + 2 * config.kv_heads) * D};
}

void CpuModel::finish(int layer_index) {
  const ModelConfig& config = model_->config();
  const ModelLayer& layer = model_->layer(layer_index);
  const int D = config.head_dim, queries = config.query_heads, cache_dim = config.cache_head_dim();
  each_row(rows_, [&](int row) {
    for (int head = 0; head < queries; ++head)
      std::copy_n(out_.data() + (at(row) * at(queries) + at(head)) * at(cache_dim), D,
                  heads_out_.row(row) + std::ptrdiff_t{head} * D);
    if (config.bare_norms) bare_norm(heads_out_.row(row), queries * D, heads_out_.row(row));
  });
  const Product output{&layer.o, delta_.data(), config.hidden};
  multiply(heads_out_, rows_, {&output, 1});
  add_residual();

  const int width = padded(config.intermediate);
  normalise(config.bare_norms ? nullptr : &layer.ffn_norm, 0, rows_);
  const Product products[] = {{&layer.gate, hidden_.row(0), width}, {&layer.up, up_.data(), width}};
  multiply(input_, rows_, products);
  each_row(rows_, [&](int row) {
    kernels_.swiglu(hidden_.row(row), up_.data() + at(row) * at(width), width);
    if (config.bare_norms) bare_norm(hidden_.row(row), config.intermediate, hidden_.row(row));
  });
  const Product down{&layer.down, delta_.data(), config.hidden};
  multiply(hidden_, rows_, {&down, 1});
  add_residual();
}

void CpuModel::score(int first, std::span<const ScoredRow> rows) {
  const ModelConfig& config = model_->config();
  const std::size_t vocabulary = at(config.vocabulary);
  const int count = static_cast<int>(rows.size());
  normalise(&model_->norm(), first, count);
  // Where one row's logits follow another's, as those of one sequence do, the product writes them there.
  bool straight = rows[0].logits != nullptr;
  for (std::size_t i = 1; i < rows.size(); ++i)
    straight = straight && rows[i].logits == rows[0].logits + i * vocabulary;
  if (!straight) logits_.resize(std::max(logits_.size(), rows.size() * vocabulary));
  float* const logits = straight ? rows[0].logits : logits_.data();
  const Product head{&model_->head(), logits, config.vocabulary};
  multiply(input_, count, {&head, 1});
  backend_->pool().run(count, [&](int i, int) {
    const ScoredRow& row = rows[at(i)];
    const float* x = logits + at(i) * vocabulary;
    if (row.logits && !straight) std::copy_n(x, vocabulary, row.logits);
    if (!row.nll) return;
    const float largest = *std::max_element(x, x + vocabulary);
    *row.nll = static_cast<float>(std::log(kernels_.sum_exp(x, config.vocabulary, largest)) -
                                  (static_cast<double>(x[row.target]) - static_cast<double>(largest)));
  });
}

}  // namespace innerkv
