// Which kernel reads which format: the one table. docs/cuda.md shows it, the backend and cache.plan() ask it,
// attend_mma.cu compiles its rows, the tests take their cases from it. A format without a row is
// attend_any's.
#pragma once

#include "../format/spec.h"

namespace innerkv::gpu {

/// What shares a scale, and how codes become numbers, as far as attend_mma treats it differently.
enum class Scales : std::uint8_t {
  kToken,          // group token, mode midRise
  kChannels32,     // group channels32, modes zeroLevel and signedMax
  kTokens32,       // values: group tokens32, modes zeroLevel and signedMax
  kTokens32Hybrid  // values: group tokens32, modes hybrid and hybridReleased
};

/// A format of attend_mma, at every head_dim of kMmaHeadDims.
struct Route {
  Scales k;
  int k_bits;
  Scales v;
  int v_bits;
  bool outliers = false;  // a kernel for formats with outliers, too
};

inline constexpr Route kMmaRoutes[] = {
    {Scales::kToken, 2, Scales::kToken, 1},                // calibrated, rotated
    {Scales::kToken, 2, Scales::kToken, 2, true},          //
    {Scales::kToken, 3, Scales::kToken, 2},                //
    {Scales::kToken, 3, Scales::kToken, 3, true},          //
    {Scales::kToken, 4, Scales::kToken, 2},                //
    {Scales::kToken, 4, Scales::kToken, 4, true},          //
    {Scales::kChannels32, 3, Scales::kTokens32, 3},        // InnerQ base
    {Scales::kChannels32, 3, Scales::kTokens32, 2},        // InnerQ small
    {Scales::kChannels32, 3, Scales::kTokens32Hybrid, 2},  // InnerQ hybrid
    {Scales::kChannels32, 4, Scales::kChannels32, 4},      // q4_0
    {Scales::kChannels32, 8, Scales::kChannels32, 8},      // q8
};
inline constexpr int kMmaHeadDims[] = {64, 128};

constexpr bool has_scales(const TensorSpec& spec, Scales scales) {
  const bool centred = spec.mode == Mode::kZeroLevel || spec.mode == Mode::kSignedMax;
  switch (scales) {
    case Scales::kToken:
      return spec.group == Group::kToken && spec.mode == Mode::kMidRise;
    case Scales::kChannels32:
      return spec.group == Group::kChannels32 && centred;
    case Scales::kTokens32:
      return spec.group == Group::kTokens32 && centred;
    case Scales::kTokens32Hybrid:
      return spec.group == Group::kTokens32 && spec.compact_zeros();
  }
  return false;
}

/// One of the specs that are read as `scales`, without outliers.
constexpr TensorSpec a_spec(Scales scales, int bits, bool other = false) {
  switch (scales) {
    case Scales::kToken:
      return {bits, Group::kToken, Mode::kMidRise};
    case Scales::kChannels32:
      return {bits, Group::kChannels32, other ? Mode::kSignedMax : Mode::kZeroLevel};
    case Scales::kTokens32:
      return {bits, Group::kTokens32, other ? Mode::kSignedMax : Mode::kZeroLevel};
    case Scales::kTokens32Hybrid:
      return {bits, Group::kTokens32, other ? Mode::kHybridReleased : Mode::kHybrid};
  }
  return {};
}

/// Row of kMmaRoutes that serves a format, or -1.
constexpr int mma_route(const TensorSpec& k, const TensorSpec& v, int head_dim) {
  bool served = false;
  for (const int dim : kMmaHeadDims) served |= dim == head_dim;
  int row = 0;
  for (const Route& route : kMmaRoutes) {
    if (served && (route.outliers || !(k.outliers > 0 || v.outliers > 0)) && route.k_bits == k.bits &&
        route.v_bits == v.bits && has_scales(k, route.k) && has_scales(v, route.v))
      return row;
    ++row;
  }
  return -1;
}

/// For people: cache.plan().
constexpr const char* path_of(const TensorSpec& k, const TensorSpec& v, int head_dim) {
  if (k.raw() && v.raw()) return "attend_half, binary16 products on tensor cores";
  return mma_route(k, v, head_dim) >= 0 ? "attend_mma, integer dot products on tensor cores"
                                        : "attend_any, float32 products";
}

}  // namespace innerkv::gpu
