// Memory on both sides of the way to the device and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"

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

class Recording;

/// Arguments on their way to the device: everything is laid out on the host, then copied at once; with those
/// of other calls where a recording is open and has room.
class Upload {
 public:
  /// `capacity`: an upper bound of room() over everything that will be added.
  Upload(DeviceBuffer& buffer, std::size_t capacity);
  Upload(const Upload&) = delete;
  ~Upload();
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
  Recording* recording_ = nullptr;  // where the room is, until it is filled
  std::uint8_t *device_ = nullptr, *host_ = nullptr;
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

}  // namespace innerkv::gpu
