// A model of the Llama family: shape, and weights that stay in their files. Nothing changes after it was
// made, so any number of caches and sequences may use it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mapping.h"
#include "tensor_type.h"

namespace innerkv {

struct ModelConfig {
  int layers = 0, hidden = 0, intermediate = 0, query_heads = 0, kv_heads = 0, head_dim = 0, vocabulary = 0;
  float rms_epsilon = 0;
  std::vector<double> theta;  // [rotary_dims / 2] radians per position
  bool half_layout = true;    // pairs (i, i + rotary_dims/2); otherwise (2i, 2i + 1)
  bool bare_norms = false;    // norms in layers have no weights, no epsilon, and stand before o and down too

  /// Channels of a head in the cache: the next size that caches have; the rest stays zero.
  int cache_head_dim() const;
};

/// A matrix [rows][columns], whole blocks row by row.
struct Weight {
  TensorType type = TensorType::kF32;
  int rows = 0, columns = 0;
  const std::uint8_t* data = nullptr;  // nullptr: the model has no such tensor
  float scale = 1;                     // of all numbers

  explicit operator bool() const { return data != nullptr; }
  std::size_t row_bytes() const {
    const TensorTypeInfo& info = info_of(type);
    return static_cast<std::size_t>(columns / info.elements) * static_cast<std::size_t>(info.bytes);
  }
  const std::uint8_t* row(int index) const { return data + static_cast<std::size_t>(index) * row_bytes(); }
};

struct ModelLayer {
  Weight q, k, v, o, gate, up, down;
  std::vector<float> attn_norm, ffn_norm;     // [hidden], or empty: bare norms
  std::vector<float> q_bias, k_bias, v_bias;  // [heads * head_dim] or empty
  std::vector<float> q_norm, k_norm;          // [head_dim] or empty
};

/// Where a tensor lies. Names: lib/model.
struct TensorPlace {
  std::string name, path;
  TensorType type = TensorType::kF32;
  std::vector<std::int64_t> shape;  // row-major, [out, in]
  std::int64_t offset = 0, bytes = 0;
  float scale = 1;
};

class Model {
 public:
  /// Throws Error{kInvalidArgument} for a shape that no cache can serve, a missing or superfluous tensor, and
  /// a tensor of the wrong shape, size or place.
  Model(ModelConfig config, const std::vector<TensorPlace>& tensors);

  const ModelConfig& config() const { return config_; }
  const ModelLayer& layer(int index) const { return layers_[static_cast<std::size_t>(index)]; }
  const Weight& embed() const { return embed_; }
  const Weight& head() const { return head_ ? head_ : embed_; }
  const std::vector<float>& norm() const { return norm_; }
  /// Bytes of weights that one token reads, the table of embeddings only if it is the head.
  std::size_t bytes_per_token() const { return bytes_per_token_; }

 private:
  ModelConfig config_;
  std::vector<std::shared_ptr<Mapping>> files_;
  std::vector<ModelLayer> layers_;
  Weight embed_, head_;
  std::vector<float> norm_;
  std::size_t bytes_per_token_ = 0;
};

}  // namespace innerkv
