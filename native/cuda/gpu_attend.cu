// The attention half of gpu_backend.h.
#include <algorithm>
#include <map>
#include <vector>

#include "../core/error.h"
#include "attend_any.cuh"
#include "attend_half.h"
#include "attend_mma.h"
#include "device.h"
#include "gpu_backend.h"
#include "mass.h"
#include "merge.h"
#include "mirrors.h"
#include "prefill_plan.h"

namespace innerkv::gpu {

namespace {

// What runs where:
//   keys and values of 16 bits: windows, 16-bit pages, plain attention    attend_half
//   stored keys and values of the formats that mma_rows() knows           attend_mma
//   other stored values; values in the ring whose keys are stored         attend_any
// except for a request of many query rows, is_prefill(): dequantise, where pages are not of 16 bits, and
// attend_prefill for all its tokens.

/// How one request is split: stored values by runs of tiles, then tokens whose keys and values are in windows
/// by runs of tokens, then tokens of which only the values are. A function of the sequence's length and
/// format alone, so that results depend on nothing else.
struct Plan {
  int stored_tiles, run, stored_splits, raw_tokens, raw_run, raw_splits;
  bool mixed;
  Plan(const AttendRule& rule, const HeadArgs& head)
      : stored_tiles(ceil_div(head.v_quantised, kPageTokens)),
        run(std::clamp(ceil_div(stored_tiles, half_pages(rule) ? 64 : 32), 1, 32)),
        stored_splits(ceil_div(stored_tiles, run)),
        raw_tokens(head.tokens - std::max(head.k_quantised, head.v_quantised)),
        raw_run(16 * std::max(2, ceil_div(raw_tokens, 16 * 32))),  // latency counts, so runs are short
        raw_splits(std::max(ceil_div(raw_tokens, raw_run), stored_splits > 0 ? 0 : 1)),
        mixed(head.k_quantised > head.v_quantised) {}
  int splits() const { return stored_splits + raw_splits + mixed; }
};

}  // namespace

void GpuBackend::run_attention(const AttendRule& rule, std::span<const AttendRequest> requests,
                               std::span<const HeadArgs> heads) {
  const int D = rule.head_dim, query_heads = rule.kv_heads * rule.group;
  std::vector<TaskArgs> tasks, fast_tasks;
  std::vector<HalfTask> half_tasks;
  std::size_t rows_in_all = 0, split_rows = 0, logits_in_all = 0, masses_in_all = 0, host_rows = 0;
  int most_rows = 0, most_splits = 0, most_blocks = 0, most_tokens = 0, fast_rows = 0, rows_a_half_task = 0;
  std::size_t prepared_rows = 0;
  std::vector<Prefill> prefills;
  std::vector<PrefillTask> prefill_tasks;
  std::size_t prefill_bytes = 0;
  for (const AttendRequest& request : requests) {
    if (is_prefill(rule, request)) continue;
    fast_rows = std::max(fast_rows, mma_rows(rule, request.q_tokens * rule.group));
    rows_a_half_task = std::max(rows_a_half_task, half_rows(rule, request.q_tokens * rule.group));
  }
  const auto blocks_of = [&](const Plan& plan) {
    if (fast_rows == 0 || plan.stored_tiles == 0) return 0;
    return rule.block_tokens > 0 ? ceil_div(plan.stored_tiles * kPageTokens, rule.block_tokens) : 1;
  };
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const HeadArgs& first_head = heads[i * at(rule.kv_heads)];
    const Plan plan(rule, first_head);
    const int rows = requests[i].q_tokens * rule.group, request = static_cast<int>(i);
    const std::size_t all = at(requests[i].q_tokens) * at(query_heads);
    rows_in_all += all;
    if (!requests[i].q_on_device) host_rows += all;
    if (requests[i].logits || requests[i].mass) logits_in_all += all * at(first_head.tokens);
    if (requests[i].mass) {
      masses_in_all += at(rule.kv_heads) * at(first_head.tokens);
      most_tokens = std::max(most_tokens, first_head.tokens);
    }
    most_rows = std::max(most_rows, static_cast<int>(all));
    if (is_prefill(rule, requests[i])) {
      const Prefill& one = prefills.emplace_back(rule, requests[i], heads, request,
                                                 static_cast<int>(prefills.size()), prefill_tasks);
      split_rows += all * at(one.plan.splits);
      most_splits = std::max(most_splits, one.plan.splits);
      prefill_bytes = std::max(prefill_bytes, one.plan.buffer_bytes(rule));
      continue;
    }
    for (int kv = 0; kv < rule.kv_heads; ++kv) {
      const auto add = [&](auto& to, int rows_a_task, int begin, int end, int split, bool raw) {
        for (int first = 0; first < rows; first += rows_a_task)
          to.push_back({request, kv, first, std::min(rows_a_task, rows - first), begin, end, split, raw});
      };
      for (int split = 0; split < plan.stored_splits; ++split) {
        const int begin = split * plan.run, end = std::min(plan.stored_tiles, begin + plan.run);
        if (half_pages(rule))
          add(half_tasks, rows_a_half_task, begin, end, split, false);
        else if (fast_rows > 0)
          add(fast_tasks, fast_rows, begin, end, split, false);
        else
          add(tasks, kRows, begin, end, split, false);
      }
      for (int split = 0; split < plan.raw_splits; ++split)
        add(half_tasks, rows_a_half_task, split * plan.raw_run,
            std::min(plan.raw_tokens, (split + 1) * plan.raw_run), plan.stored_splits + split, true);
      if (plan.mixed)
        add(tasks, kRows, first_head.v_quantised / kPageTokens, ceil_div(first_head.k_quantised, kPageTokens),
            plan.splits() - 1, true);
    }
    split_rows += all * at(plan.splits());
    most_splits = std::max(most_splits, plan.splits());
    most_blocks = std::max(most_blocks, blocks_of(plan));
    prepared_rows += all * at(blocks_of(plan));
  }
  const std::size_t stored_numbers = rule.k.outliers > 0 ? prepared_rows * at(D) : 0;
  auto* stored_queries = reinterpret_cast<float*>(
      prepared_.reserve(sizeof(float) * stored_numbers + prepared_rows * (2 * at(D) + sizeof(PreparedRow))));
  auto* prepared_bytes = reinterpret_cast<std::uint8_t*>(stored_queries + stored_numbers);
  auto* prepared_info = reinterpret_cast<PreparedRow*>(prepared_bytes + prepared_rows * 2 * at(D));
  std::uint8_t* dequantised = prefill_.reserve(prefill_bytes);
  auto* partial = reinterpret_cast<float*>(work_.reserve(sizeof(float) * split_rows * at(D + 2)));
  auto* states = reinterpret_cast<float2*>(partial + split_rows * at(D));
  auto* results = reinterpret_cast<float*>(
      results_.reserve(sizeof(float) * (rows_in_all * at(D + 1) + logits_in_all + masses_in_all)));
  const std::size_t views = prefills.size() * at(rule.kv_heads);
  Upload upload(arguments_,
                Upload::room<TaskArgs>(tasks.size()) + Upload::room<TaskArgs>(fast_tasks.size()) +
                    Upload::room<HalfTask>(half_tasks.size()) + Upload::room<PreparedArgs>(requests.size()) +
                    Upload::room<MergeArgs>(requests.size()) + Upload::room<MassArgs>(requests.size()) +
                    Upload::room<RequestArgs>(requests.size()) +
                    Upload::room<HeadArgs>(heads.size() + views) + Upload::room<DequantiseArgs>(views) +
                    Upload::room<PrefillTask>(prefill_tasks.size()) + Upload::room<float>(host_rows * at(D)));
  TaskArgs *task_args, *fast_args;
  HalfTask* half_args;
  PreparedArgs* prepared_args;
  MergeArgs* merge_args;
  MassArgs* mass_args;
  RequestArgs* request_args;
  HeadArgs* head_args;
  PrefillTask* prefill_args;
  DequantiseArgs* dequantise_args;
  float* q;
  const TaskArgs* tasks_there = upload.add(tasks.size(), &task_args);
  const TaskArgs* fast_there = upload.add(fast_tasks.size(), &fast_args);
  const HalfTask* half_there = upload.add(half_tasks.size(), &half_args);
  const PreparedArgs* prepared_there = upload.add(requests.size(), &prepared_args);
  const MergeArgs* merges_there = upload.add(requests.size(), &merge_args);
  const MassArgs* masses_there = upload.add(requests.size(), &mass_args);
  const RequestArgs* requests_there = upload.add(requests.size(), &request_args);
  const HeadArgs* heads_there = upload.add(heads.size() + views, &head_args);
  const PrefillTask* prefill_there = upload.add(prefill_tasks.size(), &prefill_args);
  const DequantiseArgs* dequantise_there = upload.add(views, &dequantise_args);
  const float* q_there = upload.add(host_rows * at(D), &q);
  std::copy(tasks.begin(), tasks.end(), task_args);
  std::copy(fast_tasks.begin(), fast_tasks.end(), fast_args);
  std::copy(half_tasks.begin(), half_tasks.end(), half_args);
  std::copy(heads.begin(), heads.end(), head_args);
  std::copy(prefill_tasks.begin(), prefill_tasks.end(), prefill_args);
  for (std::size_t i = 0; i < prefills.size(); ++i)
    prefills[i].make_views(rule, heads, dequantised, dequantise_args + i * at(rule.kv_heads),
                           head_args + heads.size() + i * at(rule.kv_heads));
  std::size_t row = 0, host_row = 0, split_row = 0, prepared_row = 0, logits_at = rows_in_all * at(D + 1),
              mass_at = logits_at + logits_in_all;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const AttendRequest& request = requests[i];
    const HeadArgs& head = heads[i * at(rule.kv_heads)];
    const Plan plan(rule, head);
    const bool prefill = is_prefill(rule, request);
    const int splits = prefill ? PrefillPlan(rule, request, head).splits : plan.splits(),
              blocks = prefill ? 0 : blocks_of(plan);
    const std::size_t rows = at(request.q_tokens) * at(query_heads);
    const float* queries = request.q;
    if (!request.q_on_device) {
      std::copy_n(request.q, rows * at(D), q + host_row * at(D));
      queries = q_there + host_row * at(D);
      host_row += rows;
    }
    request_args[i] = {queries,
                       request.logits || request.mass ? results + logits_at : nullptr,
                       partial + split_row * at(D),
                       states + split_row,
                       static_cast<int>(rows),
                       request.q_tokens + request.q_behind,
                       request.sliding_window,
                       request.causal};
    merge_args[i] = {request_args[i].partial,
                     request_args[i].state,
                     request.out_on_device ? request.out : results + row * at(D),
                     request.lse && request.lse_on_device ? request.lse : results + rows_in_all * at(D) + row,
                     splits,
                     static_cast<int>(rows),
                     rule.hadamard_v && !prefill ? plan.stored_splits : 0};
    prepared_args[i] = {prepared_bytes + prepared_row * 2 * at(D), prepared_info + prepared_row,
                        stored_numbers > 0 ? stored_queries + prepared_row * at(D) : nullptr, blocks};
    prepared_row += rows * at(blocks);
    row += rows;
    split_row += rows * at(splits);
    mass_args[i] = {request_args[i].logits, merge_args[i].lse, request.mass ? results + mass_at : nullptr,
                    request.q_tokens,       rule.group,        head.tokens};
    if (request.logits || request.mass) logits_at += rows * at(head.tokens);
    if (request.mass) mass_at += at(rule.kv_heads) * at(head.tokens);
  }
  upload.flush();
  launches_begin();
  if (!tasks.empty())
    run("attend", attend_any, dim3(static_cast<unsigned>(tasks.size())), kTileThreads, sizeof(TileMemory),
        rule, requests_there, heads_there, tasks_there);
  device::check(attend_half_tasks(rule, requests_there, heads_there, half_there,
                                  static_cast<int>(half_tasks.size()), rows_a_half_task, device::stream()),
                "attend");
  if (!fast_tasks.empty())
    device::check(attend_mma_tasks(rule, requests_there, heads_there, prepared_there,
                                   static_cast<int>(requests.size()), most_rows, most_blocks, fast_there,
                                   static_cast<int>(fast_tasks.size()), fast_rows, device::stream()),
                  "attend");
  for (std::size_t i = 0; i < prefills.size(); ++i)
    device::check(
        prefills[i].launch(rule, requests_there, heads_there, dequantise_there + i * at(rule.kv_heads),
                           prefill_there, device::stream()),
        "attend");
  device::check(merge_states(merges_there, static_cast<int>(requests.size()), most_rows, most_splits, D,
                             device::stream()),
                "merge");
  device::check(sum_masses(masses_there, static_cast<int>(requests.size()), rule.kv_heads, most_tokens,
                           device::stream()),
                "mass");
  launches_end();
  Download download(results_);
  std::vector<float> masses(masses_in_all);
  float* next_mass = masses.data();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const AttendRequest& request = requests[i];
    const std::size_t rows = at(request_args[i].rows);
    if (!request.out_on_device) download.add(request.out, merge_args[i].out, sizeof(float) * rows * at(D));
    if (request.lse && !request.lse_on_device)
      download.add(request.lse, merge_args[i].lse, sizeof(float) * rows);
    if (request.logits)
      download.add(request.logits, request_args[i].logits,
                   sizeof(float) * rows * at(heads[i * at(rule.kv_heads)].tokens));
    if (request.mass) {
      const std::size_t numbers = at(rule.kv_heads) * at(heads[i * at(rule.kv_heads)].tokens);
      download.add(next_mass, mass_args[i].mass, sizeof(float) * numbers);
      next_mass += numbers;
    }
  }
  download.finish();
  device::check(cudaSuccess, "attend");
  const float* mass = masses.data();
  for (std::size_t i = 0; i < requests.size(); ++i)
    for (int kv = 0; kv < rule.kv_heads && requests[i].mass; ++kv)
      for (int t = 0; t < heads[i * at(rule.kv_heads)].tokens; ++t)
        requests[i].mass[kv * requests[i].mass_stride + t] += *mass++;
}

bool GpuBackend::attend(const CacheConfig& config, std::span<const AttendRequest> requests,
                        const RotationTable& rotations, const std::atomic<bool>* aborted) {
  if (aborted && aborted->load(std::memory_order_relaxed)) return false;
  if (requests.empty()) return true;
  const LayerScheme& scheme = *requests[0].heads[0].scheme;
  const int D = config.head_dim;
  const PageLayout layout(scheme.k, scheme.v, D);
  AttendRule rule;
  rule.k = scheme.k;
  rule.v = scheme.v;
  rule.k_outliers = OutlierRule(scheme.k);
  rule.v_outliers = OutlierRule(scheme.v);
  rule.head_dim = D;
  rule.kv_heads = config.kv_heads;
  rule.group = config.group_size();
  rule.block_tokens = scheme.k.raw() ? 0 : scheme.block_tokens;
  rule.pairs = static_cast<int>(rotations.rope().theta.size());
  rule.half_layout = rotations.rope().half_layout;
  rule.hadamard_k = scheme.hadamard_k;
  rule.hadamard_v = scheme.hadamard_v && !scheme.v.raw();
  rule.scale = config.softmax_scale;
  rule.softcap = config.softcap;

  update_tables(layout, scheme.k.compact_zeros() || scheme.v.compact_zeros(), requests);
  const auto pages_of = [](const HeadView& view) {
    return ceil_div(std::max(view.k_quantised, view.v_quantised), kPageTokens);
  };

  // Tables that grow move, so they grow before anything points into them.
  std::map<int, const float*> tables;
  const auto table_of = [&](int sink) { return tables[sink]; };
  for (const AttendRequest& request : requests)
    for (const HeadView& view : request.heads)
      if (rule.block_tokens > 0 && pages_of(view) > 0)
        tables[view.sink] = rotations_on_device(rotations, D, view.sink, rule.block_tokens,
                                                ceil_div(pages_of(view) * kPageTokens, rule.block_tokens));
  std::vector<HeadArgs> head_args;
  for (const AttendRequest& request : requests) {
    for (const HeadView& view : request.heads) {
      if (view.scheme != &scheme) throw Error(ErrorCode::kInternal, "Requests of one call have one scheme.");
      HeadArgs head{};
      if (view.table->size() > 0)
        head.pages = static_cast<const PageMirror*>(view.table->mirror.get())->pages();
      head.sink_k = view.sink_k;
      head.sink_v = view.sink_v;
      head.ring_k = view.ring_k;
      head.ring_v = view.ring_v;
      if (view.basis && !scheme.k.raw()) {
        head.mean = on_device(*view.basis).mean;
        head.lam = on_device(*view.basis).lam;
      }
      if (rule.block_tokens > 0 && pages_of(view) > 0) head.rotations = table_of(view.sink);
      head.tokens = view.tokens;
      head.sink = view.sink;
      head.k_quantised = view.k_quantised;
      head.v_quantised = view.v_quantised;
      head.ring = view.ring;
      head_args.push_back(head);
    }
  }
  run_attention(rule, requests, head_args);
  return true;
}

void GpuBackend::attend_dense(const DenseRequest& request) {
  const int D = request.head_dim;
  AttendRule rule;
  rule.float32 = !request.half;
  rule.head_dim = D;
  rule.kv_heads = request.kv_heads;
  rule.group = request.query_heads / request.kv_heads;
  rule.scale = request.scale;
  rule.softcap = request.softcap;
  const std::size_t number = request.half ? 2 : 4, head_bytes = number * at(request.tokens) * at(D),
                    bytes = head_bytes * at(request.kv_heads);
  std::uint8_t* k = dense_.reserve(2 * bytes + 16);
  std::uint8_t* v = k + bytes;
  device::copy(k, request.k, bytes);
  device::copy(v, request.v, bytes);
  if (request.suspect) {
    const Dtype dtype = request.half ? Dtype::kF16 : Dtype::kF32;
    const std::size_t all = bytes / number;
    Intake both[] = {{k, dtype, all, dtype}, {v, dtype, all, dtype}};
    take(both);
    if (!both[0].finite || !both[1].finite) request.suspect();
  }
  const int count = ceil_div(request.tokens, kPageTokens);
  const std::size_t pages = at(count) * at(request.kv_heads);
  Upload upload(pages_, Upload::room<PageArgs>(pages));
  PageArgs* page_args;
  const PageArgs* pages_there = upload.add(pages, &page_args);
  std::vector<HeadArgs> heads;
  for (int kv = 0; kv < request.kv_heads; ++kv) {
    HeadArgs head{};
    head.pages = pages_there + std::ptrdiff_t{kv} * count;
    head.tokens = head.k_quantised = head.v_quantised = request.tokens;
    head.ring = 1;
    heads.push_back(head);
    for (int p = 0; p < count; ++p) {
      const std::size_t offset = head_bytes * at(kv) + number * at(p) * kPageTokens * at(D);
      page_args[kv * count + p] = {k + offset, v + offset, {0, 0}, nullptr, nullptr};
    }
  }
  upload.flush();
  AttendRequest one;
  one.q = request.q;
  one.out = request.out;
  one.lse = request.lse;
  one.logits = request.logits;
  one.q_tokens = request.q_tokens;
  one.sliding_window = request.sliding_window;
  one.causal = request.causal;
  run_attention(rule, std::span(&one, 1), heads);
}

}  // namespace innerkv::gpu
