// What a compiler calls at every memory access of code built with -fsanitize=thread,alignment,bounds,
// implemented here instead of by the sanitizers' runtimes: it finds the mistakes of the emulated threads,
// names their source lines, and costs nanoseconds. Empty in builds that use the real runtimes.
#include "simt/machine.h"

namespace simt {
bool checks_memory() {
#if defined(SIMT_HOOKS)
  return true;
#else
  return false;
#endif
}
}  // namespace simt

#if defined(SIMT_HOOKS)

extern "C" char __executable_start, _end;  // of the program's image, by the linker

namespace simt {
namespace {

using shadow::Access;

bool within(const void* address, const void* base, std::size_t bytes) {
  return static_cast<std::size_t>(static_cast<const char*>(address) - static_cast<const char*>(base)) < bytes;
}

// Inlined, with `bytes` known, and the rare cases apart: kernels spend a fifth of their time in these.
[[gnu::always_inline]] inline void hook(const void* address, std::size_t bytes, Access kind,
                                        const void* instruction) {
  if (!machine.watching) return;
  if (!within(address, shadow::region.base, shadow::region.bytes)) {
    if (within(address, machine.stacks, (kStackBytes + kStackGuard) * kMaxThreads)) return;
    if (within(address, &__executable_start, static_cast<std::size_t>(&_end - &__executable_start))) return;
    if (within(address, machine.pack, machine.pack_bytes)) return;
  }
  shadow::access(address, bytes, kind, instruction, {});
}

[[gnu::cold, gnu::noinline]] void misaligned(std::size_t bytes, const void* instruction) {
  if (!machine.watching) return;
  const Aside aside;
  fail(Kind::kMisaligned, "an access of " + std::to_string(bytes) + " bytes that is not aligned", {},
       instruction);
}

[[gnu::always_inline]] inline void aligned_hook(const void* address, std::size_t bytes, Access kind,
                                                const void* instruction) {
  if (reinterpret_cast<std::uintptr_t>(address) % (bytes < 8 ? bytes : 8) != 0)
    misaligned(bytes, instruction);
  hook(address, bytes, kind, instruction);
}

struct SourceLocation {
  const char* file;
  std::uint32_t line, column;
};

}  // namespace
}  // namespace simt

using simt::Access;
extern "C" {

#define SIMT_HOOK(bytes)                                                       \
  void __tsan_read##bytes(void* p) {                                           \
    simt::aligned_hook(p, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                            \
  void __tsan_write##bytes(void* p) {                                          \
    simt::aligned_hook(p, bytes, Access::kWrite, __builtin_return_address(0)); \
  }                                                                            \
  void __tsan_unaligned_read##bytes(void* p) {                                 \
    simt::hook(p, bytes, Access::kRead, __builtin_return_address(0));          \
  }                                                                            \
  void __tsan_unaligned_write##bytes(void* p) {                                \
    simt::hook(p, bytes, Access::kWrite, __builtin_return_address(0));         \
  }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
#undef SIMT_HOOK

void __tsan_read_range(void* p, unsigned long bytes) {
  simt::hook(p, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
  simt::hook(p, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}

// Host code in the same files uses these; kernels have CUDA's atomics.
#define SIMT_ATOMIC(bits, type)                                                                        \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, 5); }       \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, 5); }       \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                                 \
    return __atomic_exchange_n(p, v, 5);                                                               \
  }                                                                                                    \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {                                \
    return __atomic_fetch_add(p, v, 5);                                                                \
  }                                                                                                    \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) {                                \
    return __atomic_fetch_sub(p, v, 5);                                                                \
  }                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* seen, type v, int, int) { \
    return __atomic_compare_exchange_n(p, seen, v, false, 5, 5);                                       \
  }                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* seen, type v, int, int) {   \
    return __atomic_compare_exchange_n(p, seen, v, true, 5, 5);                                        \
  }
SIMT_ATOMIC(8, unsigned char)
SIMT_ATOMIC(16, unsigned short)
SIMT_ATOMIC(32, unsigned)
SIMT_ATOMIC(64, unsigned long)
#undef SIMT_ATOMIC
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

void __ubsan_handle_type_mismatch_v1(simt::SourceLocation* at, unsigned long) {
  simt::fail_here(simt::Kind::kMisaligned, "an access that its type's alignment forbids",
                  {at->file, static_cast<int>(at->line)});
}
void __ubsan_handle_out_of_bounds(simt::SourceLocation* at, unsigned long index) {
  simt::fail_with(simt::Kind::kOutside, {at->file, static_cast<int>(at->line)}, [&] {
    return "index " + std::to_string(static_cast<long>(index)) + " outside of its array";
  });
}
}

#endif
