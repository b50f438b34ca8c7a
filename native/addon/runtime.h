// A backend with its executor and its way back to JavaScript: shared by everything that was made from one
// createBackend().
#pragma once

#include <napi.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "../cpu/cpu_backend.h"
#include "executor.h"

namespace innerkv {

using AbortFlag = std::atomic<bool>;

/// How one call wants to be executed.
struct CallMode {
  bool sync = false;                   // the caller waits; otherwise the result is a promise
  std::shared_ptr<AbortFlag> aborted;  // may be null
  bool device = false;                 // it reads or writes memory of the backend that the caller holds
};

/// Reads (sync, abort flag or undefined) from the first two arguments of a callback.
CallMode read_mode(const Napi::CallbackInfo& info);

/// Throws Error{kAborted} when the flag is set.
void check_abort(const AbortFlag* aborted);

class Runtime : public std::enable_shared_from_this<Runtime> {
 public:
  using Run = std::function<void()>;  // on some thread; throws to fail
  using Finish =
      std::function<Napi::Value(Napi::Env)>;  // on the JavaScript thread, after a run that did not fail

  /// `cuda`: caches live on the first GPU, otherwise on the CPU. `stream`: of the caller's, see Backend.
  static std::shared_ptr<Runtime> create(Napi::Env env, bool cuda, std::optional<std::uint64_t> stream,
                                         int threads, const std::string& isa, int queue_limit);
  ~Runtime();

  /// Where caches live.
  const std::shared_ptr<Backend>& backend() const { return backend_; }
  /// This machine's own cores, whatever the backend is.
  const std::shared_ptr<CpuBackend>& cpu() const { return cpu_; }
  const Kernels& kernels() const { return cpu_->kernels(); }
  Executor& executor() { return executor_; }
  int pending() const { return pending_; }

  /// Runs a job now, or queues it and returns a promise. Throws when it is refused, or failed while the
  /// caller waited.
  Napi::Value dispatch(Napi::Env env, const CallMode& mode, Run run, Finish finish);

  /// No new work from now on; what is queued is still done and delivered, then the thread ends.
  void request_close() noexcept;

 private:
  class Call;
  Runtime(Napi::Env env, bool cuda, std::optional<std::uint64_t> stream, int threads, const std::string& isa,
          int queue_limit);
  void connect();
  void notify() noexcept;
  void deliver(Napi::Env env);
  void close() noexcept;
  static void on_deliver(napi_env env, napi_value callback, void* context, void* data);
  static void on_cleanup(void* context);

  Napi::Env env_;
  std::shared_ptr<CpuBackend> cpu_;
  std::shared_ptr<Backend> backend_;
  int queue_limit_;
  int pending_ = 0;  // asynchronous calls whose promise is not settled
  bool closing_ = false, closed_ = false;
  std::atomic<bool> notified_{false};
  napi_threadsafe_function channel_ = nullptr;
  Executor executor_;
};

}  // namespace innerkv
