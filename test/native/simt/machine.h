// The state of the emulated GPU, shared by the scheduler and the memory checker. Kernels never see this
// header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simt/context.h"
#include "simt/simt.h"

namespace simt {

inline constexpr unsigned kMaxThreads = 1024, kWarps = kMaxThreads / 32;
inline constexpr std::size_t kStackBytes = std::size_t{128} << 10, kStackGuard = 4096;

enum class State : std::uint8_t { kRunnable, kBarrier, kCollective, kExited };

struct Copy {  // a cp.async on its way
  char* to;
  unsigned char bytes[16];
  unsigned size, group;
};

struct Fiber {
  Context context;
  Thread id;
  State state = State::kExited;
  Where where;
  const char* waits_for = "";
  unsigned mask = 0;
  unsigned group = 0;           // cp.async groups committed so far
  std::uint64_t published = 0;  // the last fence of the grid that this thread has seen
  std::vector<Copy> copies;
};

struct Meeting {  // lanes of one warp gathering for one operation
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  Where where;
  Combine combine = nullptr;
  bool orders_memory = false;
};

struct alignas(16) LaneData {
  unsigned char in[kLaneBytes], out[kLaneBytes];
};

struct Warp {
  unsigned alive = 0;
  Meeting meetings[32];
  // Order of memory inside the warp: a lane's accesses with a stamp below seen[me][lane] happened before
  // mine.
  std::uint32_t clock = 1;
  std::uint32_t seen[32][32];
};

/// A __threadfence(): everything its thread knew then is known to whoever fences later.
struct Publication {
  std::uint64_t number;
  std::uint32_t first_epoch, epoch;  // of its block, and of the moment
  std::uint16_t thread;
};

struct Machine {
  bool running = false;   // a launch is under way
  bool watching = false;  // and what runs is a kernel, not this machine
  Context main;
  Fiber fibers[kMaxThreads];
  Warp warps[kWarps];
  LaneData lanes[kMaxThreads];
  std::uint64_t runnable[kMaxThreads / 64];
  unsigned threads = 0, alive = 0, current = 0, preferred_warp = 0, first_lane = 0;
  char* stacks = nullptr;

  unsigned barrier_arrived = 0;
  int barrier_votes = 0, barrier_result = 0;
  Where barrier_where;

  // Epochs number the stretches between block-wide barriers, over all blocks and launches.
  std::uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
  std::uint64_t fences = 0;
  std::vector<Publication> publications;

  const void* pack = nullptr;  // the launch's arguments, on the caller's stack
  std::size_t pack_bytes = 0;
  void (*body)(void*) = nullptr;
  const void* kernel = nullptr;
  std::size_t dynamic_bytes = 0;
  std::vector<Report> reports;
  const void* pending_address = nullptr;  // of the instruction that a memory report is about
};
extern Machine machine;

/// The machine works for a while. Templates of the standard library that it uses may be the copies of a
/// kernel's file, which tell of their accesses.
class Aside {
 public:
  Aside() : watching_(machine.watching) { machine.watching = false; }
  ~Aside() { machine.watching = watching_; }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;

 private:
  bool watching_;
};

#if defined(SIMT_TSAN)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
/// What happens meanwhile is done by no thread of the block.
class Unseen {
 public:
  Unseen() {
    ++depth;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() { end(); }
  /// For a thread that is left where it stands.
  static void end_all() {
    while (depth > 0) end();
  }

 private:
  static void end() {
    --depth;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  static inline int depth = 0;  // of the one thread that runs: no other one is switched to meanwhile
};
#else
class Unseen {
 public:
  Unseen() {}
  ~Unseen() {}
  static void end_all() {}
};
#endif

/// Records a report about the current thread and abandons the launch. Outside of kernels it only records.
void fail(Kind kind, std::string text, Where where, const void* instruction = nullptr);
/// The same with a text that is only put together now.
template <class Text>
[[gnu::noinline]] void fail_with(Kind kind, Where where, Text text) {
  const Aside aside;
  fail(kind, text(), where);
}
/// "merge.cuh:41"
std::string place(Where where);
std::string triple(unsigned x, unsigned y, unsigned z);
/// Who waits where, neighbours that agree in one line.
std::string deadlock_table();
/// Leaves the current thread, which will not go on.
void leave_for_main();
/// After an abandoned launch: completes its report with the kernel's name and the source line of the
/// instruction.
void describe_last_report();

/// What every GPU that we compile for gives to one block.
inline constexpr std::size_t kMaxSharedBytes = std::size_t{99} << 10,
                             kMaxStaticSharedBytes = std::size_t{48} << 10;

namespace shadow {

enum class Access { kRead, kWrite, kAtomic };

/// The memory that kernels may touch: first the block's shared memory, then all device buffers.
struct Region {
  char* base = nullptr;
  std::size_t bytes = 0;
};
extern Region region;
inline constexpr std::size_t kSharedBytes = std::size_t{256} << 10;

void initialise();
void allow(void* memory, std::size_t bytes);  // fresh, filled with NaN, uninitialised
void forbid(void* memory, std::size_t bytes);
void set_initialised(void* memory, std::size_t bytes);
void set_pending(void* memory, std::size_t bytes);  // a cp.async destination, from issue
void arrive(void* memory, std::size_t bytes);       // to arrival
bool written_since_launch(const void* memory, std::size_t bytes);
bool active();  // false in sanitizer builds, whose runtimes check instead
void access(const void* memory, std::size_t bytes, Access kind, const void* instruction, Where where);

void shared_begin(std::size_t dynamic_bytes);  // a block starts

}  // namespace shadow
}  // namespace simt
