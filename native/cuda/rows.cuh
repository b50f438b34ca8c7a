// rows: the steps of a layer between its products, one pass each over [rows][columns].
//
// prepare_rows   Reads a row's source (the residual, attention's heads, or SwiGLU), norms it if wanted,
// writes
//                it in the form that the next product reads. A warp takes groups of 32 columns, a lane a
//                column, so loads and stores lie side by side. What concerns a whole row (sum of squares in
//                float64, largest magnitude) is computed again by every block of the row, in an order that
//                depends on the width only. Bytes as on the CPU: step = largest / 127 of 32 columns, bit for
//                bit.
// prepare_heads  A warp per head of a row: head norm, RoPE, rounding to binary16. A key or value beyond
//                binary16 is stored as zero, so that no cache ever sees it, and its layer is noted.
// embed_rows     A thread per unit of a row of the table.
// score_rows     A block per row of logits: largest, then the sum of exponentials in float64.
#pragma once

#include "products.h"
#include "warp.cuh"
#include "weights.cuh"

namespace innerkv::gpu {

// ---- sorting a file's blocks into planes ----

/// `count` rows from `first`, as they lie in the file, at `blocks` on the device. A thread moves two bytes.
struct ArrangeArgs {
  MatrixArgs matrix;
  BlockPlanes planes;
  const std::uint16_t* blocks;
  int first, count;
  int block_words, row_words;  // of two bytes
};

INNERKV_KERNEL(256) void arrange_blocks(ArrangeArgs args) {
  const std::int64_t words = std::int64_t{args.row_words} * args.count;
  const std::int64_t step = std::int64_t{256} * gridDim.x;
  for (std::int64_t i = std::int64_t{256} * blockIdx.x + threadIdx.x; i < words; i += step) {
    const int row = static_cast<int>(i / args.row_words), within = static_cast<int>(i % args.row_words),
              block = within / args.block_words, byte = 2 * (within % args.block_words);
    const auto put = [&](const std::uint8_t* plane, int stride, int at, int bytes) {
      if (byte < at || byte >= at + bytes) return;
      std::uint8_t* to = const_cast<std::uint8_t*>(plane) + std::ptrdiff_t{args.first + row} * stride +
                         std::ptrdiff_t{block} * bytes + (byte - at);
      *reinterpret_cast<std::uint16_t*>(to) = args.blocks[i];
    };
    const BlockPlanes& p = args.planes;
    put(args.matrix.codes, args.matrix.code_stride, p.codes_at, p.codes);
    put(args.matrix.high, args.matrix.high_stride, p.high_at, p.high);
    put(args.matrix.scales, args.matrix.scale_stride, p.scales_at, p.scales);
  }
}

// ---- rows ----

inline constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

INNERKV_DEVICE double warp_sum_double(double x) {
  for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(kFullMask, x, h);
  return x;
}

/// Everybody gets the total of the block's sums: warps in rising order. `parts` [kRowWarps].
INNERKV_DEVICE double block_sum_double(double x, double* parts) {
  x = warp_sum_double(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kRowWarps; ++w) total += parts[w];
  return total;
}

INNERKV_DEVICE std::uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

/// The largest magnitude of the block as bits, which order like magnitudes. `parts` [kRowWarps].
INNERKV_DEVICE std::uint32_t block_largest(std::uint32_t bits, std::uint32_t* parts) {
  bits = __reduce_max_sync(kFullMask, bits);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = bits;
  __syncthreads();
  std::uint32_t largest = 0;
  for (int w = 0; w < kRowWarps; ++w) largest = parts[w] > largest ? parts[w] : largest;
  return largest;
}

/// A power of two that brings the largest magnitude to [2^13, 2^14), and 1 / it. 1 for zeros, infinity, NaN.
INNERKV_DEVICE float half_factor(std::uint32_t largest_bits, float* inverse) {
  const int exponent = static_cast<int>(largest_bits >> 23);
  int field = 127 + 13 - (exponent - 127);
  if (exponent == 0 || exponent == 255) field = 127;
  if (field > 253) field = 253;
  *inverse = __uint_as_float(static_cast<std::uint32_t>(254 - field) << 23);
  return __uint_as_float(static_cast<std::uint32_t>(field) << 23);
}

template <RowSource kSource, RowForm kForm>
INNERKV_KERNEL(kRowThreads)
void prepare_rows_kernel(RowsArgs args) {
  expect_block<kRowThreads>();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32),
            columns = args.columns;
  const std::ptrdiff_t row = blockIdx.x;
  const float *x = args.x, *y = args.y;
  if constexpr (kSource == RowSource::kHeads) {
    x += row * (columns / args.head_dim) * args.cache_dim;
  } else {
    x += row * columns;
    if (kSource == RowSource::kGated) y += row * columns;
  }
  const auto source_at = [&](int c) -> float {
    if constexpr (kSource == RowSource::kPlain) return x[c];
    if constexpr (kSource == RowSource::kHeads)
      return x[std::ptrdiff_t{c / args.head_dim} * args.cache_dim + c % args.head_dim];
    const float gate = x[c];
    return gate / (1.0f + expf(-gate)) * y[c];
  };
  float norm = 1.0f;
  INNERKV_SHARED(double, squares, [kRowWarps]);
  if (args.norm != RowNorm::kNone) {
    double sum = 0;
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += kRowThreads) {
      const double value = static_cast<double>(source_at(c));
      sum += value * value;
    }
    sum = block_sum_double(sum, squares);
    const double mean =
        sum / columns + (args.norm == RowNorm::kBare ? 0.0 : static_cast<double>(args.epsilon));
    norm = mean > 0 || args.norm != RowNorm::kBare ? static_cast<float>(1 / sqrt(mean)) : 0.0f;
  }
  const auto value_at = [&](int c) -> float {
    if (c >= columns) return 0.0f;
    const float value = source_at(c);
    if (args.norm == RowNorm::kNone) return value;
    return args.norm == RowNorm::kBare ? value * norm : value * norm * args.weight[c];
  };
  float factor = 1.0f;
  if constexpr (kForm == RowForm::kHalves) {
    INNERKV_SHARED(std::uint32_t, largest, [kRowWarps]);
    std::uint32_t bits = 0;
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += kRowThreads) {
      const std::uint32_t own = magnitude_bits(value_at(c));
      bits = own > bits ? own : bits;
    }
    float inverse;
    factor = half_factor(block_largest(bits, largest), &inverse);
    if (threadIdx.x == 0) args.out.scales[row] = inverse;
  }
  const int width = kForm == RowForm::kBytes ? columns : args.out.stride;
  for (int first = 32 * (static_cast<int>(blockIdx.y) * kRowWarps + warp); first < width;
       first += static_cast<int>(gridDim.y) * kRowThreads) {
    const int c = first + lane;
    const float value = value_at(c);
    if constexpr (kForm == RowForm::kFloats) args.out.floats[row * args.out.stride + c] = value;
    if constexpr (kForm == RowForm::kHalves)
      args.out.halves[row * args.out.stride + c] = __half_as_ushort(__float2half_rn(value * factor));
    if constexpr (kForm == RowForm::kBytes) {
      const float largest = __uint_as_float(__reduce_max_sync(kFullMask, magnitude_bits(value)));
      const float step = largest / 127, inverse = largest > 1e-30f ? 127 / largest : 0.0f;
      // 1.5 * 2^23: its last bit is worth 1, so adding it rounds.
      const int code = __float_as_int(value * inverse + 12582912.0f) - 0x4b400000;
      args.out.codes[row * columns + c] = static_cast<std::int8_t>(code);
      int sum = code;
#pragma unroll
      for (int h = 8; h > 0; h /= 2) sum += __shfl_xor_sync(kFullMask, sum, h);
      if (lane == 0) args.out.steps[row * (columns / 32) + first / 32] = step;
      if (lane % 16 == 0)
        args.out.totals[row * (columns / 16) + first / 16 + lane / 16] = step * static_cast<float>(sum);
    }
  }
}

inline constexpr int kHeadWarps = 4;

INNERKV_KERNEL(32 * kHeadWarps) void prepare_heads_kernel(HeadsArgs args) {
  expect_block<32 * kHeadWarps>();
  const int lane = static_cast<int>(threadIdx.x % 32), D = args.head_dim,
            heads = args.query_heads + 2 * args.kv_heads,
            head = static_cast<int>(blockIdx.y) * kHeadWarps + static_cast<int>(threadIdx.x / 32);
  if (head >= heads) return;
  const std::ptrdiff_t row = blockIdx.x;
  const float* x = args.qkv + (row * heads + head) * D;
  const int kv = head - args.query_heads;
  const bool query = kv < 0, value = kv >= args.kv_heads;
  const float* weight = query ? args.q_norm : value ? nullptr : args.k_norm;
  float norm = 1.0f;
  if (weight) {
    double sum = 0;
    for (int c = lane; c < D; c += 32) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    norm = static_cast<float>(1 / sqrt(warp_sum_double(sum) / D + static_cast<double>(args.epsilon)));
  }
  const auto normed = [&](int c) { return weight ? x[c] * norm * weight[c] : x[c]; };
  bool good = true;
  const std::ptrdiff_t to = row * (query ? args.query_heads : args.kv_heads) + (query   ? head
                                                                                : value ? kv - args.kv_heads
                                                                                        : kv);
  const auto put = [&](int c, float channel) {
    if (query) {
      args.q[to * args.cache_dim + c] = channel;
      return;
    }
    const std::uint16_t bits = __half_as_ushort(__float2half_rn(channel));
    const bool finite = (bits & 0x7c00u) != 0x7c00u;
    good = good && finite;
    (value ? args.v : args.k)[to * args.cache_dim + c] = finite ? bits : std::uint16_t{0};
  };
  if (args.observed && !value) {
    float* observed = args.observed + (row * (args.query_heads + args.kv_heads) + head) * D;
    for (int c = lane; c < D; c += 32) observed[c] = normed(c);
  }
  const int pairs = value ? 0 : args.pairs;
  for (int pair = lane; pair < pairs; pair += 32) {
    const int a = args.half_layout ? pair : 2 * pair, b = args.half_layout ? pair + pairs : 2 * pair + 1;
    const float cos = args.cos[row * args.pairs + pair], sin = args.sin[row * args.pairs + pair];
    const float xa = normed(a), xb = normed(b);
    put(a, xa * cos - xb * sin);
    put(b, xb * cos + xa * sin);
  }
  for (int c = 2 * pairs + lane; c < args.cache_dim; c += 32) put(c, c < D ? normed(c) : 0.0f);
  if (!__all_sync(kFullMask, good) && lane == 0) atomicMin(args.first_bad, args.layer);
}

/// Numbers times the scale of the table.
template <TensorType kType>
INNERKV_KERNEL(kRowThreads)
void embed_rows(MatrixArgs matrix, const int* tokens, float* out) {
  expect_block<kRowThreads>();
  using W = Weights<kType>;
  const std::ptrdiff_t row = blockIdx.x;
  float* to = out + row * matrix.columns;
  const int units = units_of<kType>(matrix.columns);
  for (int unit = static_cast<int>(blockIdx.y * kRowThreads + threadIdx.x); unit < units;
       unit += static_cast<int>(gridDim.y) * kRowThreads) {
    W weights;
    weights.load(matrix, tokens[row], unit);
#pragma unroll
    for (int quad = 0; quad < W::kQuads; ++quad) {
      float w[4];
      weights.quad(quad, w);
      const int column = W::column(unit, quad);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < matrix.columns) to[column + i] = w[i] * matrix.scale;
    }
  }
}

INNERKV_KERNEL(kRowThreads)
void score_rows_kernel(const float* logits, const int* targets, int vocabulary, float* nll) {
  expect_block<kRowThreads>();
  INNERKV_SHARED(float, tops, [kRowWarps]);
  INNERKV_SHARED(double, sums, [kRowWarps]);
  const float* x = logits + std::ptrdiff_t{vocabulary} * blockIdx.x;
  const int target = targets[blockIdx.x];
  float top = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < vocabulary; i += kRowThreads) top = x[i] > top ? x[i] : top;
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  for (int w = 0; w < kRowWarps; ++w) top = tops[w] > top ? tops[w] : top;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocabulary; i += kRowThreads)
    sum += static_cast<double>(expf(x[i] - top));
  sum = block_sum_double(sum, sums);
  if (threadIdx.x != 0) return;
  nll[blockIdx.x] =
      target < 0 ? 0.0f
                 : static_cast<float>(log(sum) - (static_cast<double>(x[target]) - static_cast<double>(top)));
}

}  // namespace innerkv::gpu
