#include "tensors.h"

#include <cstring>
#include <utility>

#include "../cpu/convert.h"
#include "failure.h"

namespace innerkv {

namespace {

/// Binary16 bits or float32 of a tensor, all finite. With `borrow`, numbers of that type are not copied.
template <class T, class Convert>
Numbers<T> numbers_of(const Tensor& tensor, Dtype as, const TensorName& name, bool borrow,
                      Convert&& convert) {
  Numbers<T> numbers;
  bool finite;
  if (borrow && tensor.dtype == as) {
    numbers.data = static_cast<const T*>(tensor.data);
    finite = all_finite(tensor.data, tensor.dtype, tensor.count);
  } else {
    numbers.own = std::make_unique_for_overwrite<T[]>(tensor.count);
    numbers.data = numbers.own.get();
    finite = convert(tensor.data, tensor.dtype, tensor.count, numbers.own.get());
  }
  if (!finite) refuse_not_finite(tensor.data, tensor.dtype, tensor.count, as, name);
  return numbers;
}

}  // namespace

Tensor read_tensor(const Napi::Value& array, const Napi::Value& dtype) {
  if (!array.IsTypedArray()) refuse("Expected a typed array.");
  napi_typedarray_type type;
  Tensor tensor;
  void* data = nullptr;
  if (napi_get_typedarray_info(array.Env(), array, &type, &tensor.count, &data, nullptr, nullptr) != napi_ok)
    refuse("A typed array cannot be read.");
  tensor.data = data;
  if (type == napi_float32_array) {
    tensor.dtype = Dtype::kF32;
  } else if (type == napi_uint16_array) {
    tensor.dtype =
        dtype.IsString() && dtype.As<Napi::String>().Utf8Value() == "bf16" ? Dtype::kBf16 : Dtype::kF16;
  } else {
    refuse("Expected a Float32Array or a Uint16Array.");
  }
  return tensor;
}

Numbers<std::uint16_t> to_halves(const Kernels& kernels, const Tensor& tensor, const TensorName& name,
                                 bool borrow) {
  return numbers_of<std::uint16_t>(tensor, Dtype::kF16, name, borrow,
                                   [&](auto... call) { return convert_to_halves(kernels, call...); });
}

Numbers<float> to_floats(const Kernels& kernels, const Tensor& tensor, const TensorName& name, bool borrow) {
  return numbers_of<float>(tensor, Dtype::kF32, name, borrow,
                           [&](auto... call) { return convert_to_floats(kernels, call...); });
}

void check_finite(const Tensor& tensor, const TensorName& name) {
  if (!all_finite(tensor.data, tensor.dtype, tensor.count))
    refuse_not_finite(tensor.data, tensor.dtype, tensor.count, Dtype::kF32, name);
}

Output::Output(const Napi::Value& array, std::size_t count, bool sync, std::string name)
    : count_(count), name_(std::move(name)) {
  if (!array.IsTypedArray()) refuse(name_ + " must be a Float32Array.");
  array_ = Napi::Reference<Napi::TypedArray>::New(array.As<Napi::TypedArray>(), 1);
  float* to = target();
  if (sync) {
    data_ = to;
  } else {
    own_ = std::make_unique_for_overwrite<float[]>(count);
    data_ = own_.get();
  }
}

float* Output::target() const {
  napi_typedarray_type type;
  std::size_t count = 0;
  void* data = nullptr;
  const Napi::TypedArray array = array_.Value();
  if (napi_get_typedarray_info(array.Env(), array, &type, &count, &data, nullptr, nullptr) != napi_ok ||
      type != napi_float32_array)
    refuse(name_ + " must be a Float32Array.");
  if (count != count_)
    refuse(name_ + " holds " + std::to_string(count) + " numbers instead of " + std::to_string(count_) +
           "; was its buffer transferred or resized while the call was under way?");
  return static_cast<float*>(data);
}

void Output::check() const {
  if (data_) target();
}

void Output::deliver() const {
  if (own_) std::memcpy(target(), own_.get(), sizeof(float) * count_);
}

}  // namespace innerkv
