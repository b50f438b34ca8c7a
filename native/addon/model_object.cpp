#include "model_object.h"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../cuda/factory.h"
#include "../model/cpu_model.h"
#include "backend_object.h"
#include "config_reader.h"
#include "failure.h"
#include "instance.h"
#include "sequence_object.h"
#include "tensors.h"

namespace innerkv {

namespace {

std::int64_t to_size(double value, const char* name) {
  if (!(value >= 0 && value <= 9007199254740992.0 && value == std::floor(value)))
    refuse(std::string(name) + " of a tensor must be an integer from 0 to 2^53.");
  return static_cast<std::int64_t>(value);
}

TensorType type_named(const std::string& name) {
  for (std::size_t i = 0; i < kTensorTypes.size(); ++i)
    if (name == kTensorTypes[i].name) return static_cast<TensorType>(i);
  throw Error(ErrorCode::kUnsupported, "There are no kernels for weights of type '" + name + "'.");
}

ModelConfig read_model(const Napi::Value& value) {
  const Fields fields(value, "model options");
  ModelConfig config;
  config.layers = fields.integer("layers");
  config.hidden = fields.integer("hidden");
  config.intermediate = fields.integer("intermediate");
  config.query_heads = fields.integer("queryHeads");
  config.kv_heads = fields.integer("kvHeads");
  config.head_dim = fields.integer("headDim");
  config.vocabulary = fields.integer("vocabulary");
  config.rms_epsilon = static_cast<float>(fields.number("rmsEpsilon"));
  config.theta = fields.doubles("theta");
  config.half_layout = fields.flag("halfLayout");
  config.bare_norms = fields.flag("bareNorms");
  return config;
}

std::vector<TensorPlace> read_places(const Napi::Value& value) {
  if (!value.IsArray()) refuse("tensors must be an array.");
  const Napi::Array array = value.As<Napi::Array>();
  std::vector<TensorPlace> places;
  for (std::uint32_t i = 0; i < array.Length(); ++i) {
    const Fields fields(array.Get(i), "tensor");
    TensorPlace place{fields.text("name"), fields.text("path"), type_named(fields.text("type")), {}, 0, 0, 1};
    const Napi::Array shape = fields.list("shape");
    for (std::uint32_t j = 0; j < shape.Length(); ++j) {
      const Napi::Value size = shape.Get(j);
      place.shape.push_back(to_size(size.IsNumber() ? size.As<Napi::Number>().DoubleValue() : -1, "shape"));
    }
    place.offset = to_size(fields.number("offset"), "offset");
    place.bytes = to_size(fields.number("bytes"), "bytes");
    place.scale = static_cast<float>(fields.number("scale"));
    places.push_back(std::move(place));
  }
  return places;
}

std::vector<std::int32_t> read_tokens(const Napi::Value& value, const char* name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array)
    refuse(std::string(name) + " must be an Int32Array.");
  const Napi::Int32Array array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

/// Where the runtime's caches live.
std::unique_ptr<ModelDevice> make_device(Runtime& runtime, const std::shared_ptr<const Model>& model) {
#ifdef INNERKV_HAS_CUDA
  if (runtime.backend() != runtime.cpu())
    return runtime.executor().between([&] { return make_cuda_model(model); });
#endif
  return std::make_unique<CpuModel>(model, runtime.cpu());
}

struct Item {
  std::shared_ptr<SequenceHandle> sequence;
  std::vector<std::int32_t> tokens, targets;
  Output logits, nll;
  int logit_rows = 0;
};

struct ForwardCall {
  std::shared_ptr<RunnerHandle> runner;
  std::shared_ptr<MomentsHandle> moments;
  std::shared_ptr<AbortFlag> aborted;
  std::vector<Item> items;
  ForwardOptions options;
  PassTimes times;

  void run() {
    std::vector<ForwardItem> batch;
    for (Item& item : items)
      batch.push_back({item.sequence->core.get(), item.tokens, item.logits.data(), item.logit_rows,
                       item.targets, item.nll.data()});
    runner->core->forward(batch, options, moments ? &moments->core : nullptr, aborted.get());
    times = runner->core->times();
    for (Item& item : items) item.sequence->publish();
  }

  Napi::Value deliver(Napi::Env env) const {
    for (const Item& item : items)
      for (const Output* output : {&item.logits, &item.nll}) output->check();
    for (const Item& item : items)
      for (const Output* output : {&item.logits, &item.nll}) output->deliver();
    Napi::Object result = Napi::Object::New(env);
    result.Set("all", times.all);
    result.Set("products", times.products);
    result.Set("append", times.append);
    result.Set("attend", times.attend);
    return result;
  }
};

}  // namespace

Napi::Function ModelObject::define(Napi::Env env) {
  return DefineClass(
      env, "Model",
      {InstanceMethod<&ModelObject::info>("info"), InstanceMethod<&ModelObject::forward>("forward"),
       InstanceMethod<&ModelObject::moments>("moments"), InstanceMethod<&ModelObject::dispose>("dispose")});
}

ModelObject::ModelObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ModelObject>(info) {
  guarded(info.Env(), [&] {
    const auto runtime = BackendObject::runtime_of(info[0]);
    auto made = std::make_unique<RunnerHandle>();
    made->runtime = runtime;
    auto model = std::make_shared<const Model>(read_model(info[1]), read_places(info[2]));
    made->core = std::make_unique<Runner>(model, make_device(*runtime, model), runtime->cpu()->pool());
    handle_ = hold(runtime, std::move(made));
  });
}

const std::shared_ptr<RunnerHandle>& ModelObject::handle() const {
  if (!handle_) throw Error(ErrorCode::kDisposed, "The model was disposed.");
  return handle_;
}

Napi::Value ModelObject::info(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const Model& model = handle()->core->model();
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("cacheHeadDim", model.config().cache_head_dim());
    result.Set("bytesPerToken", static_cast<double>(model.bytes_per_token()));
    result.Set("products", handle()->core->device().products());
    return result;
  });
}

/// (sync, abort, items, { chunk, step, byteActivations }, moments or undefined) => PassTimes
Napi::Value ModelObject::forward(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const CallMode mode = read_mode(info);
    const auto call = std::make_shared<ForwardCall>();
    call->runner = handle();
    call->aborted = mode.aborted;
    const Fields options(info[3], "options of a forward pass");
    call->options = {options.integer("chunk"), options.integer("step"), options.flag("byteActivations")};
    const Model& model = handle()->core->model();
    if (!info[4].IsUndefined()) {
      call->moments = MomentsObject::handle_of(info[4]);
      const Moments& moments = call->moments->core;
      const ModelConfig& config = model.config();
      if (moments.layers != config.layers || moments.query_heads != config.query_heads ||
          moments.kv_heads != config.kv_heads || moments.head_dim != config.head_dim)
        refuse("The moments belong to a model of another shape.");
    }
    if (!info[2].IsArray() || info[2].As<Napi::Array>().Length() == 0)
      refuse("items must be an array with at least one item.");
    const Napi::Array items = info[2].As<Napi::Array>();
    for (std::uint32_t i = 0; i < items.Length(); ++i) {
      const Fields fields(items.Get(i), "item of a forward pass");
      Item item;
      item.sequence = SequenceObject::handle_of(fields.get("sequence"));
      if (item.sequence->cache->runtime != handle()->runtime)
        refuse("The sequence belongs to another backend.");
      item.tokens = read_tokens(fields.get("tokens"), "tokens");
      item.logit_rows = fields.integer("logitRows");
      if (item.logit_rows < 0 || static_cast<std::size_t>(item.logit_rows) > item.tokens.size())
        refuse("logitRows must lie between 0 and the number of tokens.");
      if (item.logit_rows > 0)
        item.logits = Output(
            fields.get("logits"),
            static_cast<std::size_t>(item.logit_rows) * static_cast<std::size_t>(model.config().vocabulary),
            mode.sync, "logits");
      if (fields.has("targets")) {
        item.targets = read_tokens(fields.get("targets"), "targets");
        item.nll = Output(fields.get("nll"), item.targets.size(), mode.sync, "nll");
      }
      call->items.push_back(std::move(item));
    }
    return dispatch(
        info.Env(), mode, call->items[0].sequence->cache, [call] { call->run(); },
        [call](Napi::Env env) { return call->deliver(env); });
  });
}

/// (skip) => Moments
Napi::Value ModelObject::moments(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int skip = to_int(info[0], "skip");
    if (skip < 0) refuse("skip must not be negative.");
    const ModelConfig& config = handle()->core->model().config();
    auto made = hold(handle()->runtime,
                     std::make_unique<MomentsHandle>(
                         Moments(config.layers, config.query_heads, config.kv_heads, config.head_dim, skip)));
    const Napi::Object object =
        Instance::of(info.Env())
            .moments.New({Napi::External<std::shared_ptr<MomentsHandle>>::New(info.Env(), &made)});
    MomentsObject::Unwrap(object)->runtime_ = handle()->runtime;
    return object;
  });
}

Napi::Function MomentsObject::define(Napi::Env env) {
  return DefineClass(
      env, "Moments",
      {InstanceMethod<&MomentsObject::read>("read"), InstanceMethod<&MomentsObject::dispose>("dispose")});
}

MomentsObject::MomentsObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<MomentsObject>(info) {
  guarded(info.Env(), [&] {
    if (!info[0].IsExternal()) refuse("Moments are made by a model.");
    handle_ = *info[0].As<Napi::External<std::shared_ptr<MomentsHandle>>>().Data();
  });
}

std::shared_ptr<MomentsHandle> MomentsObject::handle_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Instance::of(value.Env()).moments.Value()))
    refuse("Expected moments.");
  const auto handle = Unwrap(value.As<Napi::Object>())->handle_;
  if (!handle) throw Error(ErrorCode::kDisposed, "The moments were disposed.");
  return handle;
}

/// (sync, abort) => { tokens, keySum, keySquare, querySquare }: sums over tokens, [layers][kvHeads] and then
/// [D], [D][D], [D][D]; querySquare over the query heads of a KV head too.
Napi::Value MomentsObject::read(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto handle = handle_of(info.This());
    const auto copy = std::make_shared<std::unique_ptr<Moments>>();
    return runtime_->dispatch(
        info.Env(), read_mode(info), [handle, copy] { *copy = std::make_unique<Moments>(handle->core); },
        [copy](Napi::Env env) {
          const Moments& moments = **copy;
          Napi::Object result = Napi::Object::New(env);
          const auto put = [&](const char* name, const std::vector<double>& values) {
            Napi::Float64Array array = Napi::Float64Array::New(env, values.size());
            std::memcpy(array.Data(), values.data(), sizeof(double) * values.size());
            result.Set(name, array);
          };
          result.Set("tokens", static_cast<double>(moments.tokens[0]));
          result.Set("queryTokens", static_cast<double>(moments.query_tokens[0]));
          put("keySum", moments.key_sum);
          put("keySquare", moments.key_square);
          put("querySquare", moments.query_square);
          return result;
        });
  });
}

}  // namespace innerkv
