#include "runner.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>

#include "../core/error.h"

namespace innerkv {

namespace {

constexpr int kScoredRows = 64;  // rows of logits held at once while targets are scored

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

/// Adds the time that it lives to a sum of seconds.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(Clock::now() - started_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double& seconds_;
  const Clock::time_point started_ = Clock::now();
};

[[noreturn]] void fail(ErrorCode code, const std::string& message) { throw Error(code, message); }

}  // namespace

Runner::Runner(std::shared_ptr<const Model> model, std::shared_ptr<CpuBackend> backend)
    : model_(std::move(model)),
      backend_(std::move(backend)),
      kernels_(model_kernels(backend_->isa())),
      multiplier_(kernels_, backend_->pool()) {}

void Runner::check(std::span<const ForwardItem> items) const {
  const ModelConfig& model = model_->config();
  for (std::size_t i = 0; i < items.size(); ++i) {
    const ForwardItem& item = items[i];
    const CacheConfig& cache = item.sequence->cache().config();
    require(!item.tokens.empty(), "A forward pass needs at least one token.");
    require(item.tokens.size() <= at(1 << 24), "A forward pass takes at most 2^24 tokens of a sequence.");
    require(&item.sequence->cache() == &items[0].sequence->cache(), "A sequence of another cache.");
    for (std::size_t j = 0; j < i; ++j)
      require(items[j].sequence != item.sequence, "A batch must not name a sequence twice.");
    require(cache.layers == model.layers && cache.query_heads == model.query_heads &&
                cache.kv_heads == model.kv_heads && cache.head_dim == model.cache_head_dim(),
            "The cache has another shape than the model; make it with model.createCache().");
    require(cache.rope.theta.empty() ||
                (cache.rope.theta == model.theta && cache.rope.half_layout == model.half_layout),
            "The cache has other RoPE parameters than the model; make it with model.createCache().");
    for (int layer = 1; layer < model.layers; ++layer)
      require(item.sequence->tokens(layer) == item.sequence->tokens(0),
              "The layers of the sequence hold different numbers of tokens.");
    require(item.targets.empty() || item.targets.size() == item.tokens.size(),
            "There must be as many targets as tokens.");
    const auto known = [&](std::int32_t token) {
      if (token >= model.vocabulary)
        fail(ErrorCode::kInvalidArgument, "Token " + std::to_string(token) +
                                              " does not exist; the vocabulary has " +
                                              std::to_string(model.vocabulary) + " tokens.");
    };
    for (const std::int32_t token : item.tokens) {
      require(token >= 0, "Tokens must not be negative.");
      known(token);
    }
    for (const std::int32_t target : item.targets) known(target);
  }
}

void Runner::forward(std::span<const ForwardItem> items, const ForwardOptions& options, Moments* moments,
                     const std::atomic<bool>* aborted) {
  require(!items.empty(), "A forward pass needs at least one sequence.");
  require(options.chunk >= 1 && options.chunk <= 65536, "chunk must lie between 1 and 65536.");
  require(options.step >= 1, "step must be positive.");
  check(items);
  times_ = {};
  const Stopwatch all(times_.all);
  std::vector<Checkpoint> points;
  std::vector<int> done(items.size());
  for (const ForwardItem& item : items)
    points.push_back(item.sequence->checkpoint(static_cast<int>(item.tokens.size())));
  try {
    for (;;) {
      // Every sequence gets an equal share of the chunk, those with few tokens left give theirs to the
      // others.
      std::vector<Part> parts;
      int rows = 0, left = 0;
      for (std::size_t i = 0; i < items.size(); ++i)
        left += static_cast<int>(items[i].tokens.size()) > done[i];
      if (left == 0) break;
      for (std::size_t i = 0; i < items.size(); ++i) {
        const int more = static_cast<int>(items[i].tokens.size()) - done[i];
        if (more == 0) continue;
        const int count = std::min(more, std::max(1, (options.chunk - rows) / left--));
        parts.push_back({&items[i], done[i], count, rows, items[i].sequence->tokens(0)});
        rows += count;
        done[i] += count;
      }
      round(parts, rows, options, moments, aborted);
    }
  } catch (...) {
    for (std::size_t i = 0; i < items.size(); ++i) items[i].sequence->restore(points[i]);
    throw;
  }
}

void Runner::each_row(int rows, auto&& body) {
  constexpr int kRun = 8;
  backend_->pool().run((rows + kRun - 1) / kRun, [&](int item, int) {
    for (int row = kRun * item; row < std::min(rows, kRun * (item + 1)); ++row) body(row);
  });
}

void Runner::multiply(const Activations& x, int rows, std::span<const Product> products, bool bytes) {
  const Stopwatch time(times_.products);
  multiplier_.run(x, 0, rows, products, bytes);
}

void Runner::normalise(const std::vector<float>& weight, int rows) {
  const int hidden = model_->config().hidden;
  each_row(rows, [&](int row) {
    const float* x = residual_.data() + at(row) * at(hidden);
    if (model_->config().bare_norms)
      bare_norm(x, hidden, input_.row(row));
    else
      rms_norm(x, weight.data(), hidden, model_->config().rms_epsilon, input_.row(row));
  });
}

void Runner::add_residual(int rows) {
  const std::size_t hidden = at(model_->config().hidden);
  each_row(rows, [&](int row) {
    for (std::size_t i = at(row) * hidden; i < at(row + 1) * hidden; ++i) residual_[i] += delta_[i];
  });
}

void Runner::round(std::span<const Part> parts, int rows, const ForwardOptions& options, Moments* moments,
                   const std::atomic<bool>* aborted) {
  const ModelConfig& config = model_->config();
  const int D = config.head_dim, cache_dim = config.cache_head_dim(),
            all_heads = config.query_heads + 2 * config.kv_heads,
            pairs = static_cast<int>(config.theta.size());
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
  cos_.resize(at(rows) * at(pairs));
  sin_.resize(cos_.size());

  for (const Part& part : parts)
    for (int i = 0; i < part.count; ++i) {
      const std::size_t row = at(part.row + i);
      float* embedded = residual_.data() + row * at(config.hidden);
      kernels_.dequantise(model_->embed().type, model_->embed().row(part.item->tokens[at(part.first + i)]),
                          config.hidden, embedded);
      if (model_->embed().scale != 1)
        for (int c = 0; c < config.hidden; ++c) embedded[c] *= model_->embed().scale;
      for (int pair = 0; pair < pairs; ++pair) {
        const double angle = (part.position + i) * config.theta[at(pair)];
        cos_[row * at(pairs) + at(pair)] = static_cast<float>(std::cos(angle));
        sin_[row * at(pairs) + at(pair)] = static_cast<float>(std::sin(angle));
      }
    }
  for (int layer = 0; layer < config.layers; ++layer) {
    if (aborted && aborted->load()) fail(ErrorCode::kAborted, "The call was aborted.");
    attention(layer, parts, rows, options, moments, aborted);
    feed_forward(model_->layer(layer), rows, options.byte_activations);
  }
  score(parts, options.byte_activations);
}

/// Norms and rotates head `index` of a row of qkv_, queries first, then keys, in place.
void Runner::rotate_row(const ModelLayer& layer, int row, int index) {
  const ModelConfig& config = model_->config();
  const int D = config.head_dim, pairs = static_cast<int>(config.theta.size());
  const int all_heads = config.query_heads + 2 * config.kv_heads;
  float* x = qkv_.data() + (at(row) * at(all_heads) + at(index)) * at(D);
  const float *c = cos_.data() + at(row) * at(pairs), *s = sin_.data() + at(row) * at(pairs);
  (void)layer;
  for (int pair = 0; pair < pairs; ++pair) {
    float &a = x[config.half_layout ? pair : 2 * pair],
          &b = x[config.half_layout ? pair + pairs : 2 * pair + 1];
    const float first = a * c[pair] - b * s[pair], second = b * c[pair] + a * s[pair];
    a = first;
    b = second;
  }
}

void Runner::attention(int layer_index, std::span<const Part> parts, int rows, const ForwardOptions& options,
                       Moments* moments, const std::atomic<bool>* aborted) {
  const ModelConfig& config = model_->config();
  const ModelLayer& layer = model_->layer(layer_index);
  const int D = config.head_dim, cache_dim = config.cache_head_dim(), queries = config.query_heads,
            keys = config.kv_heads;
  const std::ptrdiff_t width = std::ptrdiff_t{queries + 2 * keys} * D, k_at = std::ptrdiff_t{queries} * D,
                       v_at = k_at + std::ptrdiff_t{keys} * D;
  normalise(layer.attn_norm, rows);
  const Product projections[] = {{&layer.q, qkv_.data(), width},
                                 {&layer.k, qkv_.data() + k_at, width},
                                 {&layer.v, qkv_.data() + v_at, width}};
  multiply(input_, rows, projections, options.byte_activations);
  each_row(rows, [&](int row) {
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
  if (moments)
    for (const Part& part : parts)
      moments->add(layer_index, qkv_.data() + part.row * width, qkv_.data() + part.row * width + k_at, width,
                   part.count, part.position, backend_->pool());

  std::atomic<bool> finite{true};
  each_row(rows, [&](int row) {
    const float* x = qkv_.data() + row * width;
    for (int head = 0; head < queries + keys; ++head) rotate_row(layer, row, head);
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
  if (!finite)
    fail(ErrorCode::kNotFinite, "Layer " + std::to_string(layer_index) +
                                    " of the model made a key or value that binary16 cannot hold.");

  const std::size_t q_row = at(queries) * at(cache_dim), k_row = at(keys) * at(cache_dim);
  int longest = 0;
  for (const Part& part : parts) longest = std::max(longest, part.count);
  std::vector<BatchItem> batch;
  for (int first = 0; first < longest; first += std::min(options.step, longest)) {
    batch.clear();
    for (const Part& part : parts) {
      const int count = std::min(options.step, part.count - first);
      if (count <= 0) continue;
      const std::size_t row = at(part.row + first);
      const Stopwatch time(times_.append);
      part.item->sequence->append(layer_index, k_.data() + row * k_row, v_.data() + row * k_row, count);
      batch.push_back(
          {part.item->sequence, q_.data() + row * q_row, out_.data() + row * q_row, nullptr, nullptr, count});
    }
    const Stopwatch time(times_.attend);
    if (!attend_batch(parts[0].item->sequence->cache(), layer_index, batch, true, aborted))
      fail(ErrorCode::kAborted, "The call was aborted.");
  }
  each_row(rows, [&](int row) {
    for (int head = 0; head < queries; ++head)
      std::copy_n(out_.data() + at(row) * q_row + at(head) * at(cache_dim), D,
                  heads_out_.row(row) + std::ptrdiff_t{head} * D);
    if (config.bare_norms) bare_norm(heads_out_.row(row), queries * D, heads_out_.row(row));
  });
  const Product output{&layer.o, delta_.data(), config.hidden};
  multiply(heads_out_, rows, {&output, 1}, options.byte_activations);
  add_residual(rows);
}

void Runner::feed_forward(const ModelLayer& layer, int rows, bool bytes) {
  const int width = padded(model_->config().intermediate);
  normalise(layer.ffn_norm, rows);
  const Product products[] = {{&layer.gate, hidden_.row(0), width}, {&layer.up, up_.data(), width}};
  multiply(input_, rows, products, bytes);
  each_row(rows, [&](int row) {
    kernels_.swiglu(hidden_.row(row), up_.data() + at(row) * at(width), width);
    if (model_->config().bare_norms)
      bare_norm(hidden_.row(row), model_->config().intermediate, hidden_.row(row));
  });
  const Product down{&layer.down, delta_.data(), model_->config().hidden};
  multiply(hidden_, rows, {&down, 1}, bytes);
  add_residual(rows);
}

/// Logits and losses of the rows that want them.
void Runner::score(std::span<const Part> parts, bool bytes) {
  const ModelConfig& config = model_->config();
  const std::ptrdiff_t vocabulary = config.vocabulary;
  for (const Part& part : parts) {
    const ForwardItem& item = *part.item;
    const int all = static_cast<int>(item.tokens.size()), first_logit = all - item.logit_rows;
    const int begin = item.targets.empty() ? std::max(part.first, first_logit) : part.first,
              end = part.first + part.count;
    for (int token = begin; token < end;) {
      const int count = std::min(kScoredRows, end - token), row = part.row + token - part.first;
      each_row(count, [&](int i) {
        rms_norm(residual_.data() + at(row + i) * at(config.hidden), model_->norm().data(), config.hidden,
                 config.rms_epsilon, input_.row(i));
      });
      const bool straight = token >= first_logit;  // all rows of logits are wanted
      float* logits = straight ? item.logits + (token - first_logit) * vocabulary : nullptr;
      if (!straight) {
        logits_.resize(at(kScoredRows) * at(config.vocabulary));
        logits = logits_.data();
      }
      const Product head{&model_->head(), logits, vocabulary};
      multiply(input_, count, {&head, 1}, bytes);
      if (!straight && token + count > first_logit)
        std::copy(logits + (first_logit - token) * vocabulary, logits + count * vocabulary, item.logits);
      if (!item.targets.empty())
        each_row(count, [&](int i) {
          const std::int32_t target = item.targets[at(token + i)];
          float& nll = item.nll[token + i];
          nll = 0;
          if (target < 0) return;
          const float *x = logits + i * vocabulary, largest = *std::max_element(x, x + vocabulary);
          nll = static_cast<float>(std::log(kernels_.sum_exp(x, config.vocabulary, largest)) -
                                   (static_cast<double>(x[target]) - static_cast<double>(largest)));
        });
      token += count;
    }
  }
}

}  // namespace innerkv
