#include "transfer_objects.h"

#include <cstring>
#include <utility>
#include <vector>

#include "failure.h"
#include "instance.h"
#include "sequence_object.h"

namespace innerkv {

namespace {

template <class Handle>
std::shared_ptr<Handle> unwrap_handle(const Napi::CallbackInfo& info) {
  if (!info[0].IsExternal()) refuse("Writers and readers are made by sequences and caches.");
  return *info[0].As<Napi::External<std::shared_ptr<Handle>>>().Data();
}

template <class Handle>
const std::shared_ptr<Handle>& checked(const std::shared_ptr<Handle>& handle) {
  if (!handle) throw Error(ErrorCode::kDisposed, "The writer or reader was disposed.");
  return handle;
}

}  // namespace

Napi::Function WriterObject::define(Napi::Env env) {
  return DefineClass(
      env, "Writer",
      {InstanceMethod<&WriterObject::next>("next"), InstanceMethod<&WriterObject::dispose>("dispose")});
}

WriterObject::WriterObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<WriterObject>(info) {
  guarded(info.Env(), [&] { handle_ = unwrap_handle<WriterHandle>(info); });
}

Napi::Value WriterObject::wrap(Napi::Env env, std::shared_ptr<WriterHandle> handle) {
  return Instance::of(env).writer.New({Napi::External<std::shared_ptr<WriterHandle>>::New(env, &handle)});
}

/// (sync, abort) => Uint8Array, or null at the end
Napi::Value WriterObject::next(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto piece = std::make_shared<std::vector<std::uint8_t>>();
    return dispatch(
        info.Env(), read_mode(info), checked(handle_)->cache,
        [handle = handle_, piece] { *piece = handle->core->next(); },
        [piece](Napi::Env env) -> Napi::Value {
          if (piece->empty()) return env.Null();
          Napi::Uint8Array bytes = Napi::Uint8Array::New(env, piece->size());
          std::memcpy(bytes.Data(), piece->data(), piece->size());
          return bytes;
        });
  });
}

Napi::Function ReaderObject::define(Napi::Env env) {
  return DefineClass(
      env, "Reader",
      {InstanceMethod<&ReaderObject::feed>("feed"), InstanceMethod<&ReaderObject::finish>("finish"),
       InstanceMethod<&ReaderObject::dispose>("dispose")});
}

ReaderObject::ReaderObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ReaderObject>(info) {
  guarded(info.Env(), [&] { handle_ = unwrap_handle<ReaderHandle>(info); });
}

Napi::Value ReaderObject::create(Napi::Env env, const std::shared_ptr<CacheHandle>& cache) {
  auto handle = hold(cache->runtime,
                     std::make_unique<ReaderHandle>(cache, std::make_unique<SequenceReader>(cache->core)));
  return Instance::of(env).reader.New({Napi::External<std::shared_ptr<ReaderHandle>>::New(env, &handle)});
}

/// (sync, abort, bytes: Uint8Array)
Napi::Value ReaderObject::feed(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const CallMode mode = read_mode(info);
    if (!info[2].IsTypedArray() || info[2].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
      refuse("A saved sequence comes in Uint8Arrays.");
    const Napi::Uint8Array array = info[2].As<Napi::Uint8Array>();
    const std::uint8_t* data = array.Data();
    const std::size_t size = array.ElementLength();
    auto copy = std::make_shared<std::vector<std::uint8_t>>();
    if (!mode.sync && size > 0) {
      copy->assign(data, data + size);
      data = copy->data();
    }
    return dispatch(info.Env(), mode, checked(handle_)->cache,
                    [handle = handle_, copy, data, size] { handle->core->feed(data, size); });
  });
}

/// (sync, abort) => Sequence
Napi::Value ReaderObject::finish(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto made = std::make_shared<std::shared_ptr<SequenceHandle>>();
    return dispatch(
        info.Env(), read_mode(info), checked(handle_)->cache,
        [handle = handle_, made] {
          auto sequence = handle->core->finish();
          if (!sequence)
            throw Error(ErrorCode::kInvalidArgument, "The reader has already given its sequence away.");
          *made = hold_sequence(handle->cache, std::move(sequence));
        },
        [made](Napi::Env env) { return SequenceObject::wrap(env, *made); });
  });
}

}  // namespace innerkv
