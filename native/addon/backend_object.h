// The addon's Backend class: threads, instruction set, dense attention.
#pragma once

#include <napi.h>

#include <memory>

#include "runtime.h"

namespace innerkv {

class BackendObject : public Napi::ObjectWrap<BackendObject> {
 public:
  static Napi::Function define(Napi::Env env);
  /// (threads, isa or '', queueLimit, device, stream: bigint or undefined)
  explicit BackendObject(const Napi::CallbackInfo& info);
  ~BackendObject() override;

  /// The runtime of a Backend object; throws Error{kDisposed} after dispose().
  static std::shared_ptr<Runtime> runtime_of(const Napi::Value& value);

 private:
  Napi::Value info(const Napi::CallbackInfo& info);
  Napi::Value pending(const Napi::CallbackInfo& info);
  Napi::Value drain(const Napi::CallbackInfo& info);
  Napi::Value attend_dense(const Napi::CallbackInfo& info);
  Napi::Value tensor(const Napi::CallbackInfo& info);
  Napi::Value borrow(const Napi::CallbackInfo& info);
  Napi::Value import(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo& info);
  std::shared_ptr<Runtime> runtime() const;

  std::shared_ptr<Runtime> runtime_;
};

/// { compiled, driverVersion, runtimeVersion, error, devices }
Napi::Value write_cuda_probe(const Napi::CallbackInfo& info);

}  // namespace innerkv
