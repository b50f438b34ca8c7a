// Memory of a cache: fixed-size slots, taken and given back in O(1), never more bytes than the budget.
//
// Slots of one size form a class. Memory is got from the backend in slabs of several slots; an idle slab
// goes back when another class needs its room, so that classes of different layers can share one budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace innerkv {

class Backend;
class Pool;

/// Owning handle of one slot; gives it back when destroyed. The pool must outlive it (the cache sees to
/// that).
class Slot {
 public:
  Slot() = default;
  Slot(Slot&& other) noexcept { swap(other); }
  Slot& operator=(Slot&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Slot() { reset(); }
  void reset();
  std::uint8_t* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  friend class Pool;
  struct Slab;
  Slot(Slab* slab, std::uint8_t* data) : slab_(slab), data_(data) {}
  void swap(Slot& other) noexcept {
    std::swap(slab_, other.slab_);
    std::swap(data_, other.data_);
  }
  Slab* slab_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

class Pool {
 public:
  Pool(Backend& backend, std::size_t budget_bytes);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  /// A zero-filled slot, or Error{kOutOfMemory}.
  Slot take(std::size_t bytes);

  std::size_t budget_bytes() const { return budget_; }
  std::size_t used_bytes() const { return used_; }          // in slots handed out
  std::size_t reserved_bytes() const { return reserved_; }  // in slabs

 private:
  friend class Slot;
  struct SizeClass;
  void give(Slot::Slab* slab, std::uint8_t* data);
  Slot::Slab* grow(SizeClass& cls);
  void release_idle_slabs(std::size_t wanted);

  Backend& backend_;
  std::size_t budget_, used_ = 0, reserved_ = 0;
  std::map<std::size_t, std::unique_ptr<SizeClass>> classes_;
};

}  // namespace innerkv
