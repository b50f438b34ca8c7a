// Counts what the program holds through operator new, exactly. Included by one file of a test program: it
// replaces the global operators. Memory that a backend gets by other means is not counted.
#pragma once

#include <malloc.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace innerkv::test {

inline std::atomic<std::size_t> heap_bytes{0}, heap_peak{0};

inline void* heap_take(std::size_t bytes, std::size_t align) {
  if (bytes == 0) bytes = 1;
  void* memory = align <= alignof(std::max_align_t)
                     ? std::malloc(bytes)
                     : std::aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!memory) throw std::bad_alloc();
  const std::size_t now = heap_bytes += malloc_usable_size(memory);
  for (std::size_t peak = heap_peak; now > peak && !heap_peak.compare_exchange_weak(peak, now);) {
  }
  return memory;
}

inline void heap_give(void* memory) noexcept {
  if (memory) heap_bytes -= malloc_usable_size(memory);
  std::free(memory);
}

}  // namespace innerkv::test

void* operator new(std::size_t bytes) { return innerkv::test::heap_take(bytes, 1); }
void* operator new[](std::size_t bytes) { return innerkv::test::heap_take(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t align) {
  return innerkv::test::heap_take(bytes, static_cast<std::size_t>(align));
}
void* operator new[](std::size_t bytes, std::align_val_t align) {
  return innerkv::test::heap_take(bytes, static_cast<std::size_t>(align));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {  // std::stable_sort's
  try {
    return innerkv::test::heap_take(bytes, 1);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { innerkv::test::heap_give(memory); }
void operator delete[](void* memory) noexcept { innerkv::test::heap_give(memory); }
void operator delete(void* memory, std::size_t) noexcept { innerkv::test::heap_give(memory); }
void operator delete[](void* memory, std::size_t) noexcept { innerkv::test::heap_give(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { innerkv::test::heap_give(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { innerkv::test::heap_give(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  innerkv::test::heap_give(memory);
}
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  innerkv::test::heap_give(memory);
}
