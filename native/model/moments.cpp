#include "moments.h"

#include <algorithm>

namespace innerkv {

Moments::Moments(int layer_count, int queries, int heads, int dim, int skipped)
    : layers(layer_count), query_heads(queries), kv_heads(heads), head_dim(dim), skip(skipped) {
  const std::size_t all = head_at(layers, 0), D = static_cast<std::size_t>(head_dim);
  tokens.resize(static_cast<std::size_t>(layers));
  query_tokens.resize(static_cast<std::size_t>(layers));
  key_sum.resize(all * D);
  key_square.resize(all * D * D);
  query_square.resize(all * D * D);
}

void Moments::add(int layer, const float* q, const float* k, std::ptrdiff_t stride, int count,
                  int first_position, ThreadPool& pool) {
  const int first = std::clamp(skip - first_position, 0, count), group = query_heads / kv_heads;
  const std::ptrdiff_t D = head_dim;
  tokens[static_cast<std::size_t>(layer)] += count - first;
  query_tokens[static_cast<std::size_t>(layer)] += count;
  const auto add_square = [D](double* square, const float* x) {
    for (std::ptrdiff_t i = 0; i < D; ++i) {
      const double factor = static_cast<double>(x[i]);
      for (std::ptrdiff_t j = 0; j < D; ++j) square[i * D + j] += factor * static_cast<double>(x[j]);
    }
  };
  pool.run(kv_heads, [&](int head, int) {
    const std::size_t at = head_at(layer, head) * static_cast<std::size_t>(D);
    double *sum = key_sum.data() + at, *keys = key_square.data() + at * static_cast<std::size_t>(D),
           *queries = query_square.data() + at * static_cast<std::size_t>(D);
    for (int t = first; t < count; ++t) {
      const float* key = k + t * stride + head * D;
      for (std::ptrdiff_t c = 0; c < D; ++c) sum[c] += static_cast<double>(key[c]);
      add_square(keys, key);
    }
    for (int t = 0; t < count; ++t)
      for (int g = 0; g < group; ++g) add_square(queries, q + t * stride + (head * group + g) * D);
  });
}

}  // namespace innerkv
