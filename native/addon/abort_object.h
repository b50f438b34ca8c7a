// The native half of an AbortSignal: a flag that JavaScript sets and running work reads.
#pragma once

#include <napi.h>

#include <memory>

#include "runtime.h"

namespace innerkv {

class AbortObject : public Napi::ObjectWrap<AbortObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit AbortObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<AbortObject>(info) {}

  /// The flag of an AbortFlag object, null for undefined.
  static std::shared_ptr<AbortFlag> read(const Napi::Value& value);

 private:
  void set(const Napi::CallbackInfo&) { flag_->store(true); }
  std::shared_ptr<AbortFlag> flag_ = std::make_shared<AbortFlag>(false);
};

}  // namespace innerkv
