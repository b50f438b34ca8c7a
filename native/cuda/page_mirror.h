// Page tables that stay in device memory: attention finds them there, and only entries that changed travel.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "args.h"
#include "device.h"

namespace innerkv::gpu {

/// Device memory in blocks of powers of two, cut from slabs and kept for the next taker. A block given back
/// may be taken at once: what still reads it was asked for earlier.
class BlockPool {
 public:
  BlockPool() = default;
  BlockPool(const BlockPool&) = delete;
  ~BlockPool();
  /// At least so many bytes; *bytes is then how many. Throws Error{kOutOfMemory}.
  std::uint8_t* take(std::size_t* bytes);
  void give_back(std::uint8_t* block, std::size_t bytes) noexcept;

 private:
  static constexpr int kLeastLog = 8, kSlabLog = 20, kSizes = 40;
  static int size_of(std::size_t bytes);  // log2, rounded up
  std::mutex mutex_;                      // sequences end on any thread
  std::vector<std::uint8_t*> slabs_, idle_[kSizes];
  std::size_t blocks_[kSizes] = {};  // idle or taken
};

/// The device's copy of one PageTable: entries, and behind them the extents of each where zero points are
/// compact.
struct PageMirror {
  static constexpr int kExtents = 2 * kMaxExtents;  // of an entry: keys', then values'
  std::shared_ptr<BlockPool> pool;
  std::uint8_t* block = nullptr;
  std::size_t bytes = 0;
  int capacity = 0;
  const std::uint16_t** extents = nullptr;

  /// Throws Error{kOutOfMemory}.
  PageMirror(std::shared_ptr<BlockPool> of, int entries, bool compact);
  PageMirror(const PageMirror&) = delete;
  ~PageMirror() { pool->give_back(block, bytes); }
  PageArgs* pages() const { return reinterpret_cast<PageArgs*>(block); }
};

/// What patch_pages writes: `count` pointers of an entry's extents lie one after the other.
struct PagePatch {
  PageArgs* to;
  PageArgs page;
};
struct ExtentPatch {
  const std::uint16_t** to;
  const std::uint16_t* extents[PageMirror::kExtents];
};

}  // namespace innerkv::gpu
