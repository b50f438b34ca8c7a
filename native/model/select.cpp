#include <cstring>
#include <string>

#include "../core/error.h"
#include "kernels.h"

namespace innerkv {

#if !defined(__x86_64__)
const ModelKernels* avx2_model_kernels() { return nullptr; }
const ModelKernels* avx512_model_kernels() { return nullptr; }
#endif
#if !defined(__aarch64__)
const ModelKernels* neon_model_kernels() { return nullptr; }
#endif

const ModelKernels& model_kernels(const char* isa) {
  for (const ModelKernels* table :
       {avx512_model_kernels(), avx2_model_kernels(), neon_model_kernels(), scalar_model_kernels()})
    if (table && std::strcmp(table->isa, isa) == 0) return *table;
  throw Error(ErrorCode::kUnsupported, std::string("The model runner has no kernels for ") + isa + ".");
}

}  // namespace innerkv
