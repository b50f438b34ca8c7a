// Tokens into pages and back, one page a task. docs/format.md sections 3 to 6 and 8.
#include <algorithm>
#include <cstring>

#include "cpu_backend.h"

namespace innerkv {
namespace {

constexpr int kFeedbackKeys = 16;  // rounded in one call, which does several at a time

std::uint16_t* halves(std::uint8_t* at) { return reinterpret_cast<std::uint16_t*>(at); }

void append_zero(std::vector<Slot>& extents, int& count, std::uint16_t zero) {
  halves(extents[static_cast<std::size_t>(count / kZeroExtent)].data())[count % kZeroExtent] = zero;
  ++count;
}

void rotate(const Kernels& kernels, float* x, int head_dim, const Rotation& rotation,
            const RopeConfig& rope) {
  kernels.rotate(x, head_dim, rotation.cos.data(), rotation.sin.data(), static_cast<int>(rope.theta.size()),
                 rope.half_layout);
}

/// Everything one page task needs; D-sized buffers live on the stack of the task.
class PageWriter {
 public:
  PageWriter(const Kernels& kernels, const CacheConfig& config, const QuantiseJob& job,
             const RotationTable& rotations)
      : kernels_(kernels),
        job_(job),
        scheme_(*job.scheme),
        rotations_(rotations),
        D_(config.head_dim),
        layout_(job.scheme->k, job.scheme->v, config.head_dim),
        k_(job.page->bytes.data() + layout_.k_at()),
        v_(job.page->bytes.data() + layout_.v_at()) {}

  void write() {
    const int end = job_.k_first + job_.k_count;
    if (scheme_.feedback())
      for (int slot = job_.k_first; slot < end; slot += kFeedbackKeys)
        write_feedback_keys(slot, std::min(kFeedbackKeys, end - slot));
    else
      for (int slot = job_.k_first; slot < end; ++slot)
        write_key(slot, job_.k.at_position(job_.position(slot)));
    const bool blocks = scheme_.v.group == Group::kTokens32 && !scheme_.v.raw();
    for (int slot = job_.v_first; slot < job_.v_first + job_.v_count; slot += blocks ? kBlockTokens32 : 1)
      if (blocks)
        write_value_block(slot);
      else
        write_value(slot, job_.v.at_position(job_.position(slot)));
  }

 private:
  void transform_key(int slot, float* x) const {
    if (scheme_.block_tokens > 0) {
      const int token = job_.page_index * kPageTokens + slot;
      rotate(kernels_, x, D_, rotations_.at(block_position(job_.sink, scheme_.block_tokens, token)),
             rotations_.rope());
    }
    if (job_.basis && !job_.basis->mean.empty())
      for (int c = 0; c < D_; ++c) x[c] -= job_.basis->mean[static_cast<std::size_t>(c)];
    if (job_.basis && !job_.basis->inv_lam.empty())
      for (int c = 0; c < D_; ++c) x[c] *= job_.basis->inv_lam[static_cast<std::size_t>(c)];
    if (scheme_.hadamard_k) kernels_.hadamard(x, D_);
  }

  GroupRule rule(const TensorSpec& spec, const std::vector<float>& ratios, bool unbiased) const {
    return {spec.bits, spec.mode, ratios.data(), static_cast<int>(ratios.size()), unbiased};
  }

  static void store(const TensorLayout& layout, std::uint8_t* base, int index, const GroupScale& scale,
                    std::vector<Slot>& extents, int& zeros) {
    halves(base + layout.scales_at())[index] = scale.scale;
    if (!scale.has_zero) return;
    if (layout.spec.dense_zeros())
      halves(base + layout.zeros_at())[index] = scale.zero;
    else
      append_zero(extents, zeros, scale.zero);
  }

  /// Codes, scales, zero points and outliers of a token x [D], which is changed where it has outliers.
  void round(const TensorLayout& layout, std::uint8_t* base, int slot, float* x, const GroupRule& rule,
             std::vector<Slot>& extents, int& zeros, std::uint8_t* codes) const {
    const TensorSpec& spec = layout.spec;
    const int channels = group_channels(spec.group, D_);
    TakenOutliers taken;
    if (spec.outliers > 0) kernels_.take_outliers(x, D_, channels, spec.outliers, taken);
    GroupScale scales[kMaxHeadDim / 32];
    for (int g = 0; g < layout.groups(); ++g) {
      const int begin = layout.group_begin(g);
      scales[g] = kernels_.quantise_group(x + begin, layout.group_end(g) - begin, rule, codes + begin);
      store(layout, base, layout.scale_index(slot, g), scales[g], extents, zeros);
    }
    if (spec.outliers == 0) return;
    Outlier entries[kMaxOutliers];
    for (int i = 0; i < spec.outliers; ++i) {
      const int c = taken.channel[i];
      const GroupScale& scale = scales[c / channels];
      const Dequantiser map = dequantiser(spec.bits, spec.mode, scale.scale, scale.zero);
      entries[i] = {c, outlier_value(taken.x[i], map.scale * static_cast<float>(codes[c]) + map.offset)};
    }
    put_outlier_row(base + layout.outliers_at(), layout.outliers(), slot, slot * spec.outliers, entries,
                    spec.outliers);
  }

  void write_key(int slot, const std::uint16_t* key) {
    const TensorLayout& layout = layout_.k;
    if (layout.spec.raw()) {
      std::memcpy(k_ + std::size_t{2} * D_ * slot, key, std::size_t{2} * D_);
      return;
    }
    float x[kMaxHeadDim];
    std::uint8_t codes[kMaxHeadDim];
    kernels_.half_to_float(key, x, static_cast<std::size_t>(D_));
    transform_key(slot, x);
    round(layout, k_, slot, x, rule(layout.spec, scheme_.clip_k, scheme_.unbiased_k), job_.page->k_zeros,
          job_.page->k_zero_count, codes);
    put_row(k_, layout.codes(), slot, codes, D_);
  }

  void write_feedback_keys(int slot, int count) {
    const TensorLayout& layout = layout_.k;
    const Basis& basis = *job_.basis;
    float x[kFeedbackKeys * kMaxHeadDim];
    std::uint8_t codes[kFeedbackKeys * kMaxHeadDim];
    std::uint16_t scales[kFeedbackKeys];
    for (int i = 0; i < count; ++i) {
      kernels_.half_to_float(job_.k.at_position(job_.position(slot + i)), x + i * D_,
                             static_cast<std::size_t>(D_));
      transform_key(slot + i, x + i * D_);
    }
    kernels_.round_feedback({x, count, D_, layout.spec.bits, basis.order.data(), basis.feedback.data(),
                             basis.pivot.data(), basis.metric.data(), scheme_.clip_k.data(),
                             static_cast<int>(scheme_.clip_k.size()), scheme_.unbiased_k, codes, scales});
    for (int i = 0; i < count; ++i) {
      halves(k_ + layout.scales_at())[layout.scale_index(slot + i, 0)] = scales[i];
      put_row(k_, layout.codes(), slot + i, codes + i * D_, D_);
    }
  }

  void write_value(int slot, const std::uint16_t* value) {
    const TensorLayout& layout = layout_.v;
    if (layout.spec.raw()) {
      std::memcpy(v_ + std::size_t{2} * D_ * slot, value, std::size_t{2} * D_);
      return;
    }
    float x[kMaxHeadDim];
    std::uint8_t codes[kMaxHeadDim];
    kernels_.half_to_float(value, x, static_cast<std::size_t>(D_));
    if (scheme_.hadamard_v) kernels_.hadamard(x, D_);
    round(layout, v_, slot, x, rule(layout.spec, scheme_.clip_v, scheme_.unbiased_v), job_.page->v_zeros,
          job_.page->v_zero_count, codes);
    put_column(v_, layout.codes(), slot, codes);
  }

  void write_value_block(int slot) {
    const TensorLayout& layout = layout_.v;
    float x[kBlockTokens32][kMaxHeadDim], column[kBlockTokens32];
    std::uint8_t codes[kBlockTokens32];
    for (int t = 0; t < kBlockTokens32; ++t) {
      kernels_.half_to_float(job_.v.at_position(job_.position(slot + t)), x[t], static_cast<std::size_t>(D_));
      if (scheme_.hadamard_v) kernels_.hadamard(x[t], D_);
    }
    for (int c = 0; c < D_; ++c) {
      for (int t = 0; t < kBlockTokens32; ++t) column[t] = x[t][c];
      store(layout, v_, layout.scale_index(slot, c),
            kernels_.quantise_group(column, kBlockTokens32,
                                    rule(layout.spec, scheme_.clip_v, scheme_.unbiased_v), codes),
            job_.page->v_zeros, job_.page->v_zero_count);
      for (int t = 0; t < kBlockTokens32; ++t) put_code(v_, layout.codes(), c, slot + t, codes[t]);
    }
  }

  const Kernels& kernels_;
  const QuantiseJob& job_;
  const LayerScheme& scheme_;
  const RotationTable& rotations_;
  const int D_;
  const PageLayout layout_;
  std::uint8_t *k_, *v_;
};

}  // namespace

void CpuBackend::quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                          const RotationTable& rotations) {
  pool_.run(static_cast<int>(jobs.size()), [&](int item, int) {
    PageWriter(kernels_, config, jobs[static_cast<std::size_t>(item)], rotations).write();
  });
}

}  // namespace innerkv
