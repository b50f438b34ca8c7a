#include "attend_prefill.cuh"
#include "dequantise.cuh"

namespace innerkv::gpu {

namespace {

/// Calls `run` with head_dim as a constant.
template <class Run>
cudaError_t for_head_dim(int head_dim, Run run) {
  switch (head_dim) {
    case 64:
      return run(std::integral_constant<int, 64>());
    case 80:
      return run(std::integral_constant<int, 80>());
    case 96:
      return run(std::integral_constant<int, 96>());
    case 128:
      return run(std::integral_constant<int, 128>());
    case 256:
      return run(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int prefill_rows(int head_dim) {
  return head_dim > 128 ? PrefillShape<256>::kRows : PrefillShape<128>::kRows;
}

cudaError_t dequantise_pages(const AttendRule& rule, const DequantiseArgs* args, int heads, int first,
                             int end, int capacity, cudaStream_t stream) {
  if (heads == 0 || first >= end) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(end - first), static_cast<unsigned>(heads));
  return for_head_dim(rule.head_dim, [&](auto head_dim) {
    return launch(dequantise<head_dim>, grid, dim3(kTileThreads), sizeof(DequantiseMemory<head_dim>), stream,
                  rule, args, first, capacity);
  });
}

cudaError_t attend_prefill_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                                 const PrefillTask* tasks, int task_count, int capacity,
                                 cudaStream_t stream) {
  if (task_count == 0) return cudaSuccess;
  return for_head_dim(rule.head_dim, [&](auto head_dim) {
    return launch(attend_prefill<head_dim>, dim3(static_cast<unsigned>(task_count)), dim3(kPrefillThreads),
                  sizeof(PrefillMemory<head_dim>), stream, rule, requests, heads, tasks, capacity);
  });
}

}  // namespace innerkv::gpu
