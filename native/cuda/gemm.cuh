// gemm: many rows of activations times a panel of weights, both in binary16, on tensor cores; for prefill
// where cuBLAS is absent, and what surrounds either of them.
//
// Maths      sums[t][r] = sum over k of x[t][k] * w[r][k], products exact, sums in float32 on tensor cores.
// Work       A block of 4 warps makes 64 tokens x 64 rows, a warp 32 x 32; k in steps of 64 in rising order.
//            Blocks of the same rows are neighbours, so that L2 serves the panel to all tokens.
// Memory     Two stages of 16 KiB in shared memory, filled 16 bytes a thread by cp.async while the other is
//            used. A tile's row is 128 bytes; its 16-byte pieces are exchanged by the row's low bits, so that
//            the 8 rows of an ldmatrix lie in different banks.
// Limits     stride is a multiple of 64, zeros behind the last column. Rows and tokens beyond the last repeat
//            it and are not written.
//
// dequantise_panel   A thread per unit of a row: value = scale * code + offset in float32, rounded once.
// finish_panel       sums * scale of the token + bias, or added to the residual.
#pragma once

#include "products.h"
#include "ptx.h"
#include "weights.cuh"

namespace innerkv::gpu {

inline constexpr int kTile = 64, kTileBytes = kTile * kTile * 2, kGemmThreads = 128;

struct GemmArgs {
  const std::uint16_t *weights, *x;  // [rows][stride], [tokens][stride]
  float* out;                        // [tokens][rows]
  int rows, tokens, stride;
};

/// 16 bytes `piece` (0 to 7) of row `row` of a tile.
INNERKV_DEVICE int tile_at(int row, int piece) { return 64 * row + 8 * (piece ^ (row % 8)); }

INNERKV_KERNEL(kGemmThreads) void multiply_panel(GemmArgs args) {
  expect_block<kGemmThreads>();
  struct alignas(16) Stage {
    std::uint16_t x[kTile * kTile], w[kTile * kTile];
  };
  INNERKV_SHARED(Stage, stages, [2]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int token_tiles = (args.tokens + kTile - 1) / kTile;
  const int first_token = static_cast<int>(blockIdx.x) % token_tiles * kTile,
            first_row = static_cast<int>(blockIdx.x) / token_tiles * kTile;
  const int token_at = warp % 2 * 32, row_at = warp / 2 * 32;
  const auto fill = [&](Stage& stage, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int item = thread + kGemmThreads * i, row = item / 8, piece = item % 8;
      const int token = first_token + row < args.tokens ? first_token + row : args.tokens - 1,
                weight = first_row + row < args.rows ? first_row + row : args.rows - 1;
      ptx::cp_async_16(&stage.x[tile_at(row, piece)],
                       args.x + std::ptrdiff_t{token} * args.stride + k + 8 * piece);
      ptx::cp_async_16(&stage.w[tile_at(row, piece)],
                       args.weights + std::ptrdiff_t{weight} * args.stride + k + 8 * piece);
    }
    ptx::cp_async_commit();
  };
  float sum[2][4][4] = {};
  const int steps = args.stride / kTile;
  fill(stages[0], 0);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this step has arrived, and everybody is done with the one before
    if (step + 1 < steps) fill(stages[(step + 1) % 2], (step + 1) * kTile);
    const Stage& stage = stages[step % 2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 columns: pieces 2k and 2k + 1
      std::uint32_t a[2][4], b[2][4];
      // Matrices in the order of the A fragment: rows 0-7 and 8-15 of the first piece, then of the second.
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ptx::ldmatrix<4>(a[m], &stage.x[tile_at(token_at + 16 * m + lane % 16, 2 * k + lane / 16)]);
      // Two B fragments of 8 rows: the first piece, then the second, of each.
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ptx::ldmatrix<4>(b[n],
                         &stage.w[tile_at(row_at + 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)]);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const std::uint32_t fragment[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          ptx::mma_m16n8k16<__half>(sum[m][n], a[m], fragment);
        }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first_token + token_at + 16 * m + lane / 4 + 8 * (i / 2),
                  row = first_row + row_at + 8 * n + 2 * (lane % 4) + i % 2;
        if (token < args.tokens && row < args.rows)
          args.out[std::ptrdiff_t{token} * args.rows + row] = sum[m][n][i];
      }
}

/// Grid (blocks across a row, rows), 256 threads.
template <TensorType kType>
INNERKV_KERNEL(256)
void dequantise_panel(MatrixArgs matrix, int first, std::uint16_t* to, int stride) {
  expect_block<256>();
  using W = Weights<kType>;
  const int row = static_cast<int>(blockIdx.y), columns = matrix.columns, units = units_of<kType>(columns);
  std::uint16_t* out = to + std::ptrdiff_t{row} * stride;
  const auto halves = [](float a, float b) {
    return std::uint32_t{__half_as_ushort(__float2half_rn(a))} |
           std::uint32_t{__half_as_ushort(__float2half_rn(b))} << 16;
  };
  for (int unit = static_cast<int>(blockIdx.x * 256 + threadIdx.x); W::kColumns * unit < stride;
       unit += static_cast<int>(gridDim.x) * 256) {
    W weights;
    if (unit < units) weights.load(matrix, first + row, unit);
#pragma unroll
    for (int quad = 0; quad < W::kQuads; ++quad) {
      float w[4] = {0, 0, 0, 0};
      int column = W::kColumns * unit + 4 * quad;
      if (unit < units) {
        weights.quad(quad, w);
        column = W::column(unit, quad);
      }
      *reinterpret_cast<uint2*>(out + column) = uint2{halves(w[0], w[1]), halves(w[2], w[3])};
    }
  }
}

struct FinishArgs {
  ProductArgs product;
  const float *sums, *scales;
  int first, count, tokens;
};

INNERKV_KERNEL(256) void finish_panel(FinishArgs args) {
  expect_block<256>();
  const int token = static_cast<int>(blockIdx.x);
  const float scale = args.scales[token];
  for (int r = static_cast<int>(blockIdx.y * 256 + threadIdx.x); r < args.count;
       r += static_cast<int>(gridDim.y) * 256) {
    float value = args.sums[std::ptrdiff_t{token} * args.count + r] * scale * args.product.weight.scale;
    if (args.product.bias) value = value + args.product.bias[args.first + r];
    float* to = args.product.out + std::ptrdiff_t{token} * args.product.stride + args.first + r;
    *to = args.product.add ? *to + value : value;
  }
}

}  // namespace innerkv::gpu
