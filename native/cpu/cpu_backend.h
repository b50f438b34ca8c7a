// The CPU product backend: same pages, same results as every other backend, as fast as the instruction set
// allows.
#pragma once

#include <memory>
#include <vector>

#include "../core/backend.h"
#include "kernels.h"
#include "thread_pool.h"

namespace innerkv {

struct AttendScratch;

class CpuBackend : public Backend {
 public:
  /// threads >= 1; `isa` as for select_kernels().
  CpuBackend(int threads, const char* isa);
  ~CpuBackend() override;

  const char* isa() const { return kernels_.isa; }
  const Kernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  ThreadPool& pool() { return pool_; }

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

 private:
  const Kernels& kernels_;
  ThreadPool pool_;
  std::vector<std::unique_ptr<AttendScratch>> scratch_;  // [threads]
  std::vector<std::uint8_t> taken_;
};

}  // namespace innerkv
