#include "tensor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "../numerics/half.h"
#include "backend.h"

namespace innerkv {

namespace {

float value_at(const void* numbers, Dtype dtype, std::size_t i) {
  if (dtype == Dtype::kF32) return static_cast<const float*>(numbers)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(numbers)[i];
  return dtype == Dtype::kF16 ? half_value(bits) : std::bit_cast<float>(std::uint32_t{bits} << 16);
}

bool storable(float value, Dtype as) {
  return as == Dtype::kF16 ? half_is_finite(half_bits_ieee(value)) : std::isfinite(value);
}

struct Place {
  std::size_t token, head, channel;
  Place(const TensorName& name, std::size_t index) {
    const std::size_t channels = static_cast<std::size_t>(name.channels),
                      heads = static_cast<std::size_t>(name.heads),
                      tokens = static_cast<std::size_t>(name.heads_first_tokens), row = index / channels;
    token = tokens > 0 ? row % tokens : row / heads;
    head = tokens > 0 ? row / tokens : row % heads;
    channel = index % channels;
  }
};

std::string text_of(const TensorName& name, std::size_t index, float value) {
  const Place place(name, index);
  const std::string what = std::isfinite(value)
                               ? "is " + std::to_string(value) + ", beyond the largest binary16 number, 65504"
                           : std::isnan(value) ? "is NaN"
                                               : "is infinite";
  return name.name + " at token " + std::to_string(place.token) + ", head " + std::to_string(place.head) +
         ", channel " + std::to_string(place.channel) + " " + what + ".";
}

}  // namespace

void check_alignment(const void* memory, bool on_device, const std::string& name) {
  if (on_device && reinterpret_cast<std::uintptr_t>(memory) % kTensorAlign != 0)
    throw Error(ErrorCode::kInvalidArgument,
                name + " must be aligned to " + std::to_string(kTensorAlign) + " bytes on the device.");
}

NotFinite::NotFinite(const TensorName& name, std::size_t index, float value)
    : Error(ErrorCode::kNotFinite, text_of(name, index, value)), tensor_(name.name), value_(value) {
  const Place place(name, index);
  token_ = place.token;
  head_ = place.head;
  channel_ = place.channel;
}

void refuse_not_finite(const void* numbers, Dtype dtype, std::size_t count, Dtype as,
                       const TensorName& name) {
  std::size_t i = 0;
  while (i + 1 < count && storable(value_at(numbers, dtype, i), as)) ++i;
  throw NotFinite(name, i, value_at(numbers, dtype, i));
}

void refuse_not_finite(Backend& backend, const TensorView& tensor, std::size_t count, Dtype as,
                       const TensorName& name) {
  constexpr std::size_t kPiece = std::size_t{1} << 18;
  const std::size_t bytes = dtype_bytes(tensor.dtype);
  std::vector<std::uint8_t> piece(bytes * std::min(count, kPiece));
  for (std::size_t first = 0; first < count; first += kPiece) {
    const std::size_t some = std::min(kPiece, count - first);
    backend.copy_memory(piece.data(), static_cast<const std::uint8_t*>(tensor.data) + bytes * first,
                        bytes * some);
    for (std::size_t i = 0; i < some; ++i)
      if (const float value = value_at(piece.data(), tensor.dtype, i); !storable(value, as))
        throw NotFinite(name, first + i, value);
  }
  throw Error(ErrorCode::kNotFinite, name.name +
                                         " held a number that is not finite and is gone: its memory "
                                         "was written while the call was under way.");
}

}  // namespace innerkv
