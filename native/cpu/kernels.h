// The inner loops of the CPU backend, one table per instruction set. Plain pointers and sizes only: these
// functions are compiled with instruction sets the rest of the program must not use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../format/codes.h"
#include "../format/group.h"
#include "../format/outliers.h"
#include "../numerics/hadamard.h"

namespace innerkv {

inline constexpr int kMaxRows =
    16;  // query rows (query tokens x query heads of a KV head) that share one pass over a page

/// 16-bit integers split as 256 hi + lo, both signed bytes, with one step per vector: value = step * (256 hi
/// + lo).
struct DotArgs {
  const std::uint8_t* bytes;   // [quads][rows][4] one code per byte
  int rows, quads, bits;       // rows a multiple of 16; first row..: see row_begin
  int row_begin, row_end;      // multiples of 16, except that row_end may be rows
  const std::int8_t *hi, *lo;  // [vectors][4 * quads], vectors `stride` bytes apart
  std::ptrdiff_t stride;
  int vectors;         // <= kMaxRows
  std::int32_t* sums;  // [vectors][rows]: sum over the reduction of code * (256 hi + lo)
};

/// Feedback rounding of keys of one head. docs/format.md section 6.
struct FeedbackArgs {
  const float* x;  // [tokens][D]
  int tokens, head_dim, bits;
  const std::uint8_t* order;  // [D] channel rounded as the i-th; the matrices below are in this order
  const float *feedback, *pivot, *metric;
  const float* ratios;
  int ratio_count;
  bool unbiased;
  std::uint8_t* codes;    // [tokens][D]
  std::uint16_t* scales;  // [tokens]
};

/// A query in the basis of stored keys, as integers: rotate, dot with the mean, multiply by lam, Hadamard,
/// split.
struct QueryArgs {
  const float* q;  // [D]
  int head_dim;
  const float *cos, *sin;  // [D] or nullptr, see Rotation
  int pairs;
  bool half_layout;
  const float *mean, *lam;  // [D] or nullptr
  bool hadamard;
  std::int8_t *hi, *lo;     // [D]
  int group;                // channels whose integers are totalled together
  std::int32_t* totals;     // [ceil(D / group)]
  float step, constant;     // out
  float* stored = nullptr;  // out: [D] the query before it became integers, or nullptr
};

/// Outlier rows of one page: token t has entries starts[t] ... starts[t + 1] - 1.
struct OutlierRows {
  const std::uint16_t* starts;   // [tokens + 1]
  const std::uint8_t* channels;  // of entries
  const float* values;
  int tokens, head_dim;
};

struct SoftmaxArgs {
  float* scores;  // [count] base-2 logits in, probabilities relative to the running maximum out
  int count;
  float running_max, running_sum;  // in and out
  float rescale;                   // out: what earlier accumulators must be multiplied by
};

struct Kernels {
  const char* isa;
  void (*unpack)(const CodeShape& shape, const std::uint8_t* packed, std::uint8_t* bytes);
  void (*dot)(const DotArgs& args);
  void (*half_to_float)(const std::uint16_t* half, float* value, std::size_t count);
  /// Returns false when some value is not finite in binary16.
  bool (*float_to_half)(const float* value, std::uint16_t* half, std::size_t count);
  /// Splits x (count a multiple of 16) into hi and lo parts; returns the step (0 for a zero vector).
  float (*split)(const float* x, int count, std::int8_t* hi, std::int8_t* lo, std::int32_t* total);
  void (*prepare_query)(QueryArgs& args);
  /// x <- the rotation of `cos`, `sin`, in place: one rounding for each product and one for the sum.
  void (*rotate)(float* x, int head_dim, const float* cos, const float* sin, int pairs, bool half_layout);
  void (*hadamard)(float* x, int count);
  GroupScale (*quantise_group)(const float* x, int count, const GroupRule& rule, std::uint8_t* codes);
  void (*take_outliers)(float* x, int head_dim, int group, int count, TakenOutliers& taken);
  void (*round_feedback)(const FeedbackArgs& args);
  /// scores[r * score_stride + t] = q[r] . k[t] for raw K of float32 or binary16, q [rows][D], k rows
  /// `k_stride` elements apart.
  void (*raw_scores_half)(const std::uint16_t* k, std::ptrdiff_t k_stride, int tokens, int head_dim,
                          const float* q, int rows, float* scores, std::ptrdiff_t score_stride);
  void (*raw_scores_float)(const float* k, std::ptrdiff_t k_stride, int tokens, int head_dim, const float* q,
                           int rows, float* scores, std::ptrdiff_t score_stride);
  /// acc[r * D + c] += sum over t of p[r * p_stride + t] * v[t][c].
  void (*raw_accumulate_half)(const std::uint16_t* v, std::ptrdiff_t v_stride, int tokens, int head_dim,
                              const float* p, int rows, std::ptrdiff_t p_stride, float* acc);
  void (*raw_accumulate_float)(const float* v, std::ptrdiff_t v_stride, int tokens, int head_dim,
                               const float* p, int rows, std::ptrdiff_t p_stride, float* acc);
  void (*softmax)(SoftmaxArgs& args);
  /// scores[i] += scale[i] * step * (2 sums[i] - bias) / 2, or + offset[i] * (step * total) as well when
  /// offset is not null.
  void (*add_scores)(const std::int32_t* sums, int count, const float* scale, const float* offset, float step,
                     std::int32_t total, int center2, float* scores);
  /// acc[i] += (scale ? scale[i] : 1) * step * (2 sums[i] - center2 * total) / 2.
  void (*add_values)(const std::int32_t* sums, int count, const float* scale, float step, std::int32_t total,
                     int center2, float* acc);
  /// scores[r * score_stride + t] += the sum over the outliers of token t of q[r][channel] * value.
  void (*outlier_scores)(const OutlierRows& outliers, const float* q, int rows, float* scores,
                         std::ptrdiff_t score_stride);
  /// acc[r][channel] += p[r * p_stride + t] * value for the outliers of all tokens t.
  void (*outlier_values)(const OutlierRows& outliers, const float* p, int rows, std::ptrdiff_t p_stride,
                         float* acc);
  /// weights[i] = p[i] * scale[i].
  void (*multiply)(const float* p, const float* scale, int count, float* weights);
  void (*scale_by)(float* x, int count, float factor);
};

/// The best table this machine can run, or the one named by INNERKV_ISA (scalar, avx2, avx512, neon).
/// Throws Error{kUnsupported} for a name that this build or machine lacks.
const Kernels& select_kernels(const char* forced);

/// Every table that this build has and this machine can run, best first, null-terminated.
const Kernels* const* available_kernels();

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();  // nullptr where not built or not runnable
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace innerkv
