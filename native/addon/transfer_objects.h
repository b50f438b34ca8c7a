// The addon's Writer and Reader classes: a sequence as a stream of bytes, and back.
#pragma once

#include <napi.h>

#include <memory>

#include "handles.h"

namespace innerkv {

class WriterObject : public Napi::ObjectWrap<WriterObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit WriterObject(const Napi::CallbackInfo& info);
  static Napi::Value wrap(Napi::Env env, std::shared_ptr<WriterHandle> handle);

 private:
  Napi::Value next(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo&) { handle_.reset(); }
  std::shared_ptr<WriterHandle> handle_;
};

class ReaderObject : public Napi::ObjectWrap<ReaderObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit ReaderObject(const Napi::CallbackInfo& info);
  static Napi::Value create(Napi::Env env, const std::shared_ptr<CacheHandle>& cache);

 private:
  Napi::Value feed(const Napi::CallbackInfo& info);
  Napi::Value finish(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo&) { handle_.reset(); }
  std::shared_ptr<ReaderHandle> handle_;
};

}  // namespace innerkv
