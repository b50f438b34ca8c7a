#include "model.h"

#include <cmath>
#include <map>
#include <set>

#include "../core/error.h"
#include "../format/spec.h"
#include "kernels.h"

namespace innerkv {

namespace {

constexpr int kMaxSize = 1 << 24;

void check(bool condition, const std::string& message) {
  if (!condition) throw Error(ErrorCode::kInvalidArgument, message);
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text.empty() ? "[]" : text + "]";
}

void validate(const ModelConfig& config) {
  const auto size = [](int value, int most, const char* name) {
    check(value >= 1 && value <= most,
          std::string(name) + " of a model must lie between 1 and " + std::to_string(most) + ".");
  };
  size(config.layers, 4096, "layers");
  size(config.hidden, kMaxSize, "hidden");
  size(config.intermediate, kMaxSize, "intermediate");
  size(config.kv_heads, 4096, "kvHeads");
  size(config.query_heads, 65536, "queryHeads");
  size(config.head_dim, kMaxHeadDim, "headDim");
  size(config.vocabulary, kMaxSize, "vocabulary");
  check(config.query_heads % config.kv_heads == 0, "queryHeads must be a multiple of kvHeads.");
  check(config.query_heads <= kMaxSize / config.head_dim, "The heads of a model hold too many channels.");
  check(std::isfinite(config.rms_epsilon) && config.rms_epsilon >= 0, "rmsEpsilon must not be negative.");
  check(!config.theta.empty() && 2 * config.theta.size() <= static_cast<std::size_t>(config.head_dim),
        "A model needs RoPE frequencies for at most headDim channels.");
  for (const double theta : config.theta) check(std::isfinite(theta), "RoPE frequencies must be finite.");
}

/// Finds, checks and counts tensors.
class Tensors {
 public:
  Tensors(const std::vector<TensorPlace>& places, std::vector<std::shared_ptr<Mapping>>& files) {
    std::map<std::string, const Mapping*> opened;
    for (const TensorPlace& place : places) {
      const Mapping*& file = opened[place.path];
      if (!file) {
        files.push_back(std::make_shared<Mapping>(place.path));
        file = files.back().get();
      }
      const std::string what = "Tensor '" + place.name + "' ";
      const std::int64_t size = static_cast<std::int64_t>(file->bytes());
      check(
          place.offset >= 0 && place.bytes >= 0 && place.offset <= size && place.bytes <= size - place.offset,
          what + "lies outside its file of " + std::to_string(size) +
              " bytes: " + std::to_string(place.bytes) + " bytes at " + std::to_string(place.offset) + ".");
      check(found_.emplace(place.name, Found{&place, file->data() + place.offset}).second,
            what + "is there twice.");
    }
  }

  Weight matrix(const std::string& name, int rows, int columns) { return read(name, {rows, columns}, true); }
  Weight matrix_if_there(const std::string& name, int rows, int columns) {
    return read(name, {rows, columns}, false);
  }

  std::vector<float> vector(const std::string& name, int size, bool needed) {
    const Weight row = read(name, {size}, needed);
    if (!row) return {};
    std::vector<float> values(static_cast<std::size_t>(size));
    scalar_model_kernels()->dequantise(row.type, row.data, size, values.data());
    for (float& value : values) value *= row.scale;
    for (const float value : values)
      check(std::isfinite(value), "Tensor '" + name + "' holds a number that is not finite.");
    return values;
  }

  /// Throws when tensors were never asked for: the model would not be the one in the file.
  void all_used() const {
    for (const auto& [name, found] : found_)
      check(used_.count(name) > 0, "A model of this shape has no place for tensor '" + name + "'.");
  }

 private:
  struct Found {
    const TensorPlace* place;
    const std::uint8_t* data;
  };

  Weight read(const std::string& name, const std::vector<std::int64_t>& shape, bool needed) {
    const auto at = found_.find(name);
    if (at == found_.end()) {
      check(!needed, "The model lacks tensor '" + name + "' " + text_of(shape) + ".");
      return {};
    }
    used_.insert(name);
    const TensorPlace& place = *at->second.place;
    const TensorTypeInfo& info = info_of(place.type);
    check(place.shape == shape, "Tensor '" + name + "' has the shape " + text_of(place.shape) +
                                    " instead of " + text_of(shape) + ".");
    const std::int64_t columns = shape.back(), rows = shape.size() > 1 ? shape[0] : 1;
    check(columns % info.elements == 0, "Tensor '" + name + "' of type " + info.name +
                                            " must have a multiple of " + std::to_string(info.elements) +
                                            " columns, not " + std::to_string(columns) + ".");
    const std::int64_t bytes = columns / info.elements * info.bytes * rows;
    check(place.bytes == bytes, "Tensor '" + name + "' holds " + std::to_string(place.bytes) + " bytes; " +
                                    info.name + " " + text_of(shape) + " needs " + std::to_string(bytes) +
                                    ".");
    check(std::isfinite(place.scale), "Tensor '" + name + "' has a scale that is not finite.");
    return {place.type, static_cast<int>(rows), static_cast<int>(columns), at->second.data, place.scale};
  }

  std::map<std::string, Found> found_;
  std::set<std::string> used_;
};

}  // namespace

int ModelConfig::cache_head_dim() const {
  for (const int size : kHeadDims)
    if (size >= head_dim) return size;
  return kMaxHeadDim;
}

Model::Model(ModelConfig config, const std::vector<TensorPlace>& places) : config_(std::move(config)) {
  validate(config_);
  Tensors tensors(places, files_);
  const int hidden = config_.hidden, heads = config_.query_heads * config_.head_dim,
            kv_heads = config_.kv_heads * config_.head_dim;
  embed_ = tensors.matrix("embed", config_.vocabulary, hidden);
  head_ = tensors.matrix_if_there("head", config_.vocabulary, hidden);
  norm_ = tensors.vector("norm", hidden, true);
  const auto count = [this](const Weight& weight) {
    bytes_per_token_ += weight.row_bytes() * static_cast<std::size_t>(weight.rows);
    return weight;
  };
  count(head());
  for (int i = 0; i < config_.layers; ++i) {
    const auto name = [i](const char* part) { return "layers." + std::to_string(i) + "." + part; };
    const auto matrix = [&](const char* part, int rows, int columns) {
      return count(tensors.matrix(name(part), rows, columns));
    };
    ModelLayer layer;
    layer.attn_norm = tensors.vector(name("attnNorm"), hidden, !config_.bare_norms);
    layer.q = matrix("q", heads, hidden);
    layer.k = matrix("k", kv_heads, hidden);
    layer.v = matrix("v", kv_heads, hidden);
    layer.o = matrix("o", hidden, heads);
    layer.q_bias = tensors.vector(name("qBias"), heads, false);
    layer.k_bias = tensors.vector(name("kBias"), kv_heads, false);
    layer.v_bias = tensors.vector(name("vBias"), kv_heads, false);
    layer.q_norm = tensors.vector(name("qNorm"), config_.head_dim, false);
    layer.k_norm = tensors.vector(name("kNorm"), config_.head_dim, false);
    layer.ffn_norm = tensors.vector(name("ffnNorm"), hidden, !config_.bare_norms);
    layer.gate = matrix("gate", config_.intermediate, hidden);
    layer.up = matrix("up", config_.intermediate, hidden);
    layer.down = matrix("down", hidden, config_.intermediate);
    layers_.push_back(std::move(layer));
  }
  tensors.all_used();
}

}  // namespace innerkv
