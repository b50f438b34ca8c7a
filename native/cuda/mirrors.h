// What the backend keeps on the device beside pages: copies of bases and rotation tables, made on first use,
// owned by the objects of the core that they copy.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "args.h"
#include "device.h"

namespace innerkv::gpu {

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }
inline unsigned dim(int i) { return static_cast<unsigned>(i); }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Device memory that belongs to a basis or a rotation table of the core and goes when that does.
struct Mirror {
  std::uint8_t* memory = nullptr;
  explicit Mirror(std::size_t bytes) : memory(static_cast<std::uint8_t*>(device::allocate(bytes))) {}
  Mirror(const Mirror&) = delete;
  ~Mirror() { device::release(memory); }
};

struct BasisMirror : Mirror {
  BasisArgs args;
  using Mirror::Mirror;
};

inline const BasisArgs& on_device(const Basis& basis) {
  if (!basis.mirror) {
    constexpr std::size_t kAlign = 256;
    const auto bytes_of = [](const auto& values) {
      return (values.size() * sizeof(values[0]) + kAlign - 1) / kAlign * kAlign;
    };
    const std::size_t total = bytes_of(basis.mean) + bytes_of(basis.lam) + bytes_of(basis.inv_lam) +
                              bytes_of(basis.order) + bytes_of(basis.metric) + bytes_of(basis.feedback) +
                              bytes_of(basis.pivot);
    auto mirror = std::make_shared<BasisMirror>(total + kAlign);
    std::uint8_t* next = mirror->memory;
    const auto put = [&](const auto& values) -> decltype(values.data()) {
      if (values.empty()) return nullptr;
      device::copy(next, values.data(), values.size() * sizeof(values[0]));
      const auto* there = reinterpret_cast<decltype(values.data())>(next);
      next += bytes_of(values);
      return there;
    };
    mirror->args = {put(basis.mean),   put(basis.lam),      put(basis.inv_lam), put(basis.order),
                    put(basis.metric), put(basis.feedback), put(basis.pivot)};
    basis.mirror = std::move(mirror);
  }
  return static_cast<const BasisMirror*>(basis.mirror.get())->args;
}

/// Tables [blocks][2][D] of cos and sin, one per sink and block length.
struct RotationMirror {
  struct Table {
    std::unique_ptr<Mirror> memory;
    int blocks = 0, capacity = 0;
  };
  std::map<std::pair<int, int>, Table> tables;
};

inline const float* rotations_on_device(const RotationTable& rotations, int head_dim, int sink,
                                        int block_tokens, int blocks) {
  if (!rotations.mirror) rotations.mirror = std::make_shared<RotationMirror>();
  auto& table = static_cast<RotationMirror*>(rotations.mirror.get())->tables[{sink, block_tokens}];
  const std::size_t block_bytes = sizeof(float) * 2 * at(head_dim);
  if (blocks > table.capacity) {
    const int capacity = std::max(blocks, 2 * table.capacity);
    auto memory = std::make_unique<Mirror>(block_bytes * at(capacity));
    if (table.blocks > 0) device::copy(memory->memory, table.memory->memory, block_bytes * at(table.blocks));
    table.memory = std::move(memory);
    table.capacity = capacity;
  }
  if (blocks > table.blocks) {
    std::vector<float> fresh;
    for (int block = table.blocks; block < blocks; ++block) {
      const Rotation& rotation = rotations.at(block_position(sink, block_tokens, block * block_tokens));
      fresh.insert(fresh.end(), rotation.cos.begin(), rotation.cos.end());
      fresh.insert(fresh.end(), rotation.sin.begin(), rotation.sin.end());
    }
    device::copy(table.memory->memory + block_bytes * at(table.blocks), fresh.data(),
                 sizeof(float) * fresh.size());
    table.blocks = blocks;
  }
  return reinterpret_cast<const float*>(table.memory->memory);
}

template <class... P, class... A>
void run(const char* what, void (*kernel)(P...), dim3 grid, int threads, std::size_t shared,
         A&&... arguments) {
  device::check(
      launch(kernel, grid, dim3(dim(threads)), shared, device::stream(), std::forward<A>(arguments)...),
      what);
}

}  // namespace innerkv::gpu
