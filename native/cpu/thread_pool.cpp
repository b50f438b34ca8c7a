#include "thread_pool.h"

#include <chrono>

namespace innerkv {

namespace {

using Clock = std::chrono::steady_clock;

/// A model's loops follow each other within a few microseconds, and waking a thread that sleeps takes longer.
constexpr auto kSpinTime = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits for `done` without sleeping, for a while; returns whether it came true.
template <class Condition>
bool spin(bool allowed, Condition done) {
  if (done()) return true;
  if (!allowed) return false;
  const auto end = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      pause();
      if (done()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : spins_(static_cast<unsigned>(threads) <= std::thread::hardware_concurrency()) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_.store(true);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::take_items(int thread) {
  for (int item = next_.fetch_add(1); item < items_; item = next_.fetch_add(1)) body_(context_, item, thread);
}

void ThreadPool::run_loop(int items, Body body, void* context) {
  bool asleep;
  {
    const std::lock_guard lock(mutex_);  // a worker that is about to sleep sees the round or is seen
    body_ = body;
    context_ = context;
    items_ = items;
    next_.store(0);
    busy_.store(static_cast<int>(workers_.size()));
    round_.fetch_add(1);
    asleep = sleepers_ > 0;
  }
  if (asleep) wake_.notify_all();
  take_items(0);
  const auto done = [this] { return busy_.load() == 0; };
  if (spin(spins_, done)) return;
  std::unique_lock lock(mutex_);
  waiting_.store(true);
  idle_.wait(lock, done);
  waiting_.store(false);
}

void ThreadPool::work(int thread) {
  std::uint64_t seen = 0;
  const auto due = [&] { return stop_.load() || round_.load() != seen; };
  for (;;) {
    if (!spin(spins_ && seen > 0, due)) {
      std::unique_lock lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, due);
      --sleepers_;
    }
    if (stop_.load()) return;
    seen = round_.load();
    take_items(thread);
    // Either the caller, who says that it waits before it looks, sees the last decrement, or is seen here.
    if (busy_.fetch_sub(1) == 1 && waiting_.load()) {
      const std::lock_guard lock(mutex_);
      idle_.notify_one();
    }
  }
}

}  // namespace innerkv
