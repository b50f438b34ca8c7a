#include "cache_object.h"

#include <utility>
#include <vector>

#include "backend_object.h"
#include "config_reader.h"
#include "failure.h"
#include "keys_and_values.h"
#include "sequence_object.h"
#include "transfer_objects.h"

namespace innerkv {

Napi::Function CacheObject::define(Napi::Env env) {
  return DefineClass(
      env, "Cache",
      {InstanceMethod<&CacheObject::sequence>("sequence"), InstanceMethod<&CacheObject::reader>("reader"),
       InstanceMethod<&CacheObject::stats>("stats"), InstanceMethod<&CacheObject::plan>("plan"),
       InstanceMethod<&CacheObject::append_batch>("appendBatch"),
       InstanceMethod<&CacheObject::attend_batch>("attendBatch"),
       InstanceMethod<&CacheObject::dispose>("dispose")});
}

CacheObject::CacheObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<CacheObject>(info) {
  guarded(info.Env(), [&] {
    const auto runtime = BackendObject::runtime_of(info[0]);
    auto made = std::make_unique<CacheHandle>();
    made->runtime = runtime;
    made->core = std::make_shared<Cache>(runtime->backend(), read_config(info[1]));
    handle_ = hold(runtime, std::move(made));
  });
}

CacheObject::~CacheObject() { release(Env()); }

void CacheObject::release(Napi::Env env) {
  if (!handle_) return;
  handle_->closed = true;
  handle_->account(env);
  handle_.reset();
}

void CacheObject::dispose(const Napi::CallbackInfo& info) { release(info.Env()); }

const std::shared_ptr<CacheHandle>& CacheObject::handle() const {
  if (!handle_) throw Error(ErrorCode::kDisposed, "The cache was disposed.");
  return handle_;
}

Napi::Value CacheObject::sequence(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return SequenceObject::wrap(info.Env(), hold_sequence(handle(), handle()->core->sequence()));
  });
}

Napi::Value CacheObject::reader(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return ReaderObject::create(info.Env(), handle()); });
}

Napi::Value CacheObject::stats(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("budget", static_cast<double>(handle()->core->pool().budget_bytes()));
    result.Set("used", static_cast<double>(handle()->used.load()));
    result.Set("reserved", static_cast<double>(handle()->reserved.load()));
    return result;
  });
}

Napi::Value CacheObject::plan(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    Cache& core = *handle()->core;
    return write_plan(info.Env(), core.config(), core.backend());
  });
}

namespace {

std::string name_of(std::uint32_t item, std::uint32_t items) {
  return items > 1 ? " of item " + std::to_string(item) : "";
}

struct AppendCall {
  struct Item {
    std::shared_ptr<SequenceHandle> sequence;
    KeysAndValues input;
  };
  std::shared_ptr<CacheHandle> cache;
  int layer = 0;
  std::vector<Item> items;

  void run() const {
    std::vector<AppendItem> batch;
    for (const auto& [sequence, input] : items)
      batch.push_back({sequence->core.get(), input.k(), input.v(), input.tokens()});
    innerkv::append_batch(*cache->core, layer, batch);
    for (const Item& item : items) item.sequence->publish(layer);
  }
};

}  // namespace

/// (sync, abort, layer, items)
Napi::Value CacheObject::append_batch(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    CallMode mode = read_mode(info);
    const auto call = std::make_shared<AppendCall>();
    call->cache = handle();
    call->layer = to_int(info[2], "layer");
    if (!info[3].IsArray()) refuse("items must be an array.");
    const Napi::Array items = info[3].As<Napi::Array>();
    const std::uint32_t count = items.Length();
    for (std::uint32_t i = 0; i < count; ++i) {
      const Fields fields(items.Get(i), "item of appendBatch");
      call->items.push_back({SequenceObject::handle_of(fields.get("sequence")),
                             KeysAndValues(*handle(), fields.get("k"), fields.get("v"), fields.get("dtype"),
                                           name_of(i, count), mode)});
    }
    return dispatch(info.Env(), mode, handle(), [call] { call->run(); });
  });
}

namespace {

struct AttendItem {
  std::shared_ptr<SequenceHandle> sequence;
  Numbers<float> q;
  int q_tokens = 0;
  std::string name;  // "" or " of item 3"
  Output out, lse, logits, mass;
  std::shared_ptr<TensorHandle> device_q, device_out, device_lse;

  TensorView queries() const { return device_q ? device_q->view() : TensorView(q.data); }
  static Target target(const std::shared_ptr<TensorHandle>& device, const Output& output) {
    return device ? Target::device(reinterpret_cast<float*>(device->memory)) : Target(output.data());
  }
};

struct AttendCall {
  std::shared_ptr<CacheHandle> cache;
  std::shared_ptr<AbortFlag> aborted;
  int layer = 0;
  bool causal = true;
  std::vector<AttendItem> items;

  void run() const {
    const std::size_t heads = static_cast<std::size_t>(cache->core->config().query_heads),
                      kv_heads = static_cast<std::size_t>(cache->core->config().kv_heads);
    std::vector<BatchItem> batch;
    for (const AttendItem& item : items) {
      check_attend(*item.sequence->core, layer, item.q_tokens, causal);
      const std::size_t tokens = static_cast<std::size_t>(item.sequence->core->tokens(layer)),
                        rows = static_cast<std::size_t>(item.q_tokens) * heads;
      const auto sized = [&](const Output& output, const char* what, const char* shape, std::size_t count) {
        if (output.data() && output.count() != count)
          refuse(what + item.name + " holds " + std::to_string(output.count()) + " numbers; " + shape +
                 " needs " + std::to_string(count) + ", with " + std::to_string(tokens) + " tokens.");
      };
      sized(item.logits, "logits", "[queryTokens, queryHeads, tokens]", rows * tokens);
      sized(item.mass, "mass", "[kvHeads, tokens]", kv_heads * tokens);
      batch.push_back({item.sequence->core.get(), item.queries(), item.target(item.device_out, item.out),
                       item.target(item.device_lse, item.lse), item.logits.data(), item.q_tokens,
                       item.mass.data()});
    }
    if (!innerkv::attend_batch(*cache->core, layer, batch, causal, aborted.get())) {
      throw Error(ErrorCode::kAborted, "The call was aborted.");
    }
  }

  void deliver() const {
    for (const AttendItem& item : items)
      for (const Output* output : {&item.out, &item.lse, &item.logits, &item.mass}) output->check();
    for (const AttendItem& item : items)
      for (const Output* output : {&item.out, &item.lse, &item.logits, &item.mass}) output->deliver();
  }
};

/// A tensor for results, or null when an array is given.
std::shared_ptr<TensorHandle> read_target(const Napi::Value& value, const std::shared_ptr<Runtime>& runtime,
                                          std::size_t count, const std::string& name) {
  auto tensor = TensorObject::read(value, runtime, name);
  if (tensor && tensor->dtype != Dtype::kF32) refuse(name + " must be float32.");
  if (tensor && tensor->count != count)
    refuse(name + " holds " + std::to_string(tensor->count) + " numbers instead of " + std::to_string(count) +
           ".");
  return tensor;
}

AttendItem read_item(const Napi::Value& value, const std::shared_ptr<Runtime>& runtime,
                     const CacheConfig& config, bool sync, std::string name) {
  const Fields fields(value, "item of attendBatch");
  AttendItem item;
  item.name = std::move(name);
  item.sequence = SequenceObject::handle_of(fields.get("sequence"));
  const Input q(fields.get("q"), fields.get("dtype"), runtime, "q" + item.name);
  const std::size_t row =
      static_cast<std::size_t>(config.query_heads) * static_cast<std::size_t>(config.head_dim);
  if (q.count() == 0 || q.count() % row != 0 || q.count() / row > 0x3fffffff)
    refuse("q has the wrong length.");
  item.q_tokens = static_cast<int>(q.count() / row);
  item.device_q = q.device;
  if (!q.device)
    item.q =
        to_floats(runtime->kernels(), q.array, {"q" + item.name, config.query_heads, config.head_dim}, sync);
  const Napi::Value out = fields.get("out"), lse = fields.get("lse");
  item.device_out = read_target(out, runtime, q.count(), "out" + item.name);
  if (!item.device_out) item.out = Output(out, q.count(), sync, "out" + item.name);
  const std::size_t rows = q.count() / static_cast<std::size_t>(config.head_dim);
  item.device_lse = read_target(lse, runtime, rows, "lse" + item.name);
  if (!item.device_lse && fields.has("lse")) item.lse = Output(lse, rows, sync, "lse" + item.name);
  // Their lengths are checked when the call runs: appends may be queued before it.
  const auto over_tokens = [&](const char* what) {
    if (!fields.has(what)) return Output();
    const Napi::Value array = fields.get(what);
    if (!array.IsTypedArray()) refuse(std::string(what) + " must be a Float32Array.");
    return Output(array, array.As<Napi::TypedArray>().ElementLength(), sync, what + item.name);
  };
  item.logits = over_tokens("logits");
  item.mass = over_tokens("mass");
  return item;
}

}  // namespace

/// (sync, abort, layer, items, causal)
Napi::Value CacheObject::attend_batch(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    CallMode mode = read_mode(info);
    const auto call = std::make_shared<AttendCall>();
    call->cache = handle();
    call->aborted = mode.aborted;
    call->layer = to_int(info[2], "layer");
    call->causal = info[4].ToBoolean().Value();
    if (!info[3].IsArray()) refuse("items must be an array.");
    const Napi::Array items = info[3].As<Napi::Array>();
    const std::uint32_t count = items.Length();
    for (std::uint32_t i = 0; i < count; ++i)
      call->items.push_back(
          read_item(items.Get(i), handle()->runtime, handle()->core->config(), mode.sync, name_of(i, count)));
    TouchedMemory touched;
    for (const AttendItem& item : call->items) {
      touched.reads(item.device_q.get(), "q" + item.name);
      touched.writes(item.device_out.get(), "out" + item.name);
      touched.writes(item.device_lse.get(), "lse" + item.name);
      mode.device |= item.device_q || item.device_out || item.device_lse;
    }
    touched.check();
    return dispatch(
        info.Env(), mode, handle(), [call] { call->run(); },
        [call](Napi::Env env) {
          call->deliver();
          return env.Undefined();
        });
  });
}

}  // namespace innerkv
