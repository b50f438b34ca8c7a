// Tokens into pages: every stored bit as docs/format.md sections 3 to 6 and 8 have it.
//
// - Shape: jobs (pages) x tokens of one head; a warp per token, a block per token with feedback, a block per
//   32 tokens for tokens32 values.
// - Reads: tokens from windows and new rows (binary16), basis, clip ratios.
// - Writes: codes, scales, zero points and outlier rows of the job's slots; nothing else of the page.
// - Exchange: keys of several tokens share words (atomics on their own bits); a value's bytes are its own.
// - Order: sum32 everywhere; compaction of zero points runs in a second launch, in slot order.
// - Limits: head_dim <= 256, at most 8 clip ratios.
#pragma once

#include "../format/outliers.h"
#include "args.h"
#include "ptx.h"
#include "warp.cuh"

namespace innerkv::gpu {

inline constexpr int kQuantiseWarps = 4;

INNERKV_DEVICE void load_halves(int lane, const std::uint16_t* from, float* x, int count) {
  for (int i = lane; i < count; i += 32) x[i] = ptx::float_of(from[i]);
}

INNERKV_DEVICE void warp_transform_key(int lane, const QuantiseRule& rule, const QuantiseArgs& job,
                                       float* x) {
  const int D = rule.head_dim;
  if (job.cos) warp_rotate(lane, x, job.cos, job.sin, rule.pairs, rule.half_layout);
  if (job.basis.mean)
    for (int i = lane; i < D; i += 32) x[i] -= job.basis.mean[i];
  if (job.basis.inv_lam)
    for (int i = lane; i < D; i += 32) x[i] *= job.basis.inv_lam[i];
  if (rule.hadamard_k) warp_hadamard(lane, x, D);
  __syncwarp();
}

INNERKV_DEVICE void store_scale(const TensorLayout& layout, std::uint8_t* base, std::uint16_t* dense,
                                int index, const GroupScale& scale) {
  reinterpret_cast<std::uint16_t*>(base + layout.scales_at())[index] = scale.scale;
  if (!scale.has_zero) return;
  (layout.spec.dense_zeros() ? reinterpret_cast<std::uint16_t*>(base + layout.zeros_at()) : dense)[index] =
      scale.zero;
}

INNERKV_DEVICE void put_bits_atomic(std::uint32_t* word, std::uint32_t mask, std::uint32_t bits) {
  atomicAnd(word, ~mask);
  if (bits) atomicOr(word, bits);
}

/// Codes of one row (a token's key), `count` of them, by one warp.
INNERKV_DEVICE void warp_put_row(int lane, std::uint8_t* base, const CodeShape& shape, int row,
                                 const std::uint8_t* codes, int count) {
  const int X = shape.words(), cls = row / X, x = row % X;
  for (int quad = lane; quad < count / 4; quad += 32) {
    std::uint32_t packed = 0;
    for (int j = 0; j < 4; ++j) packed |= std::uint32_t{codes[4 * quad + j]} << (8 * j);
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(base) + quad * shape.planes() * X + x;
    if (shape.bits == 8) {
      *words = packed;
    } else if (shape.bits != 3) {
      const int shift = shape.bits * cls;
      put_bits_atomic(words, (0x01010101u * ((1u << shape.bits) - 1u)) << shift, packed << shift);
    } else if (cls < 6) {
      const int shift = 3 * (cls % 2);
      put_bits_atomic(words + cls / 2 * X, 0x07070707u << shift, packed << shift);
    } else {
      put_bits_atomic(words + (cls - 6) * X, 0xc0c0c0c0u, (packed & 0x06060606u) << 5);
      put_bits_atomic(words + 2 * X, 0x01010101u << cls, (packed & 0x01010101u) << cls);
    }
  }
}

/// The bytes of value word x (all planes) at element k, from the codes of all channels of a token.
INNERKV_DEVICE void put_value_bytes(std::uint8_t* base, const CodeShape& shape, int k, int x,
                                    const std::uint8_t* codes) {
  const int X = shape.words();
  std::uint8_t* at = base + k / 4 * shape.quad_bytes() + 4 * x + k % 4;
  if (shape.bits != 3) {
    unsigned byte = 0;
    for (int c = 0; c < shape.classes(); ++c)
      byte |= static_cast<unsigned>(codes[x + X * c]) << (shape.bits * c);
    *at = static_cast<std::uint8_t>(byte);
    return;
  }
  unsigned plane[3];
  for (int k3 = 0; k3 < 3; ++k3)
    plane[k3] = codes[x + X * 2 * k3] | static_cast<unsigned>(codes[x + X * (2 * k3 + 1)]) << 3;
  for (int high = 0; high < 2; ++high) {
    const unsigned code = codes[x + X * (6 + high)];
    plane[high] |= (code >> 1) << 6;
    plane[2] |= (code & 1u) << (6 + high);
  }
  for (int k3 = 0; k3 < 3; ++k3) at[4 * X * k3] = static_cast<std::uint8_t>(plane[k3]);
}

INNERKV_DEVICE GroupRule key_rule(const QuantiseRule& rule) {
  return {rule.k.bits, rule.k.mode, rule.clip_k, rule.clip_k_count, rule.unbiased_k};
}
INNERKV_DEVICE GroupRule value_rule(const QuantiseRule& rule) {
  return {rule.v.bits, rule.v.mode, rule.clip_v, rule.clip_v_count, rule.unbiased_v};
}

/// One of the outliers of a token: lane e < outliers has the one that was found e-th.
struct LaneOutlier {
  int channel = kMaxHeadDim, rank = 0;  // by channel
  float x = 0.0f;
};

/// Takes the outliers out of a token x [head_dim], as take_outliers() does; the warp owns x.
INNERKV_DEVICE LaneOutlier warp_take_outliers(int lane, const TensorLayout& layout, float* x) {
  const int D = layout.head_dim, count = layout.spec.outliers;
  LaneOutlier mine;
  unsigned taken = 0;  // of channels lane, lane + 32, ...
  for (int e = 0; e < count; ++e) {
    float largest = -1.0f;
    int channel = D;
    for (int i = lane; i < D; i += 32) {
      const float a = x[i] < 0 ? -x[i] : x[i];
      if (a > largest && !(taken >> (i / 32) & 1u)) {
        largest = a;
        channel = i;
      }
    }
    for (int h = 16; h > 0; h /= 2) {
      const float other = __shfl_xor_sync(kFullMask, largest, h);
      const int other_channel = __shfl_xor_sync(kFullMask, channel, h);
      if (other > largest || (other == largest && other_channel < channel)) {
        largest = other;
        channel = other_channel;
      }
    }
    if (channel % 32 == lane) taken |= 1u << (channel / 32);
    if (lane == e) mine.channel = channel;
  }
  for (int e = 0; e < count; ++e) mine.rank += __shfl_sync(kFullMask, mine.channel, e) < mine.channel;
  float drawn = 0.0f;
  for (int g = 0; g < layout.groups(); ++g) {
    const int begin = layout.group_begin(g), end = layout.group_end(g);
    const bool here = mine.channel >= begin && mine.channel < end;
    if (!__any_sync(kFullMask, here)) continue;
    constexpr float kHighest = 3.402823466e38f;
    float low = kHighest, high = -kHighest;
    for (int i = begin + lane; i < end; i += 32)
      if (!(taken >> (i / 32) & 1u)) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
      }
    low = -warp_max(-low);
    high = warp_max(high);
    if (here) {
      mine.x = x[mine.channel];
      drawn = drawn_in(mine.x, low, high);
    }
  }
  __syncwarp();
  if (lane < count) x[mine.channel] = drawn;
  __syncwarp();
  return mine;
}

/// Codes, scales, zero points and outliers of one token x [head_dim]. Only the codes are not stored.
INNERKV_DEVICE void warp_round(int lane, const TensorLayout& layout, const GroupRule& rule, int slot,
                               std::uint8_t* base, std::uint16_t* dense, float* x, std::uint8_t* codes) {
  const TensorSpec& spec = layout.spec;
  LaneOutlier mine;
  Dequantiser map{};
  if (spec.outliers > 0) mine = warp_take_outliers(lane, layout, x);
  for (int g = 0; g < layout.groups(); ++g) {
    const int begin = layout.group_begin(g), end = layout.group_end(g);
    const GroupScale scale = warp_quantise_group(
        lane, end - begin, rule, [&](int i) { return x[begin + i]; },
        [&](int i, std::uint8_t code) { codes[begin + i] = code; });
    if (lane == 0) store_scale(layout, base, dense, layout.scale_index(slot, g), scale);
    if (mine.channel >= begin && mine.channel < end)
      map = dequantiser(spec.bits, spec.mode, scale.scale, scale.zero);
  }
  __syncwarp();
  if (spec.outliers == 0) return;
  std::uint8_t* section = base + layout.outliers_at();
  const int first = slot * spec.outliers;
  if (lane < spec.outliers) {
    const float decoded = map.scale * static_cast<float>(codes[mine.channel]) + map.offset;
    put_outlier(section, layout.outliers(), first + mine.rank,
                {mine.channel, outlier_value(mine.x, decoded)});
  }
  if (lane == 0) put_outlier_start(section, layout.outliers(), slot + 1, first + spec.outliers);
  if (lane == 0 && slot == 0) put_outlier_start(section, layout.outliers(), 0, 0);
}

/// Keys without feedback: grid (ceil(tokens / 4), jobs), 128 threads.
INNERKV_KERNEL(128, 1) void quantise_keys(QuantiseRule rule, const QuantiseArgs* jobs) {
  INNERKV_SHARED(float, rows, [kQuantiseWarps][kMaxHeadDim]);
  INNERKV_SHARED(std::uint8_t, all_codes, [kQuantiseWarps][kMaxHeadDim]);
  const QuantiseArgs& job = jobs[blockIdx.y];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int item = static_cast<int>(blockIdx.x) * kQuantiseWarps + warp, D = rule.head_dim;
  if (item >= job.k_count) return;
  const int slot = job.k_first + item;
  const std::uint16_t* key = job.k.at_position(job.position + slot);
  const TensorLayout layout{rule.k, false, D};
  if (rule.k.raw()) {
    for (int i = lane; i < D; i += 32) reinterpret_cast<std::uint16_t*>(job.page)[slot * D + i] = key[i];
    return;
  }
  float* x = rows[warp];
  std::uint8_t* codes = all_codes[warp];
  load_halves(lane, key, x, D);
  warp_transform_key(lane, rule, job, x);
  warp_round(lane, layout, key_rule(rule), slot, job.page, job.k_dense, x, codes);
  warp_put_row(lane, job.page, layout.codes(), slot, codes, D);
}

/// Keys with error feedback: grid (tokens, jobs), 32 threads per clip ratio. Lane l keeps the running values
/// of columns l, l + 32, ...
template <int kColumns>
INNERKV_KERNEL(256)
void quantise_keys_feedback(QuantiseRule rule, const QuantiseArgs* jobs) {
  INNERKV_SHARED(float, x, [kMaxHeadDim]);
  INNERKV_SHARED(float, image, [kMaxHeadDim]);
  INNERKV_SHARED(std::uint8_t, codes, [kMaxClipRatios][kMaxHeadDim]);
  INNERKV_SHARED(std::uint8_t, final_codes, [kMaxHeadDim]);
  INNERKV_SHARED(float, losses, [kMaxClipRatios]);
  const QuantiseArgs& job = jobs[blockIdx.y];
  const int D = rule.head_dim, item = static_cast<int>(blockIdx.x);
  if (item >= job.k_count) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            slot = job.k_first + item;
  const TensorLayout layout{rule.k, false, D};
  const float top = static_cast<float>((1 << rule.k.bits) - 1),
              half_levels = static_cast<float>(1 << (rule.k.bits - 1)), center = 0.5f * top;
  if (warp == 0) {
    load_halves(lane, job.k.at_position(job.position + slot), image, D);
    warp_transform_key(lane, rule, job, image);
    for (int i = lane; i < D; i += 32) x[i] = image[job.basis.order[i]];
  }
  __syncthreads();

  const float full = 2.0f * warp_max_magnitude(lane, D, [&](int i) { return x[i]; }) / top;
  const std::uint16_t bits = half_bits(rule.clip_k[warp] * full);
  const float scale = half_value(bits), inverse = reciprocal(scale);
  float y[kColumns], loss = 0.0f;
  for (int m = 0; m < kColumns; ++m) y[m] = 32 * m + lane < D ? x[32 * m + lane] : 0.0f;
#pragma unroll
  for (int m = 0; m < kColumns; ++m)
    for (int l = 0; l < 32 && 32 * m + l < D; ++l) {
      const int c = 32 * m + l;
      const float now = __shfl_sync(kFullMask, y[m], l);
      const float code = clamp_code(now * inverse + half_levels, 0.0f, top);
      const float error = now - scale * (code - center);
      const float part = error * job.basis.pivot[c];
      loss = loss + part * part;
      if (lane == 0) codes[warp][c] = static_cast<std::uint8_t>(code);
      const float* row = job.basis.feedback + c * D;
#pragma unroll
      for (int k = m; k < kColumns; ++k) {
        const int j = 32 * k + lane;
        if (j > c && j < D) y[k] = y[k] - error * row[j];
      }
    }
  if (lane == 0) losses[warp] = loss;
  __syncthreads();

  int best = 0;
  for (int r = 1; r < rule.clip_k_count; ++r)
    if (losses[r] < losses[best]) best = r;
  const int threads = 32 * rule.clip_k_count;
  for (int i = static_cast<int>(threadIdx.x); i < D; i += threads)
    final_codes[job.basis.order[i]] = codes[best][i];
  if (rule.unbiased_k)
    for (int c = static_cast<int>(threadIdx.x); c < D; c += threads) {
      float sum = 0.0f;
      for (int j = 0; j < D; ++j) sum = sum + job.basis.metric[j * D + c] * x[j];
      image[c] = sum;
    }
  __syncthreads();
  if (warp != 0) return;
  std::uint16_t stored = half_bits(rule.clip_k[best] * full);
  if (rule.unbiased_k) {
    const float chosen = half_value(stored);
    const float num = warp_ordered_sum_of(lane, D, [&](int i) { return x[i] * image[i]; });
    const float den = warp_ordered_sum_of(
        lane, D, [&](int i) { return chosen * (static_cast<float>(codes[best][i]) - center) * image[i]; });
    stored = unbiased_scale(chosen, num, den);
  }
  if (lane == 0) store_scale(layout, job.page, nullptr, layout.scale_index(slot, 0), {stored, 0, false});
  warp_put_row(lane, job.page, layout.codes(), slot, final_codes, D);
}

/// Values whose scales belong to one token: grid (ceil(tokens / 4), jobs), 128 threads.
INNERKV_KERNEL(128, 1) void quantise_values(QuantiseRule rule, const QuantiseArgs* jobs, int v_at) {
  INNERKV_SHARED(float, rows, [kQuantiseWarps][kMaxHeadDim]);
  INNERKV_SHARED(std::uint8_t, all_codes, [kQuantiseWarps][kMaxHeadDim]);
  const QuantiseArgs& job = jobs[blockIdx.y];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int item = static_cast<int>(blockIdx.x) * kQuantiseWarps + warp, D = rule.head_dim;
  if (item >= job.v_count) return;
  const int slot = job.v_first + item;
  const std::uint16_t* value = job.v.at_position(job.position + slot);
  const TensorLayout layout{rule.v, true, D};
  std::uint8_t* base = job.page + v_at;
  if (rule.v.raw()) {
    for (int i = lane; i < D; i += 32) reinterpret_cast<std::uint16_t*>(base)[slot * D + i] = value[i];
    return;
  }
  float* x = rows[warp];
  std::uint8_t* codes = all_codes[warp];
  load_halves(lane, value, x, D);
  __syncwarp();
  if (rule.hadamard_v) warp_hadamard(lane, x, D);
  warp_round(lane, layout, value_rule(rule), slot, base, job.v_dense, x, codes);
  const CodeShape shape = layout.codes();
  for (int w = lane; w < shape.words(); w += 32) put_value_bytes(base, shape, slot, w, codes);
}

/// Values in sub-blocks of 32 tokens: grid (sub-blocks, jobs), 128 threads, dynamic shared memory of
/// quantise_blocks_shared(D) bytes.
inline constexpr int quantise_blocks_shared(int head_dim) { return kBlockTokens32 * (head_dim + 1) * 5; }

INNERKV_KERNEL(128) void quantise_value_blocks(QuantiseRule rule, const QuantiseArgs* jobs, int v_at) {
  const QuantiseArgs& job = jobs[blockIdx.y];
  const int D = rule.head_dim, stride = D + 1;  // odd: columns fall into different banks
  float* x = dynamic_shared<float>();           // [32][stride]
  std::uint8_t* codes = reinterpret_cast<std::uint8_t*>(x + kBlockTokens32 * stride);  // [32][stride]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (static_cast<int>(blockIdx.x) * kBlockTokens32 >= job.v_count) return;
  const int first = job.v_first + static_cast<int>(blockIdx.x) * kBlockTokens32;
  const TensorLayout layout{rule.v, true, D};
  std::uint8_t* base = job.page + v_at;
  for (int t = warp; t < kBlockTokens32; t += kQuantiseWarps) {
    load_halves(lane, job.v.at_position(job.position + first + t), x + t * stride, D);
    __syncwarp();
    if (rule.hadamard_v) warp_hadamard(lane, x + t * stride, D);
  }
  __syncthreads();
  for (int c = warp; c < D; c += kQuantiseWarps) {
    const GroupScale scale = warp_quantise_group(
        lane, kBlockTokens32, value_rule(rule), [&](int i) { return x[i * stride + c]; },
        [&](int i, std::uint8_t code) { codes[i * stride + c] = code; });
    if (lane == 0) store_scale(layout, base, job.v_dense, layout.scale_index(first, c), scale);
  }
  __syncthreads();
  const CodeShape shape = layout.codes();
  for (int item = static_cast<int>(threadIdx.x); item < kBlockTokens32 * shape.words();
       item += 32 * kQuantiseWarps) {
    const int t = item % kBlockTokens32;
    put_value_bytes(base, shape, first + t, item / kBlockTokens32, codes + t * stride);
  }
}

/// Appends the zero points of the job's asymmetric groups to its extents, in the order of slots and groups:
/// grid (2, jobs), 32 threads; blockIdx.x is 0 for keys, 1 for values.
INNERKV_KERNEL(32) void compact_zeros(QuantiseRule rule, const QuantiseArgs* jobs, int v_at) {
  const QuantiseArgs& job = jobs[blockIdx.y];
  const bool value = blockIdx.x == 1;
  const TensorLayout layout{value ? rule.v : rule.k, value, rule.head_dim};
  if (!layout.spec.compact_zeros()) return;
  const int lane = static_cast<int>(threadIdx.x), span = layout.spec.flush_tokens();
  const int first = value ? job.v_first : job.k_first, slots = value ? job.v_count : job.k_count;
  const auto* scales =
      reinterpret_cast<const std::uint16_t*>(job.page + (value ? v_at : 0) + layout.scales_at());
  const std::uint16_t* dense = value ? job.v_dense : job.k_dense;
  int* total = value ? job.v_zero_count : job.k_zero_count;
  int count = *total;
  const int items = slots / span * layout.groups();
  for (int begin = 0; begin < items; begin += 32) {
    const int item = begin + lane;
    const int index =
        item < items ? layout.scale_index(first + item / layout.groups() * span, item % layout.groups()) : 0;
    const bool mine = item < items && (scales[index] & 0x8000u);
    const unsigned all = __ballot_sync(kFullMask, mine);
    if (mine) {
      const int at = count + __popc(all & ((1u << lane) - 1u));
      (value ? job.v_zeros : job.k_zeros)[at / kZeroExtent][at % kZeroExtent] = dense[index];
    }
    count += __popc(all);
  }
  __syncwarp();
  if (lane == 0) *total = count;
}

}  // namespace innerkv::gpu
