// The inner loops of the model runner, one table per instruction set. Plain pointers and sizes only: these
// functions are compiled with instruction sets the rest of the program must not use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../platform.h"
#include "tensor_type.h"

namespace innerkv {

inline constexpr int kActivationGroup = 32;  // activations that share a step
inline constexpr int kPanelRows = 32;        // rows of weights that are unpacked together
inline constexpr int kFloatPadding = 16;     // rows of floats are padded with zeros to a multiple of it

constexpr int padded(int columns) { return (columns + kFloatPadding - 1) / kFloatPadding * kFloatPadding; }

template <class T>
INNERKV_HD T load_as(const void* at) {
  T value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

/// Activations in 8 bits: x = step * code, one step per 32 columns.
struct ByteActivations {
  std::int8_t* codes;  // [vectors][columns]
  float* steps;        // [vectors][columns / 32]
  float* totals;       // [vectors][columns / 16] step * sum of 16 codes
};

/// Rows of quantised weights times vectors of 8-bit activations.
struct IntegerDotArgs {
  TensorType type;
  const std::uint8_t* weights;  // [rows] of whole blocks, row_bytes apart
  std::size_t row_bytes;
  int rows, columns, vectors;
  ByteActivations x;
  float* out;  // out[vector * out_stride + row]
  std::ptrdiff_t out_stride;
};

/// kPanelRows rows of quantised weights in the layout of products with many vectors.
struct PackedRows {
  std::uint8_t* codes;      // [columns / 4][kPanelRows][4]
  float *scales, *offsets;  // [columns that share them][kPanelRows], at most columns / 16
};

struct PackArgs {
  TensorType type;
  const std::uint8_t* weights;  // [rows] of whole blocks, row_bytes apart
  std::size_t row_bytes;
  int rows, columns;  // rows <= kPanelRows; those that are missing become zeros
  PackedRows to;
};

/// As IntegerDotArgs, and the sums of a vector do not depend on how many there are.
struct PackedDotArgs {
  TensorType type;
  PackedRows panel;
  int rows, columns, vectors;
  ByteActivations x;
  float* out;
  std::ptrdiff_t out_stride;
};

/// out[t * out_stride + r] = sum over k of w[r * stride + k] * x[t * stride + k]. Sums are made in an order
/// that depends on `stride` only, so a token's result does not depend on how many others there are.
struct FloatDotArgs {
  const float* weights;  // [rows][stride], zero from the last column on
  const float* x;        // [tokens][stride]
  std::ptrdiff_t stride;
  int rows, tokens;
  float* out;
  std::ptrdiff_t out_stride;
};

struct ModelKernels {
  const char* isa;
  /// `count` numbers, whole blocks, to float32.
  void (*dequantise)(TensorType type, const std::uint8_t* blocks, int count, float* out);
  /// One vector (columns a multiple of 32) to 8 bits.
  void (*quantise)(const float* x, int columns, const ByteActivations& to);
  void (*integer_dot)(const IntegerDotArgs& args);
  void (*pack)(const PackArgs& args);
  void (*packed_dot)(const PackedDotArgs& args);
  void (*float_dot)(const FloatDotArgs& args);
  /// gate[i] <- gate[i] / (1 + exp(-gate[i])) * up[i], count a multiple of 16.
  void (*swiglu)(float* gate, const float* up, int count);
  /// Sum of exp(x[i] - shift).
  double (*sum_exp)(const float* x, int count, float shift);
};

/// The table of an instruction set by the name that select_kernels() of native/cpu gave.
const ModelKernels& model_kernels(const char* isa);

const ModelKernels* scalar_model_kernels();
const ModelKernels* avx2_model_kernels();  // nullptr where not built
const ModelKernels* avx512_model_kernels();
const ModelKernels* neon_model_kernels();

}  // namespace innerkv
