#include "executor.h"

#include <utility>

namespace innerkv {

Executor::~Executor() {
  stop();
  collect();
}

void Executor::execute(Job& job) {
  const std::lock_guard running(running_);
  collect();
  job.execute();
}

void Executor::submit(std::shared_ptr<Job> job) {
  const std::lock_guard lock(mutex_);
  if (!thread_.joinable()) {
    stop_ = false;
    thread_ = std::thread([this] { dispatch(); });
  }
  queue_.push_back(std::move(job));
  wake_.notify_one();
}

void Executor::run(Job& job) {
  {
    std::unique_lock lock(mutex_);
    if (!queue_.empty() || busy_) {
      job.waited_for_ = true;
      queue_.push_back(std::shared_ptr<Job>(std::shared_ptr<Job>(), &job));  // owns nothing: the caller does
      wake_.notify_one();
      finished_.wait(lock, [&] { return job.done_; });
      return;
    }
  }
  execute(job);
}

void Executor::dispatch() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !queue_.empty() || garbage_; });
    if (stop_) return;
    if (queue_.empty()) {
      lock.unlock();
      {
        const std::lock_guard running(running_);
        collect();
      }
      lock.lock();
      continue;
    }
    Jobs current;
    current.splice(current.begin(), queue_, queue_.begin());
    Job& job = *current.front();
    busy_ = true;
    lock.unlock();
    execute(job);
    lock.lock();
    busy_ = false;
    if (job.waited_for_) {
      job.done_ = true;
      finished_.notify_all();
      continue;
    }
    done_.splice(done_.end(), current);
    lock.unlock();
    notify_(context_);
    lock.lock();
  }
}

Jobs Executor::take_done() {
  const std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

void Executor::discard(Garbage* garbage) noexcept {
  {
    const std::lock_guard lock(mutex_);
    garbage->next = garbage_;
    garbage_ = garbage;
  }
  if (running_.try_lock()) {
    collect();
    running_.unlock();
  } else {
    wake_.notify_one();
  }
}

void Executor::collect() noexcept {
  for (;;) {
    Garbage* garbage;
    {
      const std::lock_guard lock(mutex_);
      garbage = garbage_;
      if (!garbage) return;
      garbage_ = garbage->next;
    }
    delete garbage;
  }
}

Jobs Executor::stop() noexcept {
  Jobs dropped;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    dropped = std::exchange(queue_, {});
    wake_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  return dropped;
}

}  // namespace innerkv
