// cuBLAS where the machine has it: found at run time, never linked, so that nothing depends on it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace innerkv::gpu {

/// The few functions of cuBLAS that are used, as its documentation declares them; enumerations are ints.
struct CublasFunctions {
  int (*create)(void** handle) = nullptr;                   // cublasCreate_v2
  int (*destroy)(void* handle) = nullptr;                   // cublasDestroy_v2
  int (*set_stream)(void* handle, void* stream) = nullptr;  // cublasSetStream_v2
  int (*property)(int which, int* value) = nullptr;         // cublasGetProperty: 0 major, 1 minor
  /// cublasGemmEx: column-major C = alpha op(A) op(B) + beta C.
  int (*gemm)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
              int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
              int ldc, int compute_type, int algorithm) = nullptr;

  explicit operator bool() const { return gemm != nullptr; }
};

/// Those of libcublas.so.13 or libcublas.so.12, or none. The library stays loaded.
CublasFunctions find_cublas() noexcept;
/// 1000 * major + 10 * minor, 0 without cuBLAS.
int cublas_version(const CublasFunctions& functions) noexcept;

class Cublas {
 public:
  /// nullptr when there is no cuBLAS or it refuses to start. `stream`: a cudaStream_t.
  static std::unique_ptr<Cublas> open(const CublasFunctions& functions, void* stream);
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  std::string name() const;
  /// out[token * rows + row] = weights[row] . x[token], both binary16 [.][stride], float32 sums. False when
  /// cuBLAS refuses; nothing is written then.
  bool multiply(const std::uint16_t* weights, const std::uint16_t* x, int rows, int tokens, int stride,
                float* out) const;

 private:
  Cublas(const CublasFunctions& functions, void* handle) : functions_(functions), handle_(handle) {}
  CublasFunctions functions_;
  void* handle_;
};

}  // namespace innerkv::gpu
