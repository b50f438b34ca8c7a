// Decode attention over 16-bit keys and values on tensor cores: windows, 16-bit pages, plain attention.
//
// Shape      a warp per task: 4 * NT query rows of one KV head against a run of pages or of window tokens,
//            16 tokens at a time; 4 independent warps a block.
// Reads      every key and value once, 16 bytes a lane (rests of head_dim 80 and 96: 8 and 4). The keys of
//            the next 16 tokens are asked for before the softmax of these, their values right after the
//            product of these.
// Writes     the task's softmax state and unnormalised output; logits.
// Arithmetic A = keys (rows are tokens) or values (rows are channels, two tokens in a word by prmt), B =
//            queries or probabilities in two binary16 parts: columns 2h and 2h + 1 are the high and the low
//            part of row h, so that 22 bits of each take part. The reduction runs over channels, then
//            tokens, in the order in which lanes hold them; operands share that order.
// Order      no barrier, no shared memory. A row's result depends on its keys, values and split alone.
// Limits     up to 8 query rows a task, 4 at head_dim 256.
#pragma once

#include "attend_half.h"
#include "half.cuh"

namespace innerkv::gpu {

/// Up to 16 tokens whose rows lie behind each other, row `wrap` being row 0 again.
struct Chunk {
  const std::uint16_t *k, *v;
  int row, wrap, count, position;  // of the first token; count 0: there are no more
  std::uint32_t removed;           // a bit per token
};

template <int D, int NT>
struct HalfAttention {
  static constexpr int kChunk = 16, kSteps = D / 16;
  static constexpr int kBlocksK = D / 32, kBlocksV = D / 64, kRestV = D % 64 / 16;
  // At head_dim 256 keys and values do not fit into registers together, nor all of a value.
  static constexpr bool kAhead = D <= 128;
  static constexpr int kParts = kAhead ? 1 : 2;
  static constexpr float kWeight = 16384.0f;  // probabilities are at most this: see half_scale()
  static_assert(D % 32 == 0 || D % 32 == 16);

  TaskRows rows;
  const HeadArgs& head;
  const HalfTask& task;
  int lane, g, t;

  std::uint32_t q[NT][2 * kSteps];      // of column g: word w meets word w of a key
  std::uint32_t k[2][2 * kSteps];       // tokens g, g + 8
  std::uint32_t v[4][kSteps / kParts];  // tokens t, t + 4, t + 8, t + 12
  float step[NT], largest[NT], sum[NT], out[kSteps][NT][4];

  /// The row of the task that column t of n-tile n stands for; rows beyond the task repeat its last one.
  INNERKV_DEVICE int task_row(int n, int column) const {
    const int r = 4 * n + column;
    return r < rows.count ? r : rows.count - 1;
  }
  /// First of the two channels in word w of a lane's key.
  INNERKV_DEVICE int key_channel(int w) const {
    return w < 4 * kBlocksK ? 32 * (w / 4) + 8 * t + 2 * (w % 4)
                            : 32 * kBlocksK + 4 * t + 2 * (w - 4 * kBlocksK);
  }

  INNERKV_DEVICE void load_queries() {
    const float factor = rows.rule.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float* from = rows.request.q + static_cast<std::ptrdiff_t>(rows.row_of(task_row(n, g / 2))) * D;
      float x[2 * kSteps][2], most = 0.0f;
#pragma unroll
      for (int w = 0; w < 2 * kSteps; ++w)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[w][h] = factor * from[key_channel(w) + h];
          most = fmaxf(most, fabsf(x[w][h]));
        }
#pragma unroll
      for (int h = 1; h <= 2; h *= 2) most = fmaxf(most, __shfl_xor_sync(kFullMask, most, h));
      const HalfScale scale = half_scale(most);
#pragma unroll
      for (int w = 0; w < 2 * kSteps; ++w) {
        const float a = scale.factor * x[w][0], b = scale.factor * x[w][1];
        q[n][w] = pack_half(a, b);
        const float2 high = unpack_half(q[n][w]);
        if (g % 2) q[n][w] = pack_half(a - high.x, b - high.y);
      }
      step[n] = __shfl_sync(kFullMask, scale.inverse, 8 * t);  // of row t: columns 2t, lanes 4 * 2t
    }
  }

  INNERKV_DEVICE void hide_logits(int position, int count) const {
    if (!rows.request.logits) return;
    for (int r = 0; r < rows.count; ++r)
      for (int i = lane; i < count; i += 32) rows.logits_of(r)[position + i] = no_score();
  }

  /// The chunk that begins with token `at` of the task's kind, whether or not anybody sees it.
  INNERKV_DEVICE Chunk chunk_at(int at, int end) const {
    const int left = end - at;
    if (task.raw) {
      const bool sink = at < head.sink;
      const int room = sink && head.sink - at < left ? head.sink - at : left;
      const int count = room < kChunk ? room : kChunk;
      if (sink) return {head.sink_k, head.sink_v, at, head.sink, count, at, 0};
      const int token =
          at - head.sink + (head.k_quantised > head.v_quantised ? head.k_quantised : head.v_quantised);
      return {head.ring_k, head.ring_v, token % head.ring, head.ring, count, head.sink + token, 0};
    }
    const PageArgs& page = head.pages[at / kPageTokens];
    const int slot = at % kPageTokens;  // a multiple of kChunk
    return {reinterpret_cast<const std::uint16_t*>(page.k),
            reinterpret_cast<const std::uint16_t*>(page.v),
            slot,
            kPageTokens,
            left < kChunk ? left : kChunk,
            head.sink + at,
            static_cast<std::uint32_t>(page.removed[slot / 64] >> (slot % 64)) & 0xffffu};
  }

  /// The next chunk of which some row sees a token; `at` moves behind it.
  INNERKV_DEVICE Chunk next(int& at, int end) const {
    while (at < end) {
      const Chunk chunk = chunk_at(at, end);
      at += chunk.count;
      if (chunk.k && rows.any_sees(chunk.position, chunk.position + chunk.count)) return chunk;
      hide_logits(chunk.position, chunk.count);
    }
    return {};
  }

  /// Row of token i of a chunk; tokens beyond it repeat its last one, so that nothing foreign is read.
  static INNERKV_DEVICE std::ptrdiff_t row_at(const Chunk& chunk, int i) {
    const int row = chunk.row + (i < chunk.count ? i : chunk.count - 1);
    return static_cast<std::ptrdiff_t>(row < chunk.wrap ? row : row - chunk.wrap) * D;
  }

  INNERKV_DEVICE void load_keys(const Chunk& chunk) {
    if (chunk.count == 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint16_t* from = chunk.k + row_at(chunk, g + 8 * h);
#pragma unroll
      for (int b = 0; b < kBlocksK; ++b) {
        const uint4 x = ptx::load_streaming(reinterpret_cast<const uint4*>(from + 32 * b + 8 * t));
        k[h][4 * b] = x.x, k[h][4 * b + 1] = x.y, k[h][4 * b + 2] = x.z, k[h][4 * b + 3] = x.w;
      }
      if constexpr (D % 32) {
        const uint2 x = ptx::load_streaming(reinterpret_cast<const uint2*>(from + 32 * kBlocksK + 4 * t));
        k[h][4 * kBlocksK] = x.x, k[h][4 * kBlocksK + 1] = x.y;
      }
    }
  }

  INNERKV_DEVICE void load_values(const Chunk& chunk, int part = 0) {
    if (chunk.count == 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint16_t* from = chunk.v + row_at(chunk, t + 4 * i) + D / kParts * part;
#pragma unroll
      for (int b = 0; b < kBlocksV / kParts; ++b) {
        const uint4 x = ptx::load_streaming(reinterpret_cast<const uint4*>(from + 64 * b + 8 * g));
        v[i][4 * b] = x.x, v[i][4 * b + 1] = x.y, v[i][4 * b + 2] = x.z, v[i][4 * b + 3] = x.w;
      }
      if constexpr (kRestV == 2) {
        const uint2 x = ptx::load_streaming(reinterpret_cast<const uint2*>(from + 64 * kBlocksV + 4 * g));
        v[i][4 * kBlocksV] = x.x, v[i][4 * kBlocksV + 1] = x.y;
      } else if constexpr (kRestV == 1) {
        v[i][4 * kBlocksV] =
            ptx::load_streaming(reinterpret_cast<const unsigned*>(from + 64 * kBlocksV + 2 * g));
      }
    }
  }

  /// scores[h][n]: token g + 8 h, row task_row(n, t), in units of log2.
  INNERKV_DEVICE void multiply_keys(float (&scores)[2][NT]) const {
    float sums[NT][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::uint32_t a[4] = {k[0][2 * s], k[1][2 * s], k[0][2 * s + 1], k[1][2 * s + 1]};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const std::uint32_t b[2] = {q[n][2 * s], q[n][2 * s + 1]};
        ptx::mma_m16n8k16<__half>(sums[n], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) scores[h][n] = (sums[n][2 * h] + sums[n][2 * h + 1]) * step[n];
  }

  /// Softcap, masks, logits.
  INNERKV_DEVICE void finish_scores(const Chunk& chunk, float (&scores)[2][NT]) const {
    const bool plain = chunk.count == kChunk && chunk.removed == 0 && !rows.request.logits &&
                       !(rows.rule.softcap > 0) && rows.all_see(chunk.position, chunk.position + kChunk);
    if (plain) return;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int r = task_row(n, t), first = rows.first_visible(r), end = rows.end_visible(r);
      float* logits = rows.request.logits && 4 * n + t < rows.count ? rows.logits_of(r) : nullptr;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = g + 8 * h, position = chunk.position + i;
        float& x = scores[h][n];
        if (rows.rule.softcap > 0) x = capped(x, rows.rule.softcap);
        if (i >= chunk.count || position < first || position >= end || (chunk.removed >> i & 1u))
          x = no_score();
        if (logits && i < chunk.count) logits[position] = x * kLn2;
      }
    }
  }

  /// Scores to weights as the B operand of add_values(); the running maximum, and everything relative to it.
  INNERKV_DEVICE void weigh(const float (&scores)[2][NT], std::uint32_t (&b)[NT][2]) {
    float rescale[NT];
    bool changed = false;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float now = fmaxf(largest[n], fmaxf(scores[0][n], scores[1][n]));
#pragma unroll
      for (int h = 4; h <= 16; h *= 2) now = fmaxf(now, __shfl_xor_sync(kFullMask, now, h));
      rescale[n] = now == largest[n] ? 1.0f : ptx::ex2(largest[n] - now);
      changed = changed || now != largest[n];
      largest[n] = now;
    }
    if (__any_sync(kFullMask, changed)) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        sum[n] *= rescale[n];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[s][n][i] *= rescale[n];
      }
    }
    const bool odd = g % 2;
    // Lanes with g < 4 hold tokens t', t' + 8 of b[0], the others t' + 4, t' + 12 of b[1], for every row.
    const int one = 4 * (t + (odd ? 4 : 0)) + g / 2, other = one ^ 16;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float base = largest[n] == no_score() ? 0.0f : largest[n];
      const float p0 = kWeight * ptx::ex2(scores[0][n] - base), p1 = kWeight * ptx::ex2(scores[1][n] - base);
      sum[n] += p0 + p1;
      const std::uint32_t high = pack_half(p0, p1);
      const float2 rounded = unpack_half(high);
      const std::uint32_t low = pack_half(p0 - rounded.x, p1 - rounded.y);
      const std::uint32_t x = __shfl_sync(kFullMask, g < 4 ? high : low, one),
                          y = __shfl_sync(kFullMask, g < 4 ? low : high, other);
      b[n][0] = odd ? y : x;
      b[n][1] = odd ? x : y;
    }
  }

  INNERKV_DEVICE void add_values(const std::uint32_t (&b)[NT][2], int part = 0) {
    constexpr int kOwn = kSteps / kParts;
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      const std::uint32_t a[4] = {ptx::prmt(v[0][s], v[2][s], 0x5410u), ptx::prmt(v[0][s], v[2][s], 0x7632u),
                                  ptx::prmt(v[1][s], v[3][s], 0x5410u), ptx::prmt(v[1][s], v[3][s], 0x7632u)};
#pragma unroll
      for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16<__half>(out[kOwn * part + s][n], a, b[n]);
    }
  }

  INNERKV_DEVICE void write() {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(task.split) * rows.request.rows;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 4; h <= 16; h *= 2) sum[n] += __shfl_xor_sync(kFullMask, sum[n], h);
      if (4 * n + t >= rows.count) continue;
      const std::ptrdiff_t row = at + rows.row_of(4 * n + t);
      if (g == 0) rows.request.state[row] = {largest[n], sum[n] / kWeight};
      float* to = rows.request.partial + row * D;
      const auto channel = [&](int s, int h) {  // 2 s' + h of a lane's channels: rows g and g + 8 of a tile
        return (out[s][n][2 * h] + out[s][n][2 * h + 1]) * (1.0f / kWeight);
      };
#pragma unroll
      for (int s = 0; s + 1 < kSteps && s < 4 * kBlocksV + kRestV / 2 * 2; s += 2)
        *reinterpret_cast<float4*>(
            to + (s < 4 * kBlocksV ? 64 * (s / 4) + 8 * g + 2 * (s % 4) : 64 * kBlocksV + 4 * g)) =
            make_float4(channel(s, 0), channel(s, 1), channel(s + 1, 0), channel(s + 1, 1));
      if constexpr (kRestV == 1)
        *reinterpret_cast<float2*>(to + 64 * kBlocksV + 2 * g) =
            make_float2(channel(kSteps - 1, 0), channel(kSteps - 1, 1));
    }
  }

  INNERKV_DEVICE void run() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      largest[n] = no_score();
      sum[n] = 0.0f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[s][n][i] = 0.0f;
    }
    load_queries();
    int at = task.raw ? task.first : task.first * kPageTokens;
    const int stop = task.end * kPageTokens, end = task.raw                  ? task.end
                                                   : stop < head.v_quantised ? stop
                                                                             : head.v_quantised;
    Chunk chunk = next(at, end);
    if constexpr (kAhead) {
      load_keys(chunk);
      load_values(chunk);
    }
    while (chunk.count > 0) {
      float scores[2][NT];
      std::uint32_t weights[NT][2];
      if constexpr (!kAhead) load_keys(chunk);
      multiply_keys(scores);
      const Chunk after = next(at, end);
      if constexpr (kAhead) load_keys(after);
      if constexpr (!kAhead) load_values(chunk);
      finish_scores(chunk, scores);
      weigh(scores, weights);
      add_values(weights);
      if constexpr (kAhead) {
        load_values(after);
      } else {
        load_values(chunk, 1);
        add_values(weights, 1);
      }
      chunk = after;
    }
    write();
  }
};

/// Grid: ceil(tasks / 4); 128 threads.
template <int D, int NT>
INNERKV_KERNEL(32 * kHalfWarps, 1)
void attend_half(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads, const HalfTask* tasks,
                 int count) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            index = static_cast<int>(blockIdx.x) * kHalfWarps + warp;
  if (index >= count) return;
  const HalfTask& task = tasks[index];
  const HeadArgs& head = heads[task.request * rule.kv_heads + task.kv_head];
  HalfAttention<D, NT> attention{
      {rule, requests[task.request], head.tokens, task.kv_head, task.first_row, task.rows},
      head,
      task,
      lane,
      lane / 4,
      lane % 4,
      {},
      {},
      {},
      {},
      {},
      {},
      {}};
  attention.run();
}

}  // namespace innerkv::gpu
