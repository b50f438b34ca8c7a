// Runs CUDA kernels on the CPU: every thread of a block is a fiber, all blocks run one after another on one
// OS thread. Included instead of CUDA's own runtime when a kernel is read by a host compiler
// (cuda/portable.h).
//
//   for (const simt::Schedule& schedule : simt::schedules()) {
//     simt::use(schedule);
//     launch(kernel, grid, block, dynamic_bytes, stream, arguments...);
//   }
//   CHECK(simt::take_reports().empty());
//
// A thread runs until it meets a barrier, a warp operation, an atomic (in the random orders) or its end; the
// schedule says who goes on. The first mistake of a launch is reported and ends it: the rest of the grid does
// not run and launch() returns cudaErrorLaunchFailure. Mistakes of synchronisation and geometry are found in
// every build. Mistakes of memory (races, uninitialised or foreign memory, misalignment, cp.async read too
// early) are found when the kernel is compiled with the hooks that CMake turns on for tests without a
// sanitizer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// Functions of the machine that are inlined into kernels: what they touch is no access of the kernel.
#define SIMT_QUIET __attribute__((no_sanitize("thread")))
#if defined(SIMT_HOOKS)
#define SIMT_QUIET_ATOMIC SIMT_QUIET
#else
#define SIMT_QUIET_ATOMIC  // ThreadSanitizer must see atomics
#endif

namespace simt {

/// A line of kernel source; as the default argument here() it is the caller's.
struct Where {
  const char* file = "";
  int line = 0;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- for tests ----

enum class Order { kAscending, kDescending, kRandom, kWarpRandom };
struct Schedule {
  Order order = Order::kAscending;
  std::uint64_t seed = 1;
};
/// Every order with three seeds. The seed of the two fixed orders shuffles the blocks.
std::vector<Schedule> schedules();
void use(Schedule schedule);

enum class Kind {
  kRace,           // two threads, one address, at least one write, no barrier or fence between
  kUninitialised,  // a read of shared or device memory that nobody wrote
  kOutside,        // an access outside of every array, buffer and stack
  kMisaligned,     // an access that its type's alignment forbids
  kCpAsyncEarly,   // a cp.async destination touched before its wait
  kReadOnly,       // ld.global.nc of memory that the same launch writes
  kBarrier,        // threads of a block meet at different barriers, or not at all
  kMask,           // a warp operation whose mask is not who takes part
  kDeadlock,       // nobody can run; the text is a table of who waits where
  kGeometry,       // grid, block or shared memory that the device or the kernel refuses
  kPinned,         // host memory that is touched while the device copies it, or that it cannot copy by itself
};
struct Report {
  Kind kind;
  std::string text;   // one line, or the deadlock table
  std::string where;  // "merge.cuh:41", or empty when unknown
};
/// The reports since the last call; each is also printed to standard error unless `quiet`.
std::vector<Report> take_reports(bool quiet = false);
/// Whether mistakes of memory are found in this build.
bool checks_memory();

struct Statistics {
  unsigned long long switches = 0, collectives = 0, barriers = 0, blocks = 0, threads = 0, accesses = 0;
};
extern Statistics statistics;

/// Device memory of exactly `bytes`, between guards. Throws std::bad_alloc.
void* device_allocate(std::size_t bytes);
void device_free(void* memory) noexcept;
void device_upload(void* to, const void* from, std::size_t bytes);
void device_download(void* to, const void* from, std::size_t bytes);

// ---- for the headers that emulate ----

struct Thread {
  uint3 index;
  unsigned lane, warp, flat;
};
struct Grid {
  uint3 block;
  dim3 block_size, grid_size;
};
extern Thread* current_thread;
extern Grid current_grid;

inline constexpr std::size_t kLaneBytes = 64;
struct LaneData;
using Combine = void (*)(LaneData* lanes, unsigned mask, Where where);
unsigned char* lane_in(LaneData* lanes, int lane);
unsigned char* lane_out(LaneData* lanes, int lane);

/// Waits for all lanes of `mask`; `combine` then computes every lane's output at once.
void meet(const char* name, unsigned mask, const void* in, std::size_t in_bytes, void* out,
          std::size_t out_bytes, Combine combine, bool orders_memory, Where where);
int barrier(int vote, Where where);
void fence();
void fail_here(Kind kind, const char* text, Where where);
/// An atomic is about to happen: another thread may come first.
void before_atomic(void* memory, std::size_t bytes, Where where);
void check_read_only(const void* memory, std::size_t bytes, Where where);

void cp_async(void* to, const void* from, unsigned bytes, unsigned from_bytes, Where where);
void cp_async_commit();
void cp_async_wait(unsigned pending);

void* shared_static(const void* site, std::size_t bytes, std::size_t alignment, Where where);
void* shared_dynamic();
void expect_block(unsigned threads, Where where);
cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes, void (*body)(void*),
                void* pack, std::size_t pack_bytes, Where where);

template <class In, class Out, void (*F)(const In (&)[32], Out (&)[32], unsigned, Where)>
SIMT_QUIET void combine_as(LaneData* lanes, unsigned mask, Where where) {
  In in[32] = {};
  Out out[32] = {};
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1u) std::memcpy(&in[lane], lane_in(lanes, lane), sizeof(In));
  F(in, out, mask, where);
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1u) std::memcpy(lane_out(lanes, lane), &out[lane], sizeof(Out));
}

/// A warp operation: F gets the operands of all lanes in `mask` and fills in their results.
template <auto F, class In, class Out>
inline Out collective(const char* name, unsigned mask, const In& in, Where where) {
  static_assert(sizeof(In) <= kLaneBytes && sizeof(Out) <= kLaneBytes);
  static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>);
  Out out;
  meet(name, mask, &in, sizeof(In), &out, sizeof(Out), combine_as<In, Out, F>, false, where);
  return out;
}

template <class... P, class... A>
inline cudaError_t launch(Where where, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t dynamic_bytes,
                          A&&... arguments) {
  struct Pack {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } pack{kernel, {static_cast<P>(std::forward<A>(arguments))...}};
  return run(
      reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes,
      [](void* p) {
        Pack* call = static_cast<Pack*>(p);
        std::apply(call->kernel, call->arguments);
      },
      &pack, sizeof(Pack), where);
}

}  // namespace simt

#include "simt/intrinsics.h"
