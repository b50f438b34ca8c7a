#include "attend_half.cuh"

namespace innerkv::gpu {

namespace {

template <int D>
cudaError_t run_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                      const HalfTask* tasks, int count, int rows_a_task, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((count + kHalfWarps - 1) / kHalfWarps)), block(32 * kHalfWarps);
  if (rows_a_task == 4)
    return launch(attend_half<D, 1>, grid, block, 0, stream, rule, requests, heads, tasks, count);
  if constexpr (D <= 128)
    if (rows_a_task == 8)
      return launch(attend_half<D, 2>, grid, block, 0, stream, rule, requests, heads, tasks, count);
  return cudaErrorInvalidValue;
}

}  // namespace

int half_rows(const AttendRule& rule, int rows) { return rows <= 4 || rule.head_dim > 128 ? 4 : 8; }

cudaError_t attend_half_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                              const HalfTask* tasks, int task_count, int rows_a_task, cudaStream_t stream) {
  if (task_count == 0) return cudaSuccess;
  switch (rule.head_dim) {
    case 64:
      return run_tasks<64>(rule, requests, heads, tasks, task_count, rows_a_task, stream);
    case 80:
      return run_tasks<80>(rule, requests, heads, tasks, task_count, rows_a_task, stream);
    case 96:
      return run_tasks<96>(rule, requests, heads, tasks, task_count, rows_a_task, stream);
    case 128:
      return run_tasks<128>(rule, requests, heads, tasks, task_count, rows_a_task, stream);
    case 256:
      return run_tasks<256>(rule, requests, heads, tasks, task_count, rows_a_task, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace innerkv::gpu
