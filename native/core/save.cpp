// Long file: writer and reader of one format, read side by side.
#include "save.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "../format/checksum.h"
#include "../numerics/half.h"
#include "error.h"

namespace innerkv {

namespace {

constexpr char kMagic[] = "INKVSEQ1", kEndMagic[] = "INKVEND1";
constexpr std::size_t kPrefix = 16, kChunkHead = 16, kEndBytes = 16, kCrc = 4;
constexpr float kMaxHalf = 65504.0f;

std::size_t at(int i) { return static_cast<std::size_t>(i); }

[[noreturn]] void corrupt(const char* what) {
  throw Error(ErrorCode::kCorrupt,
              std::string("The saved sequence is damaged or not one of ours: ") + what + ".");
}
void intact(bool condition, const char* what) {
  if (!condition) corrupt(what);
}

class Out {
 public:
  template <class T>
  void put(T value) {
    bytes(&value, sizeof value);
  }
  void bytes(const void* data, std::size_t size) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    data_.insert(data_.end(), from, from + size);
  }
  std::vector<std::uint8_t> sealed() {
    put(crc32c(data_.data(), data_.size()));
    return std::move(data_);
  }
  const std::vector<std::uint8_t>& data() const { return data_; }

 private:
  std::vector<std::uint8_t> data_;
};

class In {
 public:
  In(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  template <class T>
  T get() {
    T value;
    bytes(&value, sizeof value);
    return value;
  }
  void bytes(void* to, std::size_t size) {
    intact(size <= size_, "it ends too early");
    std::memcpy(to, data_, size);
    data_ += size;
    size_ -= size;
  }
  void halves(std::uint16_t* to, std::size_t count) {
    bytes(to, 2 * count);
    for (std::size_t i = 0; i < count; ++i)
      intact(half_is_finite(to[i]), "a window holds a number that is not finite");
  }
  std::vector<float> floats(std::size_t count, float low, float high) {
    std::vector<float> values(count);
    bytes(values.data(), sizeof(float) * count);
    for (const float value : values) intact(value >= low && value <= high, "a statistic is out of range");
    return values;
  }
  bool empty() const { return size_ == 0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

template <class T>
T peek(const std::uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

int pages_of(const LayerState& state) {
  return (std::max(state.reach.k, state.reach.v) + kPageTokens - 1) / kPageTokens;
}

/// Tokens that live in the K and V rings.
int ring_k(const LayerState& state) { return std::max(0, state.tokens - state.reach.sink) - state.reach.k; }
int ring_v(const LayerState& state) { return std::max(0, state.tokens - state.reach.sink) - state.reach.v; }

int slots_of(int quantised, int page) { return std::clamp(quantised - page * kPageTokens, 0, kPageTokens); }

/// The outlier rows of the first `slots` slots are the format's, not only some that could be read: tokens may
/// be replaced in place later.
void check_outliers(const TensorLayout& tensor, const std::uint8_t* base, int slots) {
  if (tensor.spec.outliers == 0) return;
  const OutlierLayout layout = tensor.outliers();
  const std::uint8_t* section = base + tensor.outliers_at();
  intact(outliers_valid(section, layout, slots, tensor.head_dim), "its outliers are out of order");
  for (int slot = 0; slot <= slots; ++slot)
    intact(outlier_start(section, layout, slot) == slot * tensor.spec.outliers,
           "a token has too many or too few outliers");
  const std::size_t padding[][2] = {{layout.indices_at() + at(layout.capacity), layout.values_at()},
                                    {layout.values_at() + 2 * at(layout.capacity), layout.bytes()}};
  for (const auto& [begin, end] : padding)
    for (std::size_t i = begin; i < end; ++i) intact(section[i] == 0, "what aligns outliers is not empty");
}

/// Scales, dense zero points and outliers that belong to the first `slots` slots must be sound; returns the
/// compact zero points owned.
int check_tensor(const TensorLayout& tensor, const std::uint8_t* base, int slots) {
  if (tensor.spec.raw()) {
    for (int i = 0; i < slots * tensor.head_dim; ++i)
      intact(half_is_finite(peek<std::uint16_t>(base + 2 * at(i))),
             "a 16-bit page holds a number that is not finite");
    return 0;
  }
  int zeros = 0;
  const int span = tensor.spec.flush_tokens();
  for (int slot = 0; slot < slots; slot += span)
    for (int g = 0; g < tensor.groups(); ++g) {
      const std::size_t index = 2 * at(tensor.scale_index(slot, g));
      const auto scale = peek<std::uint16_t>(base + tensor.scales_at() + index);
      intact(half_is_finite(scale), "a scale is not finite");
      if (tensor.spec.dense_zeros())
        intact(half_is_finite(peek<std::uint16_t>(base + tensor.zeros_at() + index)),
               "a zero point is not finite");
      if (tensor.spec.compact_zeros()) zeros += scale >> 15;
    }
  check_outliers(tensor, base, slots);
  return zeros;
}

/// Zero bits from slot `slots` on: what truncation left there is nobody's business.
void clear_unused(const TensorLayout& tensor, std::uint8_t* base, int slots) {
  for (int slot = slots; slot < kPageTokens; ++slot) {
    if (tensor.spec.raw()) {
      std::memset(base + 2 * at(slot * tensor.head_dim), 0, 2 * at(tensor.head_dim));
      continue;
    }
    for (int c = 0; c < tensor.head_dim; ++c)
      put_code(base, tensor.codes(), tensor.value ? c : slot, tensor.value ? slot : c, 0);
    if (slot % tensor.spec.flush_tokens() > 0) continue;
    for (int g = 0; g < tensor.groups(); ++g) {
      const std::size_t index = 2 * at(tensor.scale_index(slot, g));
      std::memset(base + tensor.scales_at() + index, 0, 2);
      if (tensor.spec.dense_zeros()) std::memset(base + tensor.zeros_at() + index, 0, 2);
    }
    for (int i = 0; i < tensor.spec.outliers; ++i)
      put_outlier(base + tensor.outliers_at(), tensor.outliers(), slot * tensor.spec.outliers + i, {0, 0});
    if (tensor.spec.outliers > 0)
      put_outlier_start(base + tensor.outliers_at(), tensor.outliers(), slot + 1, 0);
  }
}

void clear_unused(const PageLayout& layout, std::uint8_t* page, int k_slots, int v_slots) {
  clear_unused(layout.k, page + layout.k_at(), k_slots);
  clear_unused(layout.v, page + layout.v_at(), v_slots);
}

/// The bits of removed[half] that belong to the first `slots` slots.
std::uint64_t slot_mask(int half, int slots) {
  const int bits = std::clamp(slots - 64 * half, 0, 64);
  return bits == 0 ? 0 : ~std::uint64_t{0} >> (64 - bits);
}

}  // namespace

int SequenceWriter::pieces() const {
  return 2 + sequence_->cache().config().layers * sequence_->cache().config().kv_heads;
}

std::vector<std::uint8_t> SequenceWriter::next() {
  const int piece = piece_++, heads = sequence_->cache().config().kv_heads;
  if (piece == 0) return header();
  if (piece < pieces() - 1) return chunk((piece - 1) / heads, (piece - 1) % heads);
  if (piece >= pieces()) return {};
  Out end;
  end.bytes(kEndMagic, 8);
  end.put(static_cast<std::uint32_t>(pieces() - 2));
  return end.sealed();
}

std::vector<std::uint8_t> SequenceWriter::header() const {
  const Cache& cache = sequence_->cache();
  Out body;
  body.put(cache.prints().format);
  body.put(cache.prints().basis);
  body.put(static_cast<std::uint32_t>(cache.config().layers));
  body.put(static_cast<std::uint32_t>(cache.config().kv_heads));
  for (const LayerState& state : sequence_->layers_)
    for (const int number :
         {state.tokens, state.reach.sink, state.reach.k, state.reach.v, state.online ? 1 : 0})
      body.put(static_cast<std::int32_t>(number));
  Out out;
  out.bytes(kMagic, 8);
  out.put(kSaveVersion);
  out.put(static_cast<std::uint32_t>(body.data().size()));
  out.bytes(body.data().data(), body.data().size());
  return out.sealed();
}

std::vector<std::uint8_t> SequenceWriter::chunk(int layer, int head) const {
  const CacheConfig& config = sequence_->cache().config();
  const LayerState& state = sequence_->layers_[at(layer)];
  const LayerScheme& scheme = config.scheme(layer);
  const std::size_t D = at(config.head_dim);
  Out body;
  const auto w = sequence_->windows(state, scheme, head);
  Backend& backend = sequence_->cache().backend();
  const auto copy = [&](const void* from, std::size_t size) {
    std::vector<std::uint8_t> bytes(size);
    backend.copy_memory(bytes.data(), from, size);
    return bytes;
  };
  const auto device = [&](const void* from, std::size_t size) { body.bytes(copy(from, size).data(), size); };
  const auto ring = [&](const std::uint16_t* from, int first, int count) {
    for (int t = first; t < first + count; ++t) device(from + at(t % scheme.ring_tokens()) * D, 2 * D);
  };
  const std::size_t sink = at(std::min(state.tokens, state.reach.sink));
  if (sink > 0) {
    device(w.sink_k, 2 * D * sink);
    device(w.sink_v, 2 * D * sink);
  }
  ring(w.ring_k, state.reach.k, ring_k(state));
  ring(w.ring_v, state.reach.v, ring_v(state));
  if (state.online) {
    const Basis& basis = (*state.online)[at(head)];
    body.bytes(basis.mean.data(), sizeof(float) * basis.mean.size());
    body.bytes(basis.lam.data(), sizeof(float) * basis.lam.size());
  }
  const PageLayout layout(scheme.k, scheme.v, config.head_dim);
  for (int i = 0; i < pages_of(state); ++i) {
    const Page* page = state.pages[at(head)][at(i)].get();
    body.put(static_cast<std::uint8_t>(page != nullptr));
    if (!page) continue;
    const int k_slots = slots_of(state.reach.k, i), v_slots = slots_of(state.reach.v, i);
    for (int half = 0; half < 2; ++half) body.put(page->removed[half] & slot_mask(half, k_slots));
    std::vector<std::uint8_t> stored = copy(page->bytes.data(), layout.bytes());
    clear_unused(layout, stored.data(), k_slots, v_slots);
    body.bytes(stored.data(), stored.size());
    const auto zeros = [&](const TensorLayout& tensor, const std::uint8_t* base,
                           const std::vector<Slot>& extents, int slots) {
      const int count = check_tensor(tensor, base, slots);
      for (int z = 0; z < count; z += kZeroExtent)
        device(extents[at(z / kZeroExtent)].data(), 2 * at(std::min(count - z, kZeroExtent)));
    };
    zeros(layout.k, stored.data() + layout.k_at(), page->k_zeros, k_slots);
    zeros(layout.v, stored.data() + layout.v_at(), page->v_zeros, v_slots);
  }
  Out out;
  out.put(static_cast<std::uint32_t>(layer));
  out.put(static_cast<std::uint32_t>(head));
  out.put(static_cast<std::uint64_t>(body.data().size()));
  out.bytes(body.data().data(), body.data().size());
  return out.sealed();
}

SequenceReader::SequenceReader(std::shared_ptr<Cache> cache)
    : cache_(std::move(cache)), sequence_(cache_->sequence()), online_(at(cache_->config().layers)) {}

void SequenceReader::feed(const std::uint8_t* data, std::size_t size) try {
  intact(stage_ != Stage::kFailed, "an earlier part was refused");
  intact(stage_ != Stage::kDone || size == 0, "there is something after its end");
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(used_));
  used_ = 0;
  pending_.insert(pending_.end(), data, data + size);
  while (step()) {
  }
  intact(stage_ != Stage::kDone || used_ == pending_.size(), "there is something after its end");
} catch (...) {  // gives back at once what half a sequence holds
  stage_ = Stage::kFailed;
  sequence_.reset();
  throw;
}

std::unique_ptr<Sequence> SequenceReader::finish() {
  intact(stage_ == Stage::kDone, "it ends too early");
  return std::move(sequence_);
}

bool SequenceReader::step() {
  switch (stage_) {
    case Stage::kHeader:
      return read_header();
    case Stage::kChunks:
      return read_chunk();
    case Stage::kEnd:
      return read_end();
    case Stage::kDone:
    case Stage::kFailed:
      break;
  }
  return false;
}

bool SequenceReader::read_header() {
  const std::uint8_t* data = pending_.data() + used_;
  const std::size_t size = pending_.size() - used_;
  if (size == 0) return false;
  const std::size_t known = std::min<std::size_t>(size, 8);
  intact(std::memcmp(data, kMagic, known) == 0, "it does not begin with the mark of a saved sequence");
  if (size < kPrefix) return false;
  const auto version = peek<std::uint32_t>(data + 8), body = peek<std::uint32_t>(data + 12);
  const std::size_t expected = 24 + std::size_t{20} * at(cache_->config().layers);
  if (version != kSaveVersion)
    throw Error(ErrorCode::kCorrupt, "The saved sequence has version " + std::to_string(version) +
                                         "; this library reads version " + std::to_string(kSaveVersion) +
                                         ".");
  if (body != expected)
    throw Error(ErrorCode::kInvalidArgument,
                "The saved sequence has another number of layers than this cache, or a damaged head.");
  if (size < kPrefix + body + kCrc) return false;
  intact(crc32c(data, kPrefix + body) == peek<std::uint32_t>(data + kPrefix + body),
         "the checksum of its head is wrong");
  parse_layers(data + kPrefix, body);
  used_ += kPrefix + body + kCrc;
  stage_ = Stage::kChunks;
  return true;
}

void SequenceReader::parse_layers(const std::uint8_t* data, std::size_t size) {
  const CacheConfig& config = cache_->config();
  In in(data, size);
  const Fingerprints prints = cache_->prints();
  const auto format = in.get<std::uint64_t>(), basis = in.get<std::uint64_t>();
  const auto layers = in.get<std::uint32_t>(), heads = in.get<std::uint32_t>();
  if (format != prints.format || layers != static_cast<std::uint32_t>(config.layers) ||
      heads != static_cast<std::uint32_t>(config.kv_heads))
    throw Error(
        ErrorCode::kInvalidArgument,
        "The saved sequence belongs to a cache of another shape, scheme, window or rope than this one.");
  if (basis != prints.basis)
    throw Error(ErrorCode::kBasisMismatch,
                "The saved sequence was quantised with another calibration basis. Use the calibration file "
                "it was made with.");
  for (int layer = 0; layer < config.layers; ++layer) {
    LayerState& state = sequence_->layers_[at(layer)];
    const LayerScheme& scheme = config.scheme(layer);
    const int tokens = in.get<std::int32_t>(), sink = in.get<std::int32_t>(), k = in.get<std::int32_t>(),
              v = in.get<std::int32_t>(), online = in.get<std::int32_t>();
    intact(tokens >= 0 && tokens <= (1 << 30) && sink >= 0 && sink <= scheme.sink,
           "its counts are out of range");
    intact(tokens == 0               ? sink == 0
           : scheme.released_windows ? sink <= tokens
                                     : sink == scheme.sink,
           "its sink window does not fit");
    const int body = std::max(0, tokens - sink), ring = scheme.ring_tokens();
    intact(k >= 0 && v >= 0 && k <= body && v <= body && body - k <= ring && body - v <= ring,
           "its windows do not fit");
    const int flush = scheme.v.flush_tokens();
    intact(v % flush == 0, "its groups are not whole");
    intact(scheme.released_windows ? std::abs(k - v) < flush : v == k / flush * flush,
           "its keys and values do not fit");
    intact(online == (scheme.online() && (k > 0 || v > 0) ? 1 : 0), "its statistics are missing or unwanted");
    state.tokens = tokens;
    state.reach = {sink, k, v};
    if (tokens > 0) state.windows = cache_->pool().take(config.window_bytes(scheme));
  }
}

/// No honest chunk of this layer is longer, nor one whose pages the budget can hold.
SequenceReader::Limits SequenceReader::chunk_limits(int layer) const {
  const CacheConfig& config = cache_->config();
  const LayerState& state = sequence_->layers_[at(layer)];
  const PageLayout layout(config.scheme(layer).k, config.scheme(layer).v, config.head_dim);
  const std::size_t page = 17 + layout.bytes() + std::size_t{2} * at(layout.k.scales() + layout.v.scales());
  const std::size_t windows = std::size_t{16} * at(config.head_dim) *
                              (at(state.reach.sink) + at(config.scheme(layer).ring_tokens()) + 1),
                    pages = at(pages_of(state)), budget = config.budget_bytes;
  return {windows + page * pages, windows + pages + budget + 16 * (budget / layout.bytes())};
}

bool SequenceReader::read_chunk() {
  const CacheConfig& config = cache_->config();
  const std::uint8_t* data = pending_.data() + used_;
  const std::size_t size = pending_.size() - used_;
  if (size < kChunkHead) return false;
  const int layer = chunk_ / config.kv_heads, head = chunk_ % config.kv_heads;
  intact(peek<std::uint32_t>(data) == static_cast<std::uint32_t>(layer) &&
             peek<std::uint32_t>(data + 4) == static_cast<std::uint32_t>(head),
         "its parts are out of order");
  const auto body = peek<std::uint64_t>(data + 8);
  const Limits limits = chunk_limits(layer);
  intact(body <= limits.honest, "a part is too long");
  if (body > limits.affordable)
    throw Error(ErrorCode::kOutOfMemory, "The saved sequence does not fit the cache's memory budget of " +
                                             std::to_string(config.budget_bytes) +
                                             " bytes. Create the cache with more memory.");
  if (size < kChunkHead + body + kCrc) return false;
  intact(crc32c(data, kChunkHead + body) == peek<std::uint32_t>(data + kChunkHead + body),
         "the checksum of a part is wrong");
  parse_chunk(layer, head, data + kChunkHead, body);
  used_ += kChunkHead + body + kCrc;
  if (++chunk_ == config.layers * config.kv_heads) stage_ = Stage::kEnd;
  return true;
}

void SequenceReader::parse_chunk(int layer, int head, const std::uint8_t* data, std::size_t size) {
  const CacheConfig& config = cache_->config();
  LayerState& state = sequence_->layers_[at(layer)];
  const LayerScheme& scheme = config.scheme(layer);
  const std::size_t D = at(config.head_dim);
  In in(data, size);
  const auto w = sequence_->windows(state, scheme, head);
  std::vector<std::uint8_t> host;
  const auto to_device = [&](void* to) { cache_->backend().copy_memory(to, host.data(), host.size()); };
  const auto halves = [&](void* to, std::size_t count) {
    host.resize(2 * count);
    in.halves(reinterpret_cast<std::uint16_t*>(host.data()), count);
    to_device(to);
  };
  const auto ring = [&](std::uint16_t* to, int first, int count) {
    for (int t = first; t < first + count; ++t) halves(to + at(t % scheme.ring_tokens()) * D, D);
  };
  const std::size_t sink = at(std::min(state.tokens, state.reach.sink));
  if (sink > 0) {
    halves(w.sink_k, D * sink);
    halves(w.sink_v, D * sink);
  }
  ring(w.ring_k, state.reach.k, ring_k(state));
  ring(w.ring_v, state.reach.v, ring_v(state));
  if (scheme.online() && (state.reach.k > 0 || state.reach.v > 0)) {
    Basis basis;
    if (scheme.online_mean) basis.mean = in.floats(D, -kMaxHalf, kMaxHalf);
    if (scheme.online_lambda) basis.lam = in.floats(D, 0x1p-10f, std::sqrt(kMaxHalf));
    for (const float lam : basis.lam) basis.inv_lam.push_back(1.0f / lam);
    auto& bases = online_[at(layer)];
    bases.push_back(std::move(basis));
    if (head == config.kv_heads - 1)
      state.online = std::make_shared<const std::vector<Basis>>(std::move(bases));
  }
  const PageLayout layout(scheme.k, scheme.v, config.head_dim);
  const bool removable = scheme.per_token() && !scheme.k.compact_zeros() && !scheme.v.compact_zeros();
  for (int i = 0; i < pages_of(state); ++i) {
    const auto present = in.get<std::uint8_t>();
    const int k_slots = slots_of(state.reach.k, i), v_slots = slots_of(state.reach.v, i);
    intact(present == 1 || (present == 0 && removable), "a page is missing");
    auto& table = state.pages[at(head)];
    if (!present) {
      table.push_back(nullptr);
      state.removed += at(k_slots);
      continue;
    }
    auto page = std::make_shared<Page>();
    page->bytes = cache_->pool().take(layout.bytes());
    page->removed[0] = in.get<std::uint64_t>();
    page->removed[1] = in.get<std::uint64_t>();
    for (int half = 0; half < 2; ++half) {
      intact((page->removed[half] & ~(removable ? slot_mask(half, k_slots) : 0)) == 0,
             "a token is marked removed where none can be");
      state.removed += at(std::popcount(page->removed[half]));
    }
    std::vector<std::uint8_t> stored(layout.bytes());
    in.bytes(stored.data(), stored.size());
    if (std::min(k_slots, v_slots) < kPageTokens) {
      std::vector<std::uint8_t> cleared = stored;
      clear_unused(layout, cleared.data(), k_slots, v_slots);
      intact(cleared == stored, "a slot without a token is not empty");
    }
    cache_->backend().copy_memory(page->bytes.data(), stored.data(), stored.size());
    const auto zeros = [&](const TensorLayout& tensor, const std::uint8_t* base, std::vector<Slot>& extents,
                           int slots) {
      const int count = check_tensor(tensor, base, slots);
      for (int z = 0; z < count; z += kZeroExtent) {
        extents.push_back(cache_->pool().take(2 * kZeroExtent));
        halves(extents.back().data(), at(std::min(count - z, kZeroExtent)));
      }
      return count;
    };
    page->k_zero_count = zeros(layout.k, stored.data() + layout.k_at(), page->k_zeros, k_slots);
    page->v_zero_count = zeros(layout.v, stored.data() + layout.v_at(), page->v_zeros, v_slots);
    page->k_counted = k_slots;
    page->v_counted = v_slots;
    table.push_back(std::move(page));
  }
  intact(in.empty(), "a part is too long");
}

bool SequenceReader::read_end() {
  const std::uint8_t* data = pending_.data() + used_;
  if (pending_.size() - used_ < kEndBytes) return false;
  const int chunks = cache_->config().layers * cache_->config().kv_heads;
  intact(std::memcmp(data, kEndMagic, 8) == 0 &&
             peek<std::uint32_t>(data + 8) == static_cast<std::uint32_t>(chunks) &&
             crc32c(data, kEndBytes - kCrc) == peek<std::uint32_t>(data + kEndBytes - kCrc),
         "its end mark is wrong");
  used_ += kEndBytes;
  stage_ = Stage::kDone;
  return true;
}

}  // namespace innerkv
