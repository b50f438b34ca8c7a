// The GPU product backend: the core's seam over kernels. Host code only; device.h stands between it and the
// CUDA runtime, so that the same source runs on the emulated GPU of the tests.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/backend.h"
#include "args.h"

namespace innerkv::gpu {

/// Device memory that grows and is never smaller than asked.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer();
  std::uint8_t* reserve(std::size_t bytes);  // contents are lost when it grows; throws Error{kOutOfMemory}

 private:
  std::uint8_t* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Arguments on their way to the device: everything is laid out on the host, then copied at once.
class Upload {
 public:
  /// `capacity`: an upper bound of room() over everything that will be added.
  Upload(DeviceBuffer& buffer, std::size_t capacity);
  template <class T>
  static constexpr std::size_t room(std::size_t count) {
    return sizeof(T) * count + kAlign;
  }
  /// Device address of room for `count` values; `*host` is where to write them before flush().
  template <class T>
  T* add(std::size_t count, T** host) {
    const std::size_t at = place(sizeof(T) * count);
    *host = reinterpret_cast<T*>(host_.data() + at);
    return reinterpret_cast<T*>(device_ + at);
  }
  void flush();

 private:
  static constexpr std::size_t kAlign = 256;
  std::size_t place(std::size_t bytes);
  std::uint8_t* device_;
  std::vector<std::uint8_t> host_;
  std::size_t used_ = 0;
};

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
  /// Null switches it off.
  void observe(LaunchObserver* observer) { observer_ = observer; }

  void* allocate_memory(std::size_t bytes) override;
  void free_memory(void* memory, std::size_t bytes) noexcept override;
  void clear_memory(void* memory, std::size_t bytes) noexcept override;
  void copy_memory(void* to, const void* from, std::size_t bytes) noexcept override;
  const std::uint16_t* stage(int place, const std::uint16_t* numbers, std::size_t count) override;
  void copy_rows(std::span<const RowCopy> copies, int row) noexcept override;
  void quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                const RotationTable& rotations) override;
  bool attend(const CacheConfig& config, std::span<const AttendRequest> requests,
              const RotationTable& rotations, const std::atomic<bool>* aborted) override;
  void attend_dense(const DenseRequest& request) override;

 private:
  void run_attention(const AttendRule& rule, bool hadamard_v, std::span<const AttendRequest> requests,
                     std::span<const HeadArgs> heads);
  void launches_begin() const {
    if (observer_) observer_->before();
  }
  void launches_end() const {
    if (observer_) observer_->after();
  }

  static constexpr std::size_t kCopyBytes = 1 << 16;
  DeviceBuffer staged_[2], copies_, arguments_, pages_, work_, prepared_, results_, dense_;
  LaunchObserver* observer_ = nullptr;
};

}  // namespace innerkv::gpu
