#include "thread_pool.h"

namespace innerkv {

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::take_items(int thread) {
  for (int item = next_.fetch_add(1); item < items_; item = next_.fetch_add(1)) body_(context_, item, thread);
}

void ThreadPool::run_loop(int items, Body body, void* context) {
  {
    const std::lock_guard lock(mutex_);
    body_ = body;
    context_ = context;
    items_ = items;
    next_.store(0);
    busy_ = static_cast<int>(workers_.size());
    ++round_;
  }
  wake_.notify_all();
  take_items(0);
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return busy_ == 0; });
}

void ThreadPool::work(int thread) {
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || round_ != seen; });
    if (stop_) return;
    seen = round_;
    lock.unlock();
    take_items(thread);
    lock.lock();
    if (--busy_ == 0) idle_.notify_one();
  }
}

}  // namespace innerkv
