// The addon's Cache class: makes sequences, and attends over several of them in one call.
#pragma once

#include <napi.h>

#include <memory>

#include "handles.h"

namespace innerkv {

class CacheObject : public Napi::ObjectWrap<CacheObject> {
 public:
  static Napi::Function define(Napi::Env env);
  /// (backend, options)
  explicit CacheObject(const Napi::CallbackInfo& info);
  ~CacheObject() override;

 private:
  Napi::Value sequence(const Napi::CallbackInfo& info);
  Napi::Value reader(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value plan(const Napi::CallbackInfo& info);
  Napi::Value append_batch(const Napi::CallbackInfo& info);
  Napi::Value attend_batch(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo& info);
  const std::shared_ptr<CacheHandle>& handle() const;
  void release(Napi::Env env);

  std::shared_ptr<CacheHandle> handle_;
};

}  // namespace innerkv
