// What a stored tensor can be: the one table of formats. Kernels, the CPU backend, supportedSpecs() in
// TypeScript, the tests' case lists and the error texts are all made from it. Meaning of every bit:
// docs/format.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "../platform.h"

namespace innerkv {

inline constexpr int kPageTokens = 128;    // slots of a page
inline constexpr int kBlockTokens32 = 32;  // tokens of a value sub-block with grouping tokens32
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxOutliers = 8;  // of a token, kept sparse
inline constexpr std::size_t kSectionAlign = 64;
inline constexpr std::array<int, 5> kHeadDims = {64, 80, 96, 128, 256};

enum class Group : std::uint8_t { kChannels32, kChannels64, kToken, kTokens32 };
enum class Mode : std::uint8_t { kMidRise, kZeroLevel, kSignedMax, kAsymmetric, kHybrid, kHybridReleased };

inline constexpr std::array<const char*, 4> kGroupNames = {"channels32", "channels64", "token", "tokens32"};
inline constexpr std::array<const char*, 6> kModeNames = {"midRise",    "zeroLevel", "signedMax",
                                                          "asymmetric", "hybrid",    "hybridReleased"};

struct TensorSpec {
  int bits = 16;
  Group group = Group::kToken;
  Mode mode = Mode::kMidRise;
  int outliers = 0;  // numbers of each token that are kept apart, sparse

  constexpr bool operator==(const TensorSpec&) const = default;
  constexpr INNERKV_HD bool raw() const { return bits == 16; }
  constexpr INNERKV_HD int levels() const { return 1 << bits; }
  constexpr INNERKV_HD bool dense_zeros() const { return !raw() && mode == Mode::kAsymmetric; }
  constexpr INNERKV_HD bool compact_zeros() const {
    return !raw() && (mode == Mode::kHybrid || mode == Mode::kHybridReleased);
  }
  /// Slots that are quantised together: how far a window has to run full before it can flush.
  constexpr INNERKV_HD int flush_tokens() const {
    return !raw() && group == Group::kTokens32 ? kBlockTokens32 : 1;
  }
  constexpr INNERKV_HD bool per_token() const { return flush_tokens() == 1; }
};

constexpr INNERKV_HD bool is_head_dim(int head_dim) {
  for (int supported : kHeadDims)
    if (supported == head_dim) return true;
  return false;
}

/// Channels of a group that runs along the channels of one token.
constexpr INNERKV_HD int group_channels(Group group, int head_dim) {
  return group == Group::kChannels32 ? 32 : group == Group::kChannels64 ? 64 : head_dim;
}

constexpr INNERKV_HD std::size_t align_section(std::size_t bytes) {
  return (bytes + kSectionAlign - 1) / kSectionAlign * kSectionAlign;
}

/// Whether tensors of this format, whatever it is otherwise, may have outliers.
constexpr INNERKV_HD bool may_have_outliers(const TensorSpec& spec) {
  return !spec.raw() && spec.group != Group::kTokens32;
}

/// Whether a key (or value) tensor may have this spec.
constexpr INNERKV_HD bool is_supported(const TensorSpec& spec, bool value) {
  if (spec.raw()) return spec == TensorSpec{};
  if (spec.bits != 1 && spec.bits != 2 && spec.bits != 3 && spec.bits != 4 && spec.bits != 8) return false;
  if (spec.bits == 1 && (!value || (spec.mode != Mode::kMidRise && spec.mode != Mode::kAsymmetric)))
    return false;
  if (spec.group == Group::kTokens32 && !value) return false;
  return spec.outliers == 0 ||
         (spec.outliers > 0 && spec.outliers <= kMaxOutliers && may_have_outliers(spec));
}

}  // namespace innerkv
