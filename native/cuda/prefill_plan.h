// How the backend computes a request of many query rows. Host code.
#pragma once

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "attend_prefill.h"
#include "mirrors.h"

namespace innerkv::gpu {

inline bool half_pages(const AttendRule& rule) { return rule.k.raw() && rule.v.raw() && !rule.float32; }

/// Of dequantised pages; tests make it small.
inline std::size_t prefill_buffer_bytes = std::size_t{64} << 20;

/// From here on it is cheaper to write a page once as 16-bit rows than to read its codes for every 8 query
/// rows. float32 rows have no 16-bit form.
inline bool is_prefill(const AttendRule& rule, const AttendRequest& request) {
  return request.q_tokens > 8 && request.q_tokens * rule.group > 64 && !rule.float32;
}

/// 16-bit pages are read where they lie; others are dequantised into a buffer of `capacity` pages a KV head,
/// in as many passes as that takes. Each pass is split over its pages until there are tasks enough for a GPU.
/// A function of the request and the cache alone, so that results depend on nothing else.
struct PrefillPlan {
  static constexpr int kTasks = 256;

  bool dequantised;
  int row_tiles, first_page = 0, pages, capacity, passes, splits, sink, tokens;

  PrefillPlan(const AttendRule& rule, const AttendRequest& request, const HeadArgs& head)
      : dequantised(!half_pages(rule)),
        row_tiles(ceil_div(request.q_tokens * rule.group, prefill_rows(rule.head_dim))),
        pages(ceil_div(std::max(head.k_quantised, head.v_quantised), kPageTokens)),
        sink(head.sink),
        tokens(head.tokens) {
    if (request.sliding_window > 0) {  // pages before the first query's window are nobody's
      const int first_query = request.causal ? tokens - request.q_behind - request.q_tokens : tokens - 1;
      first_page = std::clamp((first_query + 1 - request.sliding_window - sink) / kPageTokens, 0, pages);
    }
    const int present = std::max(1, pages - first_page);
    const std::size_t across = page_bytes(rule) * at(rule.kv_heads);
    capacity =
        dequantised ? std::clamp(static_cast<int>(prefill_buffer_bytes / across), 1, present) : present;
    passes = ceil_div(present, capacity);
    splits = std::clamp(ceil_div(kTasks, row_tiles * rule.kv_heads), 1, std::min(32, ceil_div(capacity, 4)));
  }

  static std::size_t page_bytes(const AttendRule& rule) {
    return sizeof(std::uint16_t) * 2 * kPageTokens * at(rule.head_dim);
  }
  std::size_t buffer_bytes(const AttendRule& rule) const {
    return dequantised ? at(rule.kv_heads) * at(capacity) * (page_bytes(rule) + sizeof(PageArgs)) : 0;
  }
  int begin_of(int pass) const { return first_page + pass * capacity; }
  int end_of(int pass) const { return std::min(pages, begin_of(pass) + capacity); }
  /// Position where part `split` of a pass begins; every position belongs to one part of one pass.
  int edge(int pass, int split) const {
    const int begin = begin_of(pass), end = std::max(begin, end_of(pass)),
              run = ceil_div(end - begin, splits);
    if (split == 0) return pass == 0 ? 0 : sink + begin * kPageTokens;
    if (split == splits && pass == passes - 1) return tokens;
    return std::min(sink + std::min(end, begin + split * run) * kPageTokens, tokens);
  }
};

struct Prefill {
  PrefillPlan plan;
  int first_head;                       // of the request
  std::vector<std::size_t> first_task;  // of every pass, and the end of the last

  /// Adds the tasks of the `index`-th such request, whose views follow `heads` and those of the ones before.
  Prefill(const AttendRule& rule, const AttendRequest& request, std::span<const HeadArgs> heads,
          int request_index, int index, std::vector<PrefillTask>& tasks)
      : plan(rule, request, heads[at(request_index * rule.kv_heads)]),
        first_head(request_index * rule.kv_heads) {
    const int rows = request.q_tokens * rule.group, rows_a_task = prefill_rows(rule.head_dim),
              first_view =
                  plan.dequantised ? static_cast<int>(heads.size()) + index * rule.kv_heads : first_head;
    for (int pass = 0; pass < plan.passes; ++pass) {
      first_task.push_back(tasks.size());
      for (int tile = plan.row_tiles - 1; tile >= 0; --tile)  // the last rows see the most, so they go first
        for (int kv = 0; kv < rule.kv_heads; ++kv)
          for (int split = 0; split < plan.splits; ++split)
            tasks.push_back({request_index, first_view + kv, kv, tile * rows_a_task,
                             std::min(rows_a_task, rows - tile * rows_a_task), plan.edge(pass, split),
                             plan.edge(pass, split + 1), split, pass > 0});
    }
    first_task.push_back(tasks.size());
  }

  /// Fills in what dequantisation reads and, as views, the heads as attention sees them then.
  void make_views(const AttendRule& rule, std::span<const HeadArgs> heads, std::uint8_t* buffer,
                  DequantiseArgs* args, HeadArgs* views) const {
    const std::size_t pages = at(rule.kv_heads) * at(plan.capacity);
    auto* page_args = reinterpret_cast<PageArgs*>(buffer + pages * PrefillPlan::page_bytes(rule));
    for (int kv = 0; kv < rule.kv_heads; ++kv) {
      const HeadArgs& head = heads[at(first_head + kv)];
      const std::size_t first = at(kv) * at(plan.capacity);
      views[kv] = head;
      args[kv] = {head, nullptr, nullptr};
      if (!plan.dequantised) continue;
      args[kv] = {head, page_args + first,
                  reinterpret_cast<std::uint16_t*>(buffer + first * PrefillPlan::page_bytes(rule))};
      views[kv].pages = page_args + first;
      views[kv].k_quantised = views[kv].v_quantised = std::max(head.k_quantised, head.v_quantised);
    }
  }

  /// All pointers are on the device.
  cudaError_t launch(const AttendRule& rule, const RequestArgs* requests, const HeadArgs* heads,
                     const DequantiseArgs* args, const PrefillTask* tasks, cudaStream_t stream) const {
    for (int pass = 0; pass < plan.passes; ++pass) {
      if (plan.dequantised) {
        const cudaError_t error = dequantise_pages(rule, args, rule.kv_heads, plan.begin_of(pass),
                                                   plan.end_of(pass), plan.capacity, stream);
        if (error != cudaSuccess) return error;
      }
      const std::size_t first = first_task[at(pass)], count = first_task[at(pass + 1)] - first;
      const cudaError_t error =
          attend_prefill_tasks(rule, requests, heads, tasks + first, static_cast<int>(count),
                               plan.dequantised ? plan.capacity : std::numeric_limits<int>::max(), stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
};

}  // namespace innerkv::gpu
