#include "runtime.h"

#include <optional>
#include <utility>

#include "../core/error.h"
#include "../cuda/factory.h"
#include "abort_object.h"
#include "failure.h"

namespace innerkv {

CallMode read_mode(const Napi::CallbackInfo& info) {
  return {info[0].ToBoolean().Value(), AbortObject::read(info[1])};
}

void check_abort(const AbortFlag* aborted) {
  if (aborted && aborted->load()) throw Error(ErrorCode::kAborted, "The call was aborted.");
}

class Runtime::Call final : public Job {
 public:
  /// `device`: the backend whose memory, held by the caller, the call touches; or null.
  Call(std::shared_ptr<AbortFlag> aborted, Backend* device, Run run, Finish finish)
      : aborted_(std::move(aborted)), device_(device), run_(std::move(run)), finish_(std::move(finish)) {}

  void execute() noexcept override {
    attempt([this] {
      check_abort(aborted_.get());
      if (device_) device_->follow_caller();
      run_();
    });
    if (device_) attempt([this] { device_->settle(); });  // after a failure too: kernels may be under way
  }

  Napi::Value result(Napi::Env env) {
    if (failure_) std::rethrow_exception(failure_);
    return finish_(env);
  }

  Napi::Promise promise(Napi::Env env, std::shared_ptr<Runtime> runtime) {
    runtime_ = std::move(runtime);
    deferred_.emplace(env);
    return deferred_->Promise();
  }

  void settle(Napi::Env env) noexcept {
    const Napi::HandleScope scope(env);
    try {
      Napi::Value value;
      try {
        value = result(env);
      } catch (const Napi::Error& error) {
        deferred_->Reject(error.Value());
        return;
      } catch (...) {
        deferred_->Reject(to_error(env, describe(std::current_exception())));
        return;
      }
      deferred_->Resolve(value);
    } catch (...) {  // the environment is going down: there is nobody to tell
    }
  }

 private:
  /// The first failure counts.
  template <class Body>
  void attempt(Body&& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
    }
  }

  std::shared_ptr<AbortFlag> aborted_;
  Backend* device_;  // the runtime outlives the call
  Run run_;
  Finish finish_;
  std::exception_ptr failure_;
  std::shared_ptr<Runtime> runtime_;  // alive until every promise is settled
  std::optional<Napi::Promise::Deferred> deferred_;
};

namespace {
std::shared_ptr<Backend> cuda_backend([[maybe_unused]] std::optional<std::uint64_t> stream) {
#ifdef INNERKV_HAS_CUDA
  return make_cuda_backend(stream);
#else
  throw Error(ErrorCode::kUnsupported, "This build has no CUDA code.");
#endif
}
}  // namespace

Runtime::Runtime(Napi::Env env, bool cuda, std::optional<std::uint64_t> stream, int threads,
                 const std::string& isa, int queue_limit)
    : env_(env),
      cpu_(std::make_shared<CpuBackend>(threads, isa.empty() ? nullptr : isa.c_str())),
      backend_(cuda ? cuda_backend(stream) : cpu_),
      queue_limit_(queue_limit),
      executor_([](void* self) { static_cast<Runtime*>(self)->notify(); }, this) {}

Runtime::~Runtime() { close(); }

std::shared_ptr<Runtime> Runtime::create(Napi::Env env, bool cuda, std::optional<std::uint64_t> stream,
                                         int threads, const std::string& isa, int queue_limit) {
  const std::shared_ptr<Runtime> runtime(new Runtime(env, cuda, stream, threads, isa, queue_limit));
  runtime->connect();
  return runtime;
}

void Runtime::connect() {
  const auto check = [this](napi_status status) {
    if (status != napi_ok) throw Napi::Error::New(env_);
  };
  check(napi_create_threadsafe_function(env_, nullptr, nullptr, Napi::String::New(env_, "innerkv"), 0, 1,
                                        nullptr, nullptr, this, on_deliver, &channel_));
  check(napi_unref_threadsafe_function(env_, channel_));
  // Added after the channel, so it runs before the channel goes: hooks run in reverse order.
  check(napi_add_env_cleanup_hook(env_, on_cleanup, this));
}

Napi::Value Runtime::dispatch(Napi::Env env, const CallMode& mode, Run run, Finish finish) {
  if (closing_) throw Error(ErrorCode::kDisposed, "The backend was disposed.");
  if (mode.sync) {
    Call call(mode.aborted, mode.device ? backend_.get() : nullptr, std::move(run), std::move(finish));
    executor_.run(call);
    return call.result(env);
  }
  if (pending_ >= queue_limit_)
    throw Refusal({"ERR_INNERKV_QUEUE_FULL",
                   "The backend's queue is full: " + std::to_string(pending_) +
                       " calls wait. Await earlier calls, or raise queueLimit.",
                   {{"queueLimit", static_cast<double>(queue_limit_)}}});
  auto call = std::make_shared<Call>(mode.aborted, mode.device ? backend_.get() : nullptr, std::move(run),
                                     std::move(finish));
  const Napi::Promise promise = call->promise(env, shared_from_this());
  executor_.submit(std::move(call));
  if (pending_++ == 0) napi_ref_threadsafe_function(env_, channel_);
  return promise;
}

/// Dispatcher thread. One message is under way at most; it delivers all that is done by then.
void Runtime::notify() noexcept {
  if (!notified_.exchange(true)) napi_call_threadsafe_function(channel_, nullptr, napi_tsfn_nonblocking);
}

void Runtime::on_deliver(napi_env env, napi_value, void* context, void*) {
  if (env == nullptr) return;  // the environment is going down
  const std::shared_ptr<Runtime> self = static_cast<Runtime*>(context)->shared_from_this();
  self->notified_.store(false);
  self->deliver(env);
}

void Runtime::deliver(Napi::Env env) {
  Jobs jobs = executor_.take_done();
  if (jobs.empty()) return;
  for (const auto& job : jobs) static_cast<Call&>(*job).settle(env);
  pending_ -= static_cast<int>(jobs.size());
  if (pending_ > 0) return;
  napi_unref_threadsafe_function(env_, channel_);
  if (closing_) close();
}

void Runtime::request_close() noexcept {
  closing_ = true;
  if (pending_ == 0) close();
}

void Runtime::close() noexcept {
  if (std::exchange(closed_, true)) return;
  closing_ = true;
  executor_.stop();
  if (!channel_) return;
  napi_remove_env_cleanup_hook(env_, on_cleanup, this);
  napi_release_threadsafe_function(channel_, napi_tsfn_abort);
}

/// The environment ends: nobody can receive results, so queued calls are dropped and only the running one is
/// finished.
void Runtime::on_cleanup(void* context) {
  const std::shared_ptr<Runtime> self = static_cast<Runtime*>(context)->shared_from_this();
  self->closing_ = self->closed_ = true;
  const Napi::HandleScope scope(self->env_);
  self->executor_.stop().clear();
  self->executor_.take_done().clear();
}

}  // namespace innerkv
