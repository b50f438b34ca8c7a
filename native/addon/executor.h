// The one place where a backend computes: jobs of one queue, one after another.
//
// Asynchronous jobs run on a dispatcher thread that exists from the first one on; never on libuv's pool,
// which files and name lookups share. A job that somebody waits for runs at once in the caller's thread when
// nothing is queued. All but stop() may be called from the JavaScript thread only, discard() from anywhere.
#pragma once

#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

namespace innerkv {

class Job {
 public:
  virtual ~Job() = default;
  virtual void execute() noexcept = 0;

 private:
  friend class Executor;
  bool waited_for_ = false, done_ = false;
};

using Jobs = std::list<std::shared_ptr<Job>>;

/// Something whose destructor touches what jobs touch, and so has to run between two of them.
struct Garbage {
  virtual ~Garbage() = default;
  Garbage* next = nullptr;
};

class Executor {
 public:
  /// `notify(context)` is called from the dispatcher thread after each finished asynchronous job.
  Executor(void (*notify)(void*), void* context) : notify_(notify), context_(context) {}
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void submit(std::shared_ptr<Job> job);
  /// Returns when the job is done.
  void run(Job& job);
  Jobs take_done();

  /// Calls `look` between two jobs: waits for the running one, not for the queue.
  template <class Look>
  auto between(Look&& look) {
    const std::lock_guard running(running_);
    return look();
  }

  /// Destroys it between two jobs: now if none is running, soon otherwise. Never allocates, never waits.
  void discard(Garbage* garbage) noexcept;

  /// Ends the thread after the running job and returns the jobs that did not start.
  Jobs stop() noexcept;

 private:
  void dispatch();
  void execute(Job& job);
  void collect() noexcept;

  void (*notify_)(void*);
  void* context_;
  std::recursive_mutex
      running_;       // held while a job runs; recursive because a job may drop the last owner of garbage
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, finished_;
  Jobs queue_, done_;  // lists: the dispatcher thread moves nodes and never allocates
  Garbage* garbage_ = nullptr;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace innerkv
