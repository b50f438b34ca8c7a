// Byte offsets inside a page, and the memory a token costs. docs/format.md sections 3, 7 and 8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../platform.h"
#include "codes.h"
#include "outliers.h"
#include "spec.h"

namespace innerkv {

inline constexpr std::uint32_t kFormatVersion = 1;
inline constexpr int kZeroExtent =
    128;  // compact zero points are allotted in extents of this many binary16 values

/// One tensor (K or V) of a page.
struct TensorLayout {
  TensorSpec spec;
  bool value = false;
  int head_dim = 0;

  constexpr INNERKV_HD CodeShape codes() const {
    return value ? CodeShape{spec.bits, head_dim, kPageTokens / 4}
                 : CodeShape{spec.bits, kPageTokens, head_dim / 4};
  }
  constexpr INNERKV_HD std::size_t code_bytes() const {
    return spec.raw() ? std::size_t{2} * kPageTokens * head_dim : codes().bytes();
  }
  /// Groups of one token, or of one sub-block of 32 tokens (= channels) for tokens32.
  constexpr INNERKV_HD int groups() const {
    if (spec.group == Group::kTokens32) return head_dim;
    const int channels = group_channels(spec.group, head_dim);
    return (head_dim + channels - 1) / channels;
  }
  constexpr INNERKV_HD int group_begin(int group) const {
    return group * group_channels(spec.group, head_dim);
  }
  constexpr INNERKV_HD int group_end(int group) const {
    const int end = group_begin(group + 1);
    return end < head_dim ? end : head_dim;
  }
  /// Scales of a whole page.
  constexpr INNERKV_HD int scales() const {
    return spec.raw()
               ? 0
               : (spec.group == Group::kTokens32 ? kPageTokens / kBlockTokens32 : kPageTokens) * groups();
  }
  constexpr INNERKV_HD int scale_index(int slot, int group) const {
    return spec.group == Group::kTokens32 ? slot / kBlockTokens32 * head_dim + group
                                          : group * kPageTokens + slot;
  }
  constexpr INNERKV_HD std::size_t scales_at() const { return align_section(code_bytes()); }
  constexpr INNERKV_HD std::size_t zeros_at() const {
    return scales_at() + align_section(std::size_t{2} * scales());
  }
  constexpr INNERKV_HD OutlierLayout outliers() const { return {spec.outliers * kPageTokens}; }
  constexpr INNERKV_HD std::size_t outliers_at() const {
    return zeros_at() + (spec.dense_zeros() ? align_section(std::size_t{2} * scales()) : 0);
  }
  constexpr INNERKV_HD std::size_t outlier_bytes() const {
    return spec.outliers > 0 ? outliers().payload_bytes() : 0;
  }
  constexpr INNERKV_HD std::size_t bytes() const {
    return outliers_at() + (spec.outliers > 0 ? outliers().bytes() : 0);
  }
};

struct PageLayout {
  TensorLayout k, v;

  constexpr INNERKV_HD PageLayout(const TensorSpec& k_spec, const TensorSpec& v_spec, int head_dim)
      : k{k_spec, false, head_dim}, v{v_spec, true, head_dim} {}
  constexpr INNERKV_HD std::size_t k_at() const { return 0; }
  constexpr INNERKV_HD std::size_t v_at() const { return k.bytes(); }
  constexpr INNERKV_HD std::size_t bytes() const { return k.bytes() + v.bytes(); }
};

/// Payload bits per stored number (codes, scales, dense zero points, outlier rows), without windows, padding
/// or compact zero points.
constexpr INNERKV_HD double bits_per_value(const TensorLayout& tensor) {
  const double numbers = static_cast<double>(kPageTokens) * tensor.head_dim;
  const double meta = tensor.spec.raw() ? 0.0 : 16.0 * tensor.scales() * (tensor.spec.dense_zeros() ? 2 : 1);
  return (8.0 * (tensor.code_bytes() + tensor.outlier_bytes()) + meta) / numbers;
}

static_assert(PageLayout(TensorSpec{2, Group::kToken, Mode::kMidRise},
                         TensorSpec{2, Group::kToken, Mode::kMidRise}, 128)
                  .bytes() == 2 * (128 * 128 / 4 + 256));

}  // namespace innerkv
