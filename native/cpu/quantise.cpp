// Tokens into pages and back, one page a task. docs/format.md sections 3 to 6.
#include <cstring>

#include "cpu_backend.h"

namespace innerkv {
namespace {

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
    for (int slot = job_.k_first; slot < job_.k_first + job_.k_count; ++slot)
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
    if (scheme_.feedback()) {
      const Basis& basis = *job_.basis;
      const std::uint16_t scale =
          kernels_.round_feedback({x, D_, layout.spec.bits, basis.order.data(), basis.feedback.data(),
                                   basis.pivot.data(), basis.metric.data(), scheme_.clip_k.data(),
                                   static_cast<int>(scheme_.clip_k.size()), scheme_.unbiased_k, codes});
      halves(k_ + layout.scales_at())[layout.scale_index(slot, 0)] = scale;
    } else {
      for (int g = 0; g < layout.groups(); ++g) {
        const int begin = layout.group_begin(g);
        store(layout, k_, layout.scale_index(slot, g),
              kernels_.quantise_group(x + begin, layout.group_end(g) - begin,
                                      rule(layout.spec, scheme_.clip_k, scheme_.unbiased_k), codes + begin),
              job_.page->k_zeros, job_.page->k_zero_count);
      }
    }
    put_row(k_, layout.codes(), slot, codes, D_);
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
    for (int g = 0; g < layout.groups(); ++g) {
      const int begin = layout.group_begin(g);
      store(layout, v_, layout.scale_index(slot, g),
            kernels_.quantise_group(x + begin, layout.group_end(g) - begin,
                                    rule(layout.spec, scheme_.clip_v, scheme_.unbiased_v), codes + begin),
            job_.page->v_zeros, job_.page->v_zero_count);
    }
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

void CpuBackend::decode(const CacheConfig& config, const QuantiseJob& job, const RotationTable& rotations,
                        float* k, float* v) {
  const int D = config.head_dim;
  const LayerScheme& scheme = *job.scheme;
  const PageLayout layout(scheme.k, scheme.v, D);
  std::memset(k, 0, sizeof(float) * static_cast<std::size_t>(kPageTokens * D));
  std::memset(v, 0, sizeof(float) * static_cast<std::size_t>(kPageTokens * D));
  const auto decode_tensor = [&](const TensorLayout& tensor, const std::uint8_t* base,
                                 const std::vector<Slot>& extents, int slots, float* to) {
    const auto half_at = [&](std::size_t section, int index) {
      std::uint16_t bits;
      std::memcpy(&bits, base + section + std::size_t{2} * static_cast<std::size_t>(index), 2);
      return bits;
    };
    if (tensor.spec.raw()) {
      kernels_.half_to_float(reinterpret_cast<const std::uint16_t*>(base), to,
                             static_cast<std::size_t>(slots * D));
      return;
    }
    const CodeShape shape = tensor.codes();
    const bool blocks = tensor.spec.group == Group::kTokens32;
    const int span = blocks ? kBlockTokens32 : 1;  // slots that share their scales
    int zeros = 0;
    for (int slot = 0; slot < slots; slot += span)
      for (int g = 0; g < tensor.groups(); ++g) {
        const int index = tensor.scale_index(slot, g);
        const std::uint16_t scale = half_at(tensor.scales_at(), index);
        std::uint16_t zero = 0;
        if (tensor.spec.dense_zeros()) zero = half_at(tensor.zeros_at(), index);
        if (tensor.spec.compact_zeros() && (scale & 0x8000u)) {
          zero = reinterpret_cast<const std::uint16_t*>(
              extents[static_cast<std::size_t>(zeros / kZeroExtent)].data())[zeros % kZeroExtent];
          ++zeros;
        }
        const Dequantiser map = dequantiser(tensor.spec.bits, tensor.spec.mode, scale, zero);
        const float center =
            tensor.spec.mode == Mode::kMidRise ? 0.5f * static_cast<float>(tensor.spec.levels() - 1) : 0.0f;
        const int begin = blocks ? g : tensor.group_begin(g), end = blocks ? g + 1 : tensor.group_end(g);
        for (int t = slot; t < slot + span; ++t)
          for (int c = begin; c < end; ++c) {
            const unsigned code = tensor.value ? get_code(base, shape, c, t) : get_code(base, shape, t, c);
            to[t * D + c] = tensor.spec.mode == Mode::kMidRise
                                ? map.scale * (static_cast<float>(code) - center)
                                : map.scale * static_cast<float>(code) + map.offset;
          }
      }
  };
  const std::uint8_t* bytes = job.page->bytes.data();
  decode_tensor(layout.k, bytes + layout.k_at(), job.page->k_zeros, job.k_count, k);
  decode_tensor(layout.v, bytes + layout.v_at(), job.page->v_zeros, job.v_count, v);
  if (!scheme.v.raw() && scheme.hadamard_v)
    for (int t = 0; t < job.v_count; ++t) kernels_.hadamard(v + t * D, D);
  if (scheme.k.raw()) return;
  for (int t = 0; t < job.k_count; ++t) {
    float* x = k + t * D;
    if (scheme.hadamard_k) kernels_.hadamard(x, D);
    if (job.basis && !job.basis->lam.empty())
      for (int c = 0; c < D; ++c) x[c] *= job.basis->lam[static_cast<std::size_t>(c)];
    if (job.basis && !job.basis->mean.empty())
      for (int c = 0; c < D; ++c) x[c] += job.basis->mean[static_cast<std::size_t>(c)];
    if (scheme.block_tokens > 0) {
      rotate(
          kernels_, x, D,
          rotations.forward(block_position(job.sink, scheme.block_tokens, job.page_index * kPageTokens + t)),
          rotations.rope());
    }
  }
}

}  // namespace innerkv
