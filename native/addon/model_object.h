// The addon's Model and Moments classes: forward passes over sequences.
#pragma once

#include <napi.h>

#include <memory>

#include "../model/runner.h"
#include "handles.h"

namespace innerkv {

/// A model lives and is used between jobs of its executor, like a cache.
struct RunnerHandle final : Garbage {
  std::shared_ptr<Runtime> runtime;
  std::unique_ptr<Runner> core;
};

struct MomentsHandle final : Garbage {
  explicit MomentsHandle(Moments made) : core(std::move(made)) {}
  Moments core;
};

class ModelObject : public Napi::ObjectWrap<ModelObject> {
 public:
  static Napi::Function define(Napi::Env env);
  /// (backend, options, tensors)
  explicit ModelObject(const Napi::CallbackInfo& info);

 private:
  Napi::Value info(const Napi::CallbackInfo& info);
  Napi::Value forward(const Napi::CallbackInfo& info);
  Napi::Value moments(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo&) { handle_.reset(); }
  const std::shared_ptr<RunnerHandle>& handle() const;

  std::shared_ptr<RunnerHandle> handle_;
};

class MomentsObject : public Napi::ObjectWrap<MomentsObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit MomentsObject(const Napi::CallbackInfo& info);
  static std::shared_ptr<MomentsHandle> handle_of(const Napi::Value& value);

 private:
  Napi::Value read(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo&) { handle_.reset(); }

  std::shared_ptr<MomentsHandle> handle_;
  std::shared_ptr<Runtime> runtime_;
  friend class ModelObject;
};

}  // namespace innerkv
