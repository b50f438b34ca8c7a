// Chooses the kernel table once, by what the machine can run; never silently something else than what was
// asked for.
#include <array>
#include <cstring>
#include <string>

#include "../core/error.h"
#include "kernels.h"

namespace innerkv {

#if !defined(__x86_64__)
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif
#if !defined(__aarch64__)
const Kernels* neon_kernels() { return nullptr; }
#endif

const Kernels* const* available_kernels() {
  static const auto tables = [] {
    std::array<const Kernels*, 5> found{};
    std::size_t count = 0;
    for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), neon_kernels(), scalar_kernels()})
      if (candidate) found[count++] = candidate;
    return found;
  }();
  return tables.data();
}

const Kernels& select_kernels(const char* forced) {
  const Kernels* const* tables = available_kernels();
  if (!forced || !*forced) return *tables[0];
  std::string names;
  for (; *tables; ++tables) {
    if (std::strcmp((*tables)->isa, forced) == 0) return **tables;
    names += names.empty() ? "" : ", ";
    names += (*tables)->isa;
  }
  throw Error(ErrorCode::kUnsupported, std::string("INNERKV_ISA=") + forced +
                                           " is not available on this machine. Available: " + names + ".");
}

}  // namespace innerkv
