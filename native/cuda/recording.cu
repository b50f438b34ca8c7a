#include <algorithm>
#include <new>

#include "recording.h"

namespace innerkv::gpu {

namespace {

thread_local Recording* opened = nullptr;

bool same_grid(const KernelNode& a, const KernelNode& b) {
  return a.grid.x == b.grid.x && a.grid.y == b.grid.y && a.grid.z == b.grid.z &&
         a.shared_bytes == b.shared_bytes;
}

bool same_kernel(const KernelNode& a, const KernelNode& b) {
  return a.kernel == b.kernel && a.block.x == b.block.x && a.block.y == b.block.y && a.block.z == b.block.z;
}

}  // namespace

void device::flush() noexcept {
  if (opened) opened->flush();
}

Recording* Recording::open() { return opened; }

void Recording::begin() {
  if (opened) opened->end();
  const std::size_t wanted = std::clamp(asked_, kLeastRoom, kMostRoom);
  if (wanted > capacity_) {
    capacity_ = 0;
    const std::size_t bytes = std::min(kMostRoom, wanted + wanted / 2);
    device_ = there_.reserve(bytes);
    here_.prepare(bytes);
    capacity_ = bytes;
  }
  host_ = here_.next(capacity_);
  asked_ = used_ = sent_ = 0;
  filling_ = kNone;
  LaunchList::open = &list_;
  opened = this;
}

void Recording::end() noexcept {
  if (opened != this) return;
  flush();
  opened = nullptr;
  LaunchList::open = nullptr;
}

bool Recording::room(std::size_t bytes, std::uint8_t** host, std::uint8_t** device) {
  constexpr std::size_t kAlign = 256;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  asked_ += bytes;
  if (bytes > capacity_ || filling_ != kNone) return false;
  if (used_ + bytes > capacity_) {
    flush();
    host_ = here_.next(capacity_);
    used_ = sent_ = 0;
  }
  *host = host_ + used_;
  *device = device_ + used_;
  filling_ = used_;
  used_ += bytes;
  return true;
}

Recording::Piece* Recording::known(bool copies) {
  for (Piece& piece : pieces_)
    if (piece.copies == copies && std::equal(piece.nodes.begin(), piece.nodes.end(), list_.nodes.begin(),
                                             list_.nodes.end(), same_kernel))
      return &piece;
  return nullptr;
}

void Recording::remember(bool copies) {
  if (pieces_.size() == kMostPieces)
    pieces_.erase(std::min_element(pieces_.begin(), pieces_.end(),
                                   [](const Piece& a, const Piece& b) { return a.used < b.used; }));
  pieces_.push_back({list_.nodes, {}, copies, nullptr, rounds_});
}

/// False: nothing was enqueued.
bool Recording::replay(Piece& piece, const device::PinnedCopy& copy) {
  const bool fresh = !piece.graph;
  if (fresh) {
    piece.graph = device::make_graph(copy, list_.nodes, list_.parameters.data());
    if (!piece.graph) return false;
    ++counts_.made;
  } else {
    if (piece.copies && piece.graph->set(copy) != cudaSuccess) return false;
    for (std::size_t i = 0; i < list_.nodes.size(); ++i) {
      const KernelNode &before = piece.nodes[i], &now = list_.nodes[i];
      if (same_grid(before, now) &&
          device::same_parameters(piece.parameters.data() + before.at, list_.parameters.data() + now.at,
                                  now.layout->bytes))
        continue;
      if (piece.graph->set(i, now, list_.parameters.data()) != cudaSuccess) return false;
      ++counts_.set;
    }
  }
  if (piece.graph->launch() != cudaSuccess) return false;
  piece.nodes.swap(list_.nodes);
  piece.parameters.swap(list_.parameters);
  ++counts_.launched;
  return true;
}

void Recording::one_by_one(const device::PinnedCopy& copy) noexcept {
  device::raw::copy_later(copy.to, copy.from, copy.bytes);
  for (const KernelNode& node : list_.nodes)
    device::note(node.layout->enqueue(node, list_.parameters.data() + node.at, device::stream()));
  counts_.alone += list_.nodes.size();
}

void Recording::flush() noexcept {
  const std::size_t end = filling_ == kNone ? used_ : filling_;
  const device::PinnedCopy copy{device_ + sent_, host_ + sent_, end - sent_};
  if (list_.nodes.empty() && copy.bytes == 0) return;
  ++rounds_;
  bool done = false;
  if (list_.nodes.size() >= kLeastKernels) {
    try {
      if (Piece* piece = known(copy.bytes > 0)) {
        piece->used = rounds_;
        done = replay(*piece, copy);
        if (!done) piece->graph.reset();
      } else {
        remember(copy.bytes > 0);
      }
    } catch (const std::bad_alloc&) {  // then it goes without a graph
    }
  }
  if (!done) one_by_one(copy);
  list_.nodes.clear();
  list_.parameters.clear();
  sent_ = end;
  if (copy.bytes > 0) here_.sent();
}

}  // namespace innerkv::gpu
