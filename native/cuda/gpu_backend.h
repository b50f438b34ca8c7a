// The GPU product backend: the core's seam over kernels. Host code only; device.h stands between it and the
// CUDA runtime, so that the same source runs on the emulated GPU of the tests.
#pragma once

#include <cstdint>
#include <optional>

#include "../core/backend.h"
#include "args.h"
#include "buffers.h"
#include "page_mirror.h"
#include "routes.h"

namespace innerkv::gpu {

/// Told when the kernels of a call begin and end on device::stream(): everything they read is there by then,
/// and nothing is copied back in between. For benchmarks.
class LaunchObserver {
 public:
  virtual ~LaunchObserver() = default;
  virtual void before() = 0;
  virtual void after() = 0;
};

class GpuBackend final : public Backend {
 public:
  /// `caller`: the stream on which the caller works, in order with which he wants to be served.
  explicit GpuBackend(std::optional<cudaStream_t> caller = std::nullopt);
  /// Null switches it off.
  void observe(LaunchObserver* observer) { observer_ = observer; }

  void* allocate_memory(std::size_t bytes) override;
  void free_memory(void* memory, std::size_t bytes) noexcept override;
  void clear_memory(void* memory, std::size_t bytes) noexcept override;
  void copy_memory(void* to, const void* from, std::size_t bytes) noexcept override;
  void stage(std::span<Staging> numbers) override;
  void take(std::span<Intake> tensors) override;
  void copy_rows(std::span<const RowCopy> copies, int row) noexcept override;
  void quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                const RotationTable& rotations) override;
  bool attend(const CacheConfig& config, std::span<const AttendRequest> requests,
              const RotationTable& rotations, const std::atomic<bool>* aborted) override;
  void attend_dense(const DenseRequest& request) override;
  std::string objection(const void* memory, std::size_t bytes) override;
  MemoryHandle export_memory(void* memory) override;
  void* import_memory(const MemoryHandle& handle) override;
  void close_memory(void* memory) noexcept override;
  void follow_caller() override;
  void settle() override;
  const char* attention_path(const TensorSpec& k, const TensorSpec& v, int head_dim) const override {
    return path_of(k, v, head_dim);
  }

 private:
  /// Makes the device's page tables show what the core's do.
  void update_tables(const PageLayout& layout, bool compact, std::span<const AttendRequest> requests);
  void run_attention(const AttendRule& rule, std::span<const AttendRequest> requests,
                     std::span<const HeadArgs> heads);
  void launches_begin() const {
    if (observer_) observer_->before();
  }
  void launches_end() const {
    if (observer_) observer_->after();
  }

  static constexpr std::size_t kCopyBytes = 1 << 16;
  DeviceBuffer staged_, copies_, arguments_, pages_, work_, prepared_, prefill_, results_, dense_, intake_,
      taken_;
  std::shared_ptr<BlockPool> blocks_ = std::make_shared<BlockPool>();  // of page tables, which may outlive us
  std::optional<cudaStream_t> caller_;
  LaunchObserver* observer_ = nullptr;
};

}  // namespace innerkv::gpu
