#include "backend.h"

#include "error.h"

namespace innerkv {

MemoryHandle Backend::export_memory(void*) {
  throw Error(ErrorCode::kUnsupported, "Memory of this backend cannot be shared between processes.");
}

void* Backend::import_memory(const MemoryHandle&) {
  throw Error(ErrorCode::kUnsupported, "This backend cannot open memory of other processes.");
}

}  // namespace innerkv
