// Long file: the emulator's planted mistakes, each beside its correct twin, and the table that runs them.
//
// Every kernel below is right with kBug = false. With kBug = true it has one mistake, which must be reported
// as what it is, in all orders and seeds, and where the line is known, on a line that says "mistake".
// Mistakes of memory are planted only in builds whose compiler tells the emulator of memory accesses.
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "cuda/ptx.h"
#include "simt/buffer.h"

namespace innerkv {
namespace {

using simt::Buffer;
using simt::Kind;

constexpr unsigned kAll = ptx::kFullWarp;

// ---- shared memory and barriers ----

template <bool kBug>
INNERKV_KERNEL(64)
void tile_transpose(const int* in, int* out) {
  INNERKV_SHARED(int, tile, [64]);
  const unsigned i = threadIdx.x;
  tile[i] = in[i];
  if constexpr (!kBug) __syncthreads();
  out[i] = tile[63 - i];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(128)
void block_sum(const int* in, int* out) {
  INNERKV_SHARED(int, sums, [4]);
  const int sum = __reduce_add_sync(kAll, in[threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if constexpr (!kBug) __syncthreads();
  if (threadIdx.x == 127) *out = sums[0] + sums[1] + sums[2] + sums[3];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(64)
void stages(const int* in, int* out, int tiles) {
  int* stage = dynamic_shared<int>();  // [64]
  const int me = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    stage[me] = in[64 * tile + me];  // mistake
    __syncthreads();
    sum += stage[63 - me];  // mistake
    if constexpr (!kBug) __syncthreads();
  }
  out[me] = sum;
}

template <bool kBug>
INNERKV_KERNEL(64)
void lanes_by_memory(int* out) {
  INNERKV_SHARED(int, slots, [64]);
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (!kBug) __syncwarp();
  const int first = slots[threadIdx.x ^ 1];  // mistake
  __shfl_xor_sync(kAll, first, 1);           // orders no memory
  __syncwarp();
  slots[threadIdx.x] = first;
  out[threadIdx.x] = first;
}

template <bool kBug>
INNERKV_KERNEL(64)
void halves_in_place(std::uint16_t* out) {  // neighbours in one word are no conflict
  INNERKV_SHARED(std::uint16_t, slots, [66]);
  slots[threadIdx.x] = static_cast<std::uint16_t>(threadIdx.x);
  __syncthreads();
  const std::uint16_t mine = slots[threadIdx.x + (kBug ? 2 : 0)];  // mistake
  slots[threadIdx.x] = static_cast<std::uint16_t>(mine + 1);       // mistake
  out[threadIdx.x] = mine;
}

template <bool kBug>
INNERKV_KERNEL(64)
void counter(unsigned* out) {
  INNERKV_SHARED(unsigned, count, [1]);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  if constexpr (kBug)
    count[0] += 1;  // mistake
  else
    atomicAdd(&count[0], 1u);
  __syncthreads();
  if (threadIdx.x == 0) *out = count[0];
}

template <bool kBug>
INNERKV_KERNEL(64)
void unwritten_shared(int* out) {
  INNERKV_SHARED(int, slots, [65]);
  slots[threadIdx.x] = 1;
  if (!kBug && threadIdx.x == 0) slots[64] = 1;
  __syncthreads();
  out[threadIdx.x] = slots[threadIdx.x + 1];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(64)
void sites(int* out) {
  out[threadIdx.x] = 1;
  if (kBug && threadIdx.x % 2 == 1)
    __syncthreads();  // mistake
  else
    __syncthreads();  // mistake
}

template <bool kBug>
INNERKV_KERNEL(64)
void leaving_early(int* out) {
  if (kBug && threadIdx.x >= 32) return;
  __syncthreads();  // mistake
  if (threadIdx.x >= 32) return;
  out[threadIdx.x] = 1;
}

// ---- bounds and alignment ----

template <bool kBug>
INNERKV_KERNEL(32)
void row_too_far(int* out) {
  INNERKV_SHARED(int, tile, [32][33]);
  for (int i = 0; i < 32; ++i) tile[i][threadIdx.x] = i;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += tile[i + (kBug ? 1 : 0)][threadIdx.x];  // mistake
  out[threadIdx.x] = sum;
}

template <bool kBug>
INNERKV_KERNEL(32)
void dynamic_too_far(int* out) {
  int* slots = dynamic_shared<int>();                        // [32]
  slots[threadIdx.x + (kBug ? 1 : 0)] = 1;                   // mistake
  out[threadIdx.x] = slots[threadIdx.x + (kBug ? 1u : 0u)];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void output_too_far(std::uint8_t* out) {                                  // [61]
  if (threadIdx.x + 30 < 61 + (kBug ? 1 : 0)) out[threadIdx.x + 30] = 1;  // mistake
}

template <bool kBug>
INNERKV_KERNEL(2)
void vector_load(const unsigned* in, unsigned* out) {  // in [9]
  const uint4* row = reinterpret_cast<const uint4*>(in + (kBug ? 1 : 0));
  const uint4 four = row[threadIdx.x];  // mistake
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

template <bool kBug>
INNERKV_KERNEL(32)
void unwritten_input(const int* in, const int* unwritten, int* out) {
  out[threadIdx.x] = (kBug ? unwritten : in)[threadIdx.x];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void reading_nc(unsigned* memory, unsigned* out) {
  memory[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = kBug ? ptx::load_streaming(memory + threadIdx.x) : memory[threadIdx.x];  // mistake
}

INNERKV_KERNEL(32) void add_one(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x] + 1;  // mistake
}

// ---- cp.async ----

template <bool kBug>
INNERKV_KERNEL(32)
void copy_without_wait(const int* in, int* out) {
  INNERKV_SHARED(int, slots, [32]);
  ptx::cp_async_4(&slots[threadIdx.x], in + threadIdx.x);
  ptx::cp_async_commit();
  if constexpr (!kBug) ptx::cp_async_wait_group<0>();
  out[threadIdx.x] = slots[threadIdx.x];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void copy_with_lax_wait(const uint4* in, unsigned* out) {
  INNERKV_SHARED(uint4, slots, [2][32]);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(&slots[stage][threadIdx.x], in + 32 * stage + static_cast<int>(threadIdx.x),
                     stage ? 8 : 16);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait_group<1>();
  unsigned sum = slots[0][threadIdx.x].w;
  if constexpr (!kBug) ptx::cp_async_wait_group<0>();
  sum += slots[1][threadIdx.x].y + slots[1][threadIdx.x].z;  // mistake
  out[threadIdx.x] = sum;
}

template <bool kBug>
INNERKV_KERNEL(32)
void copy_without_barrier(const int* in, int* out) {
  INNERKV_SHARED(int, slots, [32]);
  ptx::cp_async_4(&slots[threadIdx.x], in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait_group<0>();  // this thread's copies only
  if constexpr (!kBug) __syncthreads();
  out[threadIdx.x] = slots[31 - threadIdx.x];  // mistake
}

template <bool kBug>
INNERKV_KERNEL(1)
void copy_misaligned(const unsigned* in, unsigned* out) {
  unsigned* slots = dynamic_shared<unsigned>();  // [8]
  ptx::cp_async_16(slots + (kBug ? 2 : 4), in);  // mistake
  ptx::cp_async_commit();
  ptx::cp_async_wait_group<0>();
  *out = slots[4];
}

// ---- warp operations ----

template <bool kBug>
INNERKV_KERNEL(32)
void half_gone(int* out) {
  if (kBug && threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void half_elsewhere(int* out) {
  int x = static_cast<int>(threadIdx.x);
  if (!kBug || threadIdx.x < 16) x = __shfl_xor_sync(kAll, x, 1);  // mistake
  __syncthreads();                                                 // mistake
  out[threadIdx.x] = x;
}

template <bool kBug>
INNERKV_KERNEL(32)
void mask_without_me(int* out) {
  out[threadIdx.x] = __shfl_sync(kBug ? 0x0000ffffu : kAll, static_cast<int>(threadIdx.x), 0);  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void absent_source(int* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), kBug ? 20 : 3);  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void two_operations(unsigned* out) {
  unsigned x = threadIdx.x;
  if (kBug && threadIdx.x >= 16)
    x = __ballot_sync(kAll, 1);  // mistake
  else
    x = static_cast<unsigned>(__reduce_add_sync(kAll, 1));  // mistake
  out[threadIdx.x] = x;
}

template <bool kBug>
INNERKV_KERNEL(32)
void partial_mma(float* out) {
  float d[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  if (!kBug || threadIdx.x < 16) ptx::mma_m16n8k16<__half>(d, a, b);  // mistake
  out[threadIdx.x] = d[0];
}

template <bool kBug>
INNERKV_KERNEL(40)
void ragged_warp(int* out) {
  const unsigned mask = threadIdx.x < 32 || kBug ? kAll : 0xffu;
  out[threadIdx.x] = __any_sync(mask, threadIdx.x == 0);  // mistake
}

// ---- between blocks ----

template <bool kBug>
INNERKV_KERNEL(32)
void one_address(int* out) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = 1;  // mistake
}

template <bool kBug>
INNERKV_KERNEL(32)
void same_index(int* out) {
  if constexpr (kBug)
    out[threadIdx.x] += 1;  // mistake
  else
    atomicAdd(&out[threadIdx.x], 1);
}

template <bool kBug>
INNERKV_KERNEL(32)
void last_block(const int* in, int* partial, unsigned* ticket, int* out) {
  INNERKV_SHARED(bool, last, [1]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 2 * in[blockIdx.x];
    if constexpr (!kBug) __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if constexpr (!kBug) __threadfence();
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];  // mistake
  *out = sum;
}

INNERKV_KERNEL(64) void wants_64(int* out) {
  expect_block<64>();  // mistake
  out[threadIdx.x] = 1;
}

// ---- the table ----

std::vector<int> numbers(int count) {
  std::vector<int> values;
  for (int i = 0; i < count; ++i) values.push_back(3 * i + 1);
  return values;
}
std::vector<unsigned> words(int count) {
  const std::vector<int> values = numbers(count);
  return {values.begin(), values.end()};
}

struct Case {
  const char* name;
  std::initializer_list<Kind> kinds;
  bool memory;  // only found where memory accesses are seen
  cudaError_t (*run)(bool bug);
};

#define PLANTED(kernel, grid, block, shared, ...)                                    \
  (bug ? launch(kernel<true>, dim3(grid), dim3(block), shared, nullptr, __VA_ARGS__) \
       : launch(kernel<false>, dim3(grid), dim3(block), shared, nullptr, __VA_ARGS__))

const Case cases[] = {
    {"no barrier after a tile is loaded",
     {Kind::kRace, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(64)), out(64);
       const cudaError_t error = PLANTED(tile_transpose, 1, 64, 0, in.get(), out.get());
       if (!bug) CHECK(out.download()[3] == 3 * 60 + 1);
       return error;
     }},
    {"no barrier before other warps' sums are read",
     {Kind::kRace, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(128)), out(1);
       const cudaError_t error = PLANTED(block_sum, 1, 128, 0, in.get(), out.get());
       if (!bug) CHECK(out.download()[0] == 3 * 127 * 64 + 128);
       return error;
     }},
    {"a stage reused too early",
     {Kind::kRace, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(64 * 4)), out(64);
       return PLANTED(stages, 1, 64, 256, in.get(), out.get(), 4);
     }},
    {"lanes exchange through memory without __syncwarp",
     {Kind::kRace, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> out(64);
       return PLANTED(lanes_by_memory, 1, 64, 0, out.get());
     }},
    {"half words overlap",
     {Kind::kRace, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<std::uint16_t> out(64);
       return PLANTED(halves_in_place, 1, 64, 0, out.get());
     }},
    {"a counter without atomics",
     {Kind::kRace},
     true,
     [](bool bug) {
       Buffer<unsigned> out(1);
       const cudaError_t error = PLANTED(counter, 1, 64, 0, out.get());
       if (!bug) CHECK(out.download()[0] == 64);
       return error;
     }},
    {"shared memory read before it is written",
     {Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> out(64);
       return PLANTED(unwritten_shared, 1, 64, 0, out.get());
     }},
    {"a barrier from two call sites",
     {Kind::kBarrier},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return PLANTED(sites, 1, 64, 0, out.get());
     }},
    {"a barrier after some threads left",
     {Kind::kBarrier},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return PLANTED(leaving_early, 1, 64, 0, out.get());
     }},
    {"a row beyond a shared array",
     {Kind::kOutside, Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(row_too_far, 1, 32, 0, out.get());
     }},
    {"a write past dynamic shared memory",
     {Kind::kOutside},
     true,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(dynamic_too_far, 1, 32, 128, out.get());
     }},
    {"a byte past the output",
     {Kind::kOutside},
     true,
     [](bool bug) {
       Buffer<std::uint8_t> out(61);
       return PLANTED(output_too_far, 1, 32, 0, out.get());
     }},
    {"a misaligned vector load",
     {Kind::kMisaligned},
     true,
     [](bool bug) {
       Buffer<unsigned> in(words(9)), out(2);
       return PLANTED(vector_load, 1, 2, 0, in.get(), out.get());
     }},
    {"device memory read before it is written",
     {Kind::kUninitialised},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(32)), unwritten(32), out(32);
       return PLANTED(unwritten_input, 1, 32, 0, in.get(), unwritten.get(), out.get());
     }},
    {"ld.global.nc of what the launch writes",
     {Kind::kReadOnly},
     true,
     [](bool bug) {
       Buffer<unsigned> memory(32), out(32);
       return PLANTED(reading_nc, 1, 32, 0, memory.get(), out.get());
     }},
    {"a host pointer",
     {Kind::kOutside},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(32)), out(32);
       const std::vector<int> host = numbers(32);
       return launch(add_one, dim3(1), dim3(32), 0, nullptr, bug ? host.data() : in.get(), out.get());
     }},
    {"a buffer that was freed",
     {Kind::kOutside},
     true,
     [](bool bug) {
       Buffer<int> out(32);
       const int* dangling = Buffer<int>(numbers(32)).get();
       const Buffer<int> in(numbers(32));
       return launch(add_one, dim3(1), dim3(32), 0, nullptr, bug ? dangling : in.get(), out.get());
     }},
    {"a cp.async never waited for",
     {Kind::kCpAsyncEarly},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(32)), out(32);
       return PLANTED(copy_without_wait, 1, 32, 0, in.get(), out.get());
     }},
    {"a cp.async group waited for too loosely",
     {Kind::kCpAsyncEarly},
     true,
     [](bool bug) {
       Buffer<uint4> in(64);
       simt::device_upload(in.get(), words(256).data(), 1024);
       Buffer<unsigned> out(32);
       const cudaError_t error = PLANTED(copy_with_lax_wait, 1, 32, 0, in.get(), out.get());
       if (!bug)
         CHECK(out.download()[1] ==
               (3 * 7 + 1) + (3 * 133 + 1) + 0);  // the last 8 bytes are filled with zeros
       return error;
     }},
    {"others' cp.async read without a barrier",
     {Kind::kRace, Kind::kUninitialised, Kind::kCpAsyncEarly},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(32)), out(32);
       return PLANTED(copy_without_barrier, 1, 32, 0, in.get(), out.get());
     }},
    {"a misaligned cp.async",
     {Kind::kMisaligned},
     false,
     [](bool bug) {
       Buffer<unsigned> in(words(4)), out(1);
       return PLANTED(copy_misaligned, 1, 1, 64, in.get(), out.get());
     }},
    {"a full mask while half of the warp is gone",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(half_gone, 1, 32, 0, out.get());
     }},
    {"a full mask while half of the warp waits elsewhere",
     {Kind::kDeadlock},
     false,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(half_elsewhere, 1, 32, 0, out.get());
     }},
    {"a mask without the caller",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(mask_without_me, 1, 32, 0, out.get());
     }},
    {"a shuffle from a lane outside of the mask",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<int> out(32);
       return PLANTED(absent_source, 1, 32, 0, out.get());
     }},
    {"two operations of one mask at once",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<unsigned> out(32);
       return PLANTED(two_operations, 1, 32, 0, out.get());
     }},
    {"an mma of half a warp",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<float> out(32);
       return PLANTED(partial_mma, 1, 32, 0, out.get());
     }},
    {"a full mask in a warp of 8 lanes",
     {Kind::kMask},
     false,
     [](bool bug) {
       Buffer<int> out(40);
       return PLANTED(ragged_warp, 1, 40, 0, out.get());
     }},
    {"blocks write one address",
     {Kind::kRace},
     true,
     [](bool bug) {
       Buffer<int> out(4);
       return PLANTED(one_address, 4, 32, 0, out.get());
     }},
    {"blocks update one address without atomics",
     {Kind::kRace},
     true,
     [](bool bug) {
       Buffer<int> out(numbers(32));
       const cudaError_t error = PLANTED(same_index, 4, 32, 0, out.get());
       if (!bug) CHECK(out.download()[5] == 16 + 4);
       return error;
     }},
    {"the last block without fences",
     {Kind::kRace},
     true,
     [](bool bug) {
       Buffer<int> in(numbers(8)), partial(8), out(1);
       Buffer<unsigned> ticket(std::vector<unsigned>{0});
       const cudaError_t error =
           PLANTED(last_block, 8, 32, 0, in.get(), partial.get(), ticket.get(), out.get());
       if (!bug) CHECK(out.download()[0] == 2 * (3 * 28 + 8));
       return error;
     }},
    {"no threads",
     {Kind::kGeometry},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return launch(wants_64, dim3(bug ? 0 : 1), dim3(64), 0, nullptr, out.get());
     }},
    {"2048 threads",
     {Kind::kGeometry},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return launch(wants_64, dim3(1), dim3(bug ? 2048 : 64), 0, nullptr, out.get());
     }},
    {"more shared memory than there is",
     {Kind::kGeometry},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return launch(wants_64, dim3(1), dim3(64), bug ? 100 << 10 : 99 << 10, nullptr, out.get());
     }},
    {"another block size than the kernel is written for",
     {Kind::kGeometry},
     false,
     [](bool bug) {
       Buffer<int> out(64);
       return launch(wants_64, dim3(1), dim3(bug ? 32 : 64), 0, nullptr, out.get());
     }},
};

/// Whether a report's line of this file has "mistake" in it.
bool says_mistake(const std::string& where) {
  static const std::vector<std::string> lines = [] {
    std::vector<std::string> all(1);
    char line[256];
    std::FILE* file = std::fopen(__FILE__, "r");
    while (file && std::fgets(line, sizeof line, file)) all.emplace_back(line);
    if (file) std::fclose(file);
    return all;
  }();
  if (where.rfind("self_test.cpp:", 0) != 0) return false;
  const std::size_t line = std::stoul(where.substr(14));
  return line < lines.size() && lines[line].find("mistake") != std::string::npos;
}

std::string describe(const Case& planted, const simt::Schedule& schedule) {
  return std::string(planted.name) + ", order " + std::to_string(static_cast<int>(schedule.order)) +
         ", seed " + std::to_string(schedule.seed);
}

TEST("correct kernels give no report in any order") {
  for (const simt::Schedule& schedule : simt::schedules())
    for (const Case& planted : cases) {
      simt::use(schedule);
      CHECK_WITH(planted.run(false) == cudaSuccess, describe(planted, schedule));
      CHECK_WITH(simt::take_reports().empty(), describe(planted, schedule));
    }
}

TEST("every planted mistake is reported as what it is, in every order, on its line") {
  for (const simt::Schedule& schedule : simt::schedules())
    for (const Case& planted : cases) {
      if (planted.memory && !simt::checks_memory()) continue;
      simt::use(schedule);
      const cudaError_t error = planted.run(true);
      const std::vector<simt::Report> reports = simt::take_reports(true);
      CHECK_WITH(error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration,
                 describe(planted, schedule));
      CHECK_WITH(reports.size() == 1, describe(planted, schedule));
      if (reports.size() != 1) continue;
      bool expected = false;
      for (const Kind kind : planted.kinds) expected |= reports[0].kind == kind;
      CHECK_WITH(expected, describe(planted, schedule) + ": " + reports[0].text);
      if (error == cudaErrorLaunchFailure && reports[0].kind != Kind::kDeadlock)
        CHECK_WITH(says_mistake(reports[0].where),
                   describe(planted, schedule) + ": " + reports[0].where + ": " + reports[0].text);
    }
  if (!simt::checks_memory()) std::printf("*** mistakes of memory were NOT planted: a sanitizer's build\n");
}

TEST("a deadlock is a table of who waits where") {
  simt::use({simt::Order::kAscending, 1});
  Buffer<int> out(32);
  CHECK(launch(half_elsewhere<true>, dim3(1), dim3(32), 0, nullptr, out.get()) == cudaErrorLaunchFailure);
  const std::vector<simt::Report> reports = simt::take_reports(true);
  CHECK(reports.size() == 1);
  const std::string& text = reports.at(0).text;
  CHECK_WITH(text.find("threads 0-15: shuffle with mask ffffffff at self_test.cpp:") != std::string::npos,
             text);
  CHECK_WITH(text.find("threads 16-31: __syncthreads at self_test.cpp:") != std::string::npos, text);
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("self_test", argc, argv); }
