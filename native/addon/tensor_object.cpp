#include "tensor_object.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "failure.h"
#include "instance.h"

namespace innerkv {

namespace {

Dtype read_dtype(const Napi::Value& value) {
  const std::string name = value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
  if (name == "f32") return Dtype::kF32;
  if (name == "f16") return Dtype::kF16;
  if (name == "bf16") return Dtype::kBf16;
  refuse("dtype must be 'f32', 'f16' or 'bf16'.");
}

std::size_t read_count(const Napi::Value& value, const char* name) {
  const double count = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (!(count >= 0 && count <= 0x1p47 && count == std::floor(count)))
    refuse(std::string(name) + " must be an integer from 0 to 2^47.");
  return static_cast<std::size_t>(count);
}

std::size_t read_size(const Napi::Value& value) {
  const std::size_t count = read_count(value, "The number of elements");
  if (count == 0) refuse("A tensor holds at least one element.");
  return count;
}

/// The bytes of a typed array that holds the numbers of a tensor.
struct Array {
  std::uint8_t* data = nullptr;
  Array(const Napi::Value& value, Dtype dtype, std::size_t count, const char* name) {
    napi_typedarray_type type;
    std::size_t length = 0;
    void* first = nullptr;
    if (!value.IsTypedArray() ||
        napi_get_typedarray_info(value.Env(), value, &type, &length, &first, nullptr, nullptr) != napi_ok ||
        type != (dtype == Dtype::kF32 ? napi_float32_array : napi_uint16_array))
      refuse(std::string(name) + " must be a " + (dtype == Dtype::kF32 ? "Float32Array." : "Uint16Array."));
    if (length != count)
      refuse(std::string(name) + " holds " + std::to_string(length) + " numbers instead of " +
             std::to_string(count) + "; was its buffer transferred or resized?");
    data = static_cast<std::uint8_t*>(first);
  }
};

/// Numbers on their way to a call: the caller's own if he waits, else a copy.
struct Incoming {
  std::vector<std::uint8_t> own;
  const std::uint8_t* data = nullptr;
  Incoming() = default;
  Incoming(const Napi::Value& value, const TensorHandle& to, bool sync) {
    data = Array(value, to.dtype, to.count, "data").data;
    if (sync || to.count == 0) return;
    own.assign(data, data + to.bytes());
    data = own.data();
  }
};

/// A call that touches memory of the caller's.
CallMode device_mode(const Napi::CallbackInfo& info) {
  CallMode mode = read_mode(info);
  mode.device = true;
  return mode;
}

void check_place(const Runtime& runtime, std::uint64_t address, Dtype dtype, std::size_t bytes) {
  if (address == 0) refuse("pointer is null.");
  if (address % dtype_bytes(dtype) != 0)
    refuse("pointer must be aligned to " + std::to_string(dtype_bytes(dtype)) + " bytes.");
  if (address > UINTPTR_MAX - bytes) refuse("The tensor reaches beyond the end of memory.");
  const std::string objection = runtime.backend()->objection(
      reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address)), bytes);
  if (!objection.empty()) refuse("pointer is no memory of this backend: " + objection + ".");
}

}  // namespace

TensorHandle::~TensorHandle() {
  if (!memory) return;
  if (kind == Kind::kOwn) runtime->backend()->free_memory(memory, bytes());
  if (kind == Kind::kImported) runtime->backend()->close_memory(memory);
}

Napi::Function TensorObject::define(Napi::Env env) {
  return DefineClass(
      env, "Tensor",
      {InstanceMethod<&TensorObject::pointer>("pointer"), InstanceMethod<&TensorObject::part>("part"),
       InstanceMethod<&TensorObject::write>("write"), InstanceMethod<&TensorObject::read_numbers>("read"),
       InstanceMethod<&TensorObject::export_handle>("exportHandle"),
       InstanceMethod<&TensorObject::dispose>("dispose")});
}

TensorObject::TensorObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TensorObject>(info) {
  guarded(info.Env(), [&] {
    if (!info[0].IsExternal()) refuse("Tensors are made by a backend.");
    handle_ = *info[0].As<Napi::External<std::shared_ptr<TensorHandle>>>().Data();
    if (handle_->kind != TensorHandle::Kind::kOwn) return;
    reported_ = static_cast<std::int64_t>(handle_->bytes());
    Napi::MemoryManagement::AdjustExternalMemory(info.Env(), reported_);
  });
}

void TensorObject::release(Napi::Env env) {
  if (!std::exchange(handle_, nullptr)) return;
  if (reported_ != 0) Napi::MemoryManagement::AdjustExternalMemory(env, -std::exchange(reported_, 0));
}

Napi::Value TensorObject::wrap(Napi::Env env, std::shared_ptr<TensorHandle> handle) {
  return Instance::of(env).tensor.New({Napi::External<std::shared_ptr<TensorHandle>>::New(env, &handle)});
}

const std::shared_ptr<TensorHandle>& TensorObject::handle() const {
  if (!handle_) throw Error(ErrorCode::kDisposed, "The tensor was disposed.");
  return handle_;
}

std::shared_ptr<TensorHandle> TensorObject::read(const Napi::Value& value,
                                                 const std::shared_ptr<Runtime>& runtime,
                                                 const std::string& name) {
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Instance::of(value.Env()).tensor.Value()))
    return nullptr;
  const auto& handle = Unwrap(value.As<Napi::Object>())->handle();
  if (handle->runtime != runtime) refuse(name + " belongs to another backend.");
  return handle;
}

Napi::Value TensorObject::create(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime) {
  const CallMode mode = device_mode(info);
  auto handle = hold(runtime, std::make_unique<TensorHandle>(runtime, TensorHandle::Kind::kOwn));
  handle->dtype = read_dtype(info[2]);
  handle->count = read_size(info[3]);
  const auto data = std::make_shared<Incoming>();
  if (!info[4].IsUndefined()) *data = Incoming(info[4], *handle, mode.sync);
  return runtime->dispatch(
      info.Env(), mode,
      [handle, data] {
        Backend& backend = *handle->runtime->backend();
        handle->memory = static_cast<std::uint8_t*>(backend.allocate_memory(handle->bytes()));
        if (data->data)
          backend.copy_memory(handle->memory, data->data, handle->bytes());
        else
          backend.clear_memory(handle->memory, handle->bytes());
      },
      [handle](Napi::Env env) { return wrap(env, handle); });
}

Napi::Value TensorObject::borrow(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime) {
  if (!info[0].IsBigInt()) refuse("pointer must be a bigint.");
  bool lossless = false;
  const std::uint64_t address = info[0].As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) refuse("pointer must lie between 0 and 2^64 - 1.");
  auto handle = hold(runtime, std::make_unique<TensorHandle>(runtime, TensorHandle::Kind::kBorrowed));
  handle->dtype = read_dtype(info[1]);
  handle->count = read_size(info[2]);
  check_place(*runtime, address, handle->dtype, handle->bytes());
  handle->memory = reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));
  return wrap(info.Env(), handle);
}

Napi::Value TensorObject::import(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array ||
      info[0].As<Napi::TypedArray>().ElementLength() != kHandleBytes)
    refuse("handle must be a Uint8Array of " + std::to_string(kHandleBytes) + " bytes.");
  MemoryHandle bytes;
  std::memcpy(bytes.data(), info[0].As<Napi::Uint8Array>().Data(), bytes.size());
  auto handle = hold(runtime, std::make_unique<TensorHandle>(runtime, TensorHandle::Kind::kImported));
  handle->dtype = read_dtype(info[1]);
  handle->count = read_size(info[2]);
  runtime->executor().between([&] {
    handle->memory = static_cast<std::uint8_t*>(runtime->backend()->import_memory(bytes));
    check_place(*runtime, reinterpret_cast<std::uintptr_t>(handle->memory), handle->dtype, handle->bytes());
  });
  return wrap(info.Env(), handle);
}

Napi::Value TensorObject::pointer(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return Napi::BigInt::New(info.Env(),
                             static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(handle()->memory)));
  });
}

/// (first, count): elements that the same memory holds
Napi::Value TensorObject::part(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::size_t first = read_count(info[0], "first"), count = read_size(info[1]);
    if (first > handle()->count || count > handle()->count - first) refuse("The slice lies outside.");
    auto made =
        hold(handle()->runtime, std::make_unique<TensorHandle>(handle()->runtime, TensorHandle::Kind::kPart));
    made->whole = handle();
    made->dtype = handle()->dtype;
    made->count = count;
    made->memory = handle()->memory + dtype_bytes(made->dtype) * first;
    return wrap(info.Env(), made);
  });
}

/// (sync, abort, numbers)
Napi::Value TensorObject::write(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const CallMode mode = device_mode(info);
    const auto data = std::make_shared<Incoming>(info[2], *handle(), mode.sync);
    return handle()->runtime->dispatch(
        info.Env(), mode,
        [handle = handle(), data] {
          handle->runtime->backend()->copy_memory(handle->memory, data->data, handle->bytes());
        },
        [](Napi::Env env) { return env.Undefined(); });
  });
}

/// (sync, abort, out)
Napi::Value TensorObject::read_numbers(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const CallMode mode = device_mode(info);
    const auto from = handle();
    std::uint8_t* to = Array(info[2], from->dtype, from->count, "out").data;
    if (mode.sync)
      return from->runtime->dispatch(
          info.Env(), mode,
          [from, to] { from->runtime->backend()->copy_memory(to, from->memory, from->bytes()); },
          [](Napi::Env env) { return env.Undefined(); });
    struct Result {
      std::vector<std::uint8_t> bytes;
      Napi::ObjectReference out;
    };
    const auto result = std::make_shared<Result>();
    result->bytes.resize(from->bytes());
    result->out = Napi::Persistent(info[2].As<Napi::Object>());
    return from->runtime->dispatch(
        info.Env(), mode,
        [from, result] {
          from->runtime->backend()->copy_memory(result->bytes.data(), from->memory, from->bytes());
        },
        [from, result](Napi::Env env) {
          std::uint8_t* out = Array(result->out.Value(), from->dtype, from->count, "out").data;
          if (!result->bytes.empty()) std::memcpy(out, result->bytes.data(), result->bytes.size());
          return env.Undefined();
        });
  });
}

Napi::Value TensorObject::export_handle(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (handle()->kind != TensorHandle::Kind::kOwn)
      refuse("Only a tensor with memory of its own can be exported, no slice and nothing borrowed.");
    const MemoryHandle bytes = handle()->runtime->executor().between(
        [&] { return handle()->runtime->backend()->export_memory(handle()->memory); });
    Napi::Uint8Array array = Napi::Uint8Array::New(info.Env(), bytes.size());
    std::memcpy(array.Data(), bytes.data(), bytes.size());
    return array;
  });
}

void TouchedMemory::check() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
  const Range *longest = nullptr, *longest_written = nullptr;  // reaching furthest so far
  for (const Range& range : ranges_) {
    for (const Range* other : {longest, longest_written})
      if (other && range.first < other->end && (range.written || other->written))
        refuse(range.name + " and " + other->name + " overlap in memory.");
    if (!longest || range.end > longest->end) longest = &range;
    if (range.written && (!longest_written || range.end > longest_written->end)) longest_written = &range;
  }
}

}  // namespace innerkv
