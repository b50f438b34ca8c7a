// A cache: configuration, memory budget and the sequences that live in it. It decides what is stored where;
// the backend moves and computes. Calls on one cache must not overlap (the addon runs them one after
// another).
//
// Every call either succeeds or throws Error and leaves cache and sequence as they were.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend.h"

namespace innerkv {

class Cache;
class Sequence;

/// Device memory beside the budget for the length of a call; the cache keeps it for the next one.
class Spare {
 public:
  Spare() = default;
  Spare(Spare&& other) noexcept { swap(other); }
  Spare& operator=(Spare&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Spare();
  std::uint8_t* data() const { return memory_; }

 private:
  friend class Cache;
  void swap(Spare& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<Cache> cache_;
  std::uint8_t* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

class Cache : public std::enable_shared_from_this<Cache> {
 public:
  Cache(std::shared_ptr<Backend> backend, CacheConfig config);
  ~Cache();

  const CacheConfig& config() const { return config_; }
  const Fingerprints& prints() const { return prints_; }
  Backend& backend() { return *backend_; }
  Pool& pool() { return pool_; }
  const RotationTable& rotations() const { return rotations_; }

  std::unique_ptr<Sequence> sequence();
  /// Device memory of at least so many bytes, contents undefined. Throws Error{kOutOfMemory}.
  Spare spare(std::size_t bytes);

 private:
  friend class Spare;
  struct Idle {
    std::uint8_t* memory;
    std::size_t bytes;
  };
  std::shared_ptr<Backend> backend_;
  CacheConfig config_;
  Fingerprints prints_;
  RotationTable rotations_;
  Pool pool_;
  std::vector<Idle> idle_;  // capacity for all that are out: giving back never allocates
  std::size_t spares_ = 0;  // idle or out
};

/// Bytes of a cache that holds `tokens` tokens in each of `sequences` sequences, by part; nothing is
/// allocated.
struct Estimate {
  std::size_t window_bytes, code_bytes, scale_bytes, zero_bytes, outlier_bytes, padding_bytes, fp16_bytes;
};
Estimate estimate(const CacheConfig& config, std::int64_t tokens, std::int64_t sequences);

}  // namespace innerkv
