#include "merge.cuh"

namespace innerkv {

namespace {

template <int kHeadDim>
cudaError_t merge_rows(const MergeArgs* requests, dim3 grid, int splits, cudaStream_t stream) {
  // A warp has few loads in flight; long rows are shared by four. Measured on no GPU yet.
  if (splits >= 8) return launch(merge_kernel<kHeadDim, 4>, grid, dim3(128), 0, stream, requests);
  return launch(merge_kernel<kHeadDim, 1>, grid, dim3(32), 0, stream, requests);
}

}  // namespace

cudaError_t merge_states(const MergeArgs* requests, int count, int most_rows, int most_splits, int head_dim,
                         cudaStream_t stream) {
  if (count < 0 || most_rows < 0 || most_splits < 1) return cudaErrorInvalidValue;
  if (count == 0 || most_rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(most_rows), static_cast<unsigned>(count));
  switch (head_dim) {
    case 64:
      return merge_rows<64>(requests, grid, most_splits, stream);
    case 80:
      return merge_rows<80>(requests, grid, most_splits, stream);
    case 96:
      return merge_rows<96>(requests, grid, most_splits, stream);
    case 128:
      return merge_rows<128>(requests, grid, most_splits, stream);
    case 256:
      return merge_rows<256>(requests, grid, most_splits, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace innerkv
