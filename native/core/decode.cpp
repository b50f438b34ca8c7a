#include "decode.h"

#include <algorithm>
#include <cstring>

#include "../format/group.h"
#include "../numerics/hadamard.h"

namespace innerkv {
namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

template <class T>
std::vector<T> copied(Backend& backend, const void* from, std::size_t count) {
  std::vector<T> host(count);
  if (count > 0) backend.copy_memory(host.data(), from, sizeof(T) * count);
  return host;
}

std::uint16_t half_at(const std::uint8_t* section, int index) {
  std::uint16_t bits;
  std::memcpy(&bits, section + 2 * at(index), 2);
  return bits;
}

void decode_tensor(Backend& backend, const TensorLayout& tensor, const std::uint8_t* base,
                   const std::vector<Slot>& extents, int slots, float* to) {
  const int D = tensor.head_dim;
  if (tensor.spec.raw()) {
    for (int i = 0; i < slots * D; ++i) to[i] = half_value(half_at(base, i));
    return;
  }
  std::vector<std::uint16_t> compact;
  for (const Slot& extent : extents) {
    const auto part = copied<std::uint16_t>(backend, extent.data(), kZeroExtent);
    compact.insert(compact.end(), part.begin(), part.end());
  }
  const CodeShape shape = tensor.codes();
  const bool blocks = tensor.spec.group == Group::kTokens32, mid_rise = tensor.spec.mode == Mode::kMidRise;
  const int span = blocks ? kBlockTokens32 : 1;  // slots that share their scales
  const float center = mid_rise ? 0.5f * static_cast<float>(tensor.spec.levels() - 1) : 0.0f;
  std::size_t zeros = 0;
  for (int slot = 0; slot < slots; slot += span)
    for (int g = 0; g < tensor.groups(); ++g) {
      const int index = tensor.scale_index(slot, g);
      const std::uint16_t scale = half_at(base + tensor.scales_at(), index);
      std::uint16_t zero = 0;
      if (tensor.spec.dense_zeros()) zero = half_at(base + tensor.zeros_at(), index);
      if (tensor.spec.compact_zeros() && (scale & 0x8000u)) zero = compact[zeros++];
      const Dequantiser map = dequantiser(tensor.spec.bits, tensor.spec.mode, scale, zero);
      const int begin = blocks ? g : tensor.group_begin(g), end = blocks ? g + 1 : tensor.group_end(g);
      for (int t = slot; t < slot + span; ++t)
        for (int c = begin; c < end; ++c) {
          const auto code =
              static_cast<float>(tensor.value ? get_code(base, shape, c, t) : get_code(base, shape, t, c));
          to[t * D + c] = mid_rise ? map.scale * (code - center) : map.scale * code + map.offset;
        }
    }
  if (tensor.spec.outliers == 0) return;
  const std::uint8_t* section = base + tensor.outliers_at();
  const OutlierLayout layout = tensor.outliers();
  for (int slot = 0; slot < slots; ++slot)
    for (int i = outlier_start(section, layout, slot); i < outlier_start(section, layout, slot + 1); ++i) {
      const Outlier outlier = outlier_at(section, layout, i);
      to[slot * D + outlier.index] += half_value(outlier.value);
    }
}

void rotate(float* x, int head_dim, const Rotation& rotation, const RopeConfig& rope) {
  const std::vector<float> old(x, x + head_dim);
  const std::size_t pairs = rope.theta.size();
  for (std::size_t i = 0; i < 2 * pairs; ++i) {
    const std::size_t partner = rope.half_layout ? (i < pairs ? i + pairs : i - pairs) : i ^ 1u;
    x[i] = old[i] * rotation.cos[i] + old[partner] * rotation.sin[i];
  }
}

}  // namespace

void decode_page(Backend& backend, int head_dim, const DecodeJob& job, const RotationTable& rotations,
                 float* k, float* v) {
  const int D = head_dim;
  const LayerScheme& scheme = *job.scheme;
  const PageLayout layout(scheme.k, scheme.v, D);
  std::fill_n(k, kPageTokens * D, 0.0f);
  std::fill_n(v, kPageTokens * D, 0.0f);
  const auto bytes = copied<std::uint8_t>(backend, job.page->bytes.data(), layout.bytes());
  decode_tensor(backend, layout.k, bytes.data() + layout.k_at(), job.page->k_zeros, job.k_slots, k);
  decode_tensor(backend, layout.v, bytes.data() + layout.v_at(), job.page->v_zeros, job.v_slots, v);
  if (!scheme.v.raw() && scheme.hadamard_v)
    for (int t = 0; t < job.v_slots; ++t) hadamard(v + t * D, D);
  if (scheme.k.raw()) return;
  for (int t = 0; t < job.k_slots; ++t) {
    float* x = k + t * D;
    if (scheme.hadamard_k) hadamard(x, D);
    if (job.basis && !job.basis->lam.empty())
      for (int c = 0; c < D; ++c) x[c] *= job.basis->lam[at(c)];
    if (job.basis && !job.basis->mean.empty())
      for (int c = 0; c < D; ++c) x[c] += job.basis->mean[at(c)];
    if (scheme.block_tokens > 0) {
      const int token = job.page_index * kPageTokens + t;
      rotate(x, D, rotations.forward(block_position(job.sink, scheme.block_tokens, token)), rotations.rope());
    }
  }
}

}  // namespace innerkv
