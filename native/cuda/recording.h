// A decoding step as CUDA graphs. While a recording is open on a thread, launch() puts kernels down and
// Upload collects their arguments; whatever else is asked of the device first enqueues what there is
// (device.h), so that the order is always the order asked, and a caller need not know of any of this.
//
// A piece of work, which is one copy of arguments and the kernels behind it, is enqueued one by one the first
// time. When the same kernels come again, they become a graph; later steps replay it with what has changed:
// the place of the arguments in pinned memory every time, grids and addresses now and then. Uploads lie at
// the same device addresses in every step as long as their sizes stay.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"

namespace innerkv::gpu {

class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  ~Recording() { end(); }

  /// Of this thread, or null.
  static Recording* open();
  /// Opens it; one may be open on a thread. Throws Error{kOutOfMemory}.
  void begin();
  /// Enqueues what there is.
  void flush() noexcept;
  /// The same, and closes it.
  void end() noexcept;

  /// Room for arguments that goes to the device before the next kernel that is put down after filled().
  /// False: there is none, or another one is still being filled.
  bool room(std::size_t bytes, std::uint8_t** host, std::uint8_t** device);
  void filled() noexcept { filling_ = kNone; }

  struct Counts {
    std::size_t alone = 0;     // kernels enqueued one by one
    std::size_t made = 0;      // graphs
    std::size_t launched = 0;  // graphs
    std::size_t set = 0;       // kernels of graphs that were given other parameters
  };
  const Counts& counts() const { return counts_; }

 private:
  static constexpr std::size_t kNone = ~std::size_t{0}, kLeastRoom = std::size_t{256} << 10,
                               kMostRoom = std::size_t{64} << 20;
  static constexpr std::size_t kLeastKernels = 6;  // fewer are enqueued one by one
  static constexpr std::size_t kMostPieces = 64;   // of both kinds, remembered

  /// Kernels that came before: in the second round with a graph.
  struct Piece {
    std::vector<KernelNode> nodes;
    std::vector<std::byte> parameters;
    bool copies = false;
    std::unique_ptr<device::Graph> graph;
    std::uint64_t used = 0;
  };
  Piece* known(bool copies);
  void remember(bool copies);
  bool replay(Piece& piece, const device::PinnedCopy& copy);
  void one_by_one(const device::PinnedCopy& copy) noexcept;

  LaunchList list_;
  std::vector<Piece> pieces_;
  std::uint64_t rounds_ = 0;
  DeviceBuffer there_;
  PinnedTurns here_;
  std::uint8_t *device_ = nullptr, *host_ = nullptr;
  std::size_t capacity_ = 0, used_ = 0, sent_ = 0, filling_ = kNone;
  std::size_t asked_ = 0;  // room, since begin()
  Counts counts_;
};

}  // namespace innerkv::gpu
