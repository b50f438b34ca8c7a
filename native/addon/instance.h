// What one JavaScript environment (the main thread or a worker) holds; the addon has no other state.
#pragma once

#include <napi.h>

namespace innerkv {

struct Instance {
  Napi::FunctionReference make_error;  // (code, message, details) => KvError
  Napi::FunctionReference backend, cache, sequence, writer, reader, abort_flag, model, moments,
      tensor;  // constructors

  static Instance& of(Napi::Env env) { return *env.GetInstanceData<Instance>(); }
};

}  // namespace innerkv
