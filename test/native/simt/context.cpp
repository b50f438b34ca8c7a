#include "simt/context.h"

#include <pthread.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {

// Callee-saved registers go to the old stack, the stack pointers change places, and the return lands in the
// other flow. A new stack is laid out as if its flow had been suspended just before `entry`.
#if defined(__x86_64__)
const char* const kContextKind = "x86-64";
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch,@function
  .p2align 4
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch,.-simt_switch
)");
static void* fresh_stack(char* top, void (*entry)()) {
  auto* words = reinterpret_cast<std::uintptr_t*>(top);
  *--words = 0;  // a return address that ends backtraces, 8 bytes below a multiple of 16 as after any call
  *--words = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--words = 0;
  return words;
}
#elif defined(__aarch64__)
const char* const kContextKind = "aarch64";
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch,%function
  .p2align 4
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size simt_switch,.-simt_switch
)");
static void* fresh_stack(char* top, void (*entry)()) {
  auto* words = reinterpret_cast<std::uintptr_t*>(top) - 20;
  for (int i = 0; i < 20; ++i) words[i] = 0;
  words[11] = reinterpret_cast<std::uintptr_t>(entry);  // x30, the link register
  return words;
}
#else
const char* const kContextKind = "ucontext";
#endif

#if defined(__x86_64__) || defined(__aarch64__)
static void prepare(Context& context, void (*entry)()) {
  context.saved = fresh_stack(context.stack + context.stack_bytes, entry);
}
static inline void jump(Context& from, Context& to) { simt_switch(&from.saved, to.saved); }
#else
static ucontext_t* memory_of(Context& context) {
  if (!context.saved) context.saved = new ucontext_t;  // reused by the next block, never freed
  return static_cast<ucontext_t*>(context.saved);
}
static void prepare(Context& context, void (*entry)()) {
  ucontext_t* memory = memory_of(context);
  getcontext(memory);
  memory->uc_stack.ss_sp = context.stack;
  memory->uc_stack.ss_size = context.stack_bytes;
  memory->uc_link = nullptr;
  makecontext(memory, entry, 0);
}
static inline void jump(Context& from, Context& to) { swapcontext(memory_of(from), memory_of(to)); }
#endif

void context_adopt(Context& self) {
  if (!self.stack) {
    pthread_attr_t attributes;
    void* lowest = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &self.stack_bytes);
    pthread_attr_destroy(&attributes);
    self.stack = static_cast<char*>(lowest);
  }
#if defined(SIMT_TSAN)
  self.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void context_make(Context& context, void (*entry)()) {
  context.asan_stack = nullptr;
  prepare(context, entry);
#if defined(SIMT_TSAN)
  if (!context.tsan_fiber) context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void context_switch(Context& from, Context& to, [[maybe_unused]] bool dying) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.asan_stack, to.stack, to.stack_bytes);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  jump(from, to);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
#endif
}

void context_started() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void context_drop([[maybe_unused]] Context& context, [[maybe_unused]] bool abandoned) {
#if defined(SIMT_ASAN)
  if (abandoned) __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
#if defined(SIMT_TSAN)
  if (abandoned) {  // what it did happened before whatever comes next
    void* self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(context.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_switch_to_fiber(self, 0);
    __tsan_destroy_fiber(context.tsan_fiber);
    context.tsan_fiber = nullptr;
  }
#endif
}

}  // namespace simt
