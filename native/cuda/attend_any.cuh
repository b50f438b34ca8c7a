// Attention for every format: the path that reads what routes.h does not list, float32 rows, and tokens of
// which only the values are in a window. One multiplication per code and query row on ordinary cores.
//
// - Shape: a block of 128 threads per task, up to kRows query rows of one KV head against a run of tiles of
//   128 tokens.
// - Reads: pages, the ring, queries; every page byte once per task.
// - Writes: the task's softmax state (maximum in base 2, sum), unnormalised output; logits.
// - Exchange: scores, prepared queries and scales of a tile lie in shared memory; thread = slot, then
//   thread = channel. A bit per token and channel says where outliers of values are, so that channels add
//   theirs in the order of the tokens.
// - Order: tiles ascending; a state does not depend on other tasks or on the number of multiprocessors.
// - Limits: head_dim <= 256; rows <= kRows.
#pragma once

#include "tile.cuh"

namespace innerkv::gpu {

/// The output of a task that a thread keeps: channels tid and tid + 128 of every row.
struct TileOutput {
  float sums[kRows][2] = {};

  INNERKV_DEVICE void rescale(const TileMemory& s, int rows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows)
        for (int h = 0; h < 2; ++h) sums[r][h] *= s.rescale[r];
  }

  INNERKV_DEVICE void add_rows(const Tile& t, RawRows v, int count, int slot) {
    const int D = t.rule.head_dim;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = t.tid + h * kTileThreads;
      if (c >= D) break;
      for (int i = 0; i < count; ++i) {
        const float value = v.at(static_cast<std::ptrdiff_t>(i) * D + c);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < t.task.rows) sums[r][h] = fmaf(t.s.scores[r * kPageTokens + slot + i], value, sums[r][h]);
      }
    }
  }

  /// Stored values, scales already loaded: thread = channel.
  INNERKV_DEVICE void add_stored(const Tile& t, const PageArgs& page, int slots) {
    const int D = t.rule.head_dim;
    const TensorLayout layout{t.rule.v, true, D};
    const CodeShape shape = layout.codes();
    const auto* words = reinterpret_cast<const std::uint32_t*>(page.v);
    const bool blocks = t.rule.v.group == Group::kTokens32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = t.tid + h * kTileThreads;
      if (c >= D) break;
      const int group = blocks ? c : c / group_channels(t.rule.v.group, D);
      for (int quad = 0; 4 * quad < slots; ++quad) {
        const std::uint32_t codes = codes_of(words, shape, c, quad);
        for (int j = 0; j < 4 && 4 * quad + j < slots; ++j) {
          const int slot = 4 * quad + j, index = layout.scale_index(slot, group);
          const float value =
              fmaf(t.s.scale[index], static_cast<float>(codes >> (8 * j) & 0xffu), t.s.offset[index]);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (r < t.task.rows) sums[r][h] = fmaf(t.s.scores[r * kPageTokens + slot], value, sums[r][h]);
        }
      }
    }
    if (layout.spec.outliers > 0) add_outliers(t, layout, page.v);
  }

  /// Outliers of stored values, after find_holders(): thread = channel, tokens in order.
  INNERKV_DEVICE void add_outliers(const Tile& t, const TensorLayout& layout, const std::uint8_t* base) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = t.tid + h * kTileThreads;
      if (c >= layout.head_dim) break;
      for (int first = 0; first < kPageTokens; first += 32)
        for (unsigned left = t.s.holders[first / 32][c]; left; left &= left - 1) {
          const int slot = first + __ffs(static_cast<int>(left)) - 1;
          each_outlier(layout, base, slot, [&](int channel, float value) {
            if (channel != c) return;
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (r < t.task.rows) sums[r][h] = fmaf(t.s.scores[r * kPageTokens + slot], value, sums[r][h]);
          });
        }
    }
  }
};

/// Scores and probabilities of slots [begin, end) of a tile.
INNERKV_DEVICE void tile_probabilities(const Tile& t, int tile, int begin, int end, int& prepared) {
  const int D = t.rule.head_dim, first = tile * kPageTokens;
  const int k_stored = clamp_int(t.head.k_quantised - first, 0, end);
  const PageArgs* page = k_stored > begin ? &t.head.pages[tile] : nullptr;
  const bool present = page && page->k;
  if (present) {
    if (t.rule.k.raw()) {
      t.raw_scores({page->k, t.rule.float32}, k_stored, 0);
    } else {
      const int block = t.rule.block_tokens > 0 ? first / t.rule.block_tokens : 0;
      if (block != prepared)
        t.prepare_queries(t.rule.block_tokens > 0
                              ? t.head.rotations + static_cast<std::ptrdiff_t>(block) * 2 * D
                              : nullptr);
      prepared = block;
      t.stored_scores(*page, k_stored);
    }
  }
  for (int slot = k_stored > begin ? k_stored : begin; slot < end;) {
    const int row = (first + slot) % t.head.ring, left = t.head.ring - row;
    const int run = end - slot < left ? end - slot : left;
    t.raw_scores({t.head.ring_k + static_cast<std::ptrdiff_t>(row) * D, false}, run, slot);
    slot += run;
  }
  __syncthreads();
  t.softmax(t.head.sink + first, begin, end, present ? page->removed : nullptr, k_stored);
}

/// Grid: tasks; 128 threads; dynamic shared memory sizeof(TileMemory).
INNERKV_KERNEL(128, 1)
void attend_any(AttendRule rule, const RequestArgs* requests, const HeadArgs* heads, const TaskArgs* tasks) {
  const TaskArgs& task = tasks[blockIdx.x];
  const HeadArgs& head = heads[task.request * rule.kv_heads + task.kv_head];
  const Tile t{rule,
               head,
               requests[task.request],
               task,
               *dynamic_shared<TileMemory>(),
               static_cast<int>(threadIdx.x),
               static_cast<int>(threadIdx.x) / 32,
               static_cast<int>(threadIdx.x) % 32};
  TileOutput out;
  const int D = rule.head_dim;
  t.load_queries();
  __syncthreads();

  int prepared = -1;
  for (int tile = task.first_tile; tile < task.end_tile; ++tile) {
    const int first = tile * kPageTokens, position = head.sink + first;
    const int count = clamp_int(head.tokens - position, 0, kPageTokens),
              v_stored = clamp_int(head.v_quantised - first, 0, count);
    const int begin = task.raw ? v_stored : 0,
              end = task.raw ? clamp_int(head.k_quantised - first, 0, count) : v_stored;
    if (begin >= end) continue;
    if (t.nothing_visible(position + begin, position + end)) {
      t.hide_logits(position, begin, end);
      continue;
    }
    tile_probabilities(t, tile, begin, end, prepared);
    const PageArgs* page = task.raw ? nullptr : &head.pages[tile];
    const bool stored = page && page->k;
    if (stored && rule.v.outliers > 0) t.find_holders({rule.v, true, D}, page->v, v_stored);
    if (stored && !rule.v.raw()) t.load_scales({rule.v, true, D}, page->v, page->v_zeros, v_stored);
    __syncthreads();
    out.rescale(t.s, task.rows);
    if (stored && rule.v.raw()) out.add_rows(t, {page->v, rule.float32}, v_stored, 0);
    if (stored && !rule.v.raw()) out.add_stored(t, *page, v_stored);
    for (int slot = begin; task.raw && slot < end;) {
      const int row = (first + slot) % head.ring, left = head.ring - row;
      const int run = end - slot < left ? end - slot : left;
      out.add_rows(t, {head.ring_v + static_cast<std::ptrdiff_t>(row) * D, false}, run, slot);
      slot += run;
    }
    __syncthreads();
  }

  const std::ptrdiff_t split = static_cast<std::ptrdiff_t>(task.split) * t.request.rows;
  if (t.tid < task.rows) t.request.state[split + t.row_of(t.tid)] = {t.s.largest[t.tid], t.s.sum[t.tid]};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int c = t.tid + h * kTileThreads;
    if (c >= D) break;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < task.rows) t.request.partial[(split + t.row_of(r)) * D + c] = out.sums[r][h];
  }
}

}  // namespace innerkv::gpu
