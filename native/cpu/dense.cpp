// Plain attention over uncompressed float32 or binary16 keys and values: the baseline every scheme is
// compared with.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "../core/error.h"
#include "cpu_backend.h"

namespace innerkv {

void* CpuBackend::allocate_memory(std::size_t bytes) {
  void* memory = std::aligned_alloc(kSectionAlign, align_section(bytes));
  if (!memory)
    throw Error(ErrorCode::kOutOfMemory, "The machine refused " + std::to_string(bytes) + " bytes.");
  return memory;
}

void CpuBackend::free_memory(void* memory, std::size_t) noexcept { std::free(memory); }
void CpuBackend::clear_memory(void* memory, std::size_t bytes) noexcept { std::memset(memory, 0, bytes); }
void CpuBackend::copy_memory(void* to, const void* from, std::size_t bytes) noexcept {
  std::memcpy(to, from, bytes);
}
void CpuBackend::stage(std::span<Staging> numbers) {
  for (Staging& one : numbers) one.ready = one.from;
}
void CpuBackend::copy_rows(std::span<const RowCopy> copies, int row) noexcept {
  for (const RowCopy& copy : copies)
    for (int i = 0; i < copy.rows; ++i)
      std::memcpy(copy.to + std::ptrdiff_t{i} * row, copy.from + i * copy.stride,
                  sizeof(std::uint16_t) * static_cast<std::size_t>(row));
}

void CpuBackend::attend_dense(const DenseRequest& request) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
  constexpr int kTile = kPageTokens,
                kRun = 32 * kTile;  // the same split as over pages: results do not depend on threads
  const int D = request.head_dim, group = request.query_heads / request.kv_heads,
            rows = request.q_tokens * group;
  const int runs = std::max(1, (request.tokens + kRun - 1) / kRun), blocks = (rows + kMaxRows - 1) / kMaxRows;
  const std::size_t row_floats = static_cast<std::size_t>(2 + D);
  std::vector<float> states(static_cast<std::size_t>(request.kv_heads) *
                            static_cast<std::size_t>(blocks * runs * kMaxRows) * row_floats);
  const auto state_at = [&](int head, int block, int run, int r) {
    return states.data() +
           ((static_cast<std::size_t>(head) * static_cast<std::size_t>(blocks) +
             static_cast<std::size_t>(block)) *
                static_cast<std::size_t>(runs) +
            static_cast<std::size_t>(run)) *
               kMaxRows * row_floats +
           static_cast<std::size_t>(r) * row_floats;
  };
  const auto query_row = [&](int head, int row) {
    return std::ptrdiff_t{row / group} * request.query_heads + head * group + row % group;
  };
  std::atomic<bool> all_finite{true};
  const auto check = [&](const float* values, int count) {
    unsigned bad = 0;
    for (int i = 0; i < count; ++i)
      bad |= (std::bit_cast<std::uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u;
    if (bad) all_finite.store(false, std::memory_order_relaxed);
  };
  pool_.run(request.kv_heads * blocks * runs, [&](int item, int) {
    const int head = item / (blocks * runs), block = item / runs % blocks, run = item % runs;
    const int first = block * kMaxRows, count = std::min(kMaxRows, rows - first);
    alignas(64) float q[kMaxRows * kMaxHeadDim], scores[kMaxRows * kTile], acc[kMaxRows * kMaxHeadDim] = {};
    float largest[kMaxRows], sum[kMaxRows];
    for (int r = 0; r < count; ++r) {
      largest[r] = kNone;
      sum[r] = 0;
      const float* from = request.q + query_row(head, first + r) * D;
      for (int c = 0; c < D; ++c) q[r * D + c] = from[c] * (request.scale * kLog2e);
    }
    for (int t = run * kRun; t < std::min(request.tokens, (run + 1) * kRun); t += kTile) {
      const int tokens = std::min(kTile, request.tokens - t);
      const std::ptrdiff_t at = (std::ptrdiff_t{head} * request.tokens + t) * D;
      if (request.half)
        kernels_.raw_scores_half(static_cast<const std::uint16_t*>(request.k) + at, D, tokens, D, q, count,
                                 scores, kTile);
      else
        kernels_.raw_scores_float(static_cast<const float*>(request.k) + at, D, tokens, D, q, count, scores,
                                  kTile);
      for (int r = 0; r < count; ++r) {
        float* row = scores + r * kTile;
        check(row, tokens);
        const int position =
            request.causal ? request.tokens - request.q_tokens + (first + r) / group : request.tokens - 1;
        const int begin = request.sliding_window > 0 ? position + 1 - request.sliding_window : 0;
        if (request.softcap > 0)
          for (int i = 0; i < tokens; ++i)
            row[i] = kLog2e * request.softcap * std::tanh(row[i] * kLn2 / request.softcap);
        for (int i = 0; i < tokens; ++i)
          if (t + i < begin || t + i > position) row[i] = kNone;
        if (request.logits)
          for (int i = 0; i < tokens; ++i)
            request.logits[query_row(head, first + r) * request.tokens + t + i] = row[i] * kLn2;
        SoftmaxArgs args{row, tokens, largest[r], sum[r], 1.0f};
        kernels_.softmax(args);
        largest[r] = args.running_max;
        sum[r] = args.running_sum;
        if (args.rescale != 1.0f) kernels_.scale_by(acc + r * D, D, args.rescale);
      }
      if (request.half)
        kernels_.raw_accumulate_half(static_cast<const std::uint16_t*>(request.v) + at, D, tokens, D, scores,
                                     count, kTile, acc);
      else
        kernels_.raw_accumulate_float(static_cast<const float*>(request.v) + at, D, tokens, D, scores, count,
                                      kTile, acc);
    }
    check(acc, count * D);
    for (int r = 0; r < count; ++r) {
      float* state = state_at(head, block, run, r);
      state[0] = largest[r];
      state[1] = sum[r];
      std::memcpy(state + 2, acc + r * D, sizeof(float) * static_cast<std::size_t>(D));
    }
  });
  if (!all_finite && request.suspect) request.suspect();
  for (int head = 0; head < request.kv_heads; ++head)
    for (int row = 0; row < rows; ++row) {
      float best = kNone, sum = 0, out[kMaxHeadDim] = {};
      for (int run = 0; run < runs; ++run)
        best = std::max(best, state_at(head, row / kMaxRows, run, row % kMaxRows)[0]);
      for (int run = 0; run < runs && best != kNone; ++run) {
        const float* state = state_at(head, row / kMaxRows, run, row % kMaxRows);
        const float factor = std::exp2(state[0] - best);
        sum += factor * state[1];
        for (int c = 0; c < D; ++c) out[c] += factor * state[2 + c];
      }
      const std::ptrdiff_t to = query_row(head, row);
      for (int c = 0; c < D; ++c) request.out[to * D + c] = sum > 0 ? out[c] / sum : 0.0f;
      if (request.lse) request.lse[to] = sum > 0 ? (best + std::log2(sum)) * kLn2 : kNone;
    }
}

}  // namespace innerkv
