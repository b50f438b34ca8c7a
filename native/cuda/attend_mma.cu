#include <array>

#include "attend_mma.cuh"
#include "prepare.cuh"

namespace innerkv::gpu {

namespace {

using Kernel = void (*)(AttendRule, const RequestArgs*, const HeadArgs*, const PreparedArgs*, const TaskArgs*,
                        int);

constexpr int kRoutes = static_cast<int>(std::size(kMmaRoutes)),
              kDims = static_cast<int>(std::size(kMmaHeadDims)), kTiles = 2, kVariants = 2;

/// Of a route at a head_dim, for 4 rows a task and for 8, without outliers and with them.
template <int kIndex>
constexpr Kernel kernel() {
  constexpr Route route = kMmaRoutes[kIndex / kVariants / kTiles / kDims];
  constexpr bool kOutliers = kIndex % kVariants > 0;
  if constexpr (kOutliers && !route.outliers)
    return nullptr;
  else
    return attend_mma<route.k, route.k_bits, route.v, route.v_bits,
                      kMmaHeadDims[kIndex / kVariants / kTiles % kDims], 1 + kIndex / kVariants % kTiles,
                      kOutliers>;
}

template <int... kIndex>
constexpr std::array<Kernel, sizeof...(kIndex)> kernels(std::integer_sequence<int, kIndex...>) {
  return {kernel<kIndex>()...};
}

bool has_outliers(const AttendRule& rule) { return rule.k.outliers > 0 || rule.v.outliers > 0; }

Kernel kernel_of(const AttendRule& rule, int rows_a_task) {
  static constexpr auto kKernels =
      kernels(std::make_integer_sequence<int, kRoutes * kDims * kTiles * kVariants>{});
  const int route = mma_route(rule.k, rule.v, rule.head_dim);
  if (route < 0) return nullptr;
  int dim = 0;
  while (kMmaHeadDims[dim] != rule.head_dim) ++dim;
  return kKernels[static_cast<std::size_t>(
      ((route * kDims + dim) * kTiles + rows_a_task / 4 - 1) * kVariants + has_outliers(rule))];
}

int shared_bytes(const AttendRule& rule, int rows_a_task) {
  if (!has_outliers(rule)) return 0;
  const bool short_head = rule.head_dim == 64, few = rows_a_task == 4;
  const auto memory = short_head ? few ? outlier_bytes<64, 4> : outlier_bytes<64, 8>
                      : few ? outlier_bytes<128, 4>
                                 : outlier_bytes<128, 8>;
  return kMmaWarps * memory(rule);
}

}  // namespace

int mma_rows(const AttendRule& rule, int rows) {
  if (mma_route(rule.k, rule.v, rule.head_dim) < 0) return 0;
  return rows <= 4 ? 4 : 8;
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
  return launch(kernel, dim3(blocks(task_count, kMmaWarps)), dim3(32 * kMmaWarps),
                static_cast<std::size_t>(shared_bytes(rule, rows_a_task)), stream, rule, requests, heads,
                prepared, tasks, task_count);
}

}  // namespace innerkv::gpu
