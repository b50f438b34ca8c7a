// Keys and values of new tokens on their way from JavaScript.
#pragma once

#include <napi.h>

#include <memory>
#include <string>

#include "failure.h"
#include "handles.h"
#include "tensor_object.h"

namespace innerkv {

/// k and v: [tokens, kvHeads, headDim], arrays or tensors.
class KeysAndValues {
 public:
  /// `of`: "" or " of item 3", for the text of errors. `mode` learns that memory of the caller's is involved.
  KeysAndValues(const CacheHandle& cache, const Napi::Value& keys, const Napi::Value& values,
                const Napi::Value& dtype, const std::string& of, CallMode& mode) {
    const CacheConfig& config = cache.core->config();
    const Kernels& kernels = cache.runtime->kernels();
    const Input k(keys, dtype, cache.runtime, "k" + of), v(values, dtype, cache.runtime, "v" + of);
    const std::size_t row =
        static_cast<std::size_t>(config.kv_heads) * static_cast<std::size_t>(config.head_dim);
    if (k.count() != v.count() || k.count() == 0 || k.count() % row != 0 || k.count() / row > 0x3fffffff)
      refuse("k" + of + " or v" + of + " has the wrong length.");
    tokens_ = static_cast<int>(k.count() / row);
    mode.device |= k.device || v.device;
    tensors_[0] = k.device;
    tensors_[1] = v.device;
    const int heads = config.kv_heads, D = config.head_dim;
    if (!k.device) arrays_[0] = to_halves(kernels, k.array, {"k" + of, heads, D}, mode.sync);
    if (!v.device) arrays_[1] = to_halves(kernels, v.array, {"v" + of, heads, D}, mode.sync);
  }

  int tokens() const { return tokens_; }
  TensorView k() const { return view(0); }
  TensorView v() const { return view(1); }

 private:
  TensorView view(int i) const { return tensors_[i] ? tensors_[i]->view() : TensorView(arrays_[i].data); }

  std::shared_ptr<TensorHandle> tensors_[2];
  Numbers<std::uint16_t> arrays_[2];
  int tokens_ = 0;
};

}  // namespace innerkv
