#include "cublas.h"

#include <dlfcn.h>

namespace innerkv::gpu {

namespace {

// cublas_api.h and library_types.h.
constexpr int kNoTranspose = 0, kTranspose = 1, kHalf = 2, kFloat = 0, kComputeFloat = 68, kDefault = -1;

template <class F>
bool resolve(void* library, const char* name, F& function) {
  void* const found = dlsym(library, name);
  static_assert(sizeof found == sizeof function);
  __builtin_memcpy(&function, &found, sizeof found);
  return found != nullptr;
}

CublasFunctions search() noexcept {
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    CublasFunctions functions;
    if (resolve(library, "cublasCreate_v2", functions.create) &&
        resolve(library, "cublasDestroy_v2", functions.destroy) &&
        resolve(library, "cublasSetStream_v2", functions.set_stream) &&
        resolve(library, "cublasGetProperty", functions.property) &&
        resolve(library, "cublasGemmEx", functions.gemm))
      return functions;
    dlclose(library);
  }
  return {};
}

}  // namespace

CublasFunctions find_cublas() noexcept {
  static const CublasFunctions functions = search();
  return functions;
}

int cublas_version(const CublasFunctions& functions) noexcept {
  int major = 0, minor = 0;
  if (!functions || functions.property(0, &major) != 0 || functions.property(1, &minor) != 0) return 0;
  return 1000 * major + 10 * minor;
}

std::unique_ptr<Cublas> Cublas::open(const CublasFunctions& functions, void* stream) {
  void* handle = nullptr;
  if (!functions || functions.create(&handle) != 0) return nullptr;
  std::unique_ptr<Cublas> cublas(new Cublas(functions, handle));
  return functions.set_stream(handle, stream) == 0 ? std::move(cublas) : nullptr;
}

Cublas::~Cublas() { functions_.destroy(handle_); }

std::string Cublas::name() const {
  const int version = cublas_version(functions_);
  return "cuBLAS " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

bool Cublas::multiply(const std::uint16_t* weights, const std::uint16_t* x, int rows, int tokens, int stride,
                      float* out) const {
  // Our rows are columns there: out (rows x tokens) = weights^T (stride x rows) times x (stride x tokens).
  const float one = 1, zero = 0;
  return functions_.gemm(handle_, kTranspose, kNoTranspose, rows, tokens, stride, &one, weights, kHalf,
                         stride, x, kHalf, stride, &zero, out, kFloat, rows, kComputeFloat, kDefault) == 0;
}

}  // namespace innerkv::gpu
