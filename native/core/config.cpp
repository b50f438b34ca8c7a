#include "config.h"

#include <cmath>
#include <cstring>
#include <string>

#include "error.h"

namespace innerkv {

namespace {

void check(bool condition, const std::string& message) {
  if (!condition) throw Error(ErrorCode::kInvalidArgument, message);
}

bool all_finite(const std::vector<float>& values) {
  for (const float value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

void validate(const Basis& basis, int head_dim) {
  const std::size_t D = static_cast<std::size_t>(head_dim);
  const auto sized = [](const std::vector<float>& values, std::size_t size) {
    return values.empty() || values.size() == size;
  };
  check(sized(basis.mean, D) && sized(basis.lam, D) && sized(basis.inv_lam, D) &&
            basis.lam.size() == basis.inv_lam.size(),
        "A basis must hold one mean and one normalisation factor per channel.");
  check(
      sized(basis.metric, D * D) && sized(basis.feedback, D * D) && sized(basis.pivot, D) &&
          basis.metric.size() == basis.feedback.size() && basis.pivot.empty() == basis.feedback.empty(),
      "A basis with error feedback needs headDim x headDim metric and feedback matrices and headDim pivots.");
  check(basis.order.size() == basis.pivot.size(),
        "A basis with error feedback needs the order of its channels.");
  std::vector<bool> seen(D);
  for (const std::uint8_t channel : basis.order) {
    check(channel < D && !seen[channel], "The order of a basis must be a permutation of the channels.");
    seen[channel] = true;
  }
  check(all_finite(basis.mean) && all_finite(basis.lam) && all_finite(basis.inv_lam) &&
            all_finite(basis.metric) && all_finite(basis.feedback) && all_finite(basis.pivot),
        "A basis must hold finite numbers only.");
  for (const float lam : basis.lam) check(lam > 0, "Normalisation factors of a basis must be positive.");
}

void validate_outliers(const TensorSpec& spec, const char* tensor) {
  check(spec.outliers >= 0 && spec.outliers <= kMaxOutliers,
        std::string("outliers of ") + tensor + " must lie between 0 and " + std::to_string(kMaxOutliers) +
            ", not " + std::to_string(spec.outliers) + ".");
  if (spec.outliers > 0 && !may_have_outliers(spec))
    throw Error(ErrorCode::kUnsupported, spec.raw() ? std::string("16-bit ") + tensor + " have no outliers."
                                                    : "Outliers are kept per token, so grouping tokens32 "
                                                      "cannot have them.");
}

void validate(const LayerScheme& scheme, const CacheConfig& config) {
  validate_outliers(scheme.k, "keys");
  validate_outliers(scheme.v, "values");
  if (!is_supported(scheme.k, false) || !is_supported(scheme.v, true))
    throw Error(ErrorCode::kUnsupported,
                "This combination of bits, grouping and mode is not supported. See supportedSpecs().");
  check(scheme.sink >= 0 && scheme.sink <= 65536 && scheme.recent >= 0 && scheme.recent <= 65536,
        "Windows must hold between 0 and 65536 tokens.");
  check(
      scheme.stat_tokens >= 0 && scheme.stat_tokens <= 65536 && (!scheme.online() || scheme.stat_tokens >= 1),
      "Statistics of the sequence need between 1 and 65536 tokens.");
  check(
      scheme.block_tokens >= 0 && scheme.block_tokens % kPageTokens == 0 && scheme.block_tokens <= (1 << 24),
      "The block length must be a multiple of the page length (128).");
  check(scheme.block_tokens == 0 || !config.rope.theta.empty(),
        "Block-relative keys need the model's rope parameters.");
  check(scheme.block_tokens == 0 || !scheme.k.raw(), "16-bit keys are never block-relative.");
  check(scheme.clip_k.size() <= kMaxClip && scheme.clip_v.size() <= kMaxClip && all_finite(scheme.clip_k) &&
            all_finite(scheme.clip_v),
        "At most 8 clip ratios, all finite.");
  for (const auto* clip : {&scheme.clip_k, &scheme.clip_v})
    for (const float ratio : *clip) check(ratio > 0 && ratio <= 2, "Clip ratios lie in (0, 2].");
  check(scheme.basis.empty() || scheme.basis.size() == static_cast<std::size_t>(config.kv_heads),
        "A basis is needed for each KV head.");
  for (const Basis& basis : scheme.basis) {
    validate(basis, config.head_dim);
    check(basis.mean.empty() == scheme.basis[0].mean.empty() &&
              basis.lam.empty() == scheme.basis[0].lam.empty() &&
              basis.feedback.empty() == scheme.basis[0].feedback.empty(),
          "The bases of all KV heads must have the same parts.");
  }
  check(!scheme.online() || scheme.basis.empty(),
        "A scheme has a given basis or one of its own sequence, not both.");
  if (scheme.feedback())
    check(scheme.k.group == Group::kToken && scheme.k.mode == Mode::kMidRise && !scheme.k.raw() &&
              !scheme.clip_k.empty(),
          "Rounding with error feedback needs mid-rise keys with one scale per token and at least one clip "
          "ratio.");
  if (scheme.feedback() && scheme.k.outliers > 0)
    throw Error(ErrorCode::kUnsupported, "Keys that are rounded with error feedback cannot have outliers.");
}

}  // namespace

void validate(const CacheConfig& config) {
  check(config.layers >= 1 && config.layers <= 4096, "layers must lie between 1 and 4096.");
  check(config.kv_heads >= 1 && config.kv_heads <= 4096, "kvHeads must lie between 1 and 4096.");
  check(config.query_heads >= config.kv_heads && config.query_heads % config.kv_heads == 0 &&
            config.query_heads <= 65536,
        "queryHeads must be a multiple of kvHeads.");
  if (!is_head_dim(config.head_dim))
    throw Error(ErrorCode::kUnsupported, "headDim must be one of 64, 80, 96, 128, 256.");
  check(std::isfinite(config.softmax_scale) && config.softmax_scale > 0,
        "The softmax scale must be positive.");
  check(std::isfinite(config.softcap) && config.softcap >= 0, "The logit softcap must not be negative.");
  check(config.rope.rotary_dims() <= config.head_dim, "More rotary dimensions than channels.");
  for (const double theta : config.rope.theta)
    check(std::isfinite(theta), "RoPE frequencies must be finite.");
  check(config.scheme_of_layer.size() == static_cast<std::size_t>(config.layers) &&
            config.window_of_layer.size() == config.scheme_of_layer.size(),
        "Every layer needs a scheme and a window.");
  for (const int index : config.scheme_of_layer)
    check(index >= 0 && static_cast<std::size_t>(index) < config.schemes.size(), "A layer names no scheme.");
  for (const int window : config.window_of_layer)
    check(window >= 0, "A sliding window must not be negative.");
  for (const LayerScheme& scheme : config.schemes) validate(scheme, config);
}

namespace {

/// Two 64-bit FNV-1a hashes of a stream of plain values.
class Fingerprint {
 public:
  template <class T>
  Fingerprint& add(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return add(&value, sizeof value);
  }
  template <class T>
  Fingerprint& add(const std::vector<T>& values) {
    add(values.size());
    return add(values.data(), values.size() * sizeof(T));
  }
  std::uint64_t value() const { return hash_; }

 private:
  Fingerprint& add(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3ull;
    return *this;
  }
  std::uint64_t hash_ = 0xcbf29ce484222325ull;
};

}  // namespace

Fingerprints fingerprints(const CacheConfig& config) {
  Fingerprint format, basis;
  format.add(kFormatVersion)
      .add(config.layers)
      .add(config.kv_heads)
      .add(config.head_dim)
      .add(config.rope.theta)
      .add(config.rope.half_layout);
  format.add(config.scheme_of_layer);
  for (const LayerScheme& s : config.schemes) {
    for (const TensorSpec& spec : {s.k, s.v}) format.add(spec.bits).add(spec.group).add(spec.mode);
    format.add(s.sink)
        .add(s.recent)
        .add(s.block_tokens)
        .add(s.hadamard_k)
        .add(s.hadamard_v)
        .add(s.online_mean)
        .add(s.online_lambda);
    format.add(s.stat_tokens).add(s.released_windows);
    basis.add(s.basis.size());
    for (const Basis& b : s.basis)
      basis.add(b.mean).add(b.lam).add(b.inv_lam).add(b.order).add(b.metric).add(b.feedback).add(b.pivot);
  }
  // Last and only where there are any: the hash of everything else stays what it was.
  for (std::size_t i = 0; i < config.schemes.size(); ++i) {
    const LayerScheme& s = config.schemes[i];
    if (s.k.outliers > 0 || s.v.outliers > 0) format.add(i).add(s.k.outliers).add(s.v.outliers);
  }
  return {format.value(), basis.value()};
}

}  // namespace innerkv
