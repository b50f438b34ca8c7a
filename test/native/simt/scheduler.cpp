// Launches, schedules, barriers and warp operations. Compiled without ThreadSanitizer's
// instrumentation: this is the machine, not the program.
// Long file: one machine, whose parts take turns.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

#include "simt/machine.h"
#if defined(SIMT_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define SIMT_EDGE(call) call
#else
#define SIMT_EDGE(call)
#endif

namespace simt {

Machine machine;
Statistics statistics;
Thread* current_thread = nullptr;
Grid current_grid;

static Schedule schedule;
static std::uint64_t random_state = 1;

static std::uint64_t random_bits() {
  std::uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
static unsigned below(unsigned n) { return static_cast<unsigned>((random_bits() >> 32) * n >> 32); }
static bool random_order() { return schedule.order >= Order::kRandom; }

std::vector<Schedule> schedules() {
  std::vector<Schedule> all;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kRandom, Order::kWarpRandom})
    for (std::uint64_t seed = 1; seed <= 3; ++seed) all.push_back({order, seed});
  return all;
}
void use(Schedule wanted) { schedule = wanted; }

// Places whose happens-before edges ThreadSanitizer is told of; inside the shared window, so that a new
// block, which gets fresh pages, has fresh edges too.
[[maybe_unused]] static char* edge(unsigned index) {
  return shadow::region.base + shadow::kSharedBytes - 4096 + 16 * index;
}
[[maybe_unused]] static char start_edge, grid_edge, fence_edge;

#if defined(SIMT_TSAN)
// To ThreadSanitizer a block's threads are new ones, on stacks that it has not seen. Both are dear, so blocks
// take turns at a few sets of them: of two blocks of a launch, so many apart, it would not see that they
// race. The plain build sees it.
constexpr unsigned kTurns = 8;
static void* tsan_fibers[kTurns][kMaxThreads];
#else
constexpr unsigned kTurns = 1;
#endif

// ---- who runs next ----

static void set_runnable(unsigned thread) {
  machine.fibers[thread].state = State::kRunnable;
  machine.runnable[thread / 64] |= std::uint64_t{1} << thread % 64;
}
static void clear_runnable(unsigned thread) {
  machine.runnable[thread / 64] &= ~(std::uint64_t{1} << thread % 64);
}

/// The first runnable thread at or cyclically after `from`, or -1.
static int runnable_from(unsigned from) {
  const unsigned words = (machine.threads + 63) / 64, first = from / 64;
  for (unsigned i = 0; i <= words; ++i) {
    const unsigned word = (first + i) % words;
    std::uint64_t bits = machine.runnable[word];
    if (i == 0) bits &= ~std::uint64_t{0} << from % 64;
    if (bits) return static_cast<int>(64 * word) + std::countr_zero(bits);
  }
  return -1;
}

static int pick() {
  switch (schedule.order) {
    case Order::kAscending:
      return runnable_from(0);
    case Order::kDescending:
      for (unsigned word = (machine.threads + 63) / 64; word-- > 0;)
        if (machine.runnable[word])
          return static_cast<int>(64 * word) + 63 - std::countl_zero(machine.runnable[word]);
      return -1;
    case Order::kRandom:
      return runnable_from(below(machine.threads));
    case Order::kWarpRandom:
      break;
  }
  const auto lanes_of = [](unsigned warp) {
    return static_cast<unsigned>(machine.runnable[warp / 2] >> (warp % 2 ? 32 : 0));
  };
  unsigned lanes = lanes_of(machine.preferred_warp);
  if (!lanes) {  // this warp waits or has ended: another one, from a lane of its own
    const int thread = runnable_from(below(machine.threads));
    if (thread < 0) return -1;
    machine.preferred_warp = static_cast<unsigned>(thread) / 32;
    machine.first_lane = below(32);
    lanes = lanes_of(machine.preferred_warp);
  }
  const unsigned turned = std::rotr(lanes, static_cast<int>(machine.first_lane));
  return static_cast<int>(32 * machine.preferred_warp +
                          (static_cast<unsigned>(std::countr_zero(turned)) + machine.first_lane) % 32);
}

void leave_for_main() {
  Unseen::end_all();
  Fiber& me = machine.fibers[machine.current];
  context_switch(me.context, machine.main, true);
}

/// Leaves the current thread for the next runnable one.
static void next(bool dying) {
  const unsigned me = machine.current;
  const int chosen = pick();
  if (chosen < 0) {
    if (machine.alive) fail_with(Kind::kDeadlock, machine.fibers[me].where, deadlock_table);
    return leave_for_main();
  }
  if (static_cast<unsigned>(chosen) == me) return;
  ++statistics.switches;
  machine.current = static_cast<unsigned>(chosen);
  current_thread = &machine.fibers[machine.current].id;
  context_switch(machine.fibers[me].context, machine.fibers[machine.current].context, dying);
}

static void wait_here(State state, const char* what, unsigned mask, Where where) {
  Fiber& me = machine.fibers[machine.current];
  me.state = state;
  me.waits_for = what;
  me.mask = mask;
  me.where = where;
  clear_runnable(machine.current);
  next(false);
}

// ---- warp operations ----

/// After a __syncwarp every lane of `mask` knows what each of them knew and did.
static void order_lanes(unsigned index, unsigned mask) {
  Warp& warp = machine.warps[index];
  std::uint32_t joined[32] = {};
  std::uint64_t published = 0;
  for (unsigned bits = mask; bits; bits &= bits - 1) {
    const int lane = std::countr_zero(bits);
    for (int i = 0; i < 32; ++i) joined[i] = std::max(joined[i], warp.seen[lane][i]);
    published = std::max(published, machine.fibers[32 * index + static_cast<unsigned>(lane)].published);
  }
  ++warp.clock;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1u) joined[i] = warp.clock;
  for (unsigned bits = mask; bits; bits &= bits - 1) {
    const int lane = std::countr_zero(bits);
    std::copy_n(joined, 32, warp.seen[lane]);
    machine.fibers[32 * index + static_cast<unsigned>(lane)].published = published;
  }
}

void meet(const char* name, unsigned mask, const void* in, std::size_t in_bytes, void* out,
          std::size_t out_bytes, Combine combine, bool orders_memory, Where where) {
  const unsigned thread = machine.current, index = thread / 32, bit = 1u << thread % 32;
  Warp& warp = machine.warps[index];
  if (!(mask & bit))
    fail_with(Kind::kMask, where,
              [&] { return std::string(name) + " by a lane that its mask does not name"; });
  if (mask & ~warp.alive)
    fail_with(Kind::kMask, where,
              [&] { return std::string(name) + " with a mask that names lanes that ended or never were"; });
  if (in_bytes) {
    const Unseen
        unseen;  // here and below: memcpy tells ThreadSanitizer of its accesses wherever it is called
    std::memcpy(machine.lanes[thread].in, in, in_bytes);
  }

  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.arrived && other.mask == mask) {
      if (other.name != name || other.where.line != where.line)
        fail_with(Kind::kMask, where, [&] {
          return std::string(name) + " while lanes of the same mask wait for " + other.name + " at " +
                 place(other.where);
        });
      meeting = &other;
      break;
    }
    if (!other.arrived && !meeting) meeting = &other;
  }
  meeting->mask = mask;
  meeting->name = name;
  meeting->where = where;
  meeting->arrived |= bit;
  SIMT_EDGE(if (orders_memory) __tsan_release(edge(2 + index)));
  if (meeting->arrived == mask) {
    meeting->arrived = 0;
    ++statistics.collectives;
    {
      const Unseen unseen;
      if (combine) combine(&machine.lanes[32 * index], mask, where);
      if (orders_memory) order_lanes(index, mask);
    }
    for (unsigned bits = mask; bits; bits &= bits - 1)
      set_runnable(32 * index + static_cast<unsigned>(std::countr_zero(bits)));
    if (schedule.order != Order::kAscending) next(false);
  } else {
    wait_here(State::kCollective, name, mask, where);
  }
  SIMT_EDGE(if (orders_memory) __tsan_acquire(edge(2 + index)));
  if (out_bytes) {
    const Unseen unseen;
    std::memcpy(out, machine.lanes[thread].out, out_bytes);
  }
}

unsigned char* lane_in(LaneData* lanes, int lane) { return lanes[lane].in; }
unsigned char* lane_out(LaneData* lanes, int lane) { return lanes[lane].out; }

// ---- the block's barrier, fences, atomics ----

int barrier(int vote, Where where) {
  if (machine.alive != machine.threads)
    fail_here(Kind::kBarrier, "__syncthreads after some threads of the block have ended", where);
  if (machine.barrier_arrived == 0)
    machine.barrier_where = where;
  else if (machine.barrier_where.line != where.line)
    fail_with(Kind::kBarrier, where,
              [] { return "__syncthreads while other threads wait at " + place(machine.barrier_where); });
  [[maybe_unused]] const unsigned side = machine.epoch & 1u;
  SIMT_EDGE(__tsan_release(edge(side)));
  machine.barrier_votes += vote;
  if (++machine.barrier_arrived == machine.threads) {
    ++statistics.barriers;
    ++machine.epoch;
    machine.barrier_result = machine.barrier_votes;
    machine.barrier_arrived = 0;
    machine.barrier_votes = 0;
    std::uint64_t published = 0;
    for (unsigned i = 0; i < machine.threads; ++i)
      published = std::max(published, machine.fibers[i].published);
    for (unsigned i = 0; i < machine.threads; ++i) {
      machine.fibers[i].published = published;
      set_runnable(i);
    }
    if (schedule.order != Order::kAscending) next(false);
  } else {
    wait_here(State::kBarrier, "__syncthreads", 0, where);
  }
  SIMT_EDGE(__tsan_acquire(edge(side)));
  return machine.barrier_result;
}

void fence() {
  const Aside aside;
  {
    const Unseen unseen;
    machine.fibers[machine.current].published = ++machine.fences;
    machine.publications.push_back(
        {machine.fences, machine.block_epoch, machine.epoch, static_cast<std::uint16_t>(machine.current)});
  }
  SIMT_EDGE(__tsan_acquire(&fence_edge));
  SIMT_EDGE(__tsan_release(&fence_edge));
}

void before_atomic(void* memory, std::size_t bytes, Where where) {
  if (random_order() && below(4) == 0) next(false);
  if (shadow::active()) shadow::access(memory, bytes, shadow::Access::kAtomic, nullptr, where);
}

void check_read_only(const void* memory, std::size_t bytes, Where where) {
  if (shadow::active() && shadow::written_since_launch(memory, bytes))
    fail_here(Kind::kReadOnly, "ld.global.nc reads memory that this launch has written", where);
}

// ---- launch ----

static void thread_main() {
  context_started();
  SIMT_EDGE(__tsan_acquire(&start_edge));
  machine.body(const_cast<void*>(machine.pack));
  const unsigned thread = machine.current, index = thread / 32, bit = 1u << thread % 32;
  Warp& warp = machine.warps[index];
  for (const Meeting& meeting : warp.meetings)
    if (meeting.arrived && (meeting.mask & bit))
      fail_with(Kind::kMask, meeting.where, [&] {
        return std::string("a thread ended while others of its mask wait for ") + meeting.name;
      });
  if (machine.barrier_arrived)
    fail_here(Kind::kBarrier, "a thread ended while others wait at __syncthreads", machine.barrier_where);
  SIMT_EDGE(__tsan_release(&grid_edge));
  machine.fibers[thread].state = State::kExited;
  machine.fibers[thread].copies.clear();
  --machine.alive;
  warp.alive &= ~bit;
  clear_runnable(thread);
  next(true);
}

void expect_block(unsigned threads, Where where) {
  const dim3 block = current_grid.block_size;
  if (block.x != threads || block.y != 1 || block.z != 1)
    fail_with(Kind::kGeometry, where, [&] {
      return "the kernel wants blocks of " + std::to_string(threads) + " threads and got " +
             triple(block.x, block.y, block.z);
    });
}

static const char* refusal(dim3 grid, dim3 block, std::size_t dynamic_bytes) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return "a launch of no threads";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "a grid beyond 2^31-1, 65535, 65535";
  if (block.x > 1024 || block.y > 1024 || block.z > 64 ||
      std::uint64_t{block.x} * block.y * block.z > kMaxThreads)
    return "a block of more than 1024 threads";
  if (dynamic_bytes > kMaxSharedBytes) return "more shared memory than every supported GPU has";
  return nullptr;
}

static void prepare_stacks() {
  if (machine.stacks) return;
  constexpr std::size_t stride = kStackBytes + kStackGuard, count = std::size_t{kTurns} * kMaxThreads;
  void* memory = mmap(nullptr, stride * count, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  machine.stacks = static_cast<char*>(memory);
  for (std::size_t i = 0; i < count; ++i) mprotect(machine.stacks + i * stride, kStackGuard, PROT_NONE);
}

static void run_block(uint3 block, dim3 size) {
  ++statistics.blocks;
  statistics.threads += machine.threads;
  current_grid.block = block;
  machine.block_epoch = ++machine.epoch;
  shadow::shared_begin(machine.dynamic_bytes);
  const unsigned turn = static_cast<unsigned>(statistics.blocks % kTurns);
  machine.alive = machine.threads;
  machine.barrier_arrived = 0;
  machine.barrier_votes = 0;
  std::fill(std::begin(machine.runnable), std::end(machine.runnable), 0);
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.id = {{i % size.x, i / size.x % size.y, i / size.x / size.y}, i % 32, i / 32, i};
    fiber.group = 0;
    fiber.published = 0;
    fiber.copies.clear();
    fiber.context.stack =
        machine.stacks + (std::size_t{turn} * kMaxThreads + i) * (kStackBytes + kStackGuard) + kStackGuard;
    fiber.context.stack_bytes = kStackBytes;
#if defined(SIMT_TSAN)
    fiber.context.tsan_fiber = tsan_fibers[turn][i];
#endif
    context_make(fiber.context, thread_main);
    set_runnable(i);
  }
  for (unsigned i = 0; i * 32 < machine.threads; ++i) {
    const unsigned lanes = std::min(32u, machine.threads - 32 * i);
    Warp& warp = machine.warps[i];
    warp.alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.clock = 1;
    std::memset(warp.seen, 0, sizeof warp.seen);
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
  }
  machine.preferred_warp = 0;
  machine.current = static_cast<unsigned>(pick());
  current_thread = &machine.fibers[machine.current].id;
  machine.watching = true;
  SIMT_EDGE(__tsan_release(&start_edge));
  context_switch(machine.main, machine.fibers[machine.current].context, false);
  machine.watching = false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    context_drop(machine.fibers[i].context, !machine.running);
#if defined(SIMT_TSAN)
    tsan_fibers[turn][i] = machine.fibers[i].context.tsan_fiber;
#endif
  }
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes, void (*body)(void*),
                void* pack, std::size_t pack_bytes, Where where) {
  if (const char* reason = refusal(grid, block, dynamic_bytes)) {
    fail(Kind::kGeometry, reason, where);
    return cudaErrorInvalidConfiguration;
  }
  prepare_stacks();
  shadow::initialise();
  context_adopt(machine.main);
  machine.kernel = kernel;
  machine.body = body;
  machine.pack = pack;
  machine.pack_bytes = pack_bytes;
  machine.dynamic_bytes = dynamic_bytes;
  machine.threads = block.x * block.y * block.z;
  machine.launch_epoch = ++machine.epoch;
  machine.publications.clear();
  machine.pending_address = nullptr;
  current_grid.block_size = block;
  current_grid.grid_size = grid;
  random_state = schedule.seed;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::uint32_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = static_cast<std::uint32_t>(i);
  for (std::uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[below(static_cast<unsigned>(i))]);
  machine.running = true;
  for (std::uint64_t i = 0; i < blocks && machine.running; ++i)
    run_block({order[i] % grid.x, order[i] / grid.x % grid.y, order[i] / grid.x / grid.y}, block);
  SIMT_EDGE(__tsan_acquire(&grid_edge));
  const bool completed = machine.running;
  machine.running = false;
  if (completed) return cudaSuccess;
  describe_last_report();
  return cudaErrorLaunchFailure;
}

}  // namespace simt
