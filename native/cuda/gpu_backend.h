// The GPU product backend: the core's seam over kernels. Host code only; device.h stands between it and the
// CUDA runtime, so that the same source runs on the emulated GPU of the tests.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../core/backend.h"
#include "args.h"
#include "device.h"
#include "routes.h"

namespace innerkv::gpu {

/// Pinned host memory in turns: the device copies from one block while the host writes the next.
class PinnedTurns {
 public:
  PinnedTurns() = default;
  PinnedTurns(const PinnedTurns&) = delete;
  ~PinnedTurns();
  /// The next block, no longer in use by the device. Throws Error{kOutOfMemory}; never for `bytes` that every
  /// block had before.
  std::uint8_t* next(std::size_t bytes);
  /// Makes blocks of so many bytes.
  void prepare(std::size_t bytes);
  /// The block of the last next() is in use until what the device has been asked so far is done.
  void sent() noexcept { turns_[turn_].mark.set(); }
  /// Waits for that.
  void wait() noexcept { turns_[turn_].mark.wait(); }

 private:
  static constexpr int kTurns = 4;
  struct Turn {
    std::uint8_t* memory = nullptr;
    std::size_t bytes = 0;
    device::Mark mark;
  };
  Turn turns_[kTurns];
  int turn_ = 0;
};

/// Device memory that grows and is never smaller than asked, and the way into and out of it.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer();
  std::uint8_t* reserve(std::size_t bytes);  // contents are lost when it grows; throws Error{kOutOfMemory}
  /// Host memory to write to before send(). Throws Error{kOutOfMemory}.
  std::uint8_t* host(std::size_t bytes);
  /// Copies the first `bytes` of host() to the beginning of the buffer; returns before that is done.
  void send(std::size_t bytes) noexcept;
  /// Both at once, of memory that is the caller's again on return.
  void put(const void* from, std::size_t bytes);
  /// Copies so many bytes to `to` and waits for them.
  void fetch(void* to, const std::uint8_t* from, std::size_t bytes);
  /// reserve() and put() of so many bytes take no memory from now on.
  void prepare(std::size_t bytes);

  static constexpr std::size_t kPinned = std::size_t{1} << 20;  // larger copies go without pinned memory

 private:
  std::uint8_t* memory_ = nullptr;
  std::size_t bytes_ = 0;
  PinnedTurns turns_;
  std::vector<std::uint8_t> large_;
  std::uint8_t* host_ = nullptr;
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
    *host = reinterpret_cast<T*>(host_ + at);
    return reinterpret_cast<T*>(device_ + at);
  }
  void flush();

 private:
  static constexpr std::size_t kAlign = 256;
  std::size_t place(std::size_t bytes);
  DeviceBuffer& buffer_;
  std::uint8_t *device_, *host_;
  std::size_t capacity_, used_ = 0;
};

/// Results on their way to the host, in one copy if they are small.
class Download {
 public:
  explicit Download(DeviceBuffer& from) : buffer_(from) {}
  /// `from`: in the buffer.
  void add(void* to, const void* from, std::size_t bytes);
  /// Waits until everything is there.
  void finish();

 private:
  struct Part {
    void* to;
    const std::uint8_t* from;
    std::size_t bytes;
  };
  DeviceBuffer& buffer_;
  std::vector<Part> parts_;
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
  /// `caller`: the stream on which the caller works, in order with which he wants to be served.
  explicit GpuBackend(std::optional<cudaStream_t> caller = std::nullopt);
  /// Null switches it off.
  void observe(LaunchObserver* observer) { observer_ = observer; }

  void* allocate_memory(std::size_t bytes) override;
  void free_memory(void* memory, std::size_t bytes) noexcept override;
  void clear_memory(void* memory, std::size_t bytes) noexcept override;
  void copy_memory(void* to, const void* from, std::size_t bytes) noexcept override;
  const std::uint16_t* stage(int place, const std::uint16_t* numbers, std::size_t count) override;
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
  void run_attention(const AttendRule& rule, std::span<const AttendRequest> requests,
                     std::span<const HeadArgs> heads);
  void launches_begin() const {
    if (observer_) observer_->before();
  }
  void launches_end() const {
    if (observer_) observer_->after();
  }

  static constexpr std::size_t kCopyBytes = 1 << 16;
  DeviceBuffer staged_[2], copies_, arguments_, pages_, work_, prepared_, prefill_, results_, dense_, intake_,
      taken_;
  std::optional<cudaStream_t> caller_;
  LaunchObserver* observer_ = nullptr;
};

}  // namespace innerkv::gpu
