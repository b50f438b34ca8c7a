// Rotations R(-P) of block-relative keys: cos and sin of P * theta, rounded once to float32. docs/format.md
// section 5.
#pragma once

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "config.h"

namespace innerkv {

/// R(-P) as  y[c] = x[c] * cos[c] + x[partner(c)] * sin[c]  with the signs in `sin`; 1 and 0 beyond the
/// rotary dimensions.
struct Rotation {
  std::vector<float> cos, sin;  // [head_dim]
  std::int64_t position = 0;
};

class RotationTable {
 public:
  RotationTable(const RopeConfig& rope, int head_dim) : rope_(rope), head_dim_(head_dim) {}

  const RopeConfig& rope() const { return rope_; }

  /// The rotation back from position P, computed on first use. Safe from several threads; references stay
  /// valid.
  const Rotation& at(std::int64_t position) const {
    // Every task asks once per block: what was found before needs no lock. Positions of blocks are 128 apart.
    std::atomic<const Rotation*>& place = found_[static_cast<std::size_t>(position / 128) % found_.size()];
    const Rotation* found = place.load(std::memory_order_acquire);
    if (found && found->position == position) return *found;
    const std::lock_guard lock(mutex_);
    auto& entry = table_[position];
    if (!entry) entry = std::make_unique<Rotation>(make(position));
    place.store(entry.get(), std::memory_order_release);
    return *entry;
  }

  /// The other direction: R(+P).
  Rotation forward(std::int64_t position) const {
    Rotation rotation = at(position);
    for (float& s : rotation.sin) s = -s;
    return rotation;
  }

 private:
  Rotation make(std::int64_t position) const {
    Rotation rotation{std::vector<float>(static_cast<std::size_t>(head_dim_), 1.0f),
                      std::vector<float>(static_cast<std::size_t>(head_dim_), 0.0f), position};
    const std::size_t pairs = rope_.theta.size();
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position) * rope_.theta[i];
      const std::size_t a = rope_.half_layout ? i : 2 * i, b = rope_.half_layout ? i + pairs : 2 * i + 1;
      rotation.cos[a] = rotation.cos[b] = static_cast<float>(std::cos(angle));
      rotation.sin[a] = static_cast<float>(std::sin(angle));
      rotation.sin[b] = -rotation.sin[a];
    }
    return rotation;
  }

  RopeConfig rope_;
  int head_dim_;

 public:
  mutable std::shared_ptr<void> mirror;  // the backend's copy of what it has used

 private:
  mutable std::mutex mutex_;
  mutable std::map<std::int64_t, std::unique_ptr<Rotation>> table_;
  mutable std::array<std::atomic<const Rotation*>, 1024> found_{};
};

/// First position of the block that holds token index t.
constexpr std::int64_t block_position(int sink, int block_tokens, int token_index) {
  return static_cast<std::int64_t>(sink) +
         static_cast<std::int64_t>(token_index / block_tokens) * block_tokens;
}

}  // namespace innerkv
