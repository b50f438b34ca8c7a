// Entry point: the addon translates between JavaScript and the core and decides nothing. Only lib/binding.ts
// loads it.
#include <napi.h>

#include <memory>

#include "../cuda/cublas.h"
#include "abort_object.h"
#include "backend_object.h"
#include "cache_object.h"
#include "config_reader.h"
#include "failure.h"
#include "instance.h"
#include "model_object.h"
#include "sequence_object.h"
#include "tensor_object.h"
#include "transfer_objects.h"

namespace innerkv {

namespace {

/// (factory: (code, message, details) => Error)
void set_error_factory(const Napi::CallbackInfo& info) {
  Instance::of(info.Env()).make_error = Napi::Persistent(info[0].As<Napi::Function>());
}

Napi::Value supported_specs(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return write_supported_specs(info.Env()); });
}

/// (options, tokens, sequences)
Napi::Value estimate_cache(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return write_estimate(info.Env(), read_config(info[0]), to_int(info[1], "tokens"),
                          to_int(info[2], "sequences"));
  });
}

Napi::Value cublas(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), gpu::cublas_version(gpu::find_cublas()));
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Instance);
  const auto define = [&](const char* name, Napi::FunctionReference Instance::* member,
                          Napi::Function constructor) {
    Instance::of(env).*member = Napi::Persistent(constructor);
    exports.Set(name, constructor);
  };
  define("AbortFlag", &Instance::abort_flag, AbortObject::define(env));
  define("Backend", &Instance::backend, BackendObject::define(env));
  define("Cache", &Instance::cache, CacheObject::define(env));
  define("Sequence", &Instance::sequence, SequenceObject::define(env));
  define("Writer", &Instance::writer, WriterObject::define(env));
  define("Reader", &Instance::reader, ReaderObject::define(env));
  define("Model", &Instance::model, ModelObject::define(env));
  define("Moments", &Instance::moments, MomentsObject::define(env));
  define("Tensor", &Instance::tensor, TensorObject::define(env));
  exports.Set("setErrorFactory", Napi::Function::New(env, set_error_factory));
  exports.Set("supportedSpecs", Napi::Function::New(env, supported_specs));
  exports.Set("estimate", Napi::Function::New(env, estimate_cache));
  exports.Set("probeCuda", Napi::Function::New(env, write_cuda_probe));
  exports.Set("cublasVersion", Napi::Function::New(env, cublas));
  exports.Set("formatVersion", static_cast<double>(kFormatVersion));
  exports.Set("pageTokens", kPageTokens);
  return exports;
}

}  // namespace

}  // namespace innerkv

static Napi::Object innerkv_init(Napi::Env env, Napi::Object exports) { return innerkv::init(env, exports); }

NODE_API_MODULE(NODE_GYP_MODULE_NAME, innerkv_init)
