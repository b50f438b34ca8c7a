#include "mass.cuh"

namespace innerkv {

cudaError_t sum_masses(const MassArgs* requests, int count, int kv_heads, int most_tokens,
                       cudaStream_t stream) {
  if (count < 0 || kv_heads < 1 || most_tokens < 0) return cudaErrorInvalidValue;
  if (count == 0 || most_tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((most_tokens + kMassThreads - 1) / kMassThreads),
                  static_cast<unsigned>(kv_heads), static_cast<unsigned>(count));
  return launch(mass_kernel, grid, dim3(kMassThreads), 0, stream, requests);
}

}  // namespace innerkv
