// Switching between stacks: one CUDA thread of the emulated block is one stack.
//
// Own assembly on x86-64 and aarch64, because ucontext makes a system call at every switch; ucontext
// elsewhere. AddressSanitizer and ThreadSanitizer are told about every switch.
#pragma once

#include <cstddef>

namespace simt {

/// A suspended flow of control. `stack` is empty for the flow that started the program.
struct Context {
  void* saved = nullptr;  // stack pointer (assembly) or ucontext_t
  char* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* asan_stack = nullptr;  // AddressSanitizer's shadow of the stack while suspended
  void* tsan_fiber = nullptr;
};

/// What performs the switches: "x86-64", "aarch64" or "ucontext".
extern const char* const kContextKind;

/// Fills in the flow that calls this.
void context_adopt(Context& self);
/// Prepares `context`, whose stack is set, to run `entry`, which must never return.
void context_make(Context& context, void (*entry)());
/// Suspends `from` and continues `to`; a dying flow will not be continued again.
void context_switch(Context& from, Context& to, bool dying);
/// To be called first by an `entry`.
void context_started();
/// Frees what a sanitizer keeps about a flow that ended or, its functions never having returned, was
/// abandoned.
void context_drop(Context& context, bool abandoned);

}  // namespace simt
