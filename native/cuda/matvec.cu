#include "matvec.cuh"
#include "with_type.h"

namespace innerkv::gpu {

namespace {

/// Products of one launch have one type, one width and activations of that width.
cudaError_t plan_matvec(const ProductArgs* products, int count, const RowsOut& x, int tokens, int vectors,
                        MatvecArgs& args, dim3& grid) {
  if (count < 1 || count > kMostProducts || tokens < 1) return cudaErrorInvalidValue;
  std::int64_t runs = 0;
  for (int i = 0; i < count; ++i) {
    const MatrixArgs& matrix = products[i].weight;
    if (matrix.type != products[0].weight.type || matrix.columns != products[0].weight.columns)
      return cudaErrorInvalidValue;
    args.products[i] = products[i];
    runs += (matrix.rows + kMatvecRows - 1) / kMatvecRows;
  }
  args.count = count;
  args.x = x;
  args.tokens = tokens;
  args.groups = (tokens + vectors - 1) / vectors;
  const std::int64_t blocks = (runs + kMatvecWarps - 1) / kMatvecWarps * args.groups;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  grid = dim3(static_cast<unsigned>(blocks));
  return cudaSuccess;
}

int vectors_for(int tokens) { return tokens == 1 ? 1 : tokens <= 4 ? 4 : 8; }

}  // namespace

cudaError_t multiply_bytes(const ProductArgs* products, int count, const RowsOut& x, int tokens,
                           cudaStream_t stream) {
  if (tokens > kFewTokens || count < 1 || !is_quantised(products[0].weight.type))
    return cudaErrorInvalidValue;
  MatvecArgs args{};
  dim3 grid;
  const int vectors = vectors_for(tokens);
  if (const cudaError_t error = plan_matvec(products, count, x, tokens, vectors, args, grid)) return error;
  return with_tensor_type(products[0].weight.type, [&](auto type) -> cudaError_t {
    if constexpr (is_quantised(type.value)) {
      const dim3 block(32 * kMatvecWarps);
      if (vectors == 1) return launch(matvec_bytes<type.value, 1>, grid, block, 0, stream, args);
      if (vectors == 4) return launch(matvec_bytes<type.value, 4>, grid, block, 0, stream, args);
      return launch(matvec_bytes<type.value, 8>, grid, block, 0, stream, args);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t multiply_floats(const ProductArgs* products, int count, const RowsOut& x, int tokens,
                            cudaStream_t stream) {
  MatvecArgs args{};
  dim3 grid;
  const int vectors = vectors_for(tokens);
  if (const cudaError_t error = plan_matvec(products, count, x, tokens, vectors, args, grid)) return error;
  return with_tensor_type(products[0].weight.type, [&](auto type) -> cudaError_t {
    const dim3 block(32 * kMatvecWarps);
    if (vectors == 1) return launch(matvec_floats<type.value, 1>, grid, block, 0, stream, args);
    if (vectors == 4) return launch(matvec_floats<type.value, 4>, grid, block, 0, stream, args);
    return launch(matvec_floats<type.value, 8>, grid, block, 0, stream, args);
  });
}

}  // namespace innerkv::gpu
