// The decoder of pages, as far as it may be trusted with bytes nobody checked: codes, scales, zero points and
// outlier rows of any content are read inside their sections, alike by every instruction set. Input: eight
// bytes that pick specs, head size and counts, then the content, repeated as often as it takes.
#include "../support.h"
#include "core/decode.h"
#include "format/outliers.h"
#include "fuzz.h"

namespace innerkv::test {
namespace {

std::vector<TensorSpec> specs(bool value) {
  std::vector<TensorSpec> all = {TensorSpec{}};
  for (const int bits : {1, 2, 3, 4, 8})
    for (const Group group : {Group::kChannels32, Group::kChannels64, Group::kToken, Group::kTokens32})
      for (const Mode mode : {Mode::kMidRise, Mode::kZeroLevel, Mode::kSignedMax, Mode::kAsymmetric,
                              Mode::kHybrid, Mode::kHybridReleased})
        for (const int outliers : {0, 3})
          if (is_supported({bits, group, mode, outliers}, value))
            all.push_back({bits, group, mode, outliers});
  return all;
}

/// The content of the input, endless.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t byte() { return size_ == 0 ? 0 : data_[next_++ % size_]; }
  void fill(std::uint8_t* to, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] = byte();
  }
  std::uint16_t half() {  // what enters a window is finite
    const auto bits = static_cast<std::uint16_t>(byte() | byte() << 8);
    return half_is_finite(bits) ? bits : static_cast<std::uint16_t>(bits & 0xbfff);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, next_ = 0;
};

/// Scales, zero points and outliers as the reader of saved pages lets them pass: finite, rows in order.
/// Returns the compact zero points owned.
int admit(const TensorLayout& t, std::uint8_t* base, int slots) {
  const auto finite = [&](std::size_t offset) {
    std::uint16_t bits;
    std::memcpy(&bits, base + offset, 2);
    if (!half_is_finite(bits)) bits &= 0xbfff;
    std::memcpy(base + offset, &bits, 2);
    return bits;
  };
  if (t.spec.raw())
    for (int i = 0; i < kPageTokens * t.head_dim; ++i) finite(at(2 * i));
  int zeros = 0;
  for (int slot = 0; slot < slots && !t.spec.raw(); slot += t.spec.flush_tokens())
    for (int g = 0; g < t.groups(); ++g) {
      const std::size_t index = at(2 * t.scale_index(slot, g));
      const std::uint16_t scale = finite(t.scales_at() + index);
      if (t.spec.dense_zeros()) finite(t.zeros_at() + index);
      if (t.spec.compact_zeros()) zeros += scale >> 15;
    }
  std::uint8_t* section = base + t.outliers_at();
  const int count = t.spec.outliers, share = count > 0 ? t.head_dim / count : 0;
  for (int slot = 0; slot < slots && count > 0; ++slot) {
    Outlier row[kMaxOutliers];
    for (int i = 0; i < count; ++i) {
      const Outlier raw = outlier_at(section, t.outliers(), slot * count + i);
      row[i] = {i * share + raw.index % share,
                half_is_finite(raw.value) ? raw.value : static_cast<std::uint16_t>(raw.value & 0xbfff)};
    }
    put_outlier_row(section, t.outliers(), slot, slot * count, row, count);
  }
  return zeros;
}

void check_codes(const TensorLayout& t, const std::uint8_t* base) {
  if (t.spec.raw()) return;
  const CodeShape shape = t.codes();
  const Bytes packed(base, base + shape.bytes());  // of exactly this size: ASan sees what is read beyond
  Bytes rewritten(shape.bytes());
  for (int row = 0; row < shape.rows; ++row)
    for (int k = 0; k < 4 * shape.quads; ++k)
      put_code(rewritten.data(), shape, row, k, get_code(packed.data(), shape, row, k));
  always(rewritten == packed, "codes own all bits of their section, each once");
  for (const Kernels* const* isa = available_kernels(); *isa; ++isa) {
    Bytes bytes(at(shape.rows * shape.quads * 4));
    (*isa)->unpack(shape, packed.data(), bytes.data());
    for (int row = 0; row < shape.rows; ++row)
      for (int k = 0; k < 4 * shape.quads; ++k)
        always(bytes[at((k / 4 * shape.rows + row) * 4 + k % 4)] == get_code(packed.data(), shape, row, k),
               "unpacking reads the codes");
  }
}

void check_outliers(Source& source, int capacity, int rows_used, int row_length) {
  const OutlierLayout layout{capacity};
  Bytes section(layout.bytes());
  source.fill(section.data(), section.size());
  if (!outliers_valid(section.data(), layout, rows_used, row_length)) return;
  for (int row = 0; row < rows_used; ++row)
    for (int entry = outlier_start(section.data(), layout, row);
         entry < outlier_start(section.data(), layout, row + 1); ++entry) {
      always(entry >= 0 && entry < capacity, "entries of valid rows lie within the capacity");
      always(outlier_at(section.data(), layout, entry).index < row_length, "indices lie within the row");
    }
  const int first = rows_used > 0 ? outlier_start(section.data(), layout, rows_used) : 0;
  if (rows_used == kPageTokens || first == capacity) return;
  const Outlier one{row_length - 1, 0x3c00};
  put_outlier_row(section.data(), layout, rows_used, first, &one, 1);
  always(outliers_valid(section.data(), layout, rows_used + 1, row_length), "an appended row is valid");
}

const std::shared_ptr<CpuBackend>* backends() {
  static const std::vector<std::shared_ptr<CpuBackend>> all = [] {
    std::vector<std::shared_ptr<CpuBackend>> made;
    for (const Kernels* const* isa = available_kernels(); *isa; ++isa)
      made.push_back(std::make_shared<CpuBackend>(1, (*isa)->isa));
    made.push_back(nullptr);
    return made;
  }();
  return all.data();
}

}  // namespace

std::vector<Bytes> fuzz_seeds() {
  std::vector<Bytes> seeds;
  check::Random random(3);
  const auto k = specs(false), v = specs(true);
  for (int i = 0; i < 120; ++i) {
    Bytes seed = {static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(7 * i),
                  static_cast<std::uint8_t>(i % 5)};
    for (int j = 3; j < 8; ++j) seed.push_back(static_cast<std::uint8_t>(random.bits()));
    const int style = i % 4;
    if (style == 0) {  // honest outlier rows at the end of the content
      const OutlierLayout layout{40 + i * 3};
      Bytes section(layout.bytes());
      for (int row = 0, first = 0; row < kPageTokens; ++row) {
        const Outlier entries[] = {{row % 20, 0x3c00}, {30 + row % 30, 0xc000}};
        const int count = std::min(row % 3, layout.capacity - first);
        put_outlier_row(section.data(), layout, row, first, entries, count);
        first += count;
      }
      seed[6] = static_cast<std::uint8_t>(layout.capacity);
      seed[7] = 1;
      seed.insert(seed.end(), section.begin(), section.end());
    } else {
      for (int j = 0; j < (style == 1 ? 2 : style == 2 ? 777 : 9000); ++j)
        seed.push_back(
            static_cast<std::uint8_t>(style == 1 ? 0xff * (j % 2) : static_cast<int>(random.bits())));
    }
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace innerkv::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace innerkv;
  using namespace innerkv::test;
  if (size < 8) return 0;
  static const auto k_specs = specs(false), v_specs = specs(true);
  const int D = kHeadDims[data[2] % kHeadDims.size()];
  LayerScheme scheme = scheme_of(k_specs[data[0] % k_specs.size()], v_specs[data[1] % v_specs.size()], 0, 0);
  const int flush = scheme.v.flush_tokens(), flags = data[5];
  const int k_slots = data[3] % (kPageTokens + 1), v_slots = data[4] % (kPageTokens + 1) / flush * flush;
  scheme.hadamard_k = flags & 1;
  scheme.hadamard_v = flags & 2;
  if ((flags & 4) && !scheme.k.raw()) scheme.block_tokens = kPageTokens;
  scheme.recent = kPageTokens;
  CacheConfig config = config_of({scheme}, D, 1);
  config.softcap = flags & 8 ? 20.0f : 0.0f;
  Source source(data + 8, size - 8);
  check_outliers(source, data[6] | (data[7] & 1) << 8, data[3] % (kPageTokens + 1), 1 + data[4]);

  const PageLayout layout(scheme.k, scheme.v, D);
  const RotationTable rotations(config.rope, D);
  Pool pool(**backends(), std::size_t{4} << 20);
  auto page = std::make_shared<Page>();
  page->bytes = pool.take(layout.bytes());
  source.fill(page->bytes.data(), layout.bytes());
  check_codes(layout.k, page->bytes.data() + layout.k_at());
  check_codes(layout.v, page->bytes.data() + layout.v_at());
  const auto zeros = [&](const TensorLayout& t, std::size_t base, int slots, std::vector<Slot>& extents) {
    const int count = admit(t, page->bytes.data() + base, slots);
    for (int z = 0; z < count; ++z) {
      if (z % kZeroExtent == 0) extents.push_back(pool.take(2 * kZeroExtent));
      const std::uint16_t zero = source.half();
      std::memcpy(extents.back().data() + 2 * (z % kZeroExtent), &zero, 2);
    }
    return count;
  };
  page->k_zero_count = zeros(layout.k, layout.k_at(), k_slots, page->k_zeros);
  page->v_zero_count = zeros(layout.v, layout.v_at(), v_slots, page->v_zeros);
  if (flags & 16) page->removed[0] = source.byte() * 0x0101010101010101u;

  const int tokens = kPageTokens, q_tokens = 1 + (flags >> 6);
  const int ring = scheme.ring_tokens();
  std::vector<std::uint16_t> window(at(2 * ring * D));
  for (std::uint16_t& half : window) half = source.half();
  std::vector<float> q(at(q_tokens * config.query_heads * D));
  for (float& x : q) x = half_value(source.half()) * (flags & 32 ? 1e-3f : 1.0f);
  HeadView view;
  view.scheme = &config.schemes[0];
  PageTable table;
  table.push_back(page);
  view.table = &table;
  view.tokens = tokens;
  view.k_quantised = k_slots;
  view.v_quantised = v_slots;
  view.ring_k = window.data();
  view.ring_v = window.data() + ring * D;
  view.ring = ring;
  std::vector<float> first_k, first_v;
  for (const auto* backend = backends(); *backend; ++backend) {
    std::vector<float> k(at(kPageTokens * D)), v(k.size()), out(q.size()),
        lse(at(q_tokens * config.query_heads));
    decode_page(**backend, D, {view.scheme, nullptr, page.get(), 0, 0, k_slots, v_slots}, rotations, k.data(),
                v.data());
    if (first_k.empty()) {
      first_k = k;
      first_v = v;
    }
    always(same_bits(k, first_k) && same_bits(v, first_v), "every backend decodes the same bits");
    AttendRequest request;
    request.heads = std::span(&view, 1);
    request.q = q.data();
    request.out = out.data();
    request.lse = lse.data();
    request.q_tokens = q_tokens;
    always((*backend)->attend(config, std::span(&request, 1), rotations, nullptr), "attention ends");
  }
  return 0;
}
