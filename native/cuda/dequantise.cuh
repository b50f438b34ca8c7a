// Pages of any format as binary16 rows in the space of the input, for attention of many query rows: what is
// done once per token here would be done once per token and row tile there.
//
// Maths      k = R(P) (mean + lam H k̂), v = H v̂, rounded to binary16 and limited to 65504; steps as the
// format
//            has them. Tokens of which one tensor is still in the ring take it from there.
// Shape      a block of 128 threads per page and KV head, 32 tokens at a time.
// Reads      every page byte once; thread = token (keys) or channel (values), whole words of codes.
// Writes     2 * 128 * D numbers a page, a row by a warp; the page's PageArgs.
// Sharing    32 rows in float32 and the page's scales in shared memory.
// Limits     head_dim <= 256.
#pragma once

#include "attend_prefill.h"
#include "half.cuh"
#include "merge.cuh"
#include "tile.cuh"

namespace innerkv::gpu {

inline constexpr int kDequantiseTokens = 32;

template <int D>
struct DequantiseMemory : ScaleMemory {
  static constexpr int kStride = D + 4;  // 16-byte accesses of neighbouring rows meet different banks
  float x[kDequantiseTokens * kStride];
};

template <int D>
struct PageDequantiser {
  using Memory = DequantiseMemory<D>;
  const AttendRule& rule;
  const HeadArgs& head;
  Memory& s;
  int tid, warp, lane;

  INNERKV_DEVICE void decode_keys(const TensorLayout& layout, const std::uint8_t* base, int first,
                                  int stored) const {
    const CodeShape shape = layout.codes();
    const auto* words = reinterpret_cast<const std::uint32_t*>(base);
    const int slot = first + lane;
    if (slot >= stored) return;
    for (int quad = warp; quad < D / 4; quad += kTileWarps) {
      const std::uint32_t codes = codes_of(words, shape, slot, quad);
      const int index = layout.scale_index(slot, 4 * quad / group_channels(layout.spec.group, D));
      const float scale = s.scale[index], offset = s.offset[index];
      *reinterpret_cast<float4*>(s.x + lane * Memory::kStride + 4 * quad) =
          make_float4(fmaf(scale, static_cast<float>(codes & 0xffu), offset),
                      fmaf(scale, static_cast<float>(codes >> 8 & 0xffu), offset),
                      fmaf(scale, static_cast<float>(codes >> 16 & 0xffu), offset),
                      fmaf(scale, static_cast<float>(codes >> 24), offset));
    }
  }

  INNERKV_DEVICE void decode_values(const TensorLayout& layout, const std::uint8_t* base, int first,
                                    int stored) const {
    const CodeShape shape = layout.codes();
    const auto* words = reinterpret_cast<const std::uint32_t*>(base);
    const bool blocks = layout.spec.group == Group::kTokens32;
    const int tokens = stored - first < kDequantiseTokens ? stored - first : kDequantiseTokens;
    for (int c = tid; c < D; c += kTileThreads) {
      const int group = blocks ? c : c / group_channels(layout.spec.group, D);
      for (int quad = 0; 4 * quad < tokens; ++quad) {
        const std::uint32_t codes = codes_of(words, shape, c, first / 4 + quad);
        for (int j = 0; j < 4 && 4 * quad + j < tokens; ++j) {
          const int index = layout.scale_index(first + 4 * quad + j, group);
          s.x[(4 * quad + j) * Memory::kStride + c] =
              fmaf(s.scale[index], static_cast<float>(codes >> (8 * j) & 0xffu), s.offset[index]);
        }
      }
    }
  }

  /// x += the outliers of its token; a warp.
  INNERKV_DEVICE void add_outliers(const TensorLayout& layout, const std::uint8_t* base, int slot,
                                   float* x) const {
    const OutlierLayout rows = layout.outliers();
    const std::uint8_t* section = base + layout.outliers_at();
    const int end = outlier_start(section, rows, slot + 1);
    for (int i = outlier_start(section, rows, slot) + lane; i < end; i += 32) {
      const Outlier outlier = outlier_at(section, rows, i);
      x[outlier.index] += ptx::float_of(outlier.value);
    }
    __syncwarp();
  }

  /// x <- H x; a warp.
  INNERKV_DEVICE void hadamard(float* x) const {
    using Layout = MergeLayout<D>;
    constexpr int kFirst = hadamard_block(D), kRest = D - kFirst;
    float values[Layout::kValues] = {};
    const auto each = [&](auto access) {
#pragma unroll
      for (int j = 0; j < Layout::kSteps; ++j)
#pragma unroll
        for (int i = 0; i < Layout::kVector; ++i)
          if (Layout::channel(lane, j) + i < D)
            access(values[Layout::kVector * j + i], x[Layout::channel(lane, j) + i]);
    };
    each([](float& value, float& there) { value = there; });
    hadamard_lanes<D, 0, kFirst>(values, lane);
    if constexpr (kRest > 0) hadamard_lanes<D, kFirst, kRest>(values, lane);
    each([](float& value, float& there) { there = value; });
    __syncwarp();
  }

  /// x <- R(P) (mean + lam H x); a warp.
  INNERKV_DEVICE void restore_key(float* x, const float* rotation) const {
    if (rule.hadamard_k) hadamard(x);
    if (head.lam || head.mean)
      for (int c = lane; c < D; c += 32)
        x[c] = (head.lam ? head.lam[c] : 1.0f) * x[c] + (head.mean ? head.mean[c] : 0.0f);
    if (!rotation) return;
    __syncwarp();
    const float *cos = rotation, *sin = rotation + D;
    for (int pair = lane; pair < rule.pairs; pair += 32) {
      const int a = rule.half_layout ? pair : 2 * pair,
                b = rule.half_layout ? pair + rule.pairs : 2 * pair + 1;
      const float xa = x[a], xb = x[b];
      x[a] = xa * cos[a] - xb * sin[a];
      x[b] = xb * cos[b] - xa * sin[b];
    }
    __syncwarp();
  }

  INNERKV_DEVICE void write_row(std::uint16_t* to, const float* x) const {
    const auto limited = [](float value) { return fminf(fmaxf(value, -65504.0f), 65504.0f); };
    for (int i = lane; i < D / 2; i += 32)
      reinterpret_cast<std::uint32_t*>(to)[i] = pack_half(limited(x[2 * i]), limited(x[2 * i + 1]));
  }

  /// Rows [0, count) of a tensor: [0, stored) from the page, the rest from the ring.
  INNERKV_DEVICE void tensor(bool value, const std::uint8_t* base, const std::uint16_t* const* zeros,
                             const std::uint16_t* ring, int page, int stored, int count,
                             std::uint16_t* to) const {
    const TensorLayout layout{value ? rule.v : rule.k, value, D};
    const bool raw = layout.spec.raw();
    if (!raw && stored > 0) ScaleLoader{s, tid, warp, lane}.load(layout, base, zeros, stored);
    const int block_tokens = value ? 0 : rule.block_tokens, first_token = page * kPageTokens;
    const float* rotation =
        block_tokens > 0 ? head.rotations + static_cast<std::ptrdiff_t>(first_token / block_tokens) * 2 * D
                         : nullptr;
    for (int first = 0; first < count; first += kDequantiseTokens) {
      __syncthreads();
      if (!raw && first < stored) {
        if (value)
          decode_values(layout, base, first, stored);
        else
          decode_keys(layout, base, first, stored);
      }
      __syncthreads();
      for (int i = warp; i < kDequantiseTokens && first + i < count; i += kTileWarps) {
        const int slot = first + i;
        float* x = s.x + i * Memory::kStride;
        std::uint16_t* row = to + slot * D;
        if (slot < stored && !raw) {
          if (layout.spec.outliers > 0) add_outliers(layout, base, slot, x);
          if (!value)
            restore_key(x, rotation);
          else if (rule.hadamard_v)
            hadamard(x);
          __syncwarp();
          write_row(row, x);
          continue;
        }
        const std::uint16_t* from =
            slot < stored ? reinterpret_cast<const std::uint16_t*>(base) + slot * D
                          : ring + static_cast<std::ptrdiff_t>((first_token + slot) % head.ring) * D;
        for (int c = lane; c < D / 2; c += 32)
          reinterpret_cast<std::uint32_t*>(row)[c] = reinterpret_cast<const std::uint32_t*>(from)[c];
      }
    }
  }
};

/// Grid: pages, heads; 128 threads; dynamic shared memory sizeof(DequantiseMemory<D>).
template <int D>
INNERKV_KERNEL(kTileThreads, 1)
void dequantise(AttendRule rule, const DequantiseArgs* all, int first_page, int capacity) {
  const DequantiseArgs& args = all[blockIdx.y];
  const HeadArgs& head = args.from;
  const int page = first_page + static_cast<int>(blockIdx.x), first = page * kPageTokens,
            k_stored = clamp_int(head.k_quantised - first, 0, kPageTokens),
            v_stored = clamp_int(head.v_quantised - first, 0, kPageTokens),
            count = k_stored > v_stored ? k_stored : v_stored;
  const PageArgs& from = head.pages[page];
  std::uint16_t* to = args.rows + static_cast<std::ptrdiff_t>(page % capacity) * 2 * kPageTokens * D;
  const bool present = count > 0 && from.k;
  if (threadIdx.x == 0) {
    PageArgs& made = args.pages[page % capacity];
    made = from;
    made.k = present ? reinterpret_cast<const std::uint8_t*>(to) : nullptr;
    made.v = present ? reinterpret_cast<const std::uint8_t*>(to + kPageTokens * D) : nullptr;
  }
  if (!present) return;
  const PageDequantiser<D> maker{rule,
                                 head,
                                 *dynamic_shared<DequantiseMemory<D>>(),
                                 static_cast<int>(threadIdx.x),
                                 static_cast<int>(threadIdx.x) / 32,
                                 static_cast<int>(threadIdx.x) % 32};
  maker.tensor(false, from.k, from.k_zeros, head.ring_k, page, k_stored, count, to);
  __syncthreads();
  maker.tensor(true, from.v, from.v_zeros, head.ring_v, page, v_stored, count, to + kPageTokens * D);
}

}  // namespace innerkv::gpu
