#include "sequence_object.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "config_reader.h"
#include "failure.h"
#include "instance.h"
#include "keys_and_values.h"
#include "transfer_objects.h"

namespace innerkv {

namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

template <class Array, class Element>
Array copy_out(Napi::Env env, const Element* from, std::size_t count) {
  Array array = Array::New(env, count);
  if (count > 0) std::memcpy(array.Data(), from, sizeof(Element) * count);
  return array;
}

}  // namespace

Napi::Function SequenceObject::define(Napi::Env env) {
  return DefineClass(
      env, "Sequence",
      {InstanceMethod<&SequenceObject::fork>("fork"), InstanceMethod<&SequenceObject::truncate>("truncate"),
       InstanceMethod<&SequenceObject::replace>("replace"), InstanceMethod<&SequenceObject::remove>("remove"),
       InstanceMethod<&SequenceObject::read_back>("readBack"),
       InstanceMethod<&SequenceObject::writer>("writer"), InstanceMethod<&SequenceObject::length>("length"),
       InstanceMethod<&SequenceObject::layer_state>("layerState"),
       InstanceMethod<&SequenceObject::page>("page"), InstanceMethod<&SequenceObject::dispose>("dispose")});
}

SequenceObject::SequenceObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SequenceObject>(info) {
  guarded(info.Env(), [&] {
    if (!info[0].IsExternal()) refuse("Sequences are made by a cache.");
    handle_ = *info[0].As<Napi::External<std::shared_ptr<SequenceHandle>>>().Data();
  });
}

Napi::Value SequenceObject::wrap(Napi::Env env, std::shared_ptr<SequenceHandle> handle) {
  return Instance::of(env).sequence.New({Napi::External<std::shared_ptr<SequenceHandle>>::New(env, &handle)});
}

const std::shared_ptr<SequenceHandle>& SequenceObject::handle() const {
  if (!handle_) throw Error(ErrorCode::kDisposed, "The sequence was disposed.");
  return handle_;
}

std::shared_ptr<SequenceHandle> SequenceObject::handle_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Instance::of(value.Env()).sequence.Value()))
    refuse("Expected a sequence.");
  return Unwrap(value.As<Napi::Object>())->handle();
}

/// (sync, abort)
Napi::Value SequenceObject::fork(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto made = std::make_shared<std::shared_ptr<SequenceHandle>>();
    return dispatch(
        info.Env(), read_mode(info), handle()->cache,
        [handle = handle(), made] { *made = hold_sequence(handle->cache, handle->core->fork()); },
        [made](Napi::Env env) { return wrap(env, *made); });
  });
}

/// (sync, abort, tokens)
Napi::Value SequenceObject::truncate(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int tokens = to_int(info[2], "tokens");
    return dispatch(info.Env(), read_mode(info), handle()->cache, [handle = handle(), tokens] {
      handle->core->truncate(tokens);
      handle->publish();
    });
  });
}

/// (sync, abort, layer, position, k, v, dtype)
Napi::Value SequenceObject::replace(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    CallMode mode = read_mode(info);
    const int layer = to_int(info[2], "layer"), position = to_int(info[3], "position");
    const auto input = std::make_shared<KeysAndValues>(*handle()->cache, info[4], info[5], info[6], "", mode);
    if (input->tokens() != 1) refuse("replace() takes exactly one token.");
    return dispatch(info.Env(), mode, handle()->cache, [handle = handle(), layer, position, input] {
      handle->core->replace(layer, position, input->k(), input->v());
    });
  });
}

/// (sync, abort, layer, head or -1, positions: Int32Array)
Napi::Value SequenceObject::remove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int layer = to_int(info[2], "layer"), head = to_int(info[3], "head");
    if (!info[4].IsTypedArray() || info[4].As<Napi::TypedArray>().TypedArrayType() != napi_int32_array)
      refuse("positions must be an Int32Array.");
    const Napi::Int32Array array = info[4].As<Napi::Int32Array>();
    std::vector<int> positions(array.Data(), array.Data() + array.ElementLength());
    return dispatch(info.Env(), read_mode(info), handle()->cache,
                    [handle = handle(), layer, head, positions = std::move(positions)] {
                      handle->core->remove(layer, head, positions);
                    });
  });
}

/// (sync, abort, layer, head) => { k, v }
Napi::Value SequenceObject::read_back(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int layer = to_int(info[2], "layer"), head = to_int(info[3], "head");
    const auto values = std::make_shared<std::pair<std::vector<float>, std::vector<float>>>();
    return dispatch(
        info.Env(), read_mode(info), handle()->cache,
        [handle = handle(), layer, head, values] {
          const std::size_t count =
              at(handle->core->tokens(layer)) * at(handle->cache->core->config().head_dim);
          values->first.resize(count);
          values->second.resize(count);
          handle->core->read_back(layer, head, values->first.data(), values->second.data());
        },
        [values](Napi::Env env) {
          Napi::Object result = Napi::Object::New(env);
          result.Set("k", copy_out<Napi::Float32Array>(env, values->first.data(), values->first.size()));
          result.Set("v", copy_out<Napi::Float32Array>(env, values->second.data(), values->second.size()));
          return result;
        });
  });
}

/// (sync, abort) => Writer
Napi::Value SequenceObject::writer(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto made = std::make_shared<std::shared_ptr<WriterHandle>>();
    return dispatch(
        info.Env(), read_mode(info), handle()->cache,
        [handle = handle(), made] {
          *made = hold(
              handle->cache->runtime,
              std::make_unique<WriterHandle>(handle->cache, std::make_unique<SequenceWriter>(*handle->core)));
        },
        [made](Napi::Env env) { return WriterObject::wrap(env, *made); });
  });
}

/// (layer): tokens as of the last finished call; never waits.
Napi::Value SequenceObject::length(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int layer = to_int(info[0], "layer");
    if (layer < 0 || layer >= handle()->layers()) refuse("No such layer.");
    return Napi::Number::New(info.Env(), handle()->tokens[at(layer)].load());
  });
}

/// (layer)
Napi::Value SequenceObject::layer_state(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int layer = to_int(info[0], "layer");
    Napi::Object result = Napi::Object::New(info.Env());
    handle()->cache->runtime->executor().between([&] {
      const LayerState& state = handle()->core->layer_state(layer);
      std::size_t pages = 0;
      for (const auto& table : state.pages)
        pages += at(static_cast<int>(
            std::count_if(table.begin(), table.end(), [](const auto& page) { return page != nullptr; })));
      result.Set("tokens", state.tokens);
      result.Set("sink", std::min(state.tokens, state.reach.sink));
      result.Set("keysQuantised", state.reach.k);
      result.Set("valuesQuantised", state.reach.v);
      result.Set("removed", static_cast<double>(state.removed));
      result.Set("pages", static_cast<double>(pages));
    });
    return result;
  });
}

/// (layer, head, page) => { bytes, keyZeros, valueZeros } or null when everything in the page was removed
Napi::Value SequenceObject::page(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const int layer = to_int(info[0], "layer"), head = to_int(info[1], "head"),
              index = to_int(info[2], "page");
    const Napi::Env env = info.Env();
    return handle()->cache->runtime->executor().between([&]() -> Napi::Value {
      Cache& cache = *handle()->cache->core;
      Backend& backend = cache.backend();
      const LayerState& state = handle()->core->layer_state(layer);
      if (head < 0 || at(head) >= state.pages.size()) refuse("No such KV head.");
      const auto& table = state.pages[at(head)];
      if (index < 0 || at(index) >= table.size())
        refuse("Page " + std::to_string(index) + " does not exist; there are " +
               std::to_string(table.size()) + ".");
      const Page* page = table[at(index)].get();
      if (!page) return env.Null();
      const LayerScheme& scheme = cache.config().scheme(layer);
      const auto zeros = [&](const std::vector<Slot>& extents, int count) {
        std::vector<std::uint16_t> all(at(count));
        for (int z = 0; z < count; z += kZeroExtent)
          backend.copy_memory(&all[at(z)], extents[at(z / kZeroExtent)].data(),
                              2 * at(std::min(count - z, kZeroExtent)));
        return copy_out<Napi::Uint16Array>(env, all.data(), all.size());
      };
      Napi::Object result = Napi::Object::New(env);
      std::vector<std::uint8_t> bytes(PageLayout(scheme.k, scheme.v, cache.config().head_dim).bytes());
      backend.copy_memory(bytes.data(), page->bytes.data(), bytes.size());
      result.Set("bytes", copy_out<Napi::Uint8Array>(env, bytes.data(), bytes.size()));
      result.Set("keyZeros", zeros(page->k_zeros, page->k_zero_count));
      result.Set("valueZeros", zeros(page->v_zeros, page->v_zero_count));
      return result;
    });
  });
}

}  // namespace innerkv
