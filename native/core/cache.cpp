#include "cache.h"

#include <algorithm>
#include <utility>

#include "error.h"
#include "sequence.h"

namespace innerkv {

namespace {
CacheConfig validated(CacheConfig config) {
  validate(config);
  return config;
}
}  // namespace

Cache::Cache(std::shared_ptr<Backend> backend, CacheConfig config)
    : backend_(std::move(backend)),
      config_(validated(std::move(config))),
      prints_(fingerprints(config_)),
      rotations_(config_.rope, config_.head_dim),
      pool_(*backend_, config_.budget_bytes) {}

Cache::~Cache() {
  for (const Idle& idle : idle_) backend_->free_memory(idle.memory, idle.bytes);
}

Spare Cache::spare(std::size_t bytes) {
  Spare spare;
  spare.cache_ = shared_from_this();
  const auto fits = std::find_if(idle_.begin(), idle_.end(), [&](const Idle& i) { return i.bytes >= bytes; });
  if (fits != idle_.end()) {
    spare.memory_ = fits->memory;
    spare.bytes_ = fits->bytes;
    *fits = idle_.back();
    idle_.pop_back();
    return spare;
  }
  if (!idle_.empty()) {  // one that is too small makes room
    backend_->free_memory(idle_.back().memory, idle_.back().bytes);
    idle_.pop_back();
    --spares_;
  }
  idle_.reserve(spares_ + 1);
  spare.memory_ = static_cast<std::uint8_t*>(backend_->allocate_memory(bytes));
  spare.bytes_ = bytes;
  ++spares_;
  return spare;
}

Spare::~Spare() {
  if (memory_) cache_->idle_.push_back({memory_, bytes_});
}

std::unique_ptr<Sequence> Cache::sequence() { return std::make_unique<Sequence>(shared_from_this()); }

Estimate estimate(const CacheConfig& config, std::int64_t tokens, std::int64_t sequences) {
  validate(config);
  require(tokens >= 0 && sequences >= 0, "tokens and sequences must not be negative.");
  Estimate sum{};
  const std::size_t heads = static_cast<std::size_t>(config.kv_heads),
                    D = static_cast<std::size_t>(config.head_dim), many = static_cast<std::size_t>(sequences);
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerScheme& scheme = config.scheme(layer);
    const PageLayout page(scheme.k, scheme.v, config.head_dim);
    const std::int64_t body = tokens - scheme.sink - scheme.recent;
    const std::size_t pages =
        body > 0 ? static_cast<std::size_t>((body + kPageTokens - 1) / kPageTokens) * heads * many : 0;
    for (const TensorLayout* tensor : {&page.k, &page.v}) {
      const std::size_t scales = std::size_t{2} * static_cast<std::size_t>(tensor->scales()),
                        dense = tensor->spec.dense_zeros() ? scales : 0;
      sum.code_bytes += pages * tensor->code_bytes();
      sum.scale_bytes += pages * scales;
      sum.zero_bytes +=
          pages * (tensor->spec.compact_zeros() ? scales : dense);  // compact ones: at worst one a group
      sum.outlier_bytes += pages * tensor->outlier_bytes();
      sum.padding_bytes +=
          pages * (tensor->bytes() - tensor->code_bytes() - scales - dense - tensor->outlier_bytes());
    }
    sum.window_bytes += tokens > 0 ? config.window_bytes(scheme) * many : 0;
    sum.fp16_bytes += std::size_t{2} * 2 * static_cast<std::size_t>(tokens) * heads * D * many;
  }
  return sum;
}

}  // namespace innerkv
