// Long file: one program, every way in which a file can be wrong.
// The saved form of a sequence: it comes back bit for bit, and nothing that is not one harms the cache that
// reads it. Files are cut, flipped, forged with valid checksums and fed in pieces of every size. Whatever is
// read either throws and gives back all it took, or becomes a sequence that saves to the very same file and
// works.
#include <array>
#include <limits>
#include <vector>

#include "format/checksum.h"
#include "heap.h"
#include "support.h"

namespace innerkv::test {
namespace {

constexpr int kCorrupt = static_cast<int>(ErrorCode::kCorrupt),
              kInvalid = static_cast<int>(ErrorCode::kInvalidArgument),
              kMemory = static_cast<int>(ErrorCode::kOutOfMemory);

// Every byte in turn where that takes seconds; under a sanitizer, where it takes minutes, a part of them.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStride = 11;
#else
constexpr std::size_t kStride = 1;
#endif

std::vector<Family> worlds() {
  std::vector<Family> all = families();
  all.push_back({"layers of different kinds", config_of({calibrated(), innerq(), scheme_of({}, {})})});
  return all;
}

/// Small files: one head.
std::vector<Family> small_worlds() {
  std::vector<Family> all = families();
  for (Family& family : all) {
    family.config.kv_heads = 1;
    for (LayerScheme& scheme : family.config.schemes)
      if (!scheme.basis.empty()) scheme.basis.resize(1);
  }
  return all;
}

std::vector<Bytes> pieces_of(const Sequence& sequence) {
  std::vector<Bytes> pieces;
  SequenceWriter writer(sequence);
  for (Bytes piece = writer.next(); !piece.empty(); piece = writer.next()) pieces.push_back(piece);
  return pieces;
}

Bytes joined(const std::vector<Bytes>& pieces) {
  Bytes all;
  for (const Bytes& piece : pieces) all.insert(all.end(), piece.begin(), piece.end());
  return all;
}

/// Makes the checksum of a changed piece right again.
void seal(Bytes& piece) {
  const std::uint32_t crc = crc32c(piece.data(), piece.size() - 4);
  std::memcpy(piece.data() + piece.size() - 4, &crc, 4);
}

template <class T>
void poke(Bytes& piece, std::size_t offset, T value) {
  std::memcpy(piece.data() + offset, &value, sizeof value);
}

template <class T>
T peek(const Bytes& piece, std::size_t offset) {
  T value;
  std::memcpy(&value, piece.data() + offset, sizeof value);
  return value;
}

void clear_slots(const TensorLayout& t, std::uint8_t* base, int slots) {
  for (int slot = slots; slot < kPageTokens; ++slot) {
    for (int c = 0; c < t.head_dim; ++c)
      if (t.spec.raw())
        std::memset(base + at(2 * (slot * t.head_dim + c)), 0, 2);
      else
        put_code(base, t.codes(), t.value ? c : slot, t.value ? slot : c, 0);
    for (int g = 0; g < t.groups() && !t.spec.raw(); ++g) {
      std::memset(base + t.scales_at() + at(2 * t.scale_index(slot, g)), 0, 2);
      if (t.spec.dense_zeros()) std::memset(base + t.zeros_at() + at(2 * t.scale_index(slot, g)), 0, 2);
    }
    if (t.spec.outliers == 0) continue;
    std::uint8_t* section = base + t.outliers_at();
    for (int i = 0; i < t.spec.outliers; ++i)
      put_outlier(section, t.outliers(), slot * t.spec.outliers + i, {0, 0});
    put_outlier_start(section, t.outliers(), slot + 1, 0);
  }
}

/// Whether all slots that hold no token are zero, and no bit tells of their removal.
bool unused_slots_are_zero(const Sequence& sequence) {
  const CacheConfig& config = sequence.cache().config();
  bool zero = true;
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerState& state = sequence.layer_state(layer);
    const PageLayout layout(config.scheme(layer).k, config.scheme(layer).v, config.head_dim);
    for (const auto& table : state.pages)
      for (int i = 0; i < static_cast<int>(table.size()); ++i) {
        const Page* page = table[at(i)].get();
        if (!page) continue;
        const int k_slots = stored_slots(state.reach.k, i), v_slots = stored_slots(state.reach.v, i);
        Bytes bytes(page->bytes.data(), page->bytes.data() + layout.bytes());
        const Bytes before = bytes;
        clear_slots(layout.k, bytes.data() + layout.k_at(), k_slots);
        clear_slots(layout.v, bytes.data() + layout.v_at(), v_slots);
        zero &= bytes == before;
        for (int slot = k_slots; slot < kPageTokens; ++slot) zero &= !page->is_removed(slot);
      }
  }
  return zero;
}

/// Everything a caller may do with a sequence that came out of a file nobody vouches for.
void use(Sequence& sequence, const Tokens& tokens) {
  const CacheConfig& config = sequence.cache().config();
  for (int layer = 0; layer < config.layers; ++layer) {
    const int n = sequence.tokens(layer);
    if (n > 2000) continue;  // a page table without pages may be long; reading it is a matter of time only
    read_back(sequence, layer, config.kv_heads - 1);
    if (n > 0) attended(sequence, layer);
    for (const int count : {1, 40, 150}) error_of([&] { append(sequence, tokens, 0, count, layer); });
    attended(sequence, layer);
  }
  const auto fork = sequence.fork();
  const int n = sequence.tokens(0);
  for (const int left : {n - 1, n - 60, 30, 10, 0}) {
    if (left < 0 || n > 2000) continue;
    sequence.truncate(left);
    if (left > 0) attended(sequence);
  }
}

/// Feeds `file` to a cache that holds other sequences; -1 when it was accepted. Either way the pool must hold
/// what it held, and what was accepted must save to the same file and be usable.
int judge(const std::shared_ptr<Cache>& cache, const Bytes& file, const Tokens& tokens,
          const std::string& what, std::size_t piece = SIZE_MAX) {
  const std::size_t used = cache->pool().used_bytes();
  std::unique_ptr<Sequence> sequence;
  const int code = error_of([&] { sequence = loaded(cache, file, piece); });
  if (code < 0) {
    CHECK_WITH(cache->pool().used_bytes() == used + bytes_held(*sequence), what);
    CHECK_WITH(saved(*sequence) == file, what);
    use(*sequence, tokens);
  }
  sequence.reset();
  CHECK_WITH(cache->pool().used_bytes() == used, what);
  return code;
}

TEST(
    "a loaded sequence is the saved one bit for bit, in every scheme and at every length, and goes on like "
    "it") {
  for (const Family& family : worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 400, 1);
    for (const int n : {0, 1, 3, 4, 5, 12, 13, 47, 48, 140, 141, 300}) {
      const std::string what = family.name + std::string(", ") + std::to_string(n);
      const auto sequence = filled(cache, tokens, n);
      const Bytes file = saved(*sequence);
      for (const std::size_t piece : {std::size_t{1}, std::size_t{4099}, SIZE_MAX}) {
        if (piece == 1 && n > 48) continue;
        const auto copy = loaded(cache, file, piece);
        CHECK_WITH(contents(*copy) == contents(*sequence), what);
        CHECK_WITH(raw_pages(*copy) == raw_pages(*sequence), what);
        CHECK_WITH(bytes_held(*copy) == bytes_held(*sequence), what);
        CHECK_WITH(cache->pool().used_bytes() == bytes_held(*copy) + bytes_held(*sequence), what);
        CHECK_WITH(saved(*copy) == file, what);
        for (int layer = 0; layer < family.config.layers && n > 0; ++layer)
          CHECK_WITH(same_bits(attended(*copy, layer), attended(*sequence, layer)), what);
      }
      const auto copy = loaded(cache, file);
      for (int layer = 0; layer < family.config.layers; ++layer)
        for (Sequence* one : {sequence.get(), copy.get()}) append(*one, tokens, n, 70, layer);
      CHECK_WITH(contents(*copy) == contents(*sequence), what);
    }
    CHECK(cache->pool().used_bytes() == 0);
  }
}

TEST("a file depends on what a sequence holds only: truncated slots leave nothing behind") {
  for (const Family& family : worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 400, 2);
    const int sink = family.scheme().sink;
    for (const int left : {299, 255, 200, 141, 129, 64, 20, 13, 5, 2, 0}) {
      const std::string what = family.name + std::string(" cut to ") + std::to_string(left);
      const auto sequence = filled(cache, tokens, 300);
      if (family.editable()) {
        const std::vector<int> some = {sink, sink + 7, sink + 100, sink + 130, sink + 131};
        sequence->remove(0, 1, some);
        sequence->replace(0, sink + 50, tokens.k.data(), tokens.v.data());
      }
      sequence->truncate(left);
      const Bytes file = saved(*sequence);
      const auto copy = loaded(cache, file);
      CHECK_WITH(contents(*copy) == contents(*sequence), what);
      CHECK_WITH(saved(*copy) == file, what);
      CHECK_WITH(unused_slots_are_zero(*copy), what);
      for (int layer = 0; layer < family.config.layers; ++layer)
        for (Sequence* one : {sequence.get(), copy.get()}) append(*one, tokens, left, 90, layer);
      CHECK_WITH(contents(*copy) == contents(*sequence), what);
    }
    CHECK(cache->pool().used_bytes() == 0);
  }
}

TEST("a writer keeps what it was given: the sequence may go on, shrink or vanish while it is written") {
  for (const Family& family : worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 400, 3);
    auto sequence = filled(cache, tokens, 250);
    const Bytes file = saved(*sequence);
    SequenceWriter writer(*sequence);
    Bytes all = writer.next();
    append(*sequence, tokens, 250, 100);
    for (int i = 0; i < 2; ++i) {
      const Bytes piece = writer.next();
      all.insert(all.end(), piece.begin(), piece.end());
    }
    sequence->truncate(20);
    sequence.reset();
    int pieces = 3;
    for (Bytes piece = writer.next(); !piece.empty(); piece = writer.next(), ++pieces)
      all.insert(all.end(), piece.begin(), piece.end());
    CHECK_WITH(all == file && pieces == writer.pieces() && writer.next().empty(), family.name);
  }
}

TEST("a file cut at any length is refused, in whatever pieces it comes, and gives back all it took") {
  for (const Family& family : small_worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 60, 4);
    const auto other = filled(cache, tokens, 50);
    const Bytes file = saved(*filled(cache, tokens, 46 + 12)), before = contents(*other);
    const std::size_t used = cache->pool().used_bytes();
    for (std::size_t length = 0; length < file.size(); length += kStride) {
      SequenceReader reader(cache);
      reader.feed(nullptr, 0);
      reader.feed(file.data(), length);
      CHECK_WITH(error_of([&] { reader.finish(); }) == kCorrupt, std::to_string(length));
    }
    CHECK(cache->pool().used_bytes() == used && contents(*other) == before);
    SequenceReader reader(cache);
    for (const std::uint8_t& byte : file) {
      CHECK(error_of([&] { reader.finish(); }) == kCorrupt);
      reader.feed(&byte, 1);
    }
    CHECK(contents(*reader.finish()) == contents(*filled(cache, tokens, 58)));
    Bytes longer = file;
    longer.push_back(0);
    for (const std::size_t piece : {file.size(), longer.size(), std::size_t{1}})
      CHECK(error_of([&] { loaded(cache, longer, piece); }) == kCorrupt);
  }
}

TEST("any byte flipped is noticed, and the cache that reads it stays as it was") {
  check::Random random(5);
  for (const Family& family : small_worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 60, 5);
    const auto other = filled(cache, tokens, 50);
    const Bytes file = saved(*filled(cache, tokens, 58)), before = contents(*other);
    const std::size_t used = cache->pool().used_bytes();
    for (std::size_t i = 0; i < file.size(); i += kStride) {
      Bytes flipped = file;
      flipped[i] ^= static_cast<std::uint8_t>(i % 2 ? 1 + random.below(255) : 1 << random.below(8));
      const int code = error_of([&] { loaded(cache, flipped); });
      CHECK_WITH(code == kCorrupt || code == kInvalid, std::to_string(i));
      CHECK(cache->pool().used_bytes() == used);
    }
    CHECK(contents(*other) == before);
  }
}

TEST("a file of another cache, basis or version is refused by name") {
  const CacheConfig config = config_of({calibrated(), scheme_of({}, {})});
  const auto cache = cache_of(config);
  const Tokens tokens = tokens_of(config, 200, 6);
  const Bytes file = saved(*filled(cache, tokens, 200));
  const auto code_with = [&](const std::function<void(CacheConfig&)>& change) {
    CacheConfig other = config;
    change(other);
    const auto foreign = cache_of(other);
    const int code = error_of([&] { loaded(foreign, file); });
    CHECK(foreign->pool().used_bytes() == 0);
    return code;
  };
  CHECK(code_with([](CacheConfig&) {}) == -1);
  CHECK(code_with([](CacheConfig& c) {  // not part of what a file means
          c.budget_bytes /= 2;
          c.softmax_scale = 1;
          c.query_heads *= 2;
        }) == -1);
  const std::function<void(CacheConfig&)> changes[] = {
      [](CacheConfig& c) { c = config_of({calibrated(), scheme_of({}, {}), scheme_of({}, {})}); },
      [](CacheConfig& c) { c = config_of({calibrated()}); },
      [](CacheConfig& c) { c = config_of({calibrated(64, 1), scheme_of({}, {})}, 64, 1); },
      [](CacheConfig& c) { c = config_of({calibrated(96), scheme_of({}, {})}, 96); },
      [](CacheConfig& c) { c.rope.theta[3] *= 1.0001; },
      [](CacheConfig& c) { c.rope.half_layout = false; },
      [](CacheConfig& c) { std::swap(c.scheme_of_layer[0], c.scheme_of_layer[1]); },
      [](CacheConfig& c) { c.schemes[0].k.bits = 3; },
      [](CacheConfig& c) { c.schemes[0].v.mode = Mode::kZeroLevel; },
      [](CacheConfig& c) { c.schemes[0].v.group = Group::kChannels32; },
      [](CacheConfig& c) { c.schemes[0].v.outliers = 1; },
      [](CacheConfig& c) { ++c.schemes[0].sink; },
      [](CacheConfig& c) { ++c.schemes[1].recent; },
      [](CacheConfig& c) { c.schemes[0].block_tokens = 256; },
      [](CacheConfig& c) { c.schemes[0].hadamard_v = false; },
      [](CacheConfig& c) { c.schemes[1].released_windows = true; },
  };
  for (std::size_t i = 0; i < std::size(changes); ++i)
    CHECK_WITH(code_with(changes[i]) == kInvalid, std::to_string(i));
  CHECK(code_with([](CacheConfig& c) { c.schemes[0] = calibrated(64, 2, 10); }) ==
        static_cast<int>(ErrorCode::kBasisMismatch));

  for (const Family& one : families())
    for (const Family& two : families()) {
      const auto from = cache_of(one.config), to = cache_of(two.config);
      const Bytes bytes = saved(*filled(from, tokens_of(one.config, 60, 6), 60));
      const int code = error_of([&] { loaded(to, bytes); });
      CHECK_WITH(code == (one.name == two.name ? -1 : kInvalid), std::string(one.name) + " in " + two.name);
    }

  auto pieces = pieces_of(*filled(cache, tokens, 20));
  poke(pieces[0], 8, kSaveVersion + 1);
  seal(pieces[0]);
  CHECK(judge(cache, joined(pieces), tokens, "version") == kCorrupt);
  pieces = pieces_of(*filled(cache, tokens, 200));
  for (std::size_t i = 1; i + 1 < pieces.size(); ++i) {  // parts left out, doubled, in another order
    auto less = pieces, more = pieces, swapped = pieces;
    less.erase(less.begin() + static_cast<std::ptrdiff_t>(i));
    more.insert(more.begin() + static_cast<std::ptrdiff_t>(i), pieces[i]);
    std::swap(swapped[i], swapped[i + 1]);
    for (const auto& wrong : {less, more, swapped})
      CHECK(judge(cache, joined(wrong), tokens, "order") == kCorrupt);
  }
}

TEST("forged counts with valid checksums never pass for a sequence that could not have been saved") {
  for (const Family& family : worlds()) {
    CacheConfig config = family.config;
    config.budget_bytes = std::size_t{4} << 20;
    const auto cache = cache_of(config);
    const Tokens tokens = tokens_of(config, 200, 7);
    const auto other = filled(cache, tokens, 60);
    const Bytes before = contents(*other);
    for (const int n : {0, 3, 30, 180}) {
      const auto pieces = pieces_of(*filled(cache, tokens, n));
      for (int field = 0; field < 5 * config.layers; ++field) {
        const std::size_t offset = 40 + std::size_t{4} * at(field);
        const auto honest = peek<std::int32_t>(pieces[0], offset);
        std::vector<std::int32_t> forged = {0, 1, -1, 2, 3, 4, 8, 32, 96, 128, 1 << 30, (1 << 30) + 1};
        for (const int step : {1, 8, 31, 32, 33, 128})
          forged.insert(forged.end(), {honest + step, honest - step});
        forged.insert(forged.end(), {std::numeric_limits<std::int32_t>::max(),
                                     std::numeric_limits<std::int32_t>::min(), 0x01010101});
        for (const std::int32_t value : forged) {
          if (value == honest) continue;
          auto wrong = pieces;
          poke(wrong[0], offset, value);
          seal(wrong[0]);
          const std::string what = std::string(family.name) + ", " + std::to_string(n) + " tokens, field " +
                                   std::to_string(field) + " = " + std::to_string(value);
          const std::size_t held = heap_bytes;
          heap_peak = held;
          // No other count fits the parts that follow, but the sink of released windows may be any prompt's.
          const int code = judge(cache, joined(wrong), tokens, what);
          CHECK_WITH(code >= 0 || (family.scheme().released_windows && field == 1), what);
          CHECK_WITH(heap_peak - held < 8 * joined(wrong).size() + config.budget_bytes, what);
        }
      }
    }
    CHECK(contents(*other) == before);
  }
}

/// Where page 0 begins in the part of a layer's first head, and what lies before it.
std::size_t page_offset(const Sequence& sequence, int layer) {
  const CacheConfig& config = sequence.cache().config();
  const LayerState& state = sequence.layer_state(layer);
  const LayerScheme& scheme = config.scheme(layer);
  const int body = std::max(0, state.tokens - state.reach.sink), D = config.head_dim;
  const int rows = 2 * std::min(state.tokens, state.reach.sink) + body - state.reach.k + body - state.reach.v;
  return 16 + at(2 * D * rows) +
         (state.online ? at(4 * D * (scheme.online_mean + scheme.online_lambda)) : std::size_t{0}) + 17;
}

TEST("numbers out of range inside a part with a valid checksum are refused") {
  for (const Family& family : families()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 200, 8);
    const auto sequence = filled(cache, tokens, 170);
    const auto pieces = pieces_of(*sequence);
    const std::size_t page = page_offset(*sequence, 0), D = at(family.config.head_dim);
    const PageLayout layout(family.scheme().k, family.scheme().v, family.config.head_dim);
    const auto refused = [&](std::size_t offset, auto value, const char* what) {
      auto wrong = pieces;
      CHECK(peek<decltype(value)>(wrong[1], offset) != value);
      poke(wrong[1], offset, value);
      seal(wrong[1]);
      CHECK_WITH(judge(cache, joined(wrong), tokens, what) == kCorrupt,
                 std::string(family.name) + ": " + what);
    };
    for (const std::uint16_t bad : {std::uint16_t{0x7c00}, std::uint16_t{0xfc00}, std::uint16_t{0x7e01}}) {
      refused(16 + 2, bad, "a window");
      for (const TensorLayout& t : {layout.k, layout.v}) {
        const std::size_t base = page + (t.value ? layout.v_at() : layout.k_at());
        if (t.spec.raw())
          refused(base + 2 * (3 * D + 1), bad, "a 16-bit page");
        else
          refused(base + t.scales_at() + at(2 * t.scale_index(0, t.groups() - 1)), bad, "a scale");
        if (t.spec.dense_zeros())
          refused(base + t.zeros_at() + at(2 * t.scale_index(0, t.groups() - 1)), bad, "a zero point");
        if (t.spec.outliers > 0)
          refused(base + t.outliers_at() + t.outliers().values_at() + at(2 * (5 * t.spec.outliers)), bad,
                  "an outlier");
      }
      if (layout.k.spec.compact_zeros() || layout.v.spec.compact_zeros())
        refused(page + layout.bytes(), bad, "a compact zero point");
    }
    for (const TensorLayout& t : {layout.k, layout.v}) {
      if (t.spec.outliers == 0) continue;
      const OutlierLayout rows = t.outliers();
      const std::size_t base = page + (t.value ? layout.v_at() : layout.k_at()) + t.outliers_at();
      const int entry = 9 * t.spec.outliers;  // of slot 9
      const std::uint8_t channel = peek<std::uint8_t>(pieces[1], base + rows.indices_at() + at(entry));
      for (const int beyond : {t.head_dim, 255})
        refused(base + rows.indices_at() + at(entry), static_cast<std::uint8_t>(beyond),
                "an outlier's channel");
      if (t.spec.outliers > 1) refused(base + rows.indices_at() + at(entry + 1), channel, "a channel twice");
      const std::size_t start = base + at(9 * rows.start_bytes());
      const int honest = peek<std::uint8_t>(pieces[1], start);
      for (const int forged : {0, honest - 1, honest + 1, 255})
        refused(start, static_cast<std::uint8_t>(forged), "a row start");
      refused(base, std::uint8_t{1}, "the first row start");
      refused(base + rows.bytes() - 1, std::uint8_t{1}, "what aligns the section");
      if (rows.values_at() > rows.indices_at() + at(rows.capacity))
        refused(base + rows.values_at() - 1, std::uint8_t{1}, "what aligns the values");
    }
    if (sequence->layer_state(0).online) {
      const std::size_t lam = page - 17 - 4 * D, mean = lam - 4 * D;
      for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf(""), 65505.0f, -1e30f})
        refused(mean + 8, bad, "a mean");
      for (const float bad :
           {std::numeric_limits<float>::infinity(), std::nanf(""), 0.0f, -1.0f, 0x1p-11f, 256.5f, 1e-40f})
        refused(lam + 8, bad, "a normalisation factor");
    }
    refused(page - 17, std::uint8_t{2}, "a page that is neither there nor not");
    if (!family.editable()) {
      refused(page - 17, std::uint8_t{0}, "a page is missing");
      refused(page - 16, std::uint64_t{1} << 5, "a removed token");
    }
    const int last = static_cast<int>(sequence->layer_state(0).pages[0].size()) - 1;
    CHECK(last == 1);  // its unused slots: codes, scales, removal marks
    if (!layout.k.spec.compact_zeros() && !layout.v.spec.compact_zeros()) {
      const std::size_t second = page + layout.bytes() + 17;
      refused(second - 8, std::uint64_t{1} << 63, "a slot without a token is removed");
      refused(second + layout.v_at() - 2, std::uint16_t{1}, "the last slot of K");
      refused(second + layout.bytes() - 2, std::uint16_t{1}, "the last slot of V");
    }
    refused(8, std::uint64_t{pieces[1].size() - 20 + 1}, "longer than it is");
    refused(8, std::uint64_t{pieces[1].size() - 20 - 1}, "shorter than it is");
    refused(8, std::numeric_limits<std::uint64_t>::max(), "of no length at all");
    refused(8, std::uint64_t{1} << 62, "of 2^62 bytes");
  }
}

TEST("bytes changed at random under valid checksums are refused, or make a sequence that is what it says") {
  check::Random random(9);
  int accepted = 0, refused = 0;
  for (const Family& family : worlds()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 200, 9);
    const auto other = filled(cache, tokens, 60);
    const Bytes before = contents(*other);
    for (const int n : {20, 150}) {
      const auto pieces = pieces_of(*filled(cache, tokens, n));
      for (int round = 0; round < 60; ++round) {
        auto wrong = pieces;
        for (int changes = 1 + random.below(3); changes > 0; --changes) {
          Bytes& piece = wrong[at(random.below(static_cast<int>(wrong.size())))];
          const int size = static_cast<int>(piece.size()) - 4;
          piece[at(random.below(4) ? random.below(size) : random.below(std::min(size, 64)))] ^=
              static_cast<std::uint8_t>(1 << random.below(8));
          seal(piece);
        }
        const int code = judge(cache, joined(wrong), tokens, family.name);
        ++(code < 0 ? accepted : refused);
      }
    }
    CHECK_WITH(contents(*other) == before, family.name);
  }
  CHECK(accepted > 100 && refused > 100);
}

TEST("a load that fails gives its memory back at once, and its reader accepts nothing more") {
  for (const Family& family : worlds()) {
    CacheConfig config = family.config;
    const Tokens tokens = tokens_of(config, 400, 10);
    const Bytes file = saved(*filled(cache_of(config), tokens, 400));
    const std::size_t needed = bytes_held(*filled(cache_of(config), tokens, 400));
    config.budget_bytes = needed + needed / 2;
    const auto cache = cache_of(config);
    auto hog = std::make_unique<Slot>(cache->pool().take(needed));
    SequenceReader reader(cache);
    CHECK_WITH(error_of([&] { reader.feed(file.data(), file.size()); }) == kMemory, family.name);
    CHECK_WITH(cache->pool().used_bytes() == needed, family.name);
    hog.reset();  // now there would be room, but half of a part has been read already
    CHECK_WITH(error_of([&] { reader.feed(nullptr, 0); }) == kCorrupt, family.name);
    CHECK_WITH(error_of([&] { reader.feed(file.data(), file.size()); }) == kCorrupt, family.name);
    CHECK_WITH(error_of([&] { reader.finish(); }) == kCorrupt, family.name);
    CHECK_WITH(cache->pool().used_bytes() == 0, family.name);
    CHECK_WITH(loaded(cache, file) != nullptr, family.name);
  }
}

TEST("a part that the budget could never hold is refused when it is announced, not when it has come") {
  for (const Family& family : families()) {
    CacheConfig config = family.config;
    config.budget_bytes = std::size_t{1} << 20;
    const auto cache = cache_of(config);
    const Tokens tokens = tokens_of(config, 100, 11);
    auto pieces = pieces_of(*filled(cache, tokens, 100));
    const std::int32_t sink = peek<std::int32_t>(pieces[0], 44), many = 1 << 29;
    const std::int32_t counts[] = {many + sink, sink, many, many};
    std::memcpy(pieces[0].data() + 40, counts, sizeof counts);
    seal(pieces[0]);
    poke(pieces[1], 8, std::uint64_t{20} << 20);
    SequenceReader reader(cache);
    reader.feed(pieces[0].data(), pieces[0].size());
    CHECK_WITH(error_of([&] { reader.feed(pieces[1].data(), 16); }) == kMemory, family.name);
    CHECK_WITH(cache->pool().used_bytes() == 0, family.name);
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("save", argc, argv); }
