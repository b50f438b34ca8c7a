// Bodies shared by all instruction sets, included once by each isa_*.cpp inside its own unnamed namespace,
// after it has defined: kLanes, kRowTile, kTokenTile, Vec and Ints (kLanes numbers), fma, load_half,
// sum_lanes, store_bytes, dot_unsigned, dot_signed, dot_runs, dot_group. Nothing here is visible outside the
// file.

using Bytes = std::uint8_t __attribute__((vector_size(32)));
using Bytes8 = std::uint8_t __attribute__((vector_size(8)));
using Bytes16 = std::uint8_t __attribute__((vector_size(16)));
using Floats8 = float __attribute__((vector_size(32)));

#include "../numerics/lanes.inl.h"

// ---- blocks of 32 codes: value = scale[h] * code + offset[h], h = 0 for the first 16 and 1 for the others
// ----

/// Low nibbles of 16 bytes, then their high nibbles.
INNERKV_HD Bytes nibbles(const std::uint8_t* at) {
  const Bytes16 both = load_as<Bytes16>(at), low = both & 15, high = both >> 4;
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

/// Bit i of 32 as the value 16 or 0 of byte i.
INNERKV_HD Bytes fifth_bits(const std::uint8_t* at) {
  const std::uint32_t bits = load_as<std::uint32_t>(at);
  using Words = std::uint32_t __attribute__((vector_size(32)));
  const Bytes copies = (Bytes)(Words{bits, bits, bits, bits, bits, bits, bits, bits});
  const Bytes spread =
      __builtin_shufflevector(copies, copies, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18, 18,
                              18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
  const Bytes mask = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                      1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return (Bytes)((spread & mask) == mask) & 16;
}

struct Codes {
  Bytes codes;
  float scale[2], offset[2];
};

template <TensorType kType>
struct Block {  // types of 32 numbers
  static constexpr int kParts = 1;
  static constexpr bool kSigned = kType == TensorType::kQ8_0;
  static constexpr bool kHalves = false;  // whether the two halves of a part have scales of their own

  INNERKV_HD static Codes part(const std::uint8_t* block, int) {
    const float d = half_at(block);
    if constexpr (kType == TensorType::kQ8_0) return {load_as<Bytes>(block + 2), {d, d}, {0, 0}};
    if constexpr (kType == TensorType::kQ4_0) return {nibbles(block + 2), {d, d}, {-8 * d, -8 * d}};
    if constexpr (kType == TensorType::kQ5_0)
      return {nibbles(block + 6) | fifth_bits(block + 2), {d, d}, {-16 * d, -16 * d}};
    const float m = half_at(block + 2);
    if constexpr (kType == TensorType::kQ4_1) return {nibbles(block + 4), {d, d}, {m, m}};
    return {nibbles(block + 8) | fifth_bits(block + 4), {d, d}, {m, m}};
  }
};

template <>
struct Block<TensorType::kTernary> {
  static constexpr int kParts = 1;
  static constexpr bool kSigned = false, kHalves = false;

  INNERKV_HD static Codes part(const std::uint8_t* block, int) {
    const Bytes8 four = load_as<Bytes8>(block), a = four >> 6, b = four >> 4 & 3, c = four >> 2 & 3,
                 d = four & 3;
    const Bytes16 ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),
                  cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const Bytes codes =
        __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23, 8, 9, 24, 25,
                                10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
    return {codes ^ 2, {1, 1}, {-2, -2}};  // the sign bit turned over: value + 2
  }
};

template <>
struct Block<TensorType::kQ4_K> {
  static constexpr int kParts = 8;
  static constexpr bool kSigned = false, kHalves = false;

  INNERKV_HD static Codes part(const std::uint8_t* block, int j) {
    const std::uint8_t* packed = block + 4;  // 8 scales and 8 minima of 6 bits
    const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
    const int least = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    const Bytes both = load_as<Bytes>(block + 16 + 32 * (j / 2));
    const float s = half_at(block) * static_cast<float>(scale),
                z = -(half_at(block + 2) * static_cast<float>(least));
    return {j % 2 ? both >> 4 : both & 15, {s, s}, {z, z}};
  }
};

template <>
struct Block<TensorType::kQ6_K> {
  static constexpr int kParts = 8;
  static constexpr bool kSigned = false, kHalves = true;

  INNERKV_HD static Codes part(const std::uint8_t* block, int j) {
    const int half = j / 4, quarter = j % 4;
    const Bytes low = load_as<Bytes>(block + 64 * half + 32 * (quarter % 2)),
                high = load_as<Bytes>(block + 128 + 32 * half);
    const Bytes codes = (quarter / 2 ? low >> 4 : low & 15) | (high >> (2 * quarter) & 3) << 4;
    const float d = half_at(block + 208);
    const auto scale = [&](int i) {
      return d * static_cast<float>(static_cast<std::int8_t>(block[192 + 2 * j + i]));
    };
    const float s0 = scale(0), s1 = scale(1);
    return {codes, {s0, s1}, {-32 * s0, -32 * s1}};
  }
};

/// Calls body(part, columns before it) for every 32 numbers of a row.
template <TensorType kType, class Body>
INNERKV_HD void for_parts(const std::uint8_t* row, int columns, Body&& body) {
  constexpr TensorTypeInfo kInfo = info_of(kType);
  for (int first = 0; first < columns; first += kInfo.elements, row += kInfo.bytes)
    for (int j = 0; j < Block<kType>::kParts; ++j) body(Block<kType>::part(row, j), first + 32 * j);
}

/// Calls body(integral_constant) for the quantised type.
template <class Body>
void with_type(TensorType type, Body&& body) {
  switch (type) {
    case TensorType::kQ8_0:
      return body(std::integral_constant<TensorType, TensorType::kQ8_0>{});
    case TensorType::kQ4_0:
      return body(std::integral_constant<TensorType, TensorType::kQ4_0>{});
    case TensorType::kQ4_1:
      return body(std::integral_constant<TensorType, TensorType::kQ4_1>{});
    case TensorType::kQ5_0:
      return body(std::integral_constant<TensorType, TensorType::kQ5_0>{});
    case TensorType::kQ5_1:
      return body(std::integral_constant<TensorType, TensorType::kQ5_1>{});
    case TensorType::kQ4_K:
      return body(std::integral_constant<TensorType, TensorType::kQ4_K>{});
    case TensorType::kQ6_K:
      return body(std::integral_constant<TensorType, TensorType::kQ6_K>{});
    case TensorType::kTernary:
      return body(std::integral_constant<TensorType, TensorType::kTernary>{});
    case TensorType::kF32:
    case TensorType::kF16:
    case TensorType::kBf16:
      return;
  }
}

// ---- float32 ----

void dequantise(TensorType type, const std::uint8_t* blocks, int count, float* out) {
  if (type == TensorType::kF32) {
    __builtin_memcpy(out, blocks, sizeof(float) * static_cast<std::size_t>(count));
    return;
  }
  if (type == TensorType::kBf16) {
    for (int i = 0; i < count; ++i)
      out[i] = __builtin_bit_cast(float, std::uint32_t{load_as<std::uint16_t>(blocks + 2 * i)} << 16);
    return;
  }
  if (type == TensorType::kF16) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec values = load_half(blocks + 2 * i);
      __builtin_memcpy(out + i, &values, sizeof values);
    }
    for (; i < count; ++i) out[i] = half_at(blocks + 2 * i);
    return;
  }
  with_type(type, [&](auto known) {
    using B = Block<known.value>;
    for_parts<known.value>(blocks, count, [&](const Codes& part, int first) {
      std::uint8_t codes[32];
      __builtin_memcpy(codes, &part.codes, 32);
      for (int i = 0; i < 32; i += kLanes) {
        const Vec values = widen<B::kSigned>(codes + i) * part.scale[i / 16] + part.offset[i / 16];
        __builtin_memcpy(out + first + i, &values, sizeof values);
      }
    });
  });
}

/// kRows x kTokens sums at once.
template <int kRows, int kTokens>
INNERKV_HD void float_tile(const FloatDotArgs& args, int row, int token) {
  Vec sum[kRows][kTokens] = {};
  const float *w = args.weights + row * args.stride, *x = args.x + token * args.stride;
  for (std::ptrdiff_t k = 0; k < args.stride; k += kLanes) {
    Vec weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = load_as<Vec>(w + r * args.stride + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vec value = load_as<Vec>(x + t * args.stride + k);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(weight[r], value, sum[r][t]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) args.out[(token + t) * args.out_stride + row + r] = sum_lanes(sum[r][t]);
}

template <int kTokens>
void float_rows(const FloatDotArgs& args, int token) {
  int row = 0;
  for (; row + kRowTile <= args.rows; row += kRowTile) float_tile<kRowTile, kTokens>(args, row, token);
  for (; row < args.rows; ++row) float_tile<1, kTokens>(args, row, token);
}

void float_dot(const FloatDotArgs& args) {
  int token = 0;
  for (; token + kTokenTile <= args.tokens; token += kTokenTile) float_rows<kTokenTile>(args, token);
  for (; token < args.tokens; ++token) float_rows<1>(args, token);
}

// ---- integers ----

void quantise(const float* x, int columns, const ByteActivations& to) {
  constexpr int kVecs = kActivationGroup / kLanes;
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  const auto add = [](auto a, auto b) { return a + b; };
  for (int first = 0; first < columns; first += kActivationGroup) {
    Vec from[kVecs];
    Ints most{};  // magnitudes order like their bits
    for (int i = 0; i < kVecs; ++i) {
      from[i] = load_as<Vec>(x + first + i * kLanes);
      most = larger(most, (Ints)from[i] & 0x7fffffff);
    }
    const float largest = __builtin_bit_cast(float, combine_lanes<kLanes / 2>(most, larger)[0]),
                step = largest / 127;
    const float inverse = largest > 1e-30f ? 127 / largest : 0;
    constexpr float kRound = 12582912;  // 1.5 * 2^23: its last bit is worth 1, so adding it rounds
    Ints sums[2] = {};                  // of the halves
    for (int i = 0; i < kVecs; ++i) {
      const Ints codes = (Ints)(from[i] * inverse + kRound) - 0x4b400000;
      store_bytes(to.codes + first + i * kLanes, codes);
      sums[2 * i / kVecs] += codes;
    }
    to.steps[first / 32] = step;
    for (int half = 0; half < 2; ++half)
      to.totals[first / 16 + half] = step * static_cast<float>(combine_lanes<kLanes / 2>(sums[half], add)[0]);
  }
}

template <TensorType kType, int kVectors>
void integer_rows(const IntegerDotArgs& args, int vector) {
  using B = Block<kType>;
  const std::ptrdiff_t columns = args.columns;
  const ByteActivations x{args.x.codes + vector * columns, args.x.steps + vector * (columns / 32),
                          args.x.totals + vector * (columns / 16)};
  for (int row = 0; row < args.rows; ++row) {
    const std::uint8_t* weights = args.weights + static_cast<std::size_t>(row) * args.row_bytes;
    Floats8 sum[kVectors] = {};
    float others[kVectors] = {};
    const int done = dot_runs<kType, kVectors>(weights, args.columns, x, others);
    weights += done / info_of(kType).elements * info_of(kType).bytes;
    for_parts<kType>(weights, args.columns - done, [&](const Codes& part, int after) {
      const int first = done + after;
      for (int v = 0; v < kVectors; ++v) {
        const Bytes bytes = load_as<Bytes>(x.codes + v * columns + first);
        const float step = x.steps[v * (columns / 32) + first / 32];
        const float* total = x.totals + v * (columns / 16) + first / 16;
        Floats8 factor;
        if constexpr (B::kHalves) {
          const float a = part.scale[0] * step, b = part.scale[1] * step;
          factor = Floats8{a, a, a, a, b, b, b, b};
        } else {
          factor = Floats8{} + part.scale[0] * step;
        }
        const Floats8 dots = B::kSigned ? dot_signed(part.codes, bytes) : dot_unsigned(part.codes, bytes);
        sum[v] = fma8(dots, factor, sum[v]);
        if constexpr (B::kHalves)
          others[v] += part.offset[0] * total[0] + part.offset[1] * total[1];
        else if constexpr (!B::kSigned)
          others[v] += part.offset[0] * (total[0] + total[1]);
      }
    });
    for (int v = 0; v < kVectors; ++v) {
      const float all = combine_lanes<4>(sum[v], [](auto a, auto b) { return a + b; })[0];
      args.out[(vector + v) * args.out_stride + row] = all + others[v];
    }
  }
}

void integer_dot(const IntegerDotArgs& args) {
  with_type(args.type, [&](auto known) {
    int vector = 0;
    for (; vector + 4 <= args.vectors; vector += 4) integer_rows<known.value, 4>(args, vector);
    for (; vector + 2 <= args.vectors; vector += 2) integer_rows<known.value, 2>(args, vector);
    for (; vector < args.vectors; ++vector) integer_rows<known.value, 1>(args, vector);
  });
}

// ---- exponentials ----

/// exp(x) to 2 ulp for x in [-87, 88]; below and above it stays at the border.
INNERKV_HD Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  constexpr float kRound = 12582912;
  const Vec shifted = fma(x, Vec{} + 1.44269504f, Vec{} + kRound);
  const Vec n = shifted - kRound;
  // ln 2 in two parts, the first exact in few bits (Cody and Waite).
  Vec r = fma(n, Vec{} - 0.693145752f, x);
  r = fma(n, Vec{} - 1.42860677e-6f, r);
  Vec p = Vec{} + 1.0f / 5040;
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, Vec{} + term);
  return (Vec)((Ints)p + ((Ints)shifted << 23));
}

void swiglu(float* gate, const float* up, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const Vec g = load_as<Vec>(gate + i), u = load_as<Vec>(up + i);
    const Vec result = g / (1.0f + exponential(-g)) * u;
    __builtin_memcpy(gate + i, &result, sizeof result);
  }
}

double sum_exp(const float* x, int count, float shift) {
  double sum = 0;
  int i = 0;
  for (; i + 16 * kLanes <= count; i += 16 * kLanes) {  // few float32 additions between double ones
    Vec part = {};
    for (int j = 0; j < 16; ++j) part += exponential(load_as<Vec>(x + i + j * kLanes) - shift);
    sum += static_cast<double>(sum_lanes(part));
  }
  for (; i < count; ++i) sum += static_cast<double>(exponential(Vec{} + (x[i] - shift))[0]);
  return sum;
}
