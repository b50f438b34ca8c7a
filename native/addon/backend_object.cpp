#include "backend_object.h"

#include <optional>
#include <utility>

#include "../cuda/probe.h"
#include "config_reader.h"
#include "failure.h"
#include "instance.h"
#include "tensor_object.h"
#include "tensors.h"

namespace innerkv {

Napi::Function BackendObject::define(Napi::Env env) {
  return DefineClass(
      env, "Backend",
      {InstanceMethod<&BackendObject::info>("info"), InstanceMethod<&BackendObject::pending>("pending"),
       InstanceMethod<&BackendObject::drain>("drain"),
       InstanceMethod<&BackendObject::attend_dense>("attendDense"),
       InstanceMethod<&BackendObject::tensor>("tensor"), InstanceMethod<&BackendObject::borrow>("borrow"),
       InstanceMethod<&BackendObject::import>("import"), InstanceMethod<&BackendObject::dispose>("dispose")});
}

BackendObject::BackendObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<BackendObject>(info) {
  guarded(info.Env(), [&] {
    const std::string device = info[3].ToString().Utf8Value();
    if (device != "cpu" && device != "cuda") refuse("The device must be 'cpu' or 'cuda'.");
    const int threads = to_int(info[0], "threads"), queue_limit = to_int(info[2], "queueLimit");
    if (threads < 1 || threads > 1024) refuse("threads must lie between 1 and 1024.");
    if (queue_limit < 1) refuse("queueLimit must be positive.");
    std::optional<std::uint64_t> stream;
    if (!info[4].IsUndefined()) {
      bool lossless = false;
      if (device != "cuda" || !info[4].IsBigInt()) refuse("stream must be a bigint, for a GPU.");
      stream = info[4].As<Napi::BigInt>().Uint64Value(&lossless);
      if (!lossless) refuse("stream must lie between 0 and 2^64 - 1.");
    }
    runtime_ = Runtime::create(info.Env(), device == "cuda", stream, threads, info[1].ToString().Utf8Value(),
                               queue_limit);
  });
}

BackendObject::~BackendObject() {
  if (runtime_) runtime_->request_close();
}

std::shared_ptr<Runtime> BackendObject::runtime() const {
  if (!runtime_) throw Error(ErrorCode::kDisposed, "The backend was disposed.");
  return runtime_;
}

std::shared_ptr<Runtime> BackendObject::runtime_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Instance::of(value.Env()).backend.Value()))
    refuse("Expected a backend.");
  return Unwrap(value.As<Napi::Object>())->runtime();
}

Napi::Value BackendObject::info(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto runtime = this->runtime();
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("isa", runtime->cpu()->isa());
    result.Set("threads", runtime->cpu()->threads());
    Napi::Array isas = Napi::Array::New(info.Env());
    for (const Kernels* const* table = available_kernels(); *table; ++table)
      isas.Set(isas.Length(), (*table)->isa);
    result.Set("availableIsas", isas);
    return result;
  });
}

Napi::Value BackendObject::pending(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), runtime_ ? runtime_->pending() : 0);
}

/// A promise that settles after everything queued before it.
Napi::Value BackendObject::drain(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return runtime()->dispatch(info.Env(), {}, [] {}, [](Napi::Env env) { return env.Undefined(); });
  });
}

void BackendObject::dispose(const Napi::CallbackInfo&) {
  if (runtime_) std::exchange(runtime_, nullptr)->request_close();
}

Napi::Value BackendObject::tensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return TensorObject::create(info, runtime()); });
}

Napi::Value BackendObject::borrow(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return TensorObject::borrow(info, runtime()); });
}

Napi::Value BackendObject::import(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return TensorObject::import(info, runtime()); });
}

namespace {

struct DenseCall {
  DenseRequest request;
  Numbers<float> k, v, q;
  Numbers<std::uint16_t> half_k, half_v;
  Output out, lse, logits;
};

std::size_t product(std::initializer_list<int> sizes) {
  std::size_t result = 1;
  for (const int size : sizes) result *= static_cast<std::size_t>(size);
  return result;
}

}  // namespace

/// (sync, abort, { k, v, q, kvDtype, qDtype, tokens, qTokens, ..., out, lse, logits })
Napi::Value BackendObject::attend_dense(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto runtime = this->runtime();
    const CallMode mode = read_mode(info);
    const Fields fields(info[2], "options of denseAttention");
    const auto call = std::make_shared<DenseCall>();
    DenseRequest& r = call->request;
    r.tokens = fields.integer("tokens");
    r.q_tokens = fields.integer("qTokens");
    r.query_heads = fields.integer("queryHeads");
    r.kv_heads = fields.integer("kvHeads");
    r.head_dim = fields.integer("headDim");
    r.scale = static_cast<float>(fields.number("softmaxScale"));
    r.softcap = static_cast<float>(fields.number("softcap"));
    r.sliding_window = fields.integer("slidingWindow");
    r.causal = fields.flag("causal");
    if (!is_head_dim(r.head_dim))
      throw Error(ErrorCode::kUnsupported, "headDim must be one of 64, 80, 96, 128, 256.");
    if (r.kv_heads < 1 || r.query_heads < r.kv_heads || r.query_heads % r.kv_heads != 0)
      refuse("queryHeads must be a multiple of kvHeads.");
    if (r.tokens < 1 || r.q_tokens < 1) refuse("Dense attention needs at least one token and one query.");
    if (r.causal && r.q_tokens > r.tokens)
      refuse("Causal attention needs at least as many tokens as queries.");

    const Kernels& kernels = runtime->kernels();
    const Tensor k = read_tensor(fields.get("k"), fields.get("kvDtype")),
                 v = read_tensor(fields.get("v"), fields.get("kvDtype"));
    const Tensor q = read_tensor(fields.get("q"), fields.get("qDtype"));
    const std::size_t kv_count = product({r.kv_heads, r.tokens, r.head_dim}),
                      q_count = product({r.q_tokens, r.query_heads, r.head_dim});
    if (k.count != kv_count || v.count != kv_count || q.count != q_count)
      refuse("k, v or q has the wrong length.");
    if (k.dtype != v.dtype) refuse("k and v must have the same type.");
    const TensorName k_name{"k", r.kv_heads, r.head_dim, r.tokens},
        v_name{"v", r.kv_heads, r.head_dim, r.tokens};
    r.half = k.dtype == Dtype::kF16;
    // A pass over k and v just to find NaN would take as long as attention itself. Logits are written on the
    // way.
    if (mode.sync && k.dtype != Dtype::kBf16 && !fields.has("logits")) {
      r.k = k.data;
      r.v = v.data;
      r.suspect = [=] {
        check_finite(k, k_name);
        check_finite(v, v_name);
      };
    } else if (r.half) {
      call->half_k = to_halves(kernels, k, k_name, mode.sync);
      call->half_v = to_halves(kernels, v, v_name, mode.sync);
      r.k = call->half_k.data;
      r.v = call->half_v.data;
    } else {
      call->k = to_floats(kernels, k, k_name, mode.sync);
      call->v = to_floats(kernels, v, v_name, mode.sync);
      r.k = call->k.data;
      r.v = call->v.data;
    }
    call->q = to_floats(kernels, q, {"q", r.query_heads, r.head_dim}, mode.sync);
    r.q = call->q.data;
    call->out = Output(fields.get("out"), q_count, mode.sync, "out");
    r.out = call->out.data();
    const std::size_t rows = product({r.q_tokens, r.query_heads});
    if (fields.has("lse")) call->lse = Output(fields.get("lse"), rows, mode.sync, "lse");
    if (fields.has("logits"))
      call->logits =
          Output(fields.get("logits"), rows * static_cast<std::size_t>(r.tokens), mode.sync, "logits");
    r.lse = call->lse.data();
    r.logits = call->logits.data();
    return runtime->dispatch(
        info.Env(), mode,
        [runtime = runtime.get(), call] { runtime->backend()->attend_dense(call->request); },
        [call](Napi::Env env) {
          for (const Output* output : {&call->out, &call->lse, &call->logits}) output->check();
          for (const Output* output : {&call->out, &call->lse, &call->logits}) output->deliver();
          return env.Undefined();
        });
  });
}

Napi::Value write_cuda_probe(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const CudaProbe probe = probe_cuda();
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("compiled", probe.compiled);
    result.Set("driverVersion", probe.driver_version);
    result.Set("runtimeVersion", probe.runtime_version);
    result.Set("error", probe.error_name.empty() ? info.Env().Null()
                                                 : Napi::String::New(info.Env(), probe.error_name));
    Napi::Array devices = Napi::Array::New(info.Env());
    for (const CudaDevice& device : probe.devices) {
      Napi::Object row = Napi::Object::New(info.Env());
      row.Set("name", device.name);
      row.Set("capability",
              std::to_string(device.capability_major) + "." + std::to_string(device.capability_minor));
      row.Set("totalBytes", static_cast<double>(device.total_bytes));
      row.Set("multiprocessors", device.sm_count);
      devices.Set(devices.Length(), row);
    }
    result.Set("devices", devices);
    return result;
  });
}

}  // namespace innerkv
