// One attention call of several sequences.
#include <algorithm>
#include <string>

#include "error.h"
#include "sequence.h"
#include "sequence_parts.h"

namespace innerkv {

void check_attend(const Sequence& sequence, int layer, int q_tokens, bool causal) {
  const int tokens = sequence.tokens(layer);
  require(q_tokens >= 1, "Attention needs at least one query token.");
  if (causal && q_tokens > tokens)
    throw Error(ErrorCode::kInvalidArgument,
                std::to_string(q_tokens) + " query tokens, but layer " + std::to_string(layer) +
                    " holds only " + std::to_string(tokens) +
                    " tokens. Append the tokens of the queries first, or pass causal: false.");
}

namespace {

/// The queries of each item as float32, on the device if they were there. Throws NotFinite.
std::vector<const float*> take_queries(Cache& cache, std::span<const BatchItem> items) {
  const CacheConfig& config = cache.config();
  const int heads = config.query_heads, D = config.head_dim;
  const auto numbers = [&](const BatchItem& item) { return at(item.q_tokens) * at(heads) * at(D); };
  std::vector<const float*> queries;
  std::vector<Intake> intake;
  for (const BatchItem& item : items) {
    require(item.q.on_device || item.q.dtype == Dtype::kF32, "Queries on the host must be float32.");
    check_alignment(item.q.data, item.q.on_device, "q");
    check_alignment(item.out.data, item.out.on_device, "out");
    queries.push_back(static_cast<const float*>(item.q.data));
    if (needs_intake(item.q, Dtype::kF32))
      intake.push_back({item.q.data, item.q.dtype, numbers(item), Dtype::kF32});
  }
  if (intake.empty()) return queries;
  cache.backend().take(intake);
  std::size_t taken = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (!needs_intake(items[i].q, Dtype::kF32)) continue;
    const Intake& result = intake[taken++];
    if (!result.finite)
      refuse_not_finite(cache.backend(), items[i].q, numbers(items[i]), Dtype::kF32,
                        {items.size() > 1 ? "q of item " + std::to_string(i) : "q", heads, D, 0});
    queries[i] = static_cast<const float*>(result.ready);
  }
  return queries;
}

}  // namespace

bool attend_batch(Cache& cache, int layer, std::span<const BatchItem> items, bool causal,
                  const std::atomic<bool>* aborted, std::size_t mass_numbers) {
  const CacheConfig& config = cache.config();
  const int heads = config.query_heads, D = config.head_dim;
  // Masses need every probability of a query until its sum is known, so long queries are cut.
  std::vector<int> steps;
  int parts = 1;
  for (const BatchItem& item : items) {
    require(&item.sequence->cache() == &cache, "A sequence of another cache.");
    check_attend(*item.sequence, layer, item.q_tokens, causal);
    const std::size_t tokens = at(item.sequence->tokens(layer));
    const std::size_t most = mass_numbers / (at(heads) * std::max<std::size_t>(tokens, 1));
    const bool cut = item.mass && !item.logits && most < at(item.q_tokens);  // logits are of this size anyway
    steps.push_back(cut ? std::max(1, static_cast<int>(most)) : item.q_tokens);
    parts = std::max(parts, (item.q_tokens + steps.back() - 1) / steps.back());
  }
  const std::vector<const float*> queries = take_queries(cache, items);
  for (const BatchItem& item : items)
    if (item.mass) std::fill_n(item.mass, at(config.kv_heads) * at(item.sequence->tokens(layer)), 0.0f);
  std::vector<HeadView> views;
  std::vector<AttendRequest> requests;
  for (int part = 0; part < parts; ++part) {
    views.clear();
    views.reserve(items.size() * at(config.kv_heads));
    requests.clear();
    for (std::size_t i = 0; i < items.size(); ++i) {
      const BatchItem& item = items[i];
      const int first = part * steps[i], count = std::min(steps[i], item.q_tokens - first);
      if (count <= 0) continue;
      const std::size_t first_view = views.size();
      for (int head = 0; head < config.kv_heads; ++head) views.push_back(item.sequence->view(layer, head));
      AttendRequest request;
      request.heads = std::span(views).subspan(first_view, at(config.kv_heads));
      request.q = queries[i] + std::ptrdiff_t{first} * heads * D;
      request.q_on_device = item.q.on_device;
      request.out = item.out.data + std::ptrdiff_t{first} * heads * D;
      request.out_on_device = item.out.on_device;
      request.lse = item.lse.data ? item.lse.data + std::ptrdiff_t{first} * heads : nullptr;
      request.lse_on_device = item.lse.on_device;
      request.logits = item.logits;
      request.q_tokens = count;
      request.q_behind = item.q_tokens - first - count;
      request.sliding_window = config.window_of_layer[at(layer)];
      request.causal = causal;
      request.mass = item.mass;
      request.mass_stride = item.sequence->tokens(layer);
      requests.push_back(request);
    }
    if (!cache.backend().attend(config, requests, cache.rotations(), aborted)) return false;
  }
  return true;
}

}  // namespace innerkv
