// The half of gpu_backend.h that moves: buffers, tokens and callers' tensors on their way in and out.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../core/error.h"
#include "device.h"
#include "gpu_backend.h"
#include "mirrors.h"
#include "recording.h"
#include "transfer.cuh"

namespace innerkv::gpu {

// ---- buffers ----

PinnedTurns::~PinnedTurns() {
  for (Turn& turn : turns_) {
    turn.mark.wait();
    device::release_pinned(turn.memory);
  }
}

std::uint8_t* PinnedTurns::next(std::size_t bytes) {
  const int coming = (turn_ + 1) % kTurns;
  Turn& turn = turns_[coming];
  turn.mark.wait();
  if (bytes > turn.bytes) {
    const std::size_t wanted = std::max(bytes, 2 * turn.bytes);
    device::release_pinned(std::exchange(turn.memory, nullptr));
    turn.bytes = 0;
    turn.memory = static_cast<std::uint8_t*>(device::allocate_pinned(wanted));
    turn.bytes = wanted;
  }
  turn_ = coming;
  return turn.memory;
}

void PinnedTurns::prepare(std::size_t bytes) {
  for (int i = 0; i < kTurns; ++i) next(bytes);
}

DeviceBuffer::~DeviceBuffer() { device::release(memory_); }

std::uint8_t* DeviceBuffer::reserve(std::size_t bytes) {
  if (bytes > bytes_) {
    const std::size_t wanted = std::max(bytes, bytes_ + bytes_ / 2);
    device::release(std::exchange(memory_, nullptr));
    bytes_ = 0;
    memory_ = static_cast<std::uint8_t*>(device::allocate(wanted));
    bytes_ = wanted;
  }
  return memory_;
}

std::uint8_t* DeviceBuffer::host(std::size_t bytes) {
  if (bytes <= kPinned) return host_ = turns_.next(bytes);
  large_.resize(bytes);
  return host_ = large_.data();
}

void DeviceBuffer::send(std::size_t bytes) noexcept {
  if (bytes == 0) return;
  if (host_ == large_.data()) return device::copy(memory_, host_, bytes);
  device::copy_later(memory_, host_, bytes);
  turns_.sent();
}

void DeviceBuffer::prepare(std::size_t bytes) {
  reserve(bytes);
  turns_.prepare(bytes);
}

void DeviceBuffer::put(const void* from, std::size_t bytes) {
  if (bytes > kPinned) return device::copy(memory_, from, bytes);
  if (bytes > 0) std::memcpy(host(bytes), from, bytes);
  send(bytes);
}

void DeviceBuffer::fetch(void* to, const std::uint8_t* from, std::size_t bytes) {
  if (bytes > kPinned) return device::copy(to, from, bytes);
  std::uint8_t* here = turns_.next(bytes);
  device::copy_later(here, from, bytes);
  turns_.sent();
  turns_.wait();
  if (bytes > 0) std::memcpy(to, here, bytes);
}

Upload::Upload(DeviceBuffer& buffer, std::size_t capacity) : buffer_(buffer), capacity_(capacity) {
  if (Recording* open = Recording::open(); open && open->room(capacity, &host_, &device_)) {
    recording_ = open;
    return;
  }
  device_ = buffer.reserve(capacity);
  host_ = buffer.host(capacity);
}

Upload::~Upload() {
  if (recording_) recording_->filled();
}

std::size_t Upload::place(std::size_t bytes) {
  const std::size_t place = used_;
  used_ += (bytes + kAlign - 1) / kAlign * kAlign;
  if (used_ > capacity_) throw Error(ErrorCode::kInternal, "An upload was planned too small.");
  return place;
}

void Upload::flush() {
  if (!recording_) return buffer_.send(used_);
  std::exchange(recording_, nullptr)->filled();
}

void Download::add(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) parts_.push_back({to, static_cast<const std::uint8_t*>(from), bytes});
}

void Download::finish() {
  if (parts_.empty()) return;
  const auto before = [](const Part& a, const Part& b) { return a.from < b.from; };
  std::sort(parts_.begin(), parts_.end(), before);
  const std::uint8_t* first = parts_.front().from;
  const std::size_t all = static_cast<std::size_t>(parts_.back().from - first) + parts_.back().bytes;
  if (parts_.size() == 1 || all > DeviceBuffer::kPinned) {
    for (const Part& part : parts_) buffer_.fetch(part.to, part.from, part.bytes);
    return;
  }
  std::vector<std::uint8_t> here(all);
  buffer_.fetch(here.data(), first, all);
  for (const Part& part : parts_) std::memcpy(part.to, here.data() + (part.from - first), part.bytes);
}

// ---- memory ----

GpuBackend::GpuBackend(std::optional<cudaStream_t> caller) : caller_(caller) {
  copies_.prepare(kCopyBytes);  // so that copy_rows() takes no memory
}

void* GpuBackend::allocate_memory(std::size_t bytes) { return device::allocate(bytes); }
void GpuBackend::free_memory(void* memory, std::size_t) noexcept { device::release(memory); }
void GpuBackend::clear_memory(void* memory, std::size_t bytes) noexcept { device::clear(memory, bytes); }
void GpuBackend::copy_memory(void* to, const void* from, std::size_t bytes) noexcept {
  device::copy(to, from, bytes);
}
std::string GpuBackend::objection(const void* memory, std::size_t bytes) {
  return device::objection(memory, bytes);
}
MemoryHandle GpuBackend::export_memory(void* memory) { return device::export_memory(memory); }
void* GpuBackend::import_memory(const MemoryHandle& handle) { return device::import_memory(handle); }
void GpuBackend::close_memory(void* memory) noexcept { device::close_memory(memory); }

void GpuBackend::follow_caller() {
  if (!caller_) return;
  device::follow(*caller_);
  device::check(cudaSuccess, "Waiting for the caller's stream");
}

void GpuBackend::settle() {
  if (caller_)
    device::lead(*caller_);
  else
    device::synchronize();
  device::check(cudaSuccess, "The work of a call");
}

// ---- tokens and tensors ----

void GpuBackend::stage(std::span<Staging> numbers) {
  std::size_t bytes = 0;
  for (const Staging& one : numbers) bytes += 2 * one.count;
  std::uint8_t* there = staged_.reserve(bytes);
  std::uint8_t* here = bytes <= DeviceBuffer::kPinned ? staged_.host(bytes) : nullptr;
  std::size_t placed = 0;
  for (Staging& one : numbers) {
    one.ready = reinterpret_cast<const std::uint16_t*>(there + placed);
    if (here)
      std::memcpy(here + placed, one.from, 2 * one.count);
    else
      device::copy(there + placed, one.from, 2 * one.count);
    placed += 2 * one.count;
  }
  if (here) staged_.send(bytes);
}

void GpuBackend::copy_rows(std::span<const RowCopy> copies, int row) noexcept {
  constexpr std::size_t kBatch = (kCopyBytes - Upload::room<RowCopy>(0)) / sizeof(RowCopy);
  for (std::size_t first = 0; first < copies.size(); first += kBatch) {
    const auto batch = copies.subspan(first, std::min(kBatch, copies.size() - first));
    Upload upload(copies_, Upload::room<RowCopy>(batch.size()));
    RowCopy* here;
    const RowCopy* there = upload.add(batch.size(), &here);
    std::copy(batch.begin(), batch.end(), here);
    upload.flush();
    int rows = 1;
    for (const RowCopy& copy : batch) rows = std::max(rows, copy.rows);
    launches_begin();
    device::note(launch(copy_window_rows,
                        dim3(dim(std::min(rows, 1024)), static_cast<unsigned>(batch.size())), dim3(64), 0,
                        device::stream(), there, row));
    launches_end();
  }
}

void GpuBackend::take(std::span<Intake> tensors) {
  constexpr std::size_t kAlign = 256, kGrid = 32768;
  const auto room = [](const Intake& t) {
    return t.dtype == t.as ? 0 : (dtype_bytes(t.as) * t.count + kAlign - 1) / kAlign * kAlign;
  };
  std::size_t bytes = 0, most = 1;
  for (const Intake& t : tensors) {
    bytes += room(t);
    most = std::max(most, t.count);
  }
  std::uint8_t* next = taken_.reserve(bytes);
  Upload upload(intake_, Upload::room<IntakeArgs>(tensors.size()) + Upload::room<unsigned>(tensors.size()));
  IntakeArgs* args;
  unsigned* bad;
  const IntakeArgs* args_there = upload.add(tensors.size(), &args);
  unsigned* bad_there = upload.add(tensors.size(), &bad);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Intake& t = tensors[i];
    const bool converts = t.dtype != t.as;
    t.ready = converts ? next : t.from;
    args[i] = {t.from, converts ? next : nullptr, bad_there + i, t.count, t.dtype, t.as == Dtype::kF16};
    bad[i] = 0;
    next += room(t);
  }
  upload.flush();
  const unsigned blocks =
      static_cast<unsigned>(std::min<std::size_t>((most + kIntakeThreads - 1) / kIntakeThreads, 1024));
  launches_begin();
  for (std::size_t first = 0; first < tensors.size(); first += kGrid)
    run("take in tensors", take_numbers,
        dim3(blocks, static_cast<unsigned>(std::min(kGrid, tensors.size() - first))), kIntakeThreads, 0,
        args_there + first);
  launches_end();
  std::vector<unsigned> found(tensors.size());
  intake_.fetch(found.data(), reinterpret_cast<const std::uint8_t*>(bad_there),
                sizeof(unsigned) * found.size());
  device::check(cudaSuccess, "take in tensors");
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].finite = found[i] == 0;
}

}  // namespace innerkv::gpu
