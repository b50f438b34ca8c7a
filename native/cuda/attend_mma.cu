#include "attend_mma.cuh"

namespace innerkv::gpu {

namespace {

using Kernel = void (*)(AttendRule, const RequestArgs*, const HeadArgs*, const PreparedArgs*, const TaskArgs*,
                        int);

struct Entry {
  int k_bits, v_bits, head_dim, tiles;
  Kernel kernel;
};

template <int kBitsK, int kBitsV, int D>
constexpr Entry entry(int tiles) {
  return {kBitsK, kBitsV, D, tiles,
          tiles == 1 ? attend_mma<kBitsK, kBitsV, D, 1> : attend_mma<kBitsK, kBitsV, D, 2>};
}

#define INNERKV_PAIR(k, v) entry<k, v, 64>(1), entry<k, v, 64>(2), entry<k, v, 128>(1), entry<k, v, 128>(2)
constexpr Entry kEntries[] = {INNERKV_PAIR(2, 1), INNERKV_PAIR(2, 2), INNERKV_PAIR(3, 2),
                              INNERKV_PAIR(3, 3), INNERKV_PAIR(4, 2), INNERKV_PAIR(4, 4)};
#undef INNERKV_PAIR

Kernel kernel_of(const AttendRule& rule, int rows_a_task) {
  for (const Entry& one : kEntries)
    if (one.k_bits == rule.k.bits && one.v_bits == rule.v.bits && one.head_dim == rule.head_dim &&
        4 * one.tiles == rows_a_task)
      return one.kernel;
  return nullptr;
}

bool one_scale_per_token(const TensorSpec& spec) {
  return !spec.raw() && spec.group == Group::kToken && spec.mode == Mode::kMidRise;
}

}  // namespace

int mma_rows(const AttendRule& rule, int rows) {
  const int wanted = rows <= 4 ? 4 : 8;
  return one_scale_per_token(rule.k) && one_scale_per_token(rule.v) && kernel_of(rule, wanted) ? wanted : 0;
}

cudaError_t attend_mma_tasks(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                             const PreparedArgs* prepared, int request_count, int most_rows, int most_blocks,
                             const TaskArgs* tasks, int task_count, int rows_a_task, cudaStream_t stream) {
  const Kernel kernel = kernel_of(rule, rows_a_task);
  if (!kernel) return cudaErrorInvalidValue;
  if (task_count == 0 || most_blocks == 0) return cudaSuccess;
  const auto blocks = [](int items, int each) { return static_cast<unsigned>((items + each - 1) / each); };
  const cudaError_t error = launch(prepare_queries,
                                   dim3(blocks(most_rows, kMmaWarps), static_cast<unsigned>(most_blocks),
                                        static_cast<unsigned>(request_count)),
                                   dim3(32 * kMmaWarps), 0, stream, rule, requests, heads, prepared);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(blocks(task_count, kMmaWarps)), dim3(32 * kMmaWarps), 0, stream, rule, requests,
                heads, prepared, tasks, task_count);
}

}  // namespace innerkv::gpu
