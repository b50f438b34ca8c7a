#include "abort_object.h"

#include "failure.h"
#include "instance.h"

namespace innerkv {

Napi::Function AbortObject::define(Napi::Env env) {
  return DefineClass(env, "AbortFlag", {InstanceMethod<&AbortObject::set>("set")});
}

std::shared_ptr<AbortFlag> AbortObject::read(const Napi::Value& value) {
  if (value.IsUndefined()) return nullptr;
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Instance::of(value.Env()).abort_flag.Value()))
    refuse("Expected an AbortFlag.");
  return Unwrap(value.As<Napi::Object>())->flag_;
}

}  // namespace innerkv
