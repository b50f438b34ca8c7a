// Bodies shared by all instruction sets, included once by each isa_*.cpp inside its own unnamed namespace,
// after it has defined: kLanes, kRegisters, Vec and Ints (kLanes numbers), fma, load_half, sum_lanes,
// store_bytes, dot. Loops are written so that the compiler turns them into vectors of that file's width;
// nothing here is visible outside the file.
//
// Bits: everything that decides stored codes uses separate multiplications and additions (the build forbids
// contraction) in the order of docs/format.md; only attention uses fma.
// Long file: every body shared by the instruction sets; they are compiled together.

// ---- codes ----

using Word = std::uint32_t __attribute__((may_alias));

template <int kWidth>
struct Words {
  typedef std::uint32_t Type
      __attribute__((vector_size(4 * kWidth)));  // an alias would lose a dependent attribute
  static Type load(const Word* at) {
    Type value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
  }
  static void store(Word* at, Type value) { __builtin_memcpy(at, &value, sizeof value); }
};

template <int kBits, int kWidth>
void unpack_words(const CodeShape& shape, const std::uint8_t* packed, std::uint8_t* bytes) {
  constexpr int kClasses = 8 / kBits;
  constexpr std::uint32_t kMask = 0x01010101u * ((1u << kBits) - 1u);
  const int words = shape.words();
  const Word* from = reinterpret_cast<const Word*>(packed);
  Word* to = reinterpret_cast<Word*>(bytes);
  for (int quad = 0; quad < shape.quads; ++quad, from += words, to += shape.rows)
    for (int x = 0; x < words; x += kWidth) {
      const auto word = Words<kWidth>::load(from + x);
      for (int c = 0; c < kClasses; ++c)
        Words<kWidth>::store(to + c * words + x, word >> (kBits * c) & kMask);
    }
}

template <int kWidth>
void unpack_triples(const CodeShape& shape, const std::uint8_t* packed, std::uint8_t* bytes) {
  using W = Words<kWidth>;
  const int words = shape.words();
  const Word* from = reinterpret_cast<const Word*>(packed);
  Word* to = reinterpret_cast<Word*>(bytes);
  for (int quad = 0; quad < shape.quads; ++quad, from += 3 * words, to += shape.rows)
    for (int x = 0; x < words; x += kWidth) {
      const auto w0 = W::load(from + x), w1 = W::load(from + words + x), w2 = W::load(from + 2 * words + x);
      W::store(to + x, w0 & 0x07070707u);
      W::store(to + words + x, w0 >> 3 & 0x07070707u);
      W::store(to + 2 * words + x, w1 & 0x07070707u);
      W::store(to + 3 * words + x, w1 >> 3 & 0x07070707u);
      W::store(to + 4 * words + x, w2 & 0x07070707u);
      W::store(to + 5 * words + x, w2 >> 3 & 0x07070707u);
      W::store(to + 6 * words + x, (w0 >> 5 & 0x06060606u) | (w2 >> 6 & 0x01010101u));
      W::store(to + 7 * words + x, (w1 >> 5 & 0x06060606u) | (w2 >> 7 & 0x01010101u));
    }
}

template <int kWidth>
void unpack_width(const CodeShape& shape, const std::uint8_t* packed, std::uint8_t* bytes) {
  switch (shape.bits) {
    case 1:
      return unpack_words<1, kWidth>(shape, packed, bytes);
    case 2:
      return unpack_words<2, kWidth>(shape, packed, bytes);
    case 3:
      return unpack_triples<kWidth>(shape, packed, bytes);
    case 4:
      return unpack_words<4, kWidth>(shape, packed, bytes);
    default:
      return unpack_words<8, kWidth>(shape, packed, bytes);
  }
}

void unpack(const CodeShape& shape, const std::uint8_t* packed, std::uint8_t* bytes) {
  const int words = shape.words();
  if (words % kLanes == 0) return unpack_width<kLanes>(shape, packed, bytes);
  if (words % 8 == 0) return unpack_width<8>(shape, packed, bytes);
  if (words % 4 == 0) return unpack_width<4>(shape, packed, bytes);
  unpack_width<2>(shape, packed, bytes);
}

// ---- conversions ----

void half_to_float(const std::uint16_t* half, float* value, std::size_t count) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec wide = load_half(half + i);
    __builtin_memcpy(value + i, &wide, sizeof wide);
  }
  for (; i < count; ++i) value[i] = half_value(half[i]);
}

inline Vec load(const float* at) {
  Vec value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}
inline Vec load(const std::uint16_t* at) { return load_half(at); }
inline void store(float* at, Vec value) { __builtin_memcpy(at, &value, sizeof value); }

#include "../numerics/lanes.inl.h"

inline float max_lanes(Vec v) {
  return combine_lanes<kLanes / 2>(v, [](auto a, auto b) { return a > b ? a : b; })[0];
}
inline std::int32_t add_lanes(Ints v) {
  return combine_lanes<kLanes / 2>(v, [](auto a, auto b) { return a + b; })[0];
}

float split(const float* x, int count, std::int8_t* hi, std::int8_t* lo, std::int32_t* total) {
  Vec peak{};
  for (int i = 0; i < count; i += kLanes) {
    const Vec a = load(x + i), magnitude = a < 0.0f ? -a : a;
    peak = magnitude > peak ? magnitude : peak;
  }
  const float largest = max_lanes(peak);
  if (!(largest > 1e-30f)) {  // the reciprocal of the step must stay finite
    for (int i = 0; i < count; ++i) hi[i] = lo[i] = 0;
    *total = 0;
    return 0.0f;
  }
  const float inverse = 32639.0f / largest;
  Ints sum{};
  for (int i = 0; i < count; i += kLanes) {
    // Adding 1.5 * 2^23 leaves the integer nearest to the value in the low bits of the sum.
    const Ints whole = (Ints)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
    const Ints high = (whole + 128) >> 8;
    store_bytes(hi + i, high);
    store_bytes(lo + i, whole - (high << 8));
    sum += whole;
  }
  *total = add_lanes(sum);
  return largest / 32639.0f;
}

// ---- lanes by number ----

/// Lane l of the result is lane index[l] of a, and from kLanes on of b.
inline Vec shuffled(Vec a, Vec b, Ints index) {
#if defined(__clang__)  // shuffles by constant lists only, and sees through the loop
  Vec result{};
  for (int l = 0; l < kLanes; ++l) result[l] = index[l] < kLanes ? a[index[l]] : b[index[l] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// ---- Hadamard and rotation: bit for bit the butterflies and products of docs/format.md ----

template <int kDistance>
inline Vec butterfly(Vec x) {
  Ints partner, negate;
  for (int l = 0; l < kLanes; ++l) {
    partner[l] = l ^ kDistance;
    negate[l] = l & kDistance ? static_cast<std::int32_t>(0x80000000u) : 0;
  }
  return shuffled(x, x, partner) + (Vec)((Ints)x ^ negate);  // a + b, and a + (-b) = a - b
}

template <int kSize>
void hadamard_block(float* x) {
  constexpr int kVecs = kSize / kLanes;
  Vec v[kVecs];
  for (int i = 0; i < kVecs; ++i) {
    v[i] = butterfly<2>(butterfly<1>(load(x + i * kLanes)));
    if constexpr (kLanes >= 8) v[i] = butterfly<4>(v[i]);
    if constexpr (kLanes >= 16) v[i] = butterfly<8>(v[i]);
  }
  for (int h = 1; h < kVecs; h *= 2)
    for (int base = 0; base < kVecs; base += 2 * h)
      for (int i = base; i < base + h; ++i) {
        const Vec a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
  for (int i = 0; i < kVecs; ++i) store(x + i * kLanes, v[i] * hadamard_norm(kSize));
}

void hadamard_all(float* x, int count) {
  switch (count) {
    case 64:
      return hadamard_block<64>(x);
    case 80:
      return hadamard_block<64>(x), hadamard_block<16>(x + 64);
    case 96:
      return hadamard_block<64>(x), hadamard_block<32>(x + 64);
    case 128:
      return hadamard_block<128>(x);
    case 256:
      return hadamard_block<256>(x);
    default:
      return hadamard(x, count);
  }
}

void rotate(float* x, int head_dim, const float* cos, const float* sin, int pairs, bool half_layout) {
  float old[kMaxHeadDim];
  __builtin_memcpy(old, x, sizeof(float) * static_cast<std::size_t>(head_dim));
  if (half_layout) {
    for (int i = 0; i < pairs; ++i) x[i] = old[i] * cos[i] + old[i + pairs] * sin[i];
    for (int i = pairs; i < 2 * pairs; ++i) x[i] = old[i] * cos[i] + old[i - pairs] * sin[i];
    return;
  }
  Ints partner;
  for (int l = 0; l < kLanes; ++l) partner[l] = l ^ 1;
  for (int i = 0; i < head_dim; i += kLanes) {
    const Vec a = load(old + i);
    store(x + i, a * load(cos + i) + shuffled(a, a, partner) * load(sin + i));
  }
  // Channels beyond the rotary dimensions stay, to the sign of a zero.
  __builtin_memcpy(x + 2 * pairs, old + 2 * pairs,
                   sizeof(float) * static_cast<std::size_t>(head_dim - 2 * pairs));
}

void prepare_query(QueryArgs& args) {
  float x[kMaxHeadDim];
  const int D = args.head_dim;
  __builtin_memcpy(x, args.q, sizeof(float) * static_cast<std::size_t>(D));
  if (args.cos) rotate(x, D, args.cos, args.sin, args.pairs, args.half_layout);
  args.constant = 0.0f;
  if (args.mean) {
    Vec dot{};
    for (int c = 0; c < D; c += kLanes) dot = fma(load(x + c), load(args.mean + c), dot);
    args.constant = sum_lanes(dot);
  }
  if (args.lam)
    for (int c = 0; c < D; c += kLanes) store(x + c, load(x + c) * load(args.lam + c));
  if (args.hadamard) hadamard_all(x, D);
  if (args.stored) __builtin_memcpy(args.stored, x, sizeof(float) * static_cast<std::size_t>(D));
  std::int32_t total = 0;
  args.step = split(x, D, args.hi, args.lo, &total);
  if (args.group >= D) {
    args.totals[0] = total;
    return;
  }
  for (int g = 0, begin = 0; begin < D; ++g, begin += args.group) {
    std::int32_t high = 0, low = 0;
    for (int c = begin; c < (begin + args.group < D ? begin + args.group : D); ++c) {
      high += args.hi[c];
      low += args.lo[c];
    }
    args.totals[g] = 256 * high + low;
  }
}

GroupScale quantise_group_here(const float* x, int count, const GroupRule& rule, std::uint8_t* codes) {
  return quantise_group(x, count, rule, codes);
}

void take_outliers_here(float* x, int head_dim, int group, int count, TakenOutliers& taken) {
  take_outliers(x, head_dim, group, count, taken);
}

// ---- feedback rounding ----

template <int kWidth>
struct RatioLanes;
template <>
struct RatioLanes<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Whole = std::int32_t __attribute__((vector_size(32)));
};
template <>
struct RatioLanes<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Whole = std::int32_t __attribute__((vector_size(64)));
};

/// kVecs vectors of kWidth lanes: kWidth / 8 tokens each, a token's clip ratios side by side. Every column
/// waits for the one before it, so several tokens at once fill the time, and share what is read of F and W.
template <int kWidth, int kVecs>
class FeedbackRounding {
 public:
  static constexpr int kTokens = kVecs * kWidth / kMaxClipRatios;

  /// Rounds tokens first ... first + kTokens - 1 as far as there are any.
  static void run(const FeedbackArgs& args, int first) {
    FeedbackRounding rounding(args, first);
    rounding.round();
    rounding.finish();
  }

 private:
  using Lanes = typename RatioLanes<kWidth>::Floats;
  using LaneInts = typename RatioLanes<kWidth>::Whole;

  FeedbackRounding(const FeedbackArgs& args, int first)
      : args_(args),
        D_(args.head_dim),
        first_(first),
        tokens_(args.tokens - first < kTokens ? args.tokens - first : kTokens),
        top_(static_cast<float>((1 << args.bits) - 1)) {
    for (int t = 0; t < kTokens; ++t) {  // missing tokens repeat the last one
      const float* x = args.x + std::ptrdiff_t{first + (t < tokens_ ? t : tokens_ - 1)} * D_;
      const float full = 2.0f * max_magnitude(x, D_) / top_;
      for (int i = 0; i < D_; ++i) x_[t][i] = x[args.order[i]];
      for (int r = 0; r < kMaxClipRatios; ++r) {
        const int lane = t * kMaxClipRatios + r;
        scale_bits_[t][r] = r < args.ratio_count ? half_bits(args.ratios[r] * full) : std::uint16_t{0};
        const float scale = half_value(scale_bits_[t][r]);
        scale_[lane / kWidth][lane % kWidth] = scale;
        inverse_[lane / kWidth][lane % kWidth] = reciprocal(scale);
      }
    }
  }

  /// Column i of every token, in the lanes of its ratios.
  Lanes column(int vec, int i) const {
    if constexpr (kWidth == kMaxClipRatios) return Lanes{} + x_[vec][i];
    LaneInts second;
    for (int l = 0; l < kWidth; ++l) second[l] = l < kMaxClipRatios ? 0 : -1;
    return second ? Lanes{} + x_[2 * vec + 1][i] : Lanes{} + x_[2 * vec][i];
  }

  void round() {
    constexpr int kColumns =
        kVecs == 1 || kRegisters >= 32 ? 8 : 4;  // whose running values stay in registers
    const float half_levels = static_cast<float>(1 << (args_.bits - 1)), center = 0.5f * top_;
    const Lanes low{}, high = low + top_;
    for (int block = 0; block < D_; block += kColumns) {
      Lanes y[kColumns][kVecs];
      for (int i = 0; i < kColumns; ++i)
        for (int v = 0; v < kVecs; ++v) y[i][v] = column(v, block + i);
      for (int c = 0; c < block; ++c) {
        const float* row = args_.feedback + std::ptrdiff_t{c} * D_ + block;
        for (int i = 0; i < kColumns; ++i)
          for (int v = 0; v < kVecs; ++v) y[i][v] = y[i][v] - errors_[c][v] * row[i];
      }
      for (int i = 0; i < kColumns; ++i) {
        const int c = block + i;
        const float* row = args_.feedback + std::ptrdiff_t{c} * D_ + block;
        for (int v = 0; v < kVecs; ++v) {
          Lanes u = y[i][v] * inverse_[v] + half_levels;
          u = u > low ? u : low;
          u = u < high ? u : high;
          codes_[c][v] = __builtin_convertvector(u, LaneInts);
          const Lanes error = y[i][v] - scale_[v] * (__builtin_convertvector(codes_[c][v], Lanes) - center);
          const Lanes part = error * args_.pivot[c];
          loss_[v] = loss_[v] + part * part;
          errors_[c][v] = error;
          for (int k = i + 1; k < kColumns; ++k) y[k][v] = y[k][v] - error * row[k];
        }
      }
    }
  }

  void finish() {
    float chosen[kTokens] = {};
    for (int t = 0; t < tokens_; ++t) {
      const int vec = t * kMaxClipRatios / kWidth, lane = t * kMaxClipRatios % kWidth;
      int best = 0;
      for (int r = 1; r < args_.ratio_count; ++r)
        if (loss_[vec][lane + r] < loss_[vec][lane + best]) best = r;
      std::uint8_t* to = args_.codes + std::ptrdiff_t{first_ + t} * D_;
      for (int i = 0; i < D_; ++i)
        to[args_.order[i]] = static_cast<std::uint8_t>(codes_[i][vec][lane + best]);
      args_.scales[first_ + t] = scale_bits_[t][best];
      chosen[t] = half_value(scale_bits_[t][best]);
    }
    if (!args_.unbiased) return;
    float image[kTokens][kMaxHeadDim];  // W x
    int c = 0;
    for (; c + 4 * kLanes <= D_; c += 4 * kLanes) multiply_metric<4>(c, image);
    for (; c < D_; c += kLanes) multiply_metric<1>(c, image);
    for (int t = 0; t < tokens_; ++t) {
      const std::uint8_t* codes = args_.codes + std::ptrdiff_t{first_ + t} * D_;
      const float num = ordered_sum(D_, [&](int i) { return x_[t][i] * image[t][i]; });
      const float den = ordered_sum(D_, [&](int i) {
        return chosen[t] * (static_cast<float>(codes[args_.order[i]]) - 0.5f * top_) * image[t][i];
      });
      args_.scales[first_ + t] = unbiased_scale(chosen[t], num, den);
    }
  }

  template <int kColumnVecs>
  void multiply_metric(int column, float (*image)[kMaxHeadDim]) const {
    Vec sums[kTokens][kColumnVecs] = {};
    for (int j = 0; j < D_; ++j) {
      const float* row = args_.metric + std::ptrdiff_t{j} * D_ + column;
      for (int i = 0; i < kColumnVecs; ++i) {
        const Vec w = load(row + i * kLanes);
        for (int t = 0; t < kTokens; ++t) sums[t][i] = sums[t][i] + w * x_[t][j];
      }
    }
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < kColumnVecs; ++i) store(image[t] + column + i * kLanes, sums[t][i]);
  }

  const FeedbackArgs& args_;
  const int D_, first_, tokens_;
  const float top_;
  float x_[kTokens][kMaxHeadDim];  // in the order of rounding
  std::uint16_t scale_bits_[kTokens][kMaxClipRatios];
  Lanes scale_[kVecs], inverse_[kVecs], loss_[kVecs] = {};
  Lanes errors_[kMaxHeadDim][kVecs];
  LaneInts codes_[kMaxHeadDim][kVecs];
};

void round_feedback(const FeedbackArgs& args) {
  using One = FeedbackRounding<kMaxClipRatios, 1>;
  using Many = FeedbackRounding<kLanes >= 16 ? 16 : 8, 2>;
  int first = 0;
  for (; 2 * (args.tokens - first) > Many::kTokens; first += Many::kTokens) Many::run(args, first);
  for (; first < args.tokens; ++first) One::run(args, first);
}

// ---- raw (16- or 32-bit) attention ----

// Sums of the lanes of kLanes vectors, as the lanes of one: log2(kLanes) rounds of two shuffles and an
// addition.
template <int kBlock>
inline Vec fold(Vec a, Vec b) {
  Ints low, high;
  for (int l = 0; l < kLanes; ++l) {
    const int in_block = l % kBlock, base = l - in_block, half = kBlock / 2;
    low[l] = in_block < half ? l : kLanes + base + in_block - half;
    high[l] = in_block < half ? l + half : kLanes + l;
  }
  return shuffled(a, b, low) + shuffled(a, b, high);
}

template <int kBlock = kLanes>
inline void fold_all(Vec* v) {
  if constexpr (kBlock > 1) {
    for (int i = 0; i < kBlock / 2; ++i) v[i] = fold<kBlock>(v[i], v[i + kBlock / 2]);
    fold_all<kBlock / 2>(v);
  }
}

// The processor's own prefetch stops at every 4 KB and knows nothing of the next tile. May point beyond the
// end: fetching ahead never faults.
template <class T>
inline void fetch_ahead(const T* row, int count) {
  constexpr std::uintptr_t kDistance = 8192;
  const auto begin = reinterpret_cast<std::uintptr_t>(row) + kDistance;
  for (std::uintptr_t at = begin; at < begin + sizeof(T) * static_cast<unsigned>(count); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
}

template <int kTokens, int kRows, class T>
void score_tile(const T* k, std::ptrdiff_t k_stride, int head_dim, const float* q, float* scores,
                std::ptrdiff_t score_stride) {
  // Folding takes as long for some sums as for all lanes.
  constexpr int kSums = kRows * kTokens, kFolded = (kSums + kLanes - 1) / kLanes * kLanes;
  constexpr bool kFold = 2 * kSums >= kFolded;
  Vec acc[kFold ? kFolded : kSums] = {};
  for (int c = 0; c < head_dim; c += kLanes) {
    Vec key[kTokens];
    for (int t = 0; t < kTokens; ++t) key[t] = load(k + t * k_stride + c);
    for (int r = 0; r < kRows; ++r) {
      const Vec query = load(q + std::ptrdiff_t{r} * head_dim + c);
      for (int t = 0; t < kTokens; ++t) acc[r * kTokens + t] = fma(key[t], query, acc[r * kTokens + t]);
    }
  }
  float sums[kFold ? kFolded : kSums];
  if constexpr (kFold)
    for (int i = 0; i < kFolded; i += kLanes) {
      fold_all(acc + i);
      store(sums + i, acc[i]);
    }
  else
    for (int i = 0; i < kSums; ++i) sums[i] = sum_lanes(acc[i]);
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) scores[r * score_stride + t] = sums[r * kTokens + t];
}

template <int kTokens, class T>
void score_rows(const T* k, std::ptrdiff_t k_stride, int head_dim, const float* q, int rows, float* scores,
                std::ptrdiff_t score_stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    score_tile<kTokens, 4>(k, k_stride, head_dim, q + r * head_dim, scores + r * score_stride, score_stride);
  const auto rest = [&](auto tile) {
    tile(k, k_stride, head_dim, q + r * head_dim, scores + r * score_stride, score_stride);
  };
  if (rows - r == 3) rest(score_tile<kTokens, 3, T>);
  if (rows - r == 2) rest(score_tile<kTokens, 2, T>);
  if (rows - r == 1) rest(score_tile<kTokens, 1, T>);
}

template <class T>
void raw_scores(const T* k, std::ptrdiff_t k_stride, int tokens, int head_dim, const float* q, int rows,
                float* scores, std::ptrdiff_t score_stride) {
  constexpr int kStep = kRegisters >= 32 ? 4 : 2;
  int t = 0;
  for (; t + kStep <= tokens; t += kStep) {
    for (int i = 0; i < kStep; ++i) fetch_ahead(k + (t + i) * k_stride, head_dim);
    score_rows<kStep>(k + t * k_stride, k_stride, head_dim, q, rows, scores + t, score_stride);
  }
  for (; t < tokens; ++t)
    score_rows<1>(k + t * k_stride, k_stride, head_dim, q, rows, scores + t, score_stride);
}

template <int kRows, int kVecs, class T>
void accumulate_tile(const T* v, std::ptrdiff_t v_stride, int tokens, int head_dim, const float* p,
                     std::ptrdiff_t p_stride, float* acc, int fetch) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + std::ptrdiff_t{r} * head_dim + i * kLanes);
  for (int t = 0; t < tokens; ++t) {
    Vec value[kVecs];
    fetch_ahead(v + t * v_stride, fetch);
    for (int i = 0; i < kVecs; ++i) value[i] = load(v + t * v_stride + i * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec{} + p[r * p_stride + t];
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(value[i], weight, sum[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVecs; ++i)
      __builtin_memcpy(acc + std::ptrdiff_t{r} * head_dim + i * kLanes, &sum[r][i], sizeof(Vec));
}

template <int kVecs, class T>
void accumulate_rows(const T* v, std::ptrdiff_t v_stride, int tokens, int head_dim, const float* p, int rows,
                     std::ptrdiff_t p_stride, float* acc, int fetch) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    accumulate_tile<4, kVecs>(v, v_stride, tokens, head_dim, p + r * p_stride, p_stride, acc + r * head_dim,
                              r == 0 ? fetch : 0);
  const auto rest = [&](auto tile) {
    tile(v, v_stride, tokens, head_dim, p + r * p_stride, p_stride, acc + r * head_dim, r == 0 ? fetch : 0);
  };
  if (rows - r == 3) rest(accumulate_tile<3, kVecs, T>);
  if (rows - r == 2) rest(accumulate_tile<2, kVecs, T>);
  if (rows - r == 1) rest(accumulate_tile<1, kVecs, T>);
}

template <class T>
void raw_accumulate(const T* v, std::ptrdiff_t v_stride, int tokens, int head_dim, const float* p, int rows,
                    std::ptrdiff_t p_stride, float* acc) {
  constexpr int kVecs = kRegisters >= 32 ? 4 : 2;
  int c = 0;
  for (; c + kVecs * kLanes <= head_dim; c += kVecs * kLanes)
    accumulate_rows<kVecs>(v + c, v_stride, tokens, head_dim, p, rows, p_stride, acc + c,
                           c == 0 ? head_dim : 0);
  for (; c < head_dim; c += kLanes)
    accumulate_rows<1>(v + c, v_stride, tokens, head_dim, p, rows, p_stride, acc + c, c == 0 ? head_dim : 0);
}

void raw_scores_half(const std::uint16_t* k, std::ptrdiff_t s, int tokens, int d, const float* q, int rows,
                     float* out, std::ptrdiff_t os) {
  raw_scores(k, s, tokens, d, q, rows, out, os);
}
void raw_scores_float(const float* k, std::ptrdiff_t s, int tokens, int d, const float* q, int rows,
                      float* out, std::ptrdiff_t os) {
  raw_scores(k, s, tokens, d, q, rows, out, os);
}
void raw_accumulate_half(const std::uint16_t* v, std::ptrdiff_t s, int tokens, int d, const float* p,
                         int rows, std::ptrdiff_t ps, float* acc) {
  raw_accumulate(v, s, tokens, d, p, rows, ps, acc);
}
void raw_accumulate_float(const float* v, std::ptrdiff_t s, int tokens, int d, const float* p, int rows,
                          std::ptrdiff_t ps, float* acc) {
  raw_accumulate(v, s, tokens, d, p, rows, ps, acc);
}

// ---- softmax ----

/// 2^x for x <= 0; below -126 the result is 0. Relative error below 2e-7: degree-6 polynomial on [-0.5, 0.5].
inline Vec exp2_nonpositive(Vec x) {
  const Vec clamped = x < -126.0f ? Vec{} - 126.0f : x;
  const Vec shifted = clamped + 12582912.0f;
  const Vec f = clamped - (shifted - 12582912.0f);
  Vec poly = Vec{} + 1.535336188319500e-4f;
  for (const float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                  2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
    poly = fma(poly, f, Vec{} + coefficient);
  using Unsigned = std::uint32_t __attribute__((vector_size(4 * kLanes)));
  const Vec value = (Vec)((Unsigned)poly + ((Unsigned)shifted << 23));
  return x < -126.0f ? Vec{} : value;
}

inline float exp2_one(float x) { return exp2_nonpositive(Vec{} + x)[0]; }

void softmax(SoftmaxArgs& args) {
  constexpr float kNone = -__builtin_inff();
  Vec peak = Vec{} + args.running_max;
  int i = 0;
  for (; i + kLanes <= args.count; i += kLanes) {
    const Vec s = load(args.scores + i);
    peak = s > peak ? s : peak;
  }
  float largest = max_lanes(peak);
  for (int t = i; t < args.count; ++t) largest = args.scores[t] > largest ? args.scores[t] : largest;
  if (largest == kNone) {  // nothing visible yet
    args.rescale = 1.0f;
    for (int t = 0; t < args.count; ++t) args.scores[t] = 0.0f;
    return;
  }
  args.rescale = args.running_max == largest ? 1.0f : exp2_one(args.running_max - largest);
  Vec sums{};
  for (i = 0; i + kLanes <= args.count; i += kLanes) {
    const Vec p = exp2_nonpositive(load(args.scores + i) - largest);
    store(args.scores + i, p);
    sums += p;
  }
  float total = sum_lanes(sums);
  for (; i < args.count; ++i) total += args.scores[i] = exp2_one(args.scores[i] - largest);
  args.running_max = largest;
  args.running_sum = args.running_sum * args.rescale + total;
}

// ---- integer sums back to numbers ----

// 2 * sum - center2 * total is taken modulo 2^32: the true value always fits, the intermediate ones need not.
// With center2 = 0 it would not fit (8 bits, 256 channels): such sums are not doubled, and `unit` is the
// whole step.
struct Centre {
  std::uint32_t bias, shift;
  float unit;
  Centre(float step, std::int32_t total, int center2)
      : bias(static_cast<std::uint32_t>(center2) * static_cast<std::uint32_t>(total)),
        shift(center2 == 0 ? 0 : 1),
        unit(center2 == 0 ? step : 0.5f * step) {}
  float operator()(std::int32_t sum) const {
    return unit *
           static_cast<float>(static_cast<std::int32_t>((static_cast<std::uint32_t>(sum) << shift) - bias));
  }
};

void add_scores(const std::int32_t* __restrict sums, int count, const float* __restrict scale,
                const float* __restrict offset, float step, std::int32_t total, int center2,
                float* __restrict scores) {
  const Centre centred(step, total, center2);
  for (int i = 0; i < count; ++i) scores[i] += scale[i] * centred(sums[i]);
  if (!offset) return;
  const float whole = step * static_cast<float>(total);
  for (int i = 0; i < count; ++i) scores[i] += offset[i] * whole;
}

void add_values(const std::int32_t* __restrict sums, int count, const float* __restrict scale, float step,
                std::int32_t total, int center2, float* __restrict acc) {
  const Centre centred(step, total, center2);
  if (scale)
    for (int i = 0; i < count; ++i) acc[i] += scale[i] * centred(sums[i]);
  else
    for (int i = 0; i < count; ++i) acc[i] += centred(sums[i]);
}

// ---- outliers ----

// Four rows at a time: what is read of an outlier serves them all, and their sums do not wait for each other.

template <int kRows>
void outlier_scores_of(const OutlierRows& outliers, const float* __restrict q, float* __restrict scores,
                       std::ptrdiff_t stride) {
  const int D = outliers.head_dim;
  for (int t = 0; t < outliers.tokens; ++t)
    for (int i = outliers.starts[t]; i < outliers.starts[t + 1]; ++i) {
      const float* at = q + outliers.channels[i];
      for (int r = 0; r < kRows; ++r) scores[r * stride + t] += at[r * D] * outliers.values[i];
    }
}

template <int kRows>
void outlier_values_of(const OutlierRows& outliers, const float* __restrict p, std::ptrdiff_t stride,
                       float* __restrict acc) {
  const int D = outliers.head_dim;
  for (int t = 0; t < outliers.tokens; ++t)
    for (int i = outliers.starts[t]; i < outliers.starts[t + 1]; ++i) {
      float* at = acc + outliers.channels[i];
      for (int r = 0; r < kRows; ++r) at[r * D] += p[r * stride + t] * outliers.values[i];
    }
}

void outlier_scores(const OutlierRows& outliers, const float* q, int rows, float* scores,
                    std::ptrdiff_t stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    outlier_scores_of<4>(outliers, q + r * outliers.head_dim, scores + r * stride, stride);
  for (; r < rows; ++r)
    outlier_scores_of<1>(outliers, q + r * outliers.head_dim, scores + r * stride, stride);
}

void outlier_values(const OutlierRows& outliers, const float* p, int rows, std::ptrdiff_t stride,
                    float* acc) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    outlier_values_of<4>(outliers, p + r * stride, stride, acc + r * outliers.head_dim);
  for (; r < rows; ++r) outlier_values_of<1>(outliers, p + r * stride, stride, acc + r * outliers.head_dim);
}

void multiply(const float* __restrict p, const float* __restrict scale, int count,
              float* __restrict weights) {
  for (int i = 0; i < count; ++i) weights[i] = p[i] * scale[i];
}

void scale_by(float* x, int count, float factor) {
  for (int i = 0; i < count; ++i) x[i] *= factor;
}

constexpr Kernels table(const char* isa) {
  return {isa,
          unpack,
          dot,
          half_to_float,
          float_to_half,
          split,
          prepare_query,
          rotate,
          hadamard_all,
          quantise_group_here,
          take_outliers_here,
          round_feedback,
          raw_scores_half,
          raw_scores_float,
          raw_accumulate_half,
          raw_accumulate_float,
          softmax,
          add_scores,
          add_values,
          outlier_scores,
          outlier_values,
          multiply,
          scale_by};
}
