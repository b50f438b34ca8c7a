// cuda/device.h on the emulated GPU. Includes the backend's host code, so that a program has one of the two.
//
// Copies of pinned memory happen as late as they may on a GPU: what was copied to the host is there only once
// a mark is waited for, and the source of a copy to the device that changes before that is a mistake.
#include "cuda/device.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"
#include "simt/device_log.h"
#include "simt/machine.h"

#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#define SIMT_DEVICE_MSAN 1
#include <sanitizer/msan_interface.h>
#endif
#endif

namespace simt {
int allocations_left = std::numeric_limits<int>::max(), graphs_refused = -1;
std::size_t bytes_to_host = 0, bytes_to_device = 0;
std::vector<std::string> device_log;
}  // namespace simt

namespace innerkv::gpu::device {
namespace {

std::map<const std::uint8_t*, std::size_t> regions;
std::map<const std::uint8_t*, std::size_t> pinned;
cudaError_t noted = cudaSuccess;

/// A copy that the host must not rely on yet.
struct Late {
  void* host;
  std::vector<std::uint8_t> bytes;  // what comes to the host, or what had to stay there
  bool to_host;
};
std::vector<Late> late;
std::size_t finished = 0, first_late = 0;  // numbers of copies

/// Structs have padding, which was never written; it must stay the same all the same.
bool same_bytes(const void* memory, const std::vector<std::uint8_t>& bytes) {
  const auto* from = static_cast<const std::uint8_t*>(memory);
  std::vector<std::uint8_t> now(from, from + bytes.size()), before = bytes;
#if defined(SIMT_DEVICE_MSAN)
  __msan_unpoison(now.data(), now.size());
  __msan_unpoison(before.data(), before.size());
#endif
  return now == before;
}

void finish_until(std::size_t end) {
  for (; finished < end; ++finished) {
    Late& copy = late[finished - first_late];
    if (copy.to_host)
      std::memcpy(copy.host, copy.bytes.data(), copy.bytes.size());
    else if (!same_bytes(copy.host, copy.bytes))
      simt::fail(simt::Kind::kPinned, "changed while it was being copied", {});
  }
  late.erase(late.begin(), late.begin() + static_cast<std::ptrdiff_t>(finished - first_late));
  first_late = finished;
}

void count_allocation(std::size_t bytes) {
  if (simt::allocations_left-- <= 0)
    throw Error(ErrorCode::kOutOfMemory, "The emulated GPU refuses " + std::to_string(bytes) + " bytes.");
}

}  // namespace

cudaStream_t stream() { return nullptr; }

void* allocate(std::size_t bytes) {
  count_allocation(bytes);
  void* memory;
  try {
    memory = simt::device_allocate(bytes);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "The emulated GPU has no " + std::to_string(bytes) + " bytes left.");
  }
  regions[static_cast<const std::uint8_t*>(memory)] = bytes;
  return memory;
}

bool owns(const void* memory) {
  const auto* byte = static_cast<const std::uint8_t*>(memory);
  const auto after = regions.upper_bound(byte);
  return after != regions.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

void* allocate_pinned(std::size_t bytes) {
  count_allocation(bytes);
  auto* memory = new std::uint8_t[bytes];
  pinned[memory] = bytes;
  return memory;
}

void release_pinned(void* memory) noexcept {
  if (!memory) return;
  pinned.erase(static_cast<const std::uint8_t*>(memory));
  delete[] static_cast<std::uint8_t*>(memory);
}

namespace raw {

void release(void* memory) noexcept {
  if (!memory) return;
  regions.erase(static_cast<const std::uint8_t*>(memory));
  simt::device_free(memory);
}

void clear(void* memory, std::size_t bytes) noexcept {
  const std::vector<std::uint8_t> zeros(bytes);
  simt::device_upload(memory, zeros.data(), bytes);
}

void copy(void* to, const void* from, std::size_t bytes) noexcept {
  std::vector<std::uint8_t> passing(bytes);
  if (owns(from) && !owns(to)) simt::bytes_to_host += bytes;
  if (owns(to) && !owns(from)) simt::bytes_to_device += bytes;
  if (owns(from))
    simt::device_download(passing.data(), from, bytes);
  else
    std::memcpy(passing.data(), from, bytes);
  if (owns(to))
    simt::device_upload(to, passing.data(), bytes);
  else
    std::memcpy(to, passing.data(), bytes);
}

void copy_later(void* to, const void* from, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  const bool to_host = !owns(to);
  (to_host ? simt::bytes_to_host : simt::bytes_to_device) += bytes;
  auto* host = static_cast<std::uint8_t*>(to_host ? to : const_cast<void*>(from));
  const auto after = pinned.upper_bound(host);
  if (after == pinned.begin() || host + bytes > std::prev(after)->first + std::prev(after)->second)
    simt::fail(simt::Kind::kPinned, "a late copy of memory that is not pinned", {});
  std::vector<std::uint8_t> passing(bytes);
  if (to_host) {
    simt::device_download(passing.data(), from, bytes);
    std::memset(to, 0xa5, bytes);
  } else {
    std::memcpy(passing.data(), from, bytes);
    simt::device_upload(to, from, bytes);
  }
  late.push_back({host, std::move(passing), to_host});
}

void forget(void* event) noexcept { delete static_cast<std::size_t*>(event); }

void set(void*& event) noexcept {
  if (!event) event = new std::size_t;
  *static_cast<std::size_t*>(event) = first_late + late.size();
}

void wait(void* event) noexcept {
  if (event && *static_cast<std::size_t*>(event) > finished) finish_until(*static_cast<std::size_t*>(event));
}

void synchronize() noexcept {
  finish_until(first_late + late.size());
  simt::device_log.push_back("synchronize");
}

void follow(cudaStream_t) noexcept { simt::device_log.push_back("follow"); }
void lead(cudaStream_t) noexcept { simt::device_log.push_back("lead"); }

}  // namespace raw

namespace {

/// Keeps its own copy of everything, as a GPU does: what nobody has set again is replayed as it was.
class EmulatedGraph final : public Graph {
 public:
  EmulatedGraph(const PinnedCopy& copy, std::span<const KernelNode> nodes, const std::byte* parameters)
      : copy_(copy) {
    for (const KernelNode& node : nodes) {
      Kernel& kernel = kernels_.emplace_back();
      kernel.bytes.resize(node.layout->bytes);
      take(kernel, node, parameters);
    }
  }
  cudaError_t set(const PinnedCopy& copy) override {
    if (simt::graphs_refused-- == 0) return cudaErrorUnknown;
    copy_ = copy;
    return cudaSuccess;
  }
  cudaError_t set(std::size_t index, const KernelNode& node, const std::byte* parameters) override {
    if (simt::graphs_refused-- == 0) return cudaErrorUnknown;
    Kernel& kernel = kernels_[index];
    if (node.kernel != kernel.node.kernel || node.layout != kernel.node.layout) return cudaErrorInvalidValue;
    take(kernel, node, parameters);
    return cudaSuccess;
  }
  cudaError_t launch() override {
    if (simt::graphs_refused-- == 0) return cudaErrorUnknown;
    raw::copy_later(copy_.to, copy_.from, copy_.bytes);
    for (const Kernel& kernel : kernels_)
      note(kernel.node.layout->enqueue(kernel.node, kernel.bytes.data(), stream()));
    return cudaSuccess;
  }

 private:
  struct Kernel {
    KernelNode node;
    std::vector<std::byte> bytes;
  };
  static void take(Kernel& kernel, const KernelNode& node, const std::byte* parameters) {
    kernel.node = node;
    std::copy_n(parameters + node.at, kernel.bytes.size(), kernel.bytes.begin());
  }
  PinnedCopy copy_;
  std::vector<Kernel> kernels_;
};

}  // namespace

std::unique_ptr<Graph> make_graph(const PinnedCopy& copy, std::span<const KernelNode> nodes,
                                  const std::byte* parameters) noexcept {
  if (simt::graphs_refused-- == 0) return nullptr;
  return std::make_unique<EmulatedGraph>(copy, nodes, parameters);
}

bool same_parameters(const std::byte* a, const std::byte* b, std::size_t bytes) noexcept {
  return same_bytes(
      a, {reinterpret_cast<const std::uint8_t*>(b), reinterpret_cast<const std::uint8_t*>(b) + bytes});
}

std::string objection(const void* memory, std::size_t bytes) {
  const auto* byte = static_cast<const std::uint8_t*>(memory);
  const auto after = regions.upper_bound(byte);
  const bool inside =
      after != regions.begin() && byte + bytes <= std::prev(after)->first + std::prev(after)->second;
  return inside ? "" : "the emulated GPU has nothing there";
}

MemoryHandle export_memory(void* memory) {
  MemoryHandle handle{};
  std::memcpy(handle.data(), &memory, sizeof memory);
  return handle;
}

void* import_memory(const MemoryHandle& handle) {
  void* memory;
  std::memcpy(&memory, handle.data(), sizeof memory);
  if (!owns(memory)) throw Error(ErrorCode::kInvalidArgument, "The handle opens no memory.");
  return memory;
}

void close_memory(void*) noexcept { simt::device_log.push_back("close"); }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) error = noted;
  noted = cudaSuccess;
  if (error != cudaSuccess)
    throw Error(ErrorCode::kInternal, std::string(what) + " failed on the emulated GPU.");
}

void note(cudaError_t error) noexcept {
  if (noted == cudaSuccess) noted = error;
}

}  // namespace innerkv::gpu::device
