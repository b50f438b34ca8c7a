#include "runner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "../core/error.h"
#include "stopwatch.h"

namespace innerkv {

namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

[[noreturn]] void fail(ErrorCode code, const std::string& message) { throw Error(code, message); }

}  // namespace

Runner::Runner(std::shared_ptr<const Model> model, std::unique_ptr<ModelDevice> device, ThreadPool& pool)
    : model_(std::move(model)), device_(std::move(device)), pool_(pool) {}

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
      run(parts, options, moments, aborted);
      times_.products += device_->product_seconds();
    }
  } catch (...) {
    device_->cancel();
    for (std::size_t i = 0; i < items.size(); ++i) items[i].sequence->restore(points[i]);
    throw;
  }
}

void Runner::run(std::span<const Part> parts, const ForwardOptions& options, Moments* moments,
                 const std::atomic<bool>* aborted) {
  const ModelConfig& config = model_->config();
  Round round;
  round.byte_activations = options.byte_activations;
  round.observe = moments != nullptr;
  for (const Part& part : parts)
    for (int i = 0; i < part.count; ++i) {
      round.tokens.push_back(part.item->tokens[at(part.first + i)]);
      for (const double theta : config.theta) {
        const double angle = (part.position + i) * theta;
        round.cos.push_back(static_cast<float>(std::cos(angle)));
        round.sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  device_->begin(round);
  for (int layer = 0; layer < config.layers; ++layer) {
    if (aborted && aborted->load()) fail(ErrorCode::kAborted, "The call was aborted.");
    const HeadRows heads = device_->heads(layer);
    if (moments) {
      const ObservedRows rows = device_->observed();
      for (const Part& part : parts)
        moments->add(layer, rows.q + part.row * rows.stride, rows.k + part.row * rows.stride, rows.stride,
                     part.count, part.position, pool_);
    }
    attend(layer, heads, parts, options.step, aborted);
    device_->finish(layer);
  }
  score(parts);
  device_->end();
}

void Runner::attend(int layer, const HeadRows& heads, std::span<const Part> parts, int step,
                    const std::atomic<bool>* aborted) {
  const ModelConfig& config = model_->config();
  const std::size_t cache_dim = at(config.cache_head_dim()), q_row = at(config.query_heads) * cache_dim,
                    k_row = at(config.kv_heads) * cache_dim;
  int longest = 0;
  for (const Part& part : parts) longest = std::max(longest, part.count);
  double ignored = 0;
  double &append_time = heads.on_device ? ignored : times_.append,
         &attend_time = heads.on_device ? ignored : times_.attend;
  const auto given = [&](const auto* numbers) {
    const TensorView host(numbers);
    return heads.on_device ? TensorView::device(numbers, host.dtype, true) : host;
  };
  Cache& cache = parts[0].item->sequence->cache();
  std::vector<AppendItem> appended;
  std::vector<BatchItem> batch;
  for (int first = 0; first < longest; first += std::min(step, longest)) {
    appended.clear();
    batch.clear();
    for (const Part& part : parts) {
      const int count = std::min(step, part.count - first);
      if (count <= 0) continue;
      const std::size_t row = at(part.row + first);
      float* out = heads.out + row * q_row;
      appended.push_back(
          {part.item->sequence, given(heads.k + row * k_row), given(heads.v + row * k_row), count});
      batch.push_back({part.item->sequence,
                       given(heads.q + row * q_row),
                       heads.on_device ? Target::device(out) : out,
                       {},
                       nullptr,
                       count});
    }
    {
      const Stopwatch time(append_time);
      append_batch(cache, layer, appended);
    }
    const Stopwatch time(attend_time);
    if (!attend_batch(cache, layer, batch, true, aborted)) fail(ErrorCode::kAborted, "The call was aborted.");
  }
}

/// Logits and losses of the rows that want them: neighbours together, whichever sequences they belong to.
void Runner::score(std::span<const Part> parts) const {
  const std::ptrdiff_t vocabulary = model_->config().vocabulary;
  std::vector<ScoredRow> wanted;
  int first = 0;
  const auto flush = [&] {
    if (!wanted.empty()) device_->score(first, wanted);
    wanted.clear();
  };
  for (const Part& part : parts) {
    const ForwardItem& item = *part.item;
    const int first_logit = static_cast<int>(item.tokens.size()) - item.logit_rows;
    for (int i = 0; i < part.count; ++i) {
      const int token = part.first + i, row = part.row + i;
      ScoredRow scored;
      if (token >= first_logit) scored.logits = item.logits + (token - first_logit) * vocabulary;
      if (!item.targets.empty()) {
        item.nll[token] = 0;
        scored.target = item.targets[at(token)];
        if (scored.target >= 0) scored.nll = item.nll + token;
      }
      if (!scored.logits && !scored.nll) continue;
      if (wanted.size() == kScoredRows || row != first + static_cast<int>(wanted.size())) flush();
      if (wanted.empty()) first = row;
      wanted.push_back(scored);
    }
  }
  flush();
}

}  // namespace innerkv
