#include "tensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "../numerics/half.h"
#include "failure.h"

namespace innerkv {

namespace {

float bf16_value(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

float value_at(const Tensor& tensor, std::size_t i) {
  if (tensor.dtype == Dtype::kF32) return static_cast<const float*>(tensor.data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(tensor.data)[i];
  return tensor.dtype == Dtype::kF16 ? half_value(bits) : bf16_value(bits);
}

[[noreturn]] void not_finite(const Tensor& tensor, std::size_t i, const TensorName& name) {
  const std::size_t channels = static_cast<std::size_t>(name.channels),
                    heads = static_cast<std::size_t>(name.heads);
  const std::size_t tokens = static_cast<std::size_t>(name.heads_first_tokens), row = i / channels;
  const std::size_t token = tokens > 0 ? row % tokens : row / heads,
                    head = tokens > 0 ? row / tokens : row % heads;
  const float value = value_at(tensor, i);
  const std::string where = "token " + std::to_string(token) + ", head " + std::to_string(head) +
                            ", channel " + std::to_string(i % channels);
  const std::string what = std::isfinite(value)
                               ? "is " + std::to_string(value) + ", beyond the largest binary16 number, 65504"
                           : std::isnan(value) ? "is NaN"
                                               : "is infinite";
  throw Refusal({error_code_name(ErrorCode::kNotFinite),
                 name.name + " at " + where + " " + what + ".",
                 {{"tensor", name.name},
                  {"token", static_cast<double>(token)},
                  {"head", static_cast<double>(head)},
                  {"channel", static_cast<double>(i % channels)},
                  {"value", static_cast<double>(value)}}});
}

bool all_finite(const std::uint16_t* bits, std::size_t count, std::uint16_t exponent) {
  unsigned bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= (bits[i] & exponent) == exponent;
  return bad == 0;
}

bool all_finite(const float* values, std::size_t count) {
  unsigned bad = 0;
  for (std::size_t i = 0; i < count; ++i)
    bad |= (std::bit_cast<std::uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u;
  return bad == 0;
}

constexpr std::uint16_t kHalfExponent = 0x7c00, kBf16Exponent = 0x7f80;

template <class Ok>
[[noreturn]] void find_offender(const Tensor& tensor, const TensorName& name, Ok&& ok) {
  std::size_t i = 0;
  while (i + 1 < tensor.count && ok(value_at(tensor, i))) ++i;
  not_finite(tensor, i, name);
}

bool fits_half(float value) { return half_is_finite(half_bits_ieee(value)); }

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
  const auto* bits = static_cast<const std::uint16_t*>(tensor.data);
  Numbers<std::uint16_t> halves;
  if (tensor.dtype == Dtype::kF16) {
    if (!all_finite(bits, tensor.count, kHalfExponent)) find_offender(tensor, name, fits_half);
    if (borrow) {
      halves.data = bits;
      return halves;
    }
  }
  halves.own = std::make_unique_for_overwrite<std::uint16_t[]>(tensor.count);
  halves.data = halves.own.get();
  bool finite = true;
  switch (tensor.dtype) {
    case Dtype::kF16:
      std::copy_n(bits, tensor.count, halves.own.get());
      break;
    case Dtype::kF32:
      finite = kernels.float_to_half(static_cast<const float*>(tensor.data), halves.own.get(), tensor.count);
      break;
    case Dtype::kBf16: {
      constexpr std::size_t kRun = 1024;
      float run[kRun];
      for (std::size_t begin = 0; begin < tensor.count && finite; begin += kRun) {
        const std::size_t count = std::min(kRun, tensor.count - begin);
        for (std::size_t i = 0; i < count; ++i) run[i] = bf16_value(bits[begin + i]);
        finite = kernels.float_to_half(run, halves.own.get() + begin, count);
      }
      break;
    }
  }
  if (!finite) find_offender(tensor, name, fits_half);
  return halves;
}

void check_finite(const Tensor& tensor, const TensorName& name) {
  const bool half = tensor.dtype == Dtype::kF16;
  if (half ? !all_finite(static_cast<const std::uint16_t*>(tensor.data), tensor.count, kHalfExponent)
           : !all_finite(static_cast<const float*>(tensor.data), tensor.count))
    find_offender(tensor, name, [](float value) { return std::isfinite(value); });
}

Numbers<float> to_floats(const Kernels& kernels, const Tensor& tensor, const TensorName& name, bool borrow) {
  const auto* bits = static_cast<const std::uint16_t*>(tensor.data);
  const auto* values = static_cast<const float*>(tensor.data);
  const bool finite =
      tensor.dtype == Dtype::kF32
          ? all_finite(values, tensor.count)
          : all_finite(bits, tensor.count, tensor.dtype == Dtype::kF16 ? kHalfExponent : kBf16Exponent);
  if (!finite) find_offender(tensor, name, [](float value) { return std::isfinite(value); });
  Numbers<float> floats;
  if (borrow && tensor.dtype == Dtype::kF32) {
    floats.data = values;
    return floats;
  }
  floats.own = std::make_unique_for_overwrite<float[]>(tensor.count);
  floats.data = floats.own.get();
  switch (tensor.dtype) {
    case Dtype::kF32:
      std::copy_n(values, tensor.count, floats.own.get());
      break;
    case Dtype::kF16:
      kernels.half_to_float(bits, floats.own.get(), tensor.count);
      break;
    case Dtype::kBf16:
      std::transform(bits, bits + tensor.count, floats.own.get(), bf16_value);
      break;
  }
  return floats;
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
