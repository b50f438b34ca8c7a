// Attention over pages and 16-bit windows, computed from the packed bits.
//
// A task is up to kMaxRows query rows of one KV head against a run of pages; its result is a softmax state
// (maximum, sum, output) and states are merged by log-sum-exp. Runs have a fixed length, so results do not
// depend on the number of threads. Inside a page: queries and probabilities become 16-bit integers, codes
// stay integers, scales are applied to the sums. Logits are in base 2 throughout.
// Long file: one pass over a page, in the order of its steps.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_backend.h"

namespace innerkv {

namespace {
constexpr int kRunPages = 32;
constexpr int kMassTokens = 1024;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kMaxGroups = kMaxHeadDim / 32;
constexpr int kStepsPerRow = 4;  // of a pass over a page: scores, softmax, weights, values
constexpr int kMaxScales = kPageTokens * kMaxGroups;
}  // namespace

struct AttendScratch {
  alignas(64) std::uint8_t codes[kPageTokens * kMaxHeadDim];
  alignas(64) float q[kMaxRows * kMaxHeadDim];
  alignas(64) std::int8_t q_hi[kMaxRows * kMaxHeadDim], q_lo[kMaxRows * kMaxHeadDim];
  alignas(64) std::int8_t p_hi[kMaxRows * kPageTokens], p_lo[kMaxRows * kPageTokens];
  alignas(64) std::int32_t sums[kMaxRows * kMaxHeadDim];
  alignas(64) float scores[kMaxRows * kPageTokens];
  alignas(64) float scale[kMaxScales], offset[kMaxScales], weights[kPageTokens];
  alignas(64) float q_stored[kMaxRows * kMaxHeadDim];  // in the basis of stored keys, for outliers
  alignas(64) float outlier_values[kPageTokens * kMaxOutliers];
  std::uint16_t outlier_starts[kPageTokens + 1];
  float q_step[kMaxRows], q_constant[kMaxRows];
  std::int32_t q_total[kMaxRows][kMaxGroups];
};

namespace {

struct Task {
  const AttendRequest* request;
  int head, first_row, rows, first_tile, end_tile;
  bool windows;  // this task also does the sink tokens
  float*
      state;  // maximum [rows], sum [rows], output in the stored basis [rows][D], in the raw basis [rows][D]
  float* kept = nullptr;  // [rows][tokens] base-2 logits for the masses, or nullptr
};

/// Scales of a page in float32, one per (group, slot) or (sub-block, channel), and offsets where the mode
/// needs them.
struct PageScales {
  const float* scale;
  const float* offset;  // nullptr: centred modes
  int center2;          // twice the code that means zero, for centred modes
};

PageScales load_scales(const Kernels& kernels, const TensorLayout& layout, const std::uint8_t* base,
                       const std::vector<Slot>& extents, int slots, float* scale, float* offset) {
  const TensorSpec& spec = layout.spec;
  const auto* stored = reinterpret_cast<const std::uint16_t*>(base + layout.scales_at());
  const int count = layout.scales();
  if (!spec.compact_zeros()) {
    kernels.half_to_float(stored, scale, static_cast<std::size_t>(count));
    if (!spec.dense_zeros())
      return {scale, nullptr, spec.mode == Mode::kMidRise ? spec.levels() - 1 : spec.levels()};
    kernels.half_to_float(reinterpret_cast<const std::uint16_t*>(base + layout.zeros_at()), offset,
                          static_cast<std::size_t>(count));
    return {scale, offset, 0};
  }
  // Without branches, which nobody could foresee: the next zero point is read whether it is due or not.
  float zeros[kMaxScales + 1];
  for (std::size_t i = 0; i < extents.size(); ++i)
    kernels.half_to_float(reinterpret_cast<const std::uint16_t*>(extents[i].data()), zeros + i * kZeroExtent,
                          kZeroExtent);
  zeros[extents.size() * kZeroExtent] = 0.0f;
  kernels.half_to_float(stored, scale, static_cast<std::size_t>(count));
  const float center = 0.5f * static_cast<float>(spec.levels());
  const int span = spec.group == Group::kTokens32 ? kBlockTokens32 : 1;
  const float* zero = zeros;
  for (int slot = 0; slot < slots; slot += span)
    for (int g = 0; g < layout.groups(); ++g) {
      const int index = layout.scale_index(slot, g);
      const std::uint32_t own = std::uint32_t{stored[index]} >> 15;  // the sign bit: it has a zero point
      const float size = std::abs(scale[index]), centred = -(size * center);
      const std::uint32_t chosen = (std::bit_cast<std::uint32_t>(*zero) & (0u - own)) |
                                   (std::bit_cast<std::uint32_t>(centred) & (own - 1u));
      scale[index] = size;
      offset[index] = std::bit_cast<float>(chosen);
      zero += own;
    }
  return {scale, offset, 0};
}

OutlierRows load_outliers(const Kernels& kernels, const TensorLayout& tensor, const std::uint8_t* base,
                          int slots, AttendScratch& s) {
  const OutlierLayout layout = tensor.outliers();
  const std::uint8_t* section = base + tensor.outliers_at();
  for (int slot = 0; slot <= slots; ++slot)
    s.outlier_starts[slot] = static_cast<std::uint16_t>(outlier_start(section, layout, slot));
  kernels.half_to_float(reinterpret_cast<const std::uint16_t*>(section + layout.values_at()),
                        s.outlier_values, s.outlier_starts[slots]);
  return {s.outlier_starts, section + layout.indices_at(), s.outlier_values, slots, tensor.head_dim};
}

/// Fetches the next page while the present one is computed, a few lines between the steps: pages are too
/// short for the processor to foresee them, and many lines at once would stall it.
class PageAhead {
 public:
  void start(const Page* page, std::size_t bytes, int steps) {
    at_ = page ? page->bytes.data() : nullptr;
    end_ = at_ + (page ? bytes : 0);
    share_ = (bytes / static_cast<std::size_t>(steps) + 63) / 64 * 64;
  }
  void step() {
    const std::uint8_t* stop = static_cast<std::size_t>(end_ - at_) > share_ ? at_ + share_ : end_;
    for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const std::uint8_t *at_ = nullptr, *end_ = nullptr;
  std::size_t share_ = 0;
};

class HeadAttention {
 public:
  HeadAttention(const Kernels& kernels, const CacheConfig& config, const Task& task,
                const RotationTable& rotations, AttendScratch& scratch)
      : kernels_(kernels),
        config_(config),
        task_(task),
        request_(*task.request),
        head_(task.request->heads[static_cast<std::size_t>(task.head)]),
        scheme_(*head_.scheme),
        rotations_(rotations),
        s_(scratch),
        D_(config.head_dim),
        group_(config.group_size()),
        layout_(scheme_.k, scheme_.v, D_) {
    for (int r = 0; r < task_.rows; ++r) {
      const float* from =
          request_.q + (std::ptrdiff_t{query_token(r)} * config.query_heads + query_head(r)) * D_;
      const float factor = config.softmax_scale * kLog2e;
      for (int c = 0; c < D_; ++c) s_.q[r * D_ + c] = from[c] * factor;
    }
    std::fill_n(task_.state, task_.rows, kNone);
    std::fill_n(task_.state + task_.rows, task_.rows * (1 + 2 * D_), 0.0f);
  }

  void run() {
    if (task_.windows && head_.sink > 0) sink_tile();
    for (int tile = task_.first_tile; tile < task_.end_tile; ++tile) page_tile(tile);
  }

 private:
  int query_token(int r) const { return (task_.first_row + r) / group_; }
  int query_head(int r) const { return task_.head * group_ + (task_.first_row + r) % group_; }
  float* stored_out(int r) const { return task_.state + 2 * task_.rows + r * D_; }
  float* raw_out(int r) const { return stored_out(task_.rows + r); }
  int query_position(int r) const {
    return request_.causal ? head_.tokens - request_.q_behind - request_.q_tokens + query_token(r)
                           : head_.tokens - 1;
  }

  /// Positions [first, last) that row r may see.
  int first_visible(int r) const {
    return request_.sliding_window > 0 ? std::max(0, query_position(r) + 1 - request_.sliding_window) : 0;
  }
  int end_visible(int r) const { return query_position(r) + 1; }

  void raw_rows(const std::uint16_t* k, int count, int at) {
    kernels_.raw_scores_half(k, D_, count, D_, s_.q, task_.rows, s_.scores + at, kPageTokens);
  }

  void sink_tile() {
    for (int begin = 0; begin < head_.sink; begin += kPageTokens) {
      const int count = std::min(kPageTokens, head_.sink - begin);
      if (nothing_visible(begin, count)) {
        hide_logits(begin, count);
        continue;
      }
      raw_rows(head_.sink_k + std::ptrdiff_t{begin} * D_, count, 0);
      finish_scores(begin, count);
      for (int r = 0; r < task_.rows; ++r) update_softmax(r, count);
      accumulate_raw(head_.sink_v + std::ptrdiff_t{begin} * D_, 0, count);
    }
  }

  bool nothing_visible(int position, int count) const {
    for (int r = 0; r < task_.rows; ++r)
      if (position < end_visible(r) && position + count > first_visible(r)) return false;
    return true;
  }

  void page_tile(int tile) {
    const int first = tile * kPageTokens;  // token index
    const int count = std::min(kPageTokens, head_.tokens - head_.sink - first);
    if (nothing_visible(head_.sink + first, count)) return hide_logits(head_.sink + first, count);
    const int k_stored = std::clamp(head_.k_quantised - first, 0, count),
              v_stored = std::clamp(head_.v_quantised - first, 0, count);
    const Page* page =
        k_stored > 0 || v_stored > 0 ? (*head_.table)[static_cast<std::size_t>(tile)].get() : nullptr;
    const int next = first + kPageTokens;
    ahead_.start(next < std::min(head_.k_quantised, head_.v_quantised)
                     ? (*head_.table)[static_cast<std::size_t>(tile) + 1].get()
                     : nullptr,
                 layout_.bytes(), kStepsPerRow * task_.rows);
    if (k_stored > 0) {
      if (page)
        stored_scores(*page, tile, k_stored);
      else
        for (int r = 0; r < task_.rows; ++r) std::fill_n(s_.scores + r * kPageTokens, k_stored, kNone);
    }
    for (int slot = k_stored; slot < count;) {
      const int row = (first + slot) % head_.ring, run = std::min(count - slot, head_.ring - row);
      raw_rows(head_.ring_k + std::ptrdiff_t{row} * D_, run, slot);
      slot += run;
    }
    if (page && (page->removed[0] | page->removed[1]))
      for (int slot = 0; slot < k_stored; ++slot)
        if (page->is_removed(slot))
          for (int r = 0; r < task_.rows; ++r) s_.scores[r * kPageTokens + slot] = kNone;
    finish_scores(head_.sink + first, count);
    for (int r = 0; r < task_.rows; ++r, ahead_.step()) update_softmax(r, count);
    if (page && v_stored > 0) stored_values(*page, v_stored);
    for (int slot = v_stored; slot < count;) {
      const int row = (first + slot) % head_.ring, run = std::min(count - slot, head_.ring - row);
      accumulate_raw(head_.ring_v + std::ptrdiff_t{row} * D_, slot, run);
      slot += run;
    }
  }

  /// Queries in the basis of the stored keys, as integers. Made anew only when the block changes.
  void prepare_queries(int tile) {
    const std::int64_t block =
        scheme_.block_tokens > 0 ? block_position(head_.sink, scheme_.block_tokens, tile * kPageTokens) : 0;
    if (block == prepared_) return;
    prepared_ = block;
    const Rotation* rotation = scheme_.block_tokens > 0 ? &rotations_.at(block) : nullptr;
    const auto part = [&](const std::vector<float> Basis::* member) {
      return head_.basis && !(head_.basis->*member).empty() ? (head_.basis->*member).data() : nullptr;
    };
    QueryArgs args{};
    args.head_dim = D_;
    args.cos = rotation ? rotation->cos.data() : nullptr;
    args.sin = rotation ? rotation->sin.data() : nullptr;
    args.pairs = static_cast<int>(rotations_.rope().theta.size());
    args.half_layout = rotations_.rope().half_layout;
    args.mean = part(&Basis::mean);
    args.lam = part(&Basis::lam);
    args.hadamard = scheme_.hadamard_k;
    args.group = group_channels(layout_.k.spec.group, D_);
    for (int r = 0; r < task_.rows; ++r) {
      args.q = s_.q + r * D_;
      args.hi = s_.q_hi + r * D_;
      args.lo = s_.q_lo + r * D_;
      args.totals = s_.q_total[r];
      args.stored = layout_.k.spec.outliers > 0 ? s_.q_stored + r * D_ : nullptr;
      kernels_.prepare_query(args);
      s_.q_step[r] = args.step;
      s_.q_constant[r] = args.constant;
    }
  }

  static std::int32_t total(const std::int8_t* hi, const std::int8_t* lo, int begin, int end) {
    std::int32_t high = 0, low = 0;
    for (int i = begin; i < end; ++i) {
      high += hi[i];
      low += lo[i];
    }
    return 256 * high + low;
  }

  void stored_scores(const Page& page, int tile, int stored) {
    const TensorLayout& layout = layout_.k;
    const std::uint8_t* base = page.bytes.data() + layout_.k_at();
    if (layout.spec.raw()) return raw_rows(reinterpret_cast<const std::uint16_t*>(base), stored, 0);
    prepare_queries(tile);
    const PageScales scales = load_scales(kernels_, layout, base, page.k_zeros, stored, s_.scale, s_.offset);
    kernels_.unpack(layout.codes(), base, s_.codes);
    for (int r = 0; r < task_.rows; ++r) std::fill_n(s_.scores + r * kPageTokens, stored, s_.q_constant[r]);
    for (int g = 0; g < layout.groups(); ++g) {
      const int begin = layout.group_begin(g);
      kernels_.dot({s_.codes + std::ptrdiff_t{begin} * kPageTokens, kPageTokens,
                    (layout.group_end(g) - begin) / 4, layout.spec.bits, 0, (stored + 15) / 16 * 16,
                    s_.q_hi + begin, s_.q_lo + begin, D_, task_.rows, s_.sums});
      for (int r = 0; r < task_.rows; ++r, ahead_.step())
        kernels_.add_scores(s_.sums + r * kPageTokens, stored, scales.scale + g * kPageTokens,
                            scales.offset ? scales.offset + g * kPageTokens : nullptr, s_.q_step[r],
                            s_.q_total[r][g], scales.center2, s_.scores + r * kPageTokens);
    }
    if (layout.spec.outliers > 0)
      kernels_.outlier_scores(load_outliers(kernels_, layout, base, stored, s_), s_.q_stored, task_.rows,
                              s_.scores, kPageTokens);
  }

  void hide_logits(int position, int count) {
    for (int r = 0; r < task_.rows; ++r) {
      if (request_.logits) std::fill_n(logits_row(r) + position, count, kNone);
      if (task_.kept) std::fill_n(kept_row(r) + position, count, kNone);
    }
  }

  float* kept_row(int r) const { return task_.kept + std::ptrdiff_t{r} * head_.tokens; }

  float* logits_row(int r) const {
    return request_.logits +
           (std::ptrdiff_t{query_token(r)} * config_.query_heads + query_head(r)) * head_.tokens;
  }

  /// Softcap, masks and the optional outputs of logits, for positions position ... position + count - 1.
  void finish_scores(int position, int count) {
    for (int r = 0; r < task_.rows; ++r) {
      float* scores = s_.scores + r * kPageTokens;
      if (config_.softcap > 0)
        for (int i = 0; i < count; ++i)
          if (scores[i] != kNone)  // removed: tanh would bring it back as -softcap
            scores[i] = kLog2e * config_.softcap * std::tanh(scores[i] * kLn2 / config_.softcap);
      const int hidden_before = std::clamp(first_visible(r) - position, 0, count),
                hidden_from = std::clamp(end_visible(r) - position, 0, count);
      std::fill(scores, scores + hidden_before, kNone);
      std::fill(scores + hidden_from, scores + count, kNone);
      if (request_.logits)
        for (int i = 0; i < count; ++i) logits_row(r)[position + i] = scores[i] * kLn2;
      if (task_.kept) std::copy_n(scores, count, kept_row(r) + position);
    }
  }

  void update_softmax(int r, int count) {
    float &largest = task_.state[r], &sum = task_.state[task_.rows + r];
    SoftmaxArgs args{s_.scores + r * kPageTokens, count, largest, sum, 1.0f};
    kernels_.softmax(args);
    largest = args.running_max;
    sum = args.running_sum;
    if (args.rescale == 1.0f) return;
    kernels_.scale_by(stored_out(r), D_, args.rescale);
    kernels_.scale_by(raw_out(r), D_, args.rescale);
  }

  void accumulate_raw(const std::uint16_t* v, int slot, int count) {
    kernels_.raw_accumulate_half(v, D_, count, D_, s_.scores + slot, task_.rows, kPageTokens, raw_out(0));
  }

  void stored_values(const Page& page, int stored) {
    const TensorLayout& layout = layout_.v;
    const std::uint8_t* base = page.bytes.data() + layout_.v_at();
    if (layout.spec.raw()) {
      kernels_.raw_accumulate_half(reinterpret_cast<const std::uint16_t*>(base), D_, stored, D_, s_.scores,
                                   task_.rows, kPageTokens, stored_out(0));
      return;
    }
    const PageScales scales = load_scales(kernels_, layout, base, page.v_zeros, stored, s_.scale, s_.offset);
    kernels_.unpack(layout.codes(), base, s_.codes);
    if (layout.spec.group == Group::kTokens32)
      block_values(scales, stored);
    else
      token_values(scales, stored);
    if (layout.spec.outliers > 0)
      kernels_.outlier_values(load_outliers(kernels_, layout, base, stored, s_), s_.scores, task_.rows,
                              kPageTokens, stored_out(0));
  }

  /// One scale per token (or per token and channel group): it is folded into the probability.
  void token_values(const PageScales& scales, int stored) {
    const TensorLayout& layout = layout_.v;
    for (int g = 0; g < layout.groups(); ++g) {
      const int begin = layout.group_begin(g), end = layout.group_end(g);
      const float* scale = scales.scale + g * kPageTokens;
      float step[kMaxRows];
      std::int32_t sum_of_weights[kMaxRows];
      for (int r = 0; r < task_.rows; ++r, ahead_.step()) {
        kernels_.multiply(s_.scores + r * kPageTokens, scale, stored, s_.weights);
        std::fill(s_.weights + stored, s_.weights + kPageTokens, 0.0f);
        std::int8_t *hi = s_.p_hi + r * kPageTokens, *lo = s_.p_lo + r * kPageTokens;
        step[r] = kernels_.split(s_.weights, kPageTokens, hi, lo, &sum_of_weights[r]);
      }
      kernels_.dot({s_.codes, D_, kPageTokens / 4, layout.spec.bits, begin, end, s_.p_hi, s_.p_lo,
                    kPageTokens, task_.rows, s_.sums});
      for (int r = 0; r < task_.rows; ++r, ahead_.step()) {
        float* acc = stored_out(r) + begin;
        kernels_.add_values(s_.sums + r * D_ + begin, end - begin, nullptr, step[r], sum_of_weights[r],
                            scales.center2, acc);
        if (!scales.offset) continue;
        float shift = 0;
        for (int i = 0; i < stored; ++i)
          shift += s_.scores[r * kPageTokens + i] * scales.offset[g * kPageTokens + i];
        for (int c = 0; c < end - begin; ++c) acc[c] += shift;
      }
    }
  }

  /// InnerQ values: a scale per channel for each 32 tokens, applied to the finished sum of those tokens.
  void block_values(const PageScales& scales, int stored) {
    float step[kMaxRows];
    std::int32_t whole = 0;  // per 32 tokens below
    for (int r = 0; r < task_.rows; ++r, ahead_.step()) {
      std::memcpy(s_.weights, s_.scores + r * kPageTokens, sizeof(float) * static_cast<std::size_t>(stored));
      std::fill(s_.weights + stored, s_.weights + kPageTokens, 0.0f);
      step[r] = kernels_.split(s_.weights, kPageTokens, s_.p_hi + r * kPageTokens, s_.p_lo + r * kPageTokens,
                               &whole);
    }
    for (int first = 0; first < stored; first += kBlockTokens32) {
      kernels_.dot({s_.codes + std::ptrdiff_t{first} * D_, D_, kBlockTokens32 / 4, layout_.v.spec.bits, 0, D_,
                    s_.p_hi + first, s_.p_lo + first, kPageTokens, task_.rows, s_.sums});
      const int at = first / kBlockTokens32 * D_;
      for (int r = 0; r < task_.rows; ++r, ahead_.step()) {
        const std::int32_t weights =
            total(s_.p_hi + r * kPageTokens, s_.p_lo + r * kPageTokens, first, first + kBlockTokens32);
        float* acc = stored_out(r);
        kernels_.add_values(s_.sums + r * D_, D_, scales.scale + at, step[r], weights, scales.center2, acc);
        if (!scales.offset) continue;
        const float mass = step[r] * static_cast<float>(weights);
        for (int c = 0; c < D_; ++c) acc[c] += mass * scales.offset[at + c];
      }
    }
  }

  const Kernels& kernels_;
  const CacheConfig& config_;
  const Task& task_;
  const AttendRequest& request_;
  const HeadView& head_;
  const LayerScheme& scheme_;
  const RotationTable& rotations_;
  AttendScratch& s_;
  const int D_, group_;
  const PageLayout layout_;
  PageAhead ahead_;
  std::int64_t prepared_ = -1;
};

/// The rows of one KV head whose probabilities become masses.
struct MassRows {
  const AttendRequest* request;
  int head, rows;
  float *kept, *lse;  // [rows][tokens] and [rows], base 2
};

/// Adds the probabilities of tokens begin ... begin + count - 1, row after row.
void add_mass(const Kernels& kernels, const MassRows& of, int begin, int count) {
  const HeadView& view = of.request->heads[static_cast<std::size_t>(of.head)];
  float* mass = of.request->mass + of.head * of.request->mass_stride + begin;
  for (int r = 0; r < of.rows; ++r) {
    if (of.lse[r] == kNone) continue;
    float* p = of.kept + std::ptrdiff_t{r} * view.tokens + begin;
    SoftmaxArgs args{p, count, of.lse[r], 0.0f, 1.0f};  // no logit is above the log-sum-exp
    kernels.softmax(args);
    for (int i = 0; i < count; ++i) mass[i] += p[i];
  }
}

}  // namespace

CpuBackend::CpuBackend(int threads, const char* isa) : kernels_(select_kernels(isa)), pool_(threads) {
  for (int i = 0; i < pool_.threads(); ++i) scratch_.push_back(std::make_unique<AttendScratch>());
}

CpuBackend::~CpuBackend() = default;

bool CpuBackend::attend(const CacheConfig& config, std::span<const AttendRequest> requests,
                        const RotationTable& rotations, const std::atomic<bool>* aborted) {
  const int D = config.head_dim;
  const std::size_t row_floats = static_cast<std::size_t>(2 + 2 * D);
  std::vector<Task> tasks;
  std::vector<MassRows> masses;
  std::size_t rows_in_all = 0, kept_in_all = 0, kept_rows = 0;
  for (const AttendRequest& request : requests)
    for (int head = 0; head < config.kv_heads && request.mass; ++head) {
      const int rows = request.q_tokens * config.group_size();
      masses.push_back({&request, head, rows, nullptr, nullptr});
      kept_rows += static_cast<std::size_t>(rows);
      kept_in_all += static_cast<std::size_t>(rows) * static_cast<std::size_t>(request.heads[0].tokens);
    }
  const auto kept = std::make_unique_for_overwrite<float[]>(kept_in_all + kept_rows);
  float* next_kept = kept.get();
  for (MassRows& mass : masses) {
    mass.kept = next_kept;
    mass.lse = next_kept + std::ptrdiff_t{mass.rows} * mass.request->heads[0].tokens;
    next_kept = mass.lse + mass.rows;
  }
  const MassRows* mass = masses.data();
  for (const AttendRequest& request : requests)
    for (int head = 0; head < config.kv_heads; ++head) {
      const HeadView& view = request.heads[static_cast<std::size_t>(head)];
      const int tiles = std::max(0, view.tokens - view.sink + kPageTokens - 1) / kPageTokens,
                runs = std::max(1, (tiles + kRunPages - 1) / kRunPages);
      const int rows = request.q_tokens * config.group_size();
      for (int first = 0; first < rows; first += kMaxRows)
        for (int run = 0; run < runs; ++run) {
          const int count = std::min(kMaxRows, rows - first);
          tasks.push_back({&request, head, first, count, run * kRunPages,
                           std::min(tiles, (run + 1) * kRunPages), run == 0, nullptr,
                           request.mass ? mass->kept + std::ptrdiff_t{first} * view.tokens : nullptr});
          rows_in_all += static_cast<std::size_t>(count);
        }
      if (request.mass) ++mass;
    }
  std::vector<float> states(rows_in_all * row_floats);
  float* next = states.data();
  for (Task& task : tasks) {
    task.state = next;
    next += static_cast<std::size_t>(task.rows) * row_floats;
  }
  const auto stopped = [&] { return aborted && aborted->load(std::memory_order_relaxed); };
  pool_.run(static_cast<int>(tasks.size()), [&](int item, int thread) {
    if (!stopped())
      HeadAttention(kernels_, config, tasks[static_cast<std::size_t>(item)], rotations,
                    *scratch_[static_cast<std::size_t>(thread)])
          .run();
  });
  if (stopped()) return false;

  // Merge the runs of each row, undo the values' Hadamard once, divide by the sum. Runs of a row block are
  // neighbours.
  const int group = config.group_size();
  mass = masses.data();
  for (std::size_t begin = 0; begin < tasks.size();) {
    const Task& lead = tasks[begin];
    std::size_t end = begin + 1;
    while (end < tasks.size() && !tasks[end].windows) ++end;
    const LayerScheme& scheme = *lead.request->heads[static_cast<std::size_t>(lead.head)].scheme;
    for (int r = 0; r < lead.rows; ++r) {
      float largest = kNone;
      for (std::size_t t = begin; t < end; ++t) largest = std::max(largest, tasks[t].state[r]);
      float stored[kMaxHeadDim] = {}, raw[kMaxHeadDim] = {};
      float sum = 0;
      for (std::size_t t = begin; t < end && largest != kNone; ++t) {
        const float* state = tasks[t].state;
        const float factor = std::exp2(state[r] - largest);
        sum += factor * state[lead.rows + r];
        for (int c = 0; c < D; ++c) {
          stored[c] += factor * state[2 * lead.rows + r * D + c];
          raw[c] += factor * state[2 * lead.rows + (lead.rows + r) * D + c];
        }
      }
      if (scheme.hadamard_v && !scheme.v.raw()) kernels_.hadamard(stored, D);
      const std::ptrdiff_t row = std::ptrdiff_t{(lead.first_row + r) / group} * config.query_heads +
                                 lead.head * group + (lead.first_row + r) % group;
      for (int c = 0; c < D; ++c)
        lead.request->out[row * D + c] = sum > 0 ? (stored[c] + raw[c]) / sum : 0.0f;
      const float lse = sum > 0 ? largest + std::log2(sum) : kNone;
      if (lead.request->lse) lead.request->lse[row] = lse * kLn2;
      if (lead.request->mass) mass->lse[lead.first_row + r] = lse;
    }
    if (lead.request->mass && lead.first_row + lead.rows == mass->rows) ++mass;
    begin = end;
  }
  std::vector<std::pair<const MassRows*, int>> pieces;
  for (const MassRows& rows : masses)
    for (int begin = 0; begin < rows.request->heads[0].tokens; begin += kMassTokens)
      pieces.push_back({&rows, begin});
  pool_.run(static_cast<int>(pieces.size()), [&](int item, int) {
    const auto& [rows, begin] = pieces[static_cast<std::size_t>(item)];
    add_mass(kernels_, *rows, begin, std::min(kMassTokens, rows->request->heads[0].tokens - begin));
  });
  return true;
}

}  // namespace innerkv
