// On a GPU: exit code 0 when every PTX wrapper agrees with its emulation, 1 when one does not, 77 without a
// GPU.
#include "ptx_golden.cuh"

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("ptx_golden: NOT RUN, there is no GPU\n");
    return 77;
  }
  int failed = 0;
  golden::run_all(1, [&](const char* name, int wrong) {
    std::printf("%s %s: %d of %d warps disagree\n", wrong ? "FAILED" : "  ok ", name, wrong, golden::kWarps);
    failed += wrong != 0;
  });
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
    std::printf("FAILED %s\n", cudaGetErrorString(error));
    ++failed;
  }
  return failed != 0;
}
