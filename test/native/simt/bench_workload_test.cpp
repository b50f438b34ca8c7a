// The caches of the GPU benchmark: what it times on the GPU is what the CPU computes on its copy.
#include "../../../benchmarks/native/workload.h"
#include "simt/gpu_under_test.h"
#include "support.h"

namespace innerkv::test {
namespace {

TEST("copied pages attend alike on CPU and GPU, a part of the batch like a batch of that size") {
  struct Watch final : gpu::LaunchObserver {
    int begun = 0, ended = 0;
    void before() override { ++begun; }
    void after() override { ++ended; }
  } watch;
  for (const auto& [name, scheme] : bench::compared_schemes()) {
    if (name != "fp16" && name != "calibrated-k4v4" && name != "innerq-hybrid" && name != "rotated-k2o1v2o1")
      continue;  // emulation is slow
    const std::size_t budget = std::size_t{1} << 28;
    const auto device = std::make_shared<gpu::GpuBackend>();
    device->observe(&watch);
    bench::Batch cpu(std::make_shared<CpuBackend>(1, nullptr), scheme, 1, 640, budget);
    bench::Batch small(std::make_shared<CpuBackend>(1, nullptr), scheme, 1, 384, budget);
    bench::Batch gpu(device, scheme, 2, 640, budget);
    const int begun = watch.begun;
    cpu.attend(1, 384);
    small.attend(1, 384);
    gpu.attend(1, 384);
    CHECK_WITH(watch.begun == begun + 1 && watch.ended == watch.begun, name);
    float most = 0, largest = 0;
    for (std::size_t i = 0; i < cpu.out().size(); ++i) {
      most = std::max(most, std::abs(gpu.out()[i] - cpu.out()[i]));
      largest = std::max(largest, std::abs(cpu.out()[i]));
    }
    CHECK_WITH(most <= 2e-3f * largest && largest > 0.01f, name + " " + std::to_string(most / largest));
    CHECK_WITH(same_bits(cpu.out(), small.out()), name);
    CHECK_WITH(gpu.bytes(2, 640) == 2 * cpu.bytes(1, 640) && cpu.bytes(1, 384) == small.bytes(1, 384), name);
    CHECK(simt::take_reports().empty());
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("bench_workload", argc, argv); }
