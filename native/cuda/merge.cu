#include "merge.cuh"

namespace innerkv {

namespace {

template <int kHeadDim>
cudaError_t merge_rows(const MergeArgs& args, cudaStream_t stream) {
  // A warp has few loads in flight; long rows are shared by four. Measured on no GPU yet.
  const dim3 rows(static_cast<unsigned>(args.rows));
  if (args.splits >= 8) return launch(merge_kernel<kHeadDim, 4>, rows, dim3(128), 0, stream, args);
  return launch(merge_kernel<kHeadDim, 1>, rows, dim3(32), 0, stream, args);
}

}  // namespace

cudaError_t merge_states(const MergeArgs& args, int head_dim, cudaStream_t stream) {
  if (args.rows < 0 || args.splits < 1 || args.rotated_splits < 0 || args.rotated_splits > args.splits)
    return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  switch (head_dim) {
    case 64:
      return merge_rows<64>(args, stream);
    case 80:
      return merge_rows<80>(args, stream);
    case 96:
      return merge_rows<96>(args, stream);
    case 128:
      return merge_rows<128>(args, stream);
    case 256:
      return merge_rows<256>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace innerkv
