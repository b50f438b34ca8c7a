#include <algorithm>
#include <vector>

#include "../core/error.h"
#include "device.h"
#include "gpu_backend.h"
#include "mirrors.h"
#include "quantise.cuh"

namespace innerkv::gpu {

namespace {

QuantiseRule rule_of(const LayerScheme& scheme, int head_dim, const RopeConfig& rope) {
  QuantiseRule rule;
  rule.k = scheme.k;
  rule.v = scheme.v;
  rule.head_dim = head_dim;
  rule.pairs = static_cast<int>(rope.theta.size());
  rule.half_layout = rope.half_layout;
  rule.hadamard_k = scheme.hadamard_k;
  rule.hadamard_v = scheme.hadamard_v;
  rule.unbiased_k = scheme.unbiased_k;
  rule.unbiased_v = scheme.unbiased_v;
  rule.clip_k_count = static_cast<int>(scheme.clip_k.size());
  rule.clip_v_count = static_cast<int>(scheme.clip_v.size());
  std::copy(scheme.clip_k.begin(), scheme.clip_k.end(), rule.clip_k);
  std::copy(scheme.clip_v.begin(), scheme.clip_v.end(), rule.clip_v);
  return rule;
}

}  // namespace

// ---- quantise ----

void GpuBackend::quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                          const RotationTable& rotations) {
  if (jobs.empty()) return;
  constexpr std::size_t kGrid = 32768;
  if (jobs.size() > kGrid) {  // of 65535 that a grid may have
    quantise(config, jobs.first(kGrid), rotations);
    return quantise(config, jobs.subspan(kGrid), rotations);
  }
  const int D = config.head_dim, count = static_cast<int>(jobs.size());
  const LayerScheme& scheme = *jobs[0].scheme;
  const QuantiseRule rule = rule_of(scheme, D, rotations.rope());
  const PageLayout layout(scheme.k, scheme.v, D);
  const bool compact = scheme.k.compact_zeros() || scheme.v.compact_zeros();

  int k_tokens = 0, v_tokens = 0, blocks = 0;
  const auto block_of = [&](const QuantiseJob& job) {
    return job.page_index * kPageTokens / scheme.block_tokens;
  };
  for (const QuantiseJob& job : jobs)  // a table that grows moves, so it grows before anything points into it
    if (scheme.block_tokens > 0) blocks = std::max(blocks, block_of(job) + 1);
  const float* table =
      blocks > 0 ? rotations_on_device(rotations, D, jobs[0].sink, scheme.block_tokens, blocks) : nullptr;
  Upload upload(arguments_, Upload::room<QuantiseArgs>(jobs.size()) + Upload::room<int>(2 * jobs.size()));
  QuantiseArgs* args;
  int* counts;
  const QuantiseArgs* args_there = upload.add(jobs.size(), &args);
  int* counts_there = upload.add(2 * jobs.size(), &counts);
  const std::size_t dense = at(layout.k.scales() + layout.v.scales());
  auto* dense_there =
      compact ? reinterpret_cast<std::uint16_t*>(work_.reserve(2 * dense * jobs.size())) : nullptr;
  for (int i = 0; i < count; ++i) {
    const QuantiseJob& job = jobs[at(i)];
    if (job.scheme != &scheme || job.sink != jobs[0].sink)
      throw Error(ErrorCode::kInternal, "Jobs of one call have one scheme.");
    k_tokens = std::max(k_tokens, job.k_count);
    v_tokens = std::max(v_tokens, job.v_count);
    QuantiseArgs& a = args[i];
    a = {};
    a.page = job.page->bytes.data();
    a.k = job.k;
    a.v = job.v;
    a.position = job.position(0);
    a.k_first = job.k_first;
    a.k_count = job.k_count;
    a.v_first = job.v_first;
    a.v_count = job.v_count;
    if (job.basis) a.basis = on_device(*job.basis);
    if (scheme.block_tokens > 0) {
      a.cos = table + std::ptrdiff_t{block_of(job)} * 2 * D;
      a.sin = a.cos + D;
    }
    if (compact) {
      a.k_dense = dense_there + dense * at(i);
      a.v_dense = a.k_dense + layout.k.scales();
    }
    const auto extents = [](const std::vector<Slot>& from, std::uint16_t** to) {
      for (std::size_t e = 0; e < from.size(); ++e) to[e] = reinterpret_cast<std::uint16_t*>(from[e].data());
    };
    extents(job.page->k_zeros, a.k_zeros);
    extents(job.page->v_zeros, a.v_zeros);
    counts[2 * i] = job.page->k_zero_count;
    counts[2 * i + 1] = job.page->v_zero_count;
    a.k_zero_count = counts_there + 2 * i;
    a.v_zero_count = counts_there + 2 * i + 1;
  }
  upload.flush();

  launches_begin();
  const unsigned pages = dim(count);
  if (k_tokens > 0) {
    if (scheme.feedback() && !scheme.k.raw()) {
      const dim3 grid(dim(k_tokens), pages);
      const int threads = 32 * rule.clip_k_count;
      const auto feedback = [&](auto kernel) {
        run("quantise keys", kernel, grid, threads, 0, rule, args_there);
      };
      if (D <= 64)
        feedback(quantise_keys_feedback<2>);
      else if (D <= 128)
        feedback(quantise_keys_feedback<4>);
      else
        feedback(quantise_keys_feedback<8>);
    } else {
      run("quantise keys", quantise_keys, dim3(dim(ceil_div(k_tokens, kQuantiseWarps)), pages),
          32 * kQuantiseWarps, 0, rule, args_there);
    }
  }
  const int v_at = static_cast<int>(layout.v_at());
  if (v_tokens > 0) {
    if (scheme.v.group == Group::kTokens32 && !scheme.v.raw())
      run("quantise values", quantise_value_blocks, dim3(dim(ceil_div(v_tokens, kBlockTokens32)), pages),
          32 * kQuantiseWarps, at(quantise_blocks_shared(D)), rule, args_there, v_at);
    else
      run("quantise values", quantise_values, dim3(dim(ceil_div(v_tokens, kQuantiseWarps)), pages),
          32 * kQuantiseWarps, 0, rule, args_there, v_at);
  }
  if (compact) run("compact zero points", compact_zeros, dim3(2, pages), 32, 0, rule, args_there, v_at);
  launches_end();
  if (!compact) return;
  std::vector<int> after(2 * jobs.size());
  device::copy(after.data(), counts_there, sizeof(int) * after.size());
  for (int i = 0; i < count; ++i) {
    jobs[at(i)].page->k_zero_count = after[at(2 * i)];
    jobs[at(i)].page->v_zero_count = after[at(2 * i + 1)];
  }
}

}  // namespace innerkv::gpu
