// A caller's numbers: where they lie, what they are, and the refusal of those that are not finite.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.h"

namespace innerkv {

class Backend;

enum class Dtype : std::uint8_t { kF32, kF16, kBf16 };

constexpr std::size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

/// Input of append and attend. On the host it is finite and of the type that is worked with: binary16 for
/// keys and values, float32 for queries. On the device it may be of any type, is read when the call runs, and
/// is searched for numbers that are not finite unless `finite` vouches for it; aligned to kTensorAlign.
struct TensorView {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  bool on_device = false;
  bool finite = true;

  TensorView() = default;
  TensorView(const float* host) : data(host) {}
  TensorView(const std::uint16_t* host) : data(host), dtype(Dtype::kF16) {}
  static TensorView device(const void* memory, Dtype type, bool known_finite = false) {
    TensorView view;
    view.data = memory;
    view.dtype = type;
    view.on_device = true;
    view.finite = known_finite;
    return view;
  }
};

/// Where a caller wants float32 results. On the device they are there for whatever the backend is asked next;
/// Backend::settle() makes them so for others.
struct Target {
  float* data = nullptr;
  bool on_device = false;

  Target() = default;
  Target(float* host) : data(host) {}
  static Target device(float* memory) {
    Target target(memory);
    target.on_device = true;
    return target;
  }
};

/// Of device tensors that calls read or write: what kernels load and store at once.
inline constexpr std::size_t kTensorAlign = 32;

/// Throws for memory on the device that is not aligned so.
void check_alignment(const void* memory, bool on_device, const std::string& name);

/// Does a device tensor have to be converted or searched before it can be used as what is wanted?
inline bool needs_intake(const TensorView& tensor, Dtype as) {
  return tensor.on_device && !(tensor.finite && tensor.dtype == as);
}

/// How a tensor is called and laid out, for the text of errors: [tokens, heads, channels], or heads first.
struct TensorName {
  std::string name;
  int heads, channels;
  int heads_first_tokens = 0;  // tokens of [heads, tokens, channels]; 0 for tokens first
};

/// NaN, infinity, or a number that binary16 cannot hold, and where it is.
class NotFinite : public Error {
 public:
  NotFinite(const TensorName& name, std::size_t index, float value);
  const std::string& tensor() const { return tensor_; }
  std::size_t token() const { return token_; }
  std::size_t head() const { return head_; }
  std::size_t channel() const { return channel_; }
  float value() const { return value_; }

 private:
  std::string tensor_;
  std::size_t token_, head_, channel_;
  float value_;
};

/// Throws NotFinite for the first of `count` numbers on the host that is not finite, or, when they are to
/// become binary16, `as` kF16, that this cannot hold. There is one.
[[noreturn]] void refuse_not_finite(const void* numbers, Dtype dtype, std::size_t count, Dtype as,
                                    const TensorName& name);
/// The same for numbers on the device.
[[noreturn]] void refuse_not_finite(Backend& backend, const TensorView& tensor, std::size_t count, Dtype as,
                                    const TensorName& name);

}  // namespace innerkv
