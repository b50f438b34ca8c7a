// The addon's Sequence class: appends, edits, copies and inspects one sequence.
#pragma once

#include <napi.h>

#include <memory>

#include "handles.h"

namespace innerkv {

class SequenceObject : public Napi::ObjectWrap<SequenceObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit SequenceObject(const Napi::CallbackInfo& info);

  static Napi::Value wrap(Napi::Env env, std::shared_ptr<SequenceHandle> handle);
  /// The handle of a Sequence object; throws Error{kDisposed} after dispose().
  static std::shared_ptr<SequenceHandle> handle_of(const Napi::Value& value);

 private:
  Napi::Value fork(const Napi::CallbackInfo& info);
  Napi::Value truncate(const Napi::CallbackInfo& info);
  Napi::Value replace(const Napi::CallbackInfo& info);
  Napi::Value remove(const Napi::CallbackInfo& info);
  Napi::Value read_back(const Napi::CallbackInfo& info);
  Napi::Value writer(const Napi::CallbackInfo& info);
  Napi::Value length(const Napi::CallbackInfo& info);
  Napi::Value layer_state(const Napi::CallbackInfo& info);
  Napi::Value page(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo&) { handle_.reset(); }
  const std::shared_ptr<SequenceHandle>& handle() const;

  std::shared_ptr<SequenceHandle> handle_;
};

}  // namespace innerkv
