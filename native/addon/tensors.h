// Numbers that cross the border: typed arrays in, checked and converted before anything changes; float32 out.
#pragma once

#include <napi.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "../core/tensor.h"
#include "../cpu/kernels.h"

namespace innerkv {

/// A typed array of the caller, valid during one callback.
struct Tensor {
  const void* data = nullptr;
  std::size_t count = 0;
  Dtype dtype = Dtype::kF32;
};

/// `dtype` tells what a Uint16Array holds: 'bf16', or binary16 for anything else.
Tensor read_tensor(const Napi::Value& array, const Napi::Value& dtype);

/// Numbers of one type, the caller's own or a copy.
template <class T>
struct Numbers {
  std::unique_ptr<T[]> own;
  const T* data = nullptr;
};

/// Binary16 bits of a tensor, all finite, or NotFinite. With `borrow`, binary16 input is not
/// copied.
Numbers<std::uint16_t> to_halves(const Kernels& kernels, const Tensor& tensor, const TensorName& name,
                                 bool borrow);

/// NotFinite for a binary16 or float32 tensor that is not all finite.
void check_finite(const Tensor& tensor, const TensorName& name);

/// The same in float32.
Numbers<float> to_floats(const Kernels& kernels, const Tensor& tensor, const TensorName& name, bool borrow);

/// A Float32Array of the caller that receives `count` numbers: at once when the caller waits, otherwise on
/// delivery.
class Output {
 public:
  Output() = default;
  Output(const Napi::Value& array, std::size_t count, bool sync, std::string name);

  /// nullptr when the caller wants none.
  float* data() const { return data_; }
  std::size_t count() const { return count_; }
  /// JavaScript thread. Refuses when the array was detached or shrunk in the meantime.
  void deliver() const;
  /// Would deliver() refuse?
  void check() const;

 private:
  float* target() const;

  float* data_ = nullptr;
  std::size_t count_ = 0;
  std::unique_ptr<float[]> own_;
  Napi::Reference<Napi::TypedArray> array_;
  std::string name_;
};

}  // namespace innerkv
