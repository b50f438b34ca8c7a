// Attention of many query rows over 16-bit keys and values on tensor cores: prefill. Quantised pages come
// here after dequantise.cuh.
//
// Shape      a block of 4 warps per task: 64 MT query rows of one KV head (MT m-tiles of 16 rows a warp)
// against a
//            range of positions, kTile tokens at a time.
// Reads      each key and value once a task, by cp.async: the next keys travel during softmax and values, the
//            next values during the scores.
// Writes     the task's softmax state and unnormalised output; logits.
// Arithmetic A = queries, then weights, rounded to binary16 (queries times a power of two a row); B = keys,
//            then values; float32 sums. One rounding of each operand, as large as the one that storing keys
//            and values as binary16 is.
// Sharing    queries, keys and values in shared memory, rows 16 bytes longer than needed, so that the rows of
// an
//            ldmatrix lie in different banks. Four barriers a tile.
// Limits     head_dim <= 256. MT is 1 at 256, else 2; kTile is 64 at 64, else 32: what registers allow.
#pragma once

#include "attend_prefill.h"
#include "half.cuh"

namespace innerkv::gpu {

inline constexpr int kPrefillWarps = 4, kPrefillThreads = 32 * kPrefillWarps;

template <int D>
struct PrefillShape {
  static constexpr int kMTiles = D > 128 ? 1 : 2, kTile = D > 64 ? 32 : 64;
  static constexpr int kWarpRows = 16 * kMTiles, kRows = kPrefillWarps * kWarpRows;
  static constexpr int kStride = D + 8;
};

template <int D>
struct PrefillMemory {
  using Shape = PrefillShape<D>;
  alignas(16) std::uint16_t q[Shape::kRows * Shape::kStride];
  alignas(16) std::uint16_t k[Shape::kTile * Shape::kStride], v[Shape::kTile * Shape::kStride];
  float step[Shape::kRows];  // of the queries' scale
};

/// Up to kTile tokens whose rows lie behind each other, row `wrap` being row 0 again.
template <int kTile>
struct PrefillTile {
  using Bits = std::conditional_t<kTile == 64, std::uint64_t, std::uint32_t>;
  const std::uint16_t *k, *v;
  int row, wrap, count, position;  // of the first token; count 0: there are no more
  Bits removed;                    // a bit per token
};

template <int D>
struct PrefillAttention {
  using Shape = PrefillShape<D>;
  static constexpr int MT = Shape::kMTiles, kTile = Shape::kTile, kStride = Shape::kStride;
  using Tile = PrefillTile<kTile>;
  /// What is left to know of a tile that is on its way. Registers are short: the rest is looked up again.
  struct Seen {
    int count, position;  // count is negative when tokens of the tile are removed
    explicit INNERKV_DEVICE Seen(const Tile& tile)
        : count(tile.removed ? -tile.count : tile.count), position(tile.position) {}
  };
  static constexpr int kScoreTiles = kTile / 8, kOutTiles = D / 8;
  static constexpr float kShift = 14.0f;  // weights are at most 2^14: see half_scale()

  TaskRows rows;
  const HeadArgs& head;
  const PrefillTask& task;
  PrefillMemory<D>& s;
  int capacity, tid, warp, lane, g, t;

  float out[MT][kOutTiles][4], largest[MT][2], sum[MT][2];

  /// Row of the task that half h of m-tile m of this lane's accumulators stands for.
  INNERKV_DEVICE int own_row(int m, int h) const { return warp * Shape::kWarpRows + 16 * m + 8 * h + g; }
  INNERKV_DEVICE int clamped(int r) const { return r < rows.count ? r : rows.count - 1; }

  /// A warp loads its own rows; rows beyond the task are zeros.
  INNERKV_DEVICE void load_queries() const {
    const float factor = rows.rule.scale * kLog2e;
    for (int i = 0; i < Shape::kWarpRows; ++i) {
      const int r = warp * Shape::kWarpRows + i;
      auto* to = reinterpret_cast<std::uint32_t*>(s.q + r * kStride);
      const bool present = r < rows.count;
      const float* from = rows.request.q + static_cast<std::ptrdiff_t>(rows.row_of(clamped(r))) * D;
      float x[(D + 63) / 64][2] = {}, most = 0.0f;
#pragma unroll
      for (int j = 0; j < (D + 63) / 64; ++j) {
        const int c = 64 * j + 2 * lane;
        if (!present || c >= D) continue;
        x[j][0] = factor * from[c], x[j][1] = factor * from[c + 1];
        most = fmaxf(most, fmaxf(fabsf(x[j][0]), fabsf(x[j][1])));
      }
      const HalfScale scale = half_scale(warp_max(most));
#pragma unroll
      for (int j = 0; j < (D + 63) / 64; ++j)
        if (64 * j + 2 * lane < D)
          to[32 * j + lane] = pack_half(scale.factor * x[j][0], scale.factor * x[j][1]);
      if (lane == 0) s.step[r] = scale.inverse;
    }
  }

  INNERKV_DEVICE void hide_logits(int position, int count) const {
    if (!rows.request.logits) return;
    for (int r = 0; r < rows.count; ++r)
      for (int i = tid; i < count; i += kPrefillThreads) rows.logits_of(r)[position + i] = no_score();
  }

  /// The tile that begins at a position, whether or not anybody sees it.
  INNERKV_DEVICE Tile tile_at(int position) const {
    const int stored = head.k_quantised > head.v_quantised ? head.k_quantised : head.v_quantised;
    const auto least = [](int a, int b) { return a < b ? a : b; };
    const int left = least(task.end - position, kTile);
    if (position < head.sink)
      return {head.sink_k, head.sink_v, position, head.sink, least(left, head.sink - position), position, 0};
    const int token = position - head.sink;
    if (token >= stored) return {head.ring_k, head.ring_v, token % head.ring, head.ring, left, position, 0};
    const int slot = token % kPageTokens;
    const PageArgs& page = head.pages[token / kPageTokens % capacity];
    const int count = least(left, least(stored - token, kPageTokens - slot));
    return {reinterpret_cast<const std::uint16_t*>(page.k),
            reinterpret_cast<const std::uint16_t*>(page.v),
            slot,
            kPageTokens,
            count,
            position,
            static_cast<typename Tile::Bits>(page.removed[slot / 64] >> (slot % 64))};
  }

  /// The next tile of which some row sees a token; `position` moves behind it.
  INNERKV_DEVICE Tile next(int& position) const {
    while (position < task.end) {
      // Pages that nobody sees may not be there.
      const int room = kTile - (position >= head.sink ? (position - head.sink) % kTile : 0),
                left = task.end - position, window = head.sink - position, span = room < left ? room : left,
                hidden = window > 0 && window < span ? window : span;
      if (!rows.any_sees(position, position + hidden)) {
        hide_logits(position, hidden);
        position += hidden;
        continue;
      }
      const Tile tile = tile_at(position);
      position += tile.count;
      if (tile.k) return tile;
      hide_logits(tile.position, tile.count);
    }
    return {};
  }

  /// Asks for a tile's rows; rows beyond it become zeros. Closes a group of copies.
  INNERKV_DEVICE void fetch(std::uint16_t* to, const std::uint16_t* from, const Tile& tile) const {
    constexpr int kPieces = D / 8;
    if (tile.count > 0)
      for (int i = tid; i < kTile * kPieces; i += kPrefillThreads) {
        const int token = i / kPieces, piece = i % kPieces;
        const bool present = token < tile.count;
        const int row = tile.row + (present ? token : 0);
        ptx::cp_async_16(
            to + token * kStride + 8 * piece,
            from + static_cast<std::ptrdiff_t>(row < tile.wrap ? row : row - tile.wrap) * D + 8 * piece,
            present ? 16 : 0);
      }
    ptx::cp_async_commit();
  }

  INNERKV_DEVICE void multiply_keys(float (&scores)[MT][kScoreTiles][4]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    const std::uint16_t* q_row =
        s.q + (warp * Shape::kWarpRows + lane % 8 + 8 * (lane / 8 % 2)) * kStride + 8 * (lane / 16);
    const std::uint16_t* k_row = s.k + (lane % 8 + 8 * (lane / 16)) * kStride + 8 * (lane / 8 % 2);
#pragma unroll 4  // all of head_dim 128 would spill a few registers on Blackwell
    for (int c = 0; c < D; c += 16) {
      std::uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) ptx::ldmatrix<4>(a[m], q_row + 16 * m * kStride + c);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        std::uint32_t b[4];
        ptx::ldmatrix<4>(b, k_row + 8 * n * kStride + c);
        const std::uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          ptx::mma_m16n8k16<__half>(scores[m][n], a[m], b0);
          ptx::mma_m16n8k16<__half>(scores[m][n + 1], a[m], b1);
        }
      }
    }
  }

  /// Softcap, masks, logits. Afterwards scores are in units of log2, or still times 1 / step if that returns
  /// false.
  INNERKV_DEVICE bool finish_scores(const Seen& tile, float (&scores)[MT][kScoreTiles][4]) const {
    if (tile.count == kTile && !rows.request.logits && !(rows.rule.softcap > 0) &&
        rows.all_see(tile.position, tile.position + kTile))
      return false;
    const int count = tile.count < 0 ? -tile.count : tile.count;
    const typename Tile::Bits removed = tile.count < 0 ? tile_at(tile.position).removed : 0;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = own_row(m, h), r = clamped(own), first = rows.first_visible(r) - tile.position,
                  end = rows.end_visible(r) - tile.position, last = end < count ? end : count;
        const float step = s.step[own];
        float* logits = rows.request.logits && own == r ? rows.logits_of(r) + tile.position : nullptr;
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int i = 8 * n + 2 * t + j;
            float x = scores[m][n][2 * h + j] * step;
            if (rows.rule.softcap > 0) x = capped(x, rows.rule.softcap);
            if (i < first || i >= last || (removed >> i & 1u)) x = no_score();
            if (logits && i < count) logits[i] = x * kLn2;
            scores[m][n][2 * h + j] = x;
          }
      }
    return true;
  }

  /// Scores to weights as A operands; the running maximum, and everything relative to it.
  INNERKV_DEVICE void weigh(const float (&scores)[MT][kScoreTiles][4], bool finished,
                            std::uint32_t (&a)[MT][kScoreTiles][2]) {
    float rescale[MT][2];
    bool changed = false;
    const auto unit = [&](int m, int h) { return finished ? 1.0f : s.step[own_row(m, h)]; };
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = no_score();
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
          most = fmaxf(most, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        most *= unit(m, h);
#pragma unroll
        for (int x = 1; x <= 2; x *= 2) most = fmaxf(most, __shfl_xor_sync(kFullMask, most, x));
        const float before = largest[m][h], now = fmaxf(before, most);
        rescale[m][h] = before == now ? 1.0f : ptx::ex2(before - now);
        changed = changed || before != now;
        largest[m][h] = now;
      }
    if (__any_sync(kFullMask, changed)) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[m][h] *= rescale[m][h];
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][n][i] *= rescale[m][i / 2];
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = unit(m, h), base = kShift - (largest[m][h] == no_score() ? 0.0f : largest[m][h]);
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
          const float p0 = ptx::ex2(fmaf(scores[m][n][2 * h], factor, base)),
                      p1 = ptx::ex2(fmaf(scores[m][n][2 * h + 1], factor, base));
          sum[m][h] += p0 + p1;
          a[m][n][h] = pack_half(p0, p1);
        }
      }
  }

  INNERKV_DEVICE void add_values(const std::uint32_t (&weights)[MT][kScoreTiles][2]) {
    const std::uint16_t* v_row = s.v + (lane % 8 + 8 * (lane / 8 % 2)) * kStride + 8 * (lane / 16);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i)
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        std::uint32_t b[4];
        ptx::ldmatrix<4, true>(b, v_row + 16 * i * kStride + 8 * n);
        const std::uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const std::uint32_t a[4] = {weights[m][2 * i][0], weights[m][2 * i][1], weights[m][2 * i + 1][0],
                                      weights[m][2 * i + 1][1]};
          ptx::mma_m16n8k16<__half>(out[m][n], a, b0);
          ptx::mma_m16n8k16<__half>(out[m][n + 1], a, b1);
        }
      }
  }

  /// What a split was left with, in units of 2^kShift; a row's sum goes to its lane t = 0.
  INNERKV_DEVICE void begin_state() {
    const float weight = exp2f(kShift);
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(task.split) * rows.request.rows;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = own_row(m, h);
        largest[m][h] = no_score();
        sum[m][h] = 0.0f;
        const bool resume = task.resume && r < rows.count;
        const std::ptrdiff_t row = at + rows.row_of(clamped(r));
        if (resume) {
          const float2 state = rows.request.state[row];
          largest[m][h] = state.x;
          sum[m][h] = t == 0 ? weight * state.y : 0.0f;
        }
        const float* from = rows.request.partial + row * D + 2 * t;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          const float2 x = resume ? *reinterpret_cast<const float2*>(from + 8 * n) : make_float2(0.0f, 0.0f);
          out[m][n][2 * h] = weight * x.x;
          out[m][n][2 * h + 1] = weight * x.y;
        }
      }
  }

  INNERKV_DEVICE void write() {
    const float weight = exp2f(-kShift);
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(task.split) * rows.request.rows;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int x = 1; x <= 2; x *= 2) sum[m][h] += __shfl_xor_sync(kFullMask, sum[m][h], x);
        const int r = own_row(m, h);
        if (r >= rows.count) continue;
        const std::ptrdiff_t row = at + rows.row_of(r);
        if (t == 0) rows.request.state[row] = {largest[m][h], weight * sum[m][h]};
        float* to = rows.request.partial + row * D + 2 * t;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
          *reinterpret_cast<float2*>(to + 8 * n) =
              make_float2(weight * out[m][n][2 * h], weight * out[m][n][2 * h + 1]);
      }
  }

  INNERKV_DEVICE void run() {
    load_queries();
    __syncwarp();
    begin_state();
    int position = task.first;
    const Tile first = next(position);
    fetch(s.k, first.k, first);
    fetch(s.v, first.v, first);
    Seen tile(first);
    while (tile.count != 0) {
      const Tile after = next(position);
      const Seen seen(after);
      float scores[MT][kScoreTiles][4];
      ptx::cp_async_wait_group<1>();  // the keys; the values may still travel
      __syncthreads();
      multiply_keys(scores);
      __syncthreads();
      fetch(s.k, after.k, after);
      const bool finished = finish_scores(tile, scores);
      std::uint32_t weights[MT][kScoreTiles][2];
      weigh(scores, finished, weights);
      ptx::cp_async_wait_group<1>();  // the values; the next keys may still travel
      __syncthreads();
      add_values(weights);
      __syncthreads();
      const Tile again = seen.count != 0 ? tile_at(seen.position) : Tile{};
      fetch(s.v, again.v, again);
      tile = seen;
    }
    ptx::cp_async_wait_group<0>();
    __syncwarp();  // lanes have read the states that one of them writes
    write();
  }
};

/// Grid: tasks; 128 threads; dynamic shared memory sizeof(PrefillMemory<D>).
template <int D>
INNERKV_KERNEL(kPrefillThreads, 1)
void attend_prefill(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads,
                    const PrefillTask* tasks, int capacity) {
  const PrefillTask& task = tasks[blockIdx.x];
  const HeadArgs& head = heads[task.head];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  PrefillAttention<D> attention{
      {rule, requests[task.request], head.tokens, task.kv_head, task.first_row, task.rows},
      head,
      task,
      *dynamic_shared<PrefillMemory<D>>(),
      capacity,
      tid,
      tid / 32,
      lane,
      lane / 4,
      lane % 4,
      {},
      {},
      {}};
  attention.run();
}

}  // namespace innerkv::gpu
