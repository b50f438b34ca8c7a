// The addon's Tensor class: memory of a backend that callers hold, own or borrowed.
#pragma once

#include <napi.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "handles.h"
#include "tensors.h"

namespace innerkv {

struct TensorHandle final : Garbage {
  enum class Kind { kOwn, kBorrowed, kImported, kPart };
  TensorHandle(std::shared_ptr<Runtime> of, Kind how) : runtime(std::move(of)), kind(how) {}
  ~TensorHandle() override;

  std::size_t bytes() const { return dtype_bytes(dtype) * count; }
  TensorView view() const { return TensorView::device(memory, dtype); }

  std::shared_ptr<Runtime> runtime;
  Kind kind;
  std::uint8_t* memory = nullptr;
  std::size_t count = 0;
  Dtype dtype = Dtype::kF32;
  std::shared_ptr<TensorHandle> whole;  // of a part
};

class TensorObject : public Napi::ObjectWrap<TensorObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit TensorObject(const Napi::CallbackInfo& info);
  ~TensorObject() override { release(Env()); }

  /// (sync, abort, dtype, count, numbers or undefined) => Tensor of zeros, or of these numbers
  static Napi::Value create(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime);
  /// (pointer, dtype, count) => Tensor
  static Napi::Value borrow(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime);
  /// (handle, dtype, count) => Tensor
  static Napi::Value import(const Napi::CallbackInfo& info, const std::shared_ptr<Runtime>& runtime);

  /// The handle when the value is a Tensor of this runtime, null when it is none.
  static std::shared_ptr<TensorHandle> read(const Napi::Value& value, const std::shared_ptr<Runtime>& runtime,
                                            const std::string& name);

 private:
  static Napi::Value wrap(Napi::Env env, std::shared_ptr<TensorHandle> handle);
  const std::shared_ptr<TensorHandle>& handle() const;
  void release(Napi::Env env);
  Napi::Value pointer(const Napi::CallbackInfo& info);
  Napi::Value part(const Napi::CallbackInfo& info);
  Napi::Value write(const Napi::CallbackInfo& info);
  Napi::Value read_numbers(const Napi::CallbackInfo& info);
  Napi::Value export_handle(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo& info) { release(info.Env()); }

  std::shared_ptr<TensorHandle> handle_;
  std::int64_t reported_ = 0;  // bytes the garbage collector knows of
};

/// A typed array, or a Tensor of the caller's backend.
struct Input {
  Input(const Napi::Value& value, const Napi::Value& dtype, const std::shared_ptr<Runtime>& runtime,
        const std::string& name)
      : device(TensorObject::read(value, runtime, name)) {
    if (!device) array = read_tensor(value, dtype);
  }
  std::size_t count() const { return device ? device->count : array.count; }

  std::shared_ptr<TensorHandle> device;
  Tensor array;
};

/// Memory that a call reads or writes, to see that nothing is written that something else of the call uses.
class TouchedMemory {
 public:
  void reads(const TensorHandle* tensor, const std::string& name) { add(tensor, name, false); }
  void writes(const TensorHandle* tensor, const std::string& name) { add(tensor, name, true); }
  /// Refuses overlaps.
  void check();

 private:
  struct Range {
    const std::uint8_t *first, *end;
    std::string name;
    bool written;
  };
  void add(const TensorHandle* tensor, const std::string& name, bool written) {
    if (tensor) ranges_.push_back({tensor->memory, tensor->memory + tensor->bytes(), name, written});
  }
  std::vector<Range> ranges_;
};

}  // namespace innerkv
