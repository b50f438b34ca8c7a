#include "gemm.cuh"
#include "with_type.h"

namespace innerkv::gpu {

namespace {

unsigned across(int items) { return static_cast<unsigned>((items + 255) / 256); }

}  // namespace

cudaError_t multiply_halves(const std::uint16_t* weights, const std::uint16_t* x, int rows, int tokens,
                            int stride, float* out, cudaStream_t stream) {
  if (rows < 1 || tokens < 1 || stride < kTile || stride % kTile != 0) return cudaErrorInvalidValue;
  const std::int64_t tiles = std::int64_t{(rows + kTile - 1) / kTile} * ((tokens + kTile - 1) / kTile);
  if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(multiply_panel, dim3(static_cast<unsigned>(tiles)), dim3(kGemmThreads), 0, stream,
                GemmArgs{weights, x, out, rows, tokens, stride});
}

cudaError_t dequantise_halves(const MatrixArgs& matrix, int first, int count, std::uint16_t* to, int stride,
                              cudaStream_t stream) {
  if (count < 1 || count > 65535 || stride % kRowPadding != 0 || stride < matrix.columns)
    return cudaErrorInvalidValue;
  return with_tensor_type(matrix.type, [&](auto type) {
    const int units = stride / Weights<type.value>::kColumns;
    return launch(dequantise_panel<type.value>, dim3(across(units), static_cast<unsigned>(count)), dim3(256),
                  0, stream, matrix, first, to, stride);
  });
}

cudaError_t finish_halves(const ProductArgs& product, const float* sums, const float* scales, int first,
                          int count, int tokens, cudaStream_t stream) {
  if (count < 1 || tokens < 1) return cudaErrorInvalidValue;
  return launch(finish_panel, dim3(static_cast<unsigned>(tokens), across(count)), dim3(256), 0, stream,
                FinishArgs{product, sums, scales, first, count, tokens});
}

}  // namespace innerkv::gpu
