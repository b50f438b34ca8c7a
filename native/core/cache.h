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

class Sequence;

class Cache : public std::enable_shared_from_this<Cache> {
 public:
  Cache(std::shared_ptr<Backend> backend, CacheConfig config);

  const CacheConfig& config() const { return config_; }
  const Fingerprints& prints() const { return prints_; }
  Backend& backend() { return *backend_; }
  Pool& pool() { return pool_; }
  const RotationTable& rotations() const { return rotations_; }

  std::unique_ptr<Sequence> sequence();

 private:
  std::shared_ptr<Backend> backend_;
  CacheConfig config_;
  Fingerprints prints_;
  RotationTable rotations_;
  Pool pool_;
};

/// Bytes of a cache that holds `tokens` tokens in each of `sequences` sequences, by part; nothing is
/// allocated.
struct Estimate {
  std::size_t window_bytes, code_bytes, scale_bytes, zero_bytes, padding_bytes, fp16_bytes;
};
Estimate estimate(const CacheConfig& config, std::int64_t tokens, std::int64_t sequences);

}  // namespace innerkv
