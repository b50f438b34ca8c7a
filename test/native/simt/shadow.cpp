// The memory of the emulated GPU and what is known about every word of it: who may touch it, who wrote it
// last and who read it since. A word is split into its bytes at the first access of part of it.
//
// Two accesses of one address, at least one a write and not both atomic, must be ordered: by a block-wide
// barrier (epochs), inside a warp by __syncwarp (stamps), between blocks by fences on both sides
// (publications). Otherwise they race, in whatever order this run happened to do them.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

#include "simt/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#elif __has_feature(memory_sanitizer)
#define SIMT_MSAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#elif defined(SIMT_MSAN)
#include <sanitizer/msan_interface.h>
#endif

namespace simt {
namespace shadow {

Region region;

namespace {

constexpr std::size_t kDeviceBytes = std::size_t{256} << 20, kGuard = 256, kSharedFirst = kGuard;
constexpr std::uint8_t kAllowed = 1, kInitialised = 2, kPending = 4, kAtomicWrite = 8, kSplit = 16,
                       kReadByBlocks = 32, kManyWarps = 255;

struct Cell {
  std::uint32_t w_epoch, w_stamp, r_epoch, r_stamp, r_lanes;
  std::uint16_t w_thread;
  std::uint8_t r_warp, flags;
};
struct Fault {
  Kind kind;
  const char* text;
};

Cell *words = nullptr, *bytes_of_words = nullptr;  // one per 4 bytes, one per byte
std::size_t shared_used = 0, device_used = 0;
struct Site {
  const void* key;
  void* memory;
};
std::vector<Site> sites;
std::size_t static_bytes = 0;
struct Allocation {
  void* memory;
  std::size_t bytes;
};
std::vector<Allocation> buffers;  // alive

void* reserve(std::size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

std::size_t offset_of(const void* memory) {
  return static_cast<std::size_t>(static_cast<const char*>(memory) - region.base);
}

/// Did an access of another block of this launch happen before what the current thread does now?
bool published(std::uint32_t epoch, int thread) {
  const Aside aside;
  const std::uint64_t known = machine.fibers[machine.current].published;
  return std::any_of(machine.publications.begin(), machine.publications.end(), [&](const Publication& p) {
    return p.number <= known && epoch >= p.first_epoch && epoch <= p.epoch &&
           (epoch < p.epoch || thread == p.thread);
  });
}

/// Did the accesses of `lanes` in `warp` at that time happen before what the current thread does now?
bool ordered(std::uint32_t epoch, std::uint32_t stamp, unsigned warp, unsigned lanes) {
  if (epoch < machine.launch_epoch) return true;
  if (epoch < machine.block_epoch)
    return published(epoch, std::popcount(lanes) == 1 && warp != kManyWarps
                                ? static_cast<int>(32 * warp) + std::countr_zero(lanes)
                                : -1);
  if (epoch < machine.epoch) return true;
  if (warp != machine.current / 32) return false;
  const unsigned me = machine.current % 32;
  const std::uint32_t* seen = machine.warps[warp].seen[me];
  for (unsigned bits = lanes & ~(1u << me); bits; bits &= bits - 1)
    if (stamp >= seen[std::countr_zero(bits)]) return false;
  return true;
}

void remember_read(Cell& cell) {
  const unsigned warp = machine.current / 32, bit = 1u << machine.current % 32;
  const std::uint32_t stamp = machine.warps[warp].clock;
  if (cell.r_epoch == machine.epoch && cell.r_warp != kManyWarps &&
      !(cell.r_warp == warp && ordered(cell.r_epoch, cell.r_stamp, warp, cell.r_lanes))) {
    if (cell.r_warp == warp)
      cell.r_lanes |= bit;
    else
      cell.r_warp = kManyWarps;
  } else if (cell.r_epoch != machine.epoch || cell.r_warp != kManyWarps) {
    if (cell.r_epoch < machine.launch_epoch)
      cell.flags &= static_cast<std::uint8_t>(~kReadByBlocks);
    else if (cell.r_epoch < machine.block_epoch)
      cell.flags |= kReadByBlocks;
    cell.r_epoch = machine.epoch;
    cell.r_warp = static_cast<std::uint8_t>(warp);
    cell.r_lanes = bit;
  }
  cell.r_stamp = stamp;
}

const Fault* touch(Cell& cell, Access kind) {
  static constexpr Fault outside{Kind::kOutside, "outside of every array and buffer"},
      early{Kind::kCpAsyncEarly, "that a cp.async is still filling"},
      uninitialised{Kind::kUninitialised, "that nobody has written"},
      after_write{Kind::kRace, "that another thread wrote, with no barrier between"},
      after_read{Kind::kRace, "that another thread read, with no barrier between"};
  if (!(cell.flags & kAllowed)) return &outside;
  if (cell.flags & kPending) return &early;
  if (kind != Access::kWrite && !(cell.flags & kInitialised)) return &uninitialised;
  const std::uint16_t me = static_cast<std::uint16_t>(machine.current);
  if (cell.w_epoch >= machine.launch_epoch && !(kind == Access::kAtomic && cell.flags & kAtomicWrite) &&
      !(cell.w_thread == me && cell.w_epoch >= machine.block_epoch) &&
      !ordered(cell.w_epoch, cell.w_stamp, cell.w_thread / 32u, 1u << cell.w_thread % 32))
    return &after_write;
  if (kind == Access::kRead) {
    remember_read(cell);
    return nullptr;
  }
  if (cell.r_epoch >= machine.launch_epoch &&
      ((cell.flags & kReadByBlocks) || !ordered(cell.r_epoch, cell.r_stamp, cell.r_warp, cell.r_lanes)))
    return &after_read;
  cell.w_epoch = machine.epoch;
  cell.w_stamp = machine.warps[me / 32].clock;
  cell.w_thread = me;
  cell.flags |= kInitialised;
  if (kind == Access::kAtomic)
    cell.flags |= kAtomicWrite;
  else
    cell.flags &= static_cast<std::uint8_t>(~kAtomicWrite);
  return nullptr;
}

/// Calls f(cell) for every word that [offset, offset + bytes) covers whole and for the bytes of the others.
template <class F>
void each_cell(std::size_t offset, std::size_t bytes, F f) {
  const std::size_t end = offset + bytes;
  while (offset < end) {
    Cell& word = words[offset / 4];
    const std::size_t next = std::min(end, (offset / 4 + 1) * 4);
    if (next - offset == 4 && !(word.flags & kSplit)) {
      f(word);
    } else {
      if (!(word.flags & kSplit)) {
        std::fill_n(&bytes_of_words[offset / 4 * 4], 4, word);
        word.flags |= kSplit;
      }
      for (std::size_t i = offset; i < next; ++i) f(bytes_of_words[i]);
    }
    offset = next;
  }
}

void clear_cells(std::size_t offset, std::size_t bytes) {
  const std::size_t first = offset / 4, count = (offset + bytes + 3) / 4 - first;
  std::fill_n(words + first, count, Cell{});
}

}  // namespace

bool active() { return words != nullptr; }

void initialise() {
  if (region.base) return;
  region.bytes = kSharedBytes + kDeviceBytes;
  region.base = static_cast<char*>(reserve(region.bytes));
  if (checks_memory()) {
    words = static_cast<Cell*>(reserve(region.bytes / 4 * sizeof(Cell)));
    bytes_of_words = static_cast<Cell*>(reserve(region.bytes * sizeof(Cell)));
  }
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(region.base, region.bytes);
#endif
}

void allow(void* memory, std::size_t bytes) {
  if (active()) {
    clear_cells(offset_of(memory), bytes);
    each_cell(offset_of(memory), bytes, [&](Cell& cell) { cell.flags |= kAllowed; });
  }
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(memory, bytes);
#endif
  {
    const Unseen unseen;
    std::memset(memory, 0xff, bytes);  // NaN in every floating type
  }
#if defined(SIMT_MSAN)
  __msan_poison(memory, bytes);
#endif
}

void forbid(void* memory, std::size_t bytes) {
  if (active()) clear_cells(offset_of(memory), bytes);
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(memory, bytes);
#endif
}

void set_initialised(void* memory, std::size_t bytes) {
  if (active()) each_cell(offset_of(memory), bytes, [](Cell& cell) { cell.flags |= kInitialised; });
}
void set_pending(void* memory, std::size_t bytes) {
  each_cell(offset_of(memory), bytes, [](Cell& cell) { cell.flags |= kPending; });
}
void arrive(void* memory, std::size_t bytes) {
  each_cell(offset_of(memory), bytes, [](Cell& cell) {
    cell.flags &= static_cast<std::uint8_t>(~kPending);
    cell.w_epoch = machine.epoch;
    cell.w_stamp = machine.warps[machine.current / 32].clock;
  });
}

bool written_since_launch(const void* memory, std::size_t bytes) {
  bool found = false;
  if (offset_of(memory) < region.bytes)
    each_cell(offset_of(memory), bytes, [&](Cell& cell) { found |= cell.w_epoch >= machine.launch_epoch; });
  return found;
}

void access(const void* memory, std::size_t bytes, Access kind, const void* instruction, Where where) {
  ++statistics.accesses;
  const std::size_t offset = offset_of(memory);
  const Fault* fault = nullptr;
  static constexpr Fault foreign{Kind::kOutside, "that is not the device's"};
  if (offset >= region.bytes || bytes > region.bytes - offset)
    fault = &foreign;
  else
    each_cell(offset, bytes, [&](Cell& cell) {
      if (!fault) fault = touch(cell, kind);
    });
  if (!fault) return;
  const Aside aside;
  const char* verb = kind == Access::kRead ? "reads " : kind == Access::kWrite ? "writes " : "updates ";
  std::string text = verb + std::to_string(bytes) + " bytes of ";
  text += offset < kSharedBytes ? "shared memory (offset " + std::to_string(offset - kSharedFirst) + ") "
                                : std::string("device memory ");
  fail(fault->kind, text + fault->text, where, instruction);
}

// ---- shared memory of the running block ----

void shared_begin(std::size_t dynamic_bytes) {
#if defined(SIMT_TSAN)
  munmap(region.base, kSharedBytes);
  mmap(region.base, kSharedBytes, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#endif
  if (shared_used) forbid(region.base, shared_used);
  sites.clear();
  static_bytes = 0;
  allow(region.base + kSharedFirst, dynamic_bytes);
  shared_used = kSharedFirst + dynamic_bytes;
}

}  // namespace shadow

void* shared_dynamic() { return shadow::region.base + shadow::kSharedFirst; }

void* shared_static(const void* site, std::size_t bytes, std::size_t alignment, Where where) {
  using namespace shadow;
  const Aside aside;
  const Unseen unseen;
  for (const Site& known : sites)
    if (known.key == site) return known.memory;
  static_bytes = (static_bytes + alignment - 1) / alignment * alignment + bytes;
  if (static_bytes > kMaxStaticSharedBytes || static_bytes + machine.dynamic_bytes > kMaxSharedBytes)
    fail_here(Kind::kGeometry, "static arrays exceed the block's shared memory", where);
  const std::size_t align = std::max<std::size_t>(alignment, 16);
  const std::size_t offset = (shared_used + kGuard + align - 1) / align * align;
  shared_used = offset + bytes;
  char* memory = region.base + offset;
  allow(memory, bytes);
  sites.push_back({site, memory});
  return memory;
}

// ---- device buffers ----

void* device_allocate(std::size_t bytes) {
  using namespace shadow;
  initialise();
  if (buffers.empty()) device_used = 0;
  const std::size_t first = kSharedBytes + device_used + kGuard;
  if (first + bytes + kGuard > region.bytes) throw std::bad_alloc();
  device_used = (first - kSharedBytes + bytes + kGuard - 1) / kGuard * kGuard;
  char* memory = region.base + first;
  buffers.push_back({memory, bytes});
  allow(memory, bytes);
  return memory;
}

void device_free(void* memory) noexcept {
  using namespace shadow;
  const auto found =
      std::find_if(buffers.begin(), buffers.end(), [&](const Allocation& a) { return a.memory == memory; });
  if (found == buffers.end()) return;
  forbid(memory, found->bytes);
  buffers.erase(found);
}

void device_upload(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  shadow::set_initialised(to, bytes);
}
void device_download(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace simt
