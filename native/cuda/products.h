// Products of weights with rows of activations, and the small steps between them. Host side of weights.cuh,
// matvec.cuh, rows.cuh and gemm.cuh. Everything is enqueued on the given stream; pointers are device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "weights.h"

namespace innerkv::gpu {

inline constexpr int kFewTokens = 8;     // that integer products take
inline constexpr int kRowPadding = 64;   // rows of activations are padded with zeros to a multiple of it
inline constexpr int kMostProducts = 3;  // with the same activations in one launch

/// One product: out[token * stride + row] = scale * (weight[row] . x[token]) + bias[row], or added to what is
/// there.
struct ProductArgs {
  MatrixArgs weight;
  const float* bias = nullptr;  // [rows] or nullptr
  float* out = nullptr;
  int stride = 0;
  bool add = false;
};

/// Activations in the forms that products read; only the one asked for is written.
struct RowsOut {
  float* floats = nullptr;                    // [rows][stride]
  std::int8_t* codes = nullptr;               // [rows][columns]: x = step * code
  float *steps = nullptr, *totals = nullptr;  // [rows][columns / 32], [rows][columns / 16]
  std::uint16_t* halves = nullptr;            // [rows][stride]: x = scale * half
  float* scales = nullptr;                    // [rows] powers of two
  int stride = 0;                             // columns padded to kRowPadding
};

enum class RowForm { kFloats, kBytes, kHalves };
enum class RowSource {
  kPlain,  // x [rows][columns]
  kHeads,  // heads of cache_dim channels without their padding; x [rows][columns / head_dim][cache_dim]
  kGated   // x / (1 + exp(-x)) * y; both [rows][columns]
};

enum class RowNorm {
  kNone,
  kWeighted,  // row / rms(row) * weight, rms with epsilon
  kBare       // row / rms(row), and zeros stay
};

struct RowsArgs {
  const float *x = nullptr, *y = nullptr, *weight = nullptr;
  int rows = 0, columns = 0, head_dim = 1, cache_dim = 1;
  RowNorm norm = RowNorm::kNone;
  float epsilon = 0;
  RowsOut out;
};

/// Heads of a layer on their way into the cache: head norms, RoPE, rounding of keys and values to binary16.
struct HeadsArgs {
  const float* qkv = nullptr;                        // [rows][query_heads + 2 kv_heads][head_dim]
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim] or nullptr
  const float *cos = nullptr, *sin = nullptr;        // [rows][pairs]
  float* q = nullptr;                                // [rows][query_heads][cache_dim]
  std::uint16_t *k = nullptr, *v = nullptr;          // [rows][kv_heads][cache_dim]
  float* observed = nullptr;  // [rows][query_heads + kv_heads][head_dim] before RoPE, or nullptr
  int* first_bad = nullptr;   // becomes the least layer with a key or value beyond binary16
  int rows = 0, query_heads = 0, kv_heads = 0, head_dim = 0, cache_dim = 0, pairs = 0, layer = 0;
  float epsilon = 0;
  bool half_layout = true;
};

/// `count` rows from `first`, as they lie in the file, at `blocks` on the device, into the planes of
/// `matrix`.
cudaError_t arrange(const MatrixArgs& matrix, const std::uint8_t* blocks, int first, int count,
                    cudaStream_t stream);

/// Rows `tokens` of a matrix to float32: out [count][columns].
cudaError_t embed(const MatrixArgs& matrix, const int* tokens, int count, float* out, cudaStream_t stream);

cudaError_t prepare_rows(RowSource source, RowForm form, const RowsArgs& args, cudaStream_t stream);
cudaError_t prepare_heads(const HeadsArgs& args, cudaStream_t stream);

/// Up to kMostProducts products of one type of weights. In bytes for quantised types and 1 to kFewTokens
/// tokens; in float32 for every type and any number. A token's result does not depend on the others.
cudaError_t multiply_bytes(const ProductArgs* products, int count, const RowsOut& x, int tokens,
                           cudaStream_t stream);
cudaError_t multiply_floats(const ProductArgs* products, int count, const RowsOut& x, int tokens,
                            cudaStream_t stream);

/// Rows [first, first + count) of a matrix as binary16: to [count][stride], zeros from the last column on.
cudaError_t dequantise_halves(const MatrixArgs& matrix, int first, int count, std::uint16_t* to, int stride,
                              cudaStream_t stream);
/// out[token * rows + row] = weights[row] . x[token], both binary16 [.][stride], float32 sums, on tensor
/// cores.
cudaError_t multiply_halves(const std::uint16_t* weights, const std::uint16_t* x, int rows, int tokens,
                            int stride, float* out, cudaStream_t stream);
/// What a product in binary16 still lacks: product.out[token][first + row] from sums[token * count + row].
cudaError_t finish_halves(const ProductArgs& product, const float* sums, const float* scales, int first,
                          int count, int tokens, cudaStream_t stream);

/// nll[row] = -log softmax(logits[row])[targets[row]], 0 where the target is negative.
cudaError_t score_rows(const float* logits, const int* targets, int rows, int vocabulary, float* nll,
                       cudaStream_t stream);

}  // namespace innerkv::gpu
