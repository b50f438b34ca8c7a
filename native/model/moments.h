// Statistics of a model's keys and queries before RoPE, for calibration. lib/schemes/moments.ts has the file.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/thread_pool.h"

namespace innerkv {

/// Sums in float64: keys at position `skip` and later (the sinks' keys are unlike all others), all queries.
class Moments {
 public:
  Moments(int layers, int query_heads, int kv_heads, int head_dim, int skip);

  /// Rows of one layer: q [query_heads][D], k [kv_heads][D], `stride` floats from token to token. Only keys
  /// with first_position + i >= skip count.
  void add(int layer, const float* q, const float* k, std::ptrdiff_t stride, int tokens, int first_position,
           ThreadPool& pool);

  int layers, query_heads, kv_heads, head_dim, skip;
  std::vector<std::int64_t> tokens, query_tokens;         // [layers]; keys, queries per query head
  std::vector<double> key_sum, key_square, query_square;  // [layers][kv_heads][D], [D][D], [D][D]

 private:
  std::size_t head_at(int layer, int head) const {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(kv_heads) +
           static_cast<std::size_t>(head);
  }
};

}  // namespace innerkv
