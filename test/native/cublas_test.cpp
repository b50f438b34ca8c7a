// What is said to cuBLAS, held against a library that does what its documentation says, without a GPU.
#include "cuda/cublas.h"

#include <vector>

#include "numerics/half.h"
#include "support.h"

namespace innerkv::test {
namespace {

int handles = 0;
bool refuse_stream = false, refuse_gemm = false;
void* seen_stream = nullptr;

int create(void** handle) {
  ++handles;
  *handle = &handles;
  return 0;
}
int destroy(void*) {
  --handles;
  return 0;
}
int set_stream(void*, void* stream) {
  seen_stream = stream;
  return refuse_stream ? 1 : 0;
}
int property(int which, int* value) {
  *value = which == 0 ? 13 : 2;
  return 0;
}

/// Column-major C = alpha op(A) op(B) + beta C, binary16 in and float32 out.
int gemm(void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
         int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
         int compute, int algorithm) {
  if (refuse_gemm) return 15;
  CHECK(a_type == 2 && b_type == 2 && c_type == 0 && compute == 68 && algorithm == -1);
  CHECK(lda >= (op_a ? k : m) && ldb >= (op_b ? n : k) && ldc >= m);
  const auto value = [](const void* matrix, int leading, int transposed, int row, int column) {
    const std::size_t at_ =
        transposed ? at(row) * at(leading) + at(column) : at(column) * at(leading) + at(row);
    return static_cast<double>(half_value(static_cast<const std::uint16_t*>(matrix)[at_]));
  };
  for (int column = 0; column < n; ++column)
    for (int row = 0; row < m; ++row) {
      double sum = 0;
      for (int i = 0; i < k; ++i) sum += value(a, lda, op_a, row, i) * value(b, ldb, op_b, i, column);
      float& to = static_cast<float*>(c)[at(column) * at(ldc) + at(row)];
      to = static_cast<float>(static_cast<double>(*static_cast<const float*>(alpha)) * sum +
                              static_cast<double>(*static_cast<const float*>(beta) * to));
    }
  return 0;
}

gpu::CublasFunctions functions() {
  gpu::CublasFunctions all;
  all.create = create;
  all.destroy = destroy;
  all.set_stream = set_stream;
  all.property = property;
  all.gemm = gemm;
  return all;
}

TEST("products of many rows are asked for in cuBLAS's order of matrices") {
  int stream = 0;
  {
    const auto cublas = gpu::Cublas::open(functions(), &stream);
    CHECK(cublas && seen_stream == &stream && handles == 1);
    CHECK(cublas->name() == "cuBLAS 13.2");
    const int rows = 5, tokens = 3, stride = 64;
    check::Random random(1);
    std::vector<std::uint16_t> w(at(rows * stride)), x(at(tokens * stride));
    for (auto* matrix : {&w, &x})
      for (auto& bits : *matrix) bits = half_bits(static_cast<float>(random.below(9) - 4));
    std::vector<float> out(at(tokens * rows), 1e30f);
    CHECK(cublas->multiply(w.data(), x.data(), rows, tokens, stride, out.data()));
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r) {
        float exact = 0;  // integers
        for (int k = 0; k < stride; ++k)
          exact += half_value(w[at(r * stride + k)]) * half_value(x[at(t * stride + k)]);
        CHECK(out[at(t * rows + r)] == exact);
      }
    refuse_gemm = true;
    CHECK(!cublas->multiply(w.data(), x.data(), rows, tokens, stride, out.data()));
  }
  CHECK(handles == 0);
}

TEST("without cuBLAS, or with one that refuses, there is none") {
  CHECK(!gpu::Cublas::open({}, nullptr));
  CHECK(gpu::cublas_version({}) == 0);
  refuse_stream = true;
  CHECK(!gpu::Cublas::open(functions(), nullptr));
  CHECK(handles == 0);
  CHECK(gpu::cublas_version(functions()) == 13020);
  const int version = gpu::cublas_version(gpu::find_cublas());
  CHECK(version == 0 || version >= 12000);
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("cublas", argc, argv); }
