// Kernels that are put down now and enqueued later, with their parameters. portable.h includes this.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace innerkv {

struct KernelNode;

/// How a kernel's parameters lie in a list's memory, and what enqueues it with them.
struct ParameterLayout {
  const std::size_t* offsets;  // of each parameter from the first
  std::size_t count, bytes;
  cudaError_t (*enqueue)(const KernelNode& node, const std::byte* parameters, cudaStream_t stream);
};

struct KernelNode {
  void (*kernel)();
  dim3 grid, block;
  std::size_t shared_bytes;
  const ParameterLayout* layout;
  std::size_t at;  // of the first parameter in LaunchList::parameters
};

template <class... P>
struct ParametersOf {
  static_assert((std::is_trivially_copyable_v<P> && ...), "parameters are copied byte by byte");
  static constexpr std::size_t kAlign = alignof(std::max_align_t);
  static_assert(((alignof(P) <= kAlign) && ...));

  static constexpr std::size_t place(std::array<std::size_t, sizeof...(P)>* offsets) {
    std::size_t end = 0, i = 0;
    ((end = (end + alignof(P) - 1) / alignof(P) * alignof(P), offsets ? void((*offsets)[i++] = end) : void(),
      end += sizeof(P)),
     ...);
    return end;
  }
  static constexpr auto kOffsets = [] {
    std::array<std::size_t, sizeof...(P)> offsets{};
    place(&offsets);
    return offsets;
  }();

  template <std::size_t... kIndex>
  static cudaError_t enqueue_each(const KernelNode& node, const std::byte* from, cudaStream_t stream,
                                  std::index_sequence<kIndex...>) {
    return innerkv::enqueue<P...>(reinterpret_cast<void (*)(P...)>(node.kernel), node.grid, node.block,
                                  node.shared_bytes, stream,
                                  *reinterpret_cast<const P*>(from + kOffsets[kIndex])...);
  }
  static cudaError_t enqueue(const KernelNode& node, const std::byte* from, cudaStream_t stream) {
    return enqueue_each(node, from, stream, std::index_sequence_for<P...>());
  }
  static constexpr ParameterLayout kLayout{kOffsets.data(), sizeof...(P), place(nullptr), enqueue};
};

struct LaunchList {
  std::vector<KernelNode> nodes;
  std::vector<std::byte> parameters;  // from the heap, so as aligned as anything

  /// Of this thread: where launch() puts kernels down. Null: they are enqueued at once.
  static inline thread_local LaunchList* open = nullptr;

  template <class... P>
  void add(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, const P&... arguments) {
    using Parameters = ParametersOf<P...>;
    const std::size_t first =
        (parameters.size() + Parameters::kAlign - 1) / Parameters::kAlign * Parameters::kAlign;
    parameters.resize(first + Parameters::kLayout.bytes);
    std::size_t i = 0;
    (std::memcpy(&parameters[first + Parameters::kOffsets[i++]], &arguments, sizeof(P)), ...);
    nodes.push_back(
        {reinterpret_cast<void (*)()>(kernel), grid, block, shared_bytes, &Parameters::kLayout, first});
  }
};

}  // namespace innerkv
