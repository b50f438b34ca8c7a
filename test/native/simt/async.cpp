// cp.async: the bytes of a copy are taken at issue and arrive at the wait that covers it, never before.
#include <cstring>

#include "simt/machine.h"

namespace simt {

void cp_async(void* to, const void* from, unsigned bytes, unsigned from_bytes, Where where) {
  const Aside aside;
  if (reinterpret_cast<std::uintptr_t>(to) % bytes || reinterpret_cast<std::uintptr_t>(from) % bytes)
    fail(Kind::kMisaligned, "cp.async of " + std::to_string(bytes) + " bytes, not aligned to them", where);
  if (shadow::active()) {
    const auto offset = static_cast<std::size_t>(static_cast<char*>(to) - shadow::region.base);
    if (offset >= shadow::kSharedBytes) fail(Kind::kOutside, "cp.async to memory that is not shared", where);
    shadow::access(to, bytes, shadow::Access::kWrite, nullptr, where);
    if (from_bytes) shadow::access(from, from_bytes, shadow::Access::kRead, nullptr, where);
    shadow::set_pending(to, bytes);
  }
  Fiber& me = machine.fibers[machine.current];
  Copy copy{static_cast<char*>(to), {}, bytes, me.group};
  if (from_bytes) std::memcpy(copy.bytes, from, from_bytes);
  std::memset(to, 0xff, bytes);
  const Unseen unseen;
  me.copies.push_back(copy);
}
void cp_async_commit() { ++machine.fibers[machine.current].group; }
void cp_async_wait(unsigned pending) {
  const Aside aside;
  Fiber& me = machine.fibers[machine.current];
  const auto late = [&](const Copy& copy) { return copy.group + pending >= me.group; };
  for (const Copy& copy : me.copies) {
    if (late(copy)) continue;
    std::memcpy(copy.to, copy.bytes, copy.size);
    if (shadow::active()) shadow::arrive(copy.to, copy.size);
  }
  const Unseen unseen;
  std::erase_if(me.copies, [&](const Copy& copy) { return !late(copy); });
}

}  // namespace simt
