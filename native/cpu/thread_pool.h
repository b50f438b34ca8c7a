// A fixed set of threads that run the items of one loop at a time; the caller takes part.
//
// Not OpenMP: libgomp is missing from slim containers and its pool fights with Node's worker threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace innerkv {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls task(item, thread) for item = 0 ... items - 1, thread in [0, threads()). The task must not throw.
  template <class Task>
  void run(int items, Task&& task) {
    if (items <= 1 || workers_.empty()) {
      for (int item = 0; item < items; ++item) task(item, 0);
      return;
    }
    run_loop(
        items, [](void* context, int item, int thread) { (*static_cast<Task*>(context))(item, thread); },
        &task);
  }

 private:
  using Body = void (*)(void*, int, int);
  void run_loop(int items, Body body, void* context);
  void take_items(int thread);
  void work(int thread);

  const bool spins_;  // threads wait for the next loop for a while before they sleep
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> workers_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int items_ = 0, sleepers_ = 0;
  std::atomic<int> next_{0}, busy_{0};
  std::atomic<std::uint64_t> round_{0};
  std::atomic<bool> stop_{false}, waiting_{false};
};

}  // namespace innerkv
