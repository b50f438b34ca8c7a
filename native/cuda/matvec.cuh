// matvec: rows of stored weights times a few rows of activations, for decoding.
//
// Maths      out[t][r] = sum over units u, pieces p of scale * (step * (codes . codes of x)) + offset *
// total,
//            or in float32 sum over columns of value * x; then + bias, or added to what is there.
// Work       A warp owns kMatvecRows rows and all tokens of its group: every weight is read once, 16 bytes a
//            lane and row, kMatvecRows loads under way at a time. Lane l takes units l, l + 32, ...
// Sums       Of 16 or 32 codes exact in int32 (dp4a); then float32 by fma, units in rising order, within a
//            unit piece 0 before piece 1 and products before offsets; in float32 columns in the order of the
//            unit's codes. Lanes are added as a butterfly from 16 to 1. Nothing of this depends on the
//            number of rows or tokens, so a token's result does not either.
// Memory     No shared memory and no barrier. Activations (1 or 4 bytes a column and token) come through L1,
//            which weights bypass. Groups of 8 tokens of one set of rows are neighbouring blocks, so that L2
//            serves the weights of all but the first.
#pragma once

#include "products.h"
#include "warp.cuh"
#include "weights.cuh"

namespace innerkv::gpu {

inline constexpr int kMatvecRows = 4, kMatvecWarps = 4;

struct MatvecArgs {
  ProductArgs products[kMostProducts];
  int count;
  RowsOut x;
  int tokens, groups;  // groups of kVectors tokens
};

/// The rows and tokens of one warp.
struct MatvecTask {
  int product, row, token;
  bool any;

  INNERKV_DEVICE MatvecTask(const MatvecArgs& args, int vectors) : product(0), any(true) {
    const unsigned block = blockIdx.x;
    token = static_cast<int>(block % static_cast<unsigned>(args.groups)) * vectors;
    int run = static_cast<int>(block / static_cast<unsigned>(args.groups)) * kMatvecWarps +
              static_cast<int>(threadIdx.x / 32);
    // Rows of a product fill whole warps; products of a launch follow each other.
    for (;; ++product) {
      if (product == args.count) {
        any = false;
        return;
      }
      const int runs = (args.products[product].weight.rows + kMatvecRows - 1) / kMatvecRows;
      if (run < runs) break;
      run -= runs;
    }
    row = run * kMatvecRows;
  }
};

template <int kVectors>
INNERKV_DEVICE void finish_matvec(const ProductArgs& product, const MatvecTask& task, int tokens, int lane,
                                  float (&sum)[kMatvecRows][kVectors]) {
#pragma unroll
  for (int r = 0; r < kMatvecRows; ++r)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float total = warp_sum(sum[r][v]) * product.weight.scale;
      const int row = task.row + r, token = task.token + v;
      if (lane != (r * kVectors + v) % 32 || row >= product.weight.rows || token >= tokens) continue;
      float* to = product.out + std::ptrdiff_t{token} * product.stride + row;
      const float value = product.bias ? total + product.bias[row] : total;
      *to = product.add ? *to + value : value;
    }
}

template <TensorType kType, int kVectors>
INNERKV_KERNEL(32 * kMatvecWarps)
void matvec_bytes(MatvecArgs args) {
  expect_block<32 * kMatvecWarps>();
  using W = Weights<kType>;
  const MatvecTask task(args, kVectors);
  if (!task.any) return;
  const ProductArgs& product = args.products[task.product];
  const MatrixArgs& matrix = product.weight;
  const int lane = static_cast<int>(threadIdx.x % 32), columns = matrix.columns, units = columns / 32;
  int rows[kMatvecRows];
#pragma unroll
  for (int r = 0; r < kMatvecRows; ++r) rows[r] = task.row + r < matrix.rows ? task.row + r : matrix.rows - 1;
  float sum[kMatvecRows][kVectors] = {};
  for (int unit = lane; unit < units; unit += 32) {
    W weights[kMatvecRows];
#pragma unroll
    for (int r = 0; r < kMatvecRows; ++r) weights[r].load(matrix, rows[r], unit);
    const int segments[2] = {W::segment(unit, 0), W::segment(unit, 1)};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= args.tokens) break;  // for all lanes alike; also keeps later loads from being held early
      std::uint32_t x[2][4];
      float step[2], total[2];
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int at = v * (columns / 16) + segments[piece];  // all segments of 8 tokens: below 2^24
        const uint4 from = reinterpret_cast<const uint4*>(args.x.codes)[at];
        x[piece][0] = from.x;
        x[piece][1] = from.y;
        x[piece][2] = from.z;
        x[piece][3] = from.w;
        step[piece] = args.x.steps[at / 2];
        total[piece] = W::kOffset ? args.x.totals[at] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kMatvecRows; ++r) {
        const W& w = weights[r];
        using Code = std::conditional_t<W::kSigned, std::int8_t, std::uint8_t>;
        std::int32_t dots[2] = {0, 0};
#pragma unroll
        for (int piece = 0; piece < 2; ++piece)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            dots[piece] = ptx::dp4a<Code, std::int8_t>(w.words[piece][i], x[piece][i], dots[piece]);
        float& to = sum[r][v];
        if constexpr (W::kOneScale) {
          to = __fmaf_rn(static_cast<float>(dots[0] + dots[1]), w.scale[0] * step[0], to);
          if constexpr (W::kOffset) to = __fmaf_rn(w.offset[0], total[0] + total[1], to);
        } else {
#pragma unroll
          for (int piece = 0; piece < 2; ++piece) {
            to = __fmaf_rn(static_cast<float>(dots[piece]), w.scale[piece] * step[piece], to);
            to = __fmaf_rn(w.offset[piece], total[piece], to);
          }
        }
      }
    }
  }
  finish_matvec<kVectors>(product, task, args.tokens, lane, sum);
}

/// Blocks that a multiprocessor must have room for. Left alone, ptxas spills a register or two to fit one
/// more.
constexpr int float_blocks(TensorType type, int vectors) {
  if (vectors > 1) return vectors == 4 ? 4 : 3;
  if (!is_quantised(type)) return 1;
  return type == TensorType::kQ6_K ? 4 : 5;
}

template <TensorType kType, int kVectors>
INNERKV_KERNEL(32 * kMatvecWarps, float_blocks(kType, kVectors))
void matvec_floats(MatvecArgs args) {
  expect_block<32 * kMatvecWarps>();
  using W = Weights<kType>;
  const MatvecTask task(args, kVectors);
  if (!task.any) return;
  const ProductArgs& product = args.products[task.product];
  const MatrixArgs& matrix = product.weight;
  const int lane = static_cast<int>(threadIdx.x % 32), units = units_of<kType>(matrix.columns);
  int rows[kMatvecRows];
#pragma unroll
  for (int r = 0; r < kMatvecRows; ++r) rows[r] = task.row + r < matrix.rows ? task.row + r : matrix.rows - 1;
  const float* x = args.x.floats + std::ptrdiff_t{task.token} * args.x.stride;
  const int tokens = args.tokens - task.token;
  float sum[kMatvecRows][kVectors] = {};
  for (int unit = lane; unit < units; unit += 32) {
    W weights[kMatvecRows];
#pragma unroll
    for (int r = 0; r < kMatvecRows; ++r) weights[r].load(matrix, rows[r], unit);
#pragma unroll
    for (int quad = 0; quad < W::kQuads; ++quad) {
      const int column = W::column(unit, quad);
      float w[kMatvecRows][4];
#pragma unroll
      for (int r = 0; r < kMatvecRows; ++r) weights[r].quad(quad, w[r]);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= tokens) break;
        const float4 four = *reinterpret_cast<const float4*>(x + (v * args.x.stride + column));
#pragma unroll
        for (int r = 0; r < kMatvecRows; ++r) {
          float& to = sum[r][v];
          to = __fmaf_rn(w[r][0], four.x, to);
          to = __fmaf_rn(w[r][1], four.y, to);
          to = __fmaf_rn(w[r][2], four.z, to);
          to = __fmaf_rn(w[r][3], four.w, to);
        }
      }
    }
  }
  finish_matvec<kVectors>(product, task, args.tokens, lane, sum);
}

}  // namespace innerkv::gpu
