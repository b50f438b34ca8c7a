// The attention kernels of every instruction set this machine can run, against plain integer or float64
// arithmetic. Buffers have exactly their size or poisoned ends, so that writes outside are seen without a
// sanitizer too.
// Long file: every kernel of the table, in its order.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "format/page.h"
#include "numerics/half.h"

namespace innerkv {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kBits[] = {1, 2, 3, 4, 8};
constexpr std::size_t kGuard = 64;

std::size_t at(int i) { return static_cast<std::size_t>(i); }
double wide(float x) { return static_cast<double>(x); }

template <class Body>
void for_each_isa(Body body) {
  for (const Kernels* const* table = available_kernels(); *table; ++table) body(**table);
}

std::string say(const Kernels& kernels, std::initializer_list<int> numbers) {
  std::string text = kernels.isa;
  for (const int number : numbers) text += " " + std::to_string(number);
  return text;
}

TEST("unpacking gives the codes that get_code reads, for every width, head size and tensor") {
  check::Random random(1);
  for_each_isa([&](const Kernels& kernels) {
    for (const int bits : kBits)
      for (const int D : kHeadDims)
        for (const bool value : {false, true}) {
          const CodeShape s = TensorLayout{{bits, Group::kToken, Mode::kMidRise}, value, D}.codes();
          std::vector<std::uint8_t> packed(s.bytes()), bytes(at(s.rows * s.quads * 4) + kGuard, 0xee);
          for (auto& byte : packed) byte = static_cast<std::uint8_t>(random.bits());
          kernels.unpack(s, packed.data(), bytes.data());
          bool same = true;
          for (int row = 0; row < s.rows; ++row)
            for (int k = 0; k < 4 * s.quads; ++k)
              same &= bytes[at((k / 4 * s.rows + row) * 4 + k % 4)] == get_code(packed.data(), s, row, k);
          CHECK_WITH(same, say(kernels, {bits, D, value}));
          CHECK(std::all_of(bytes.end() - kGuard, bytes.end(), [](auto byte) { return byte == 0xee; }));
        }
  });
}

struct DotCase {
  int bits, rows, quads, row_begin, row_end, vectors;
  std::ptrdiff_t stride;
};

// fill: 0 random, 1 every product at its positive extreme, 2 at its negative extreme, 3 signs alternate
void check_dot(const Kernels& kernels, const DotCase& c, int fill, check::Random& random) {
  constexpr std::int32_t kPoison = 0x5a5a5a5a;
  const int top = (1 << c.bits) - 1;
  std::vector<std::uint8_t> codes(at(c.quads * c.rows * 4));
  std::vector<std::int8_t> hi(at(static_cast<int>(c.stride) * c.vectors)), lo(hi.size());
  for (auto& code : codes) code = static_cast<std::uint8_t>(fill == 0 ? random.below(top + 1) : top);
  for (std::size_t i = 0; i < hi.size(); ++i) {
    const int extremes[] = {-128, -127, 127, 0, random.below(255) - 127};
    hi[i] = static_cast<std::int8_t>(fill == 0   ? extremes[random.below(5)]
                                     : fill == 1 ? 127
                                     : fill == 2 ? -128
                                     : i % 2     ? 127
                                                 : -127);
    lo[i] = static_cast<std::int8_t>(fill == 0   ? extremes[random.below(5)]
                                     : fill == 1 ? 127
                                     : fill == 2 ? -128
                                     : i % 3     ? -128
                                                 : 127);
  }
  std::vector<std::int32_t> sums(at(c.vectors * c.rows) + kGuard, kPoison);
  kernels.dot({codes.data(), c.rows, c.quads, c.bits, c.row_begin, c.row_end, hi.data(), lo.data(), c.stride,
               c.vectors, sums.data()});
  bool exact = true, untouched = true;
  for (int v = 0; v < c.vectors; ++v)
    for (int row = 0; row < c.rows; ++row) {
      const std::int32_t got = sums[at(v * c.rows + row)];
      if (row < c.row_begin || row >= c.row_end) {
        untouched &= got == kPoison;
        continue;
      }
      std::int64_t sum = 0;
      for (int k = 0; k < 4 * c.quads; ++k) {
        const std::size_t from = at(static_cast<int>(c.stride) * v + k);
        sum += std::int64_t{codes[at((k / 4 * c.rows + row) * 4 + k % 4)]} * (256 * hi[from] + lo[from]);
      }
      exact &= sum == got;
    }
  for (std::size_t i = sums.size() - kGuard; i < sums.size(); ++i) untouched &= sums[i] == kPoison;
  CHECK_WITH(exact, say(kernels, {c.bits, c.rows, c.quads, c.row_begin, c.row_end, c.vectors, fill}));
  CHECK_WITH(untouched, say(kernels, {c.bits, c.rows, c.quads, c.row_begin, c.row_end, c.vectors, fill}));
}

TEST("integer dot products are exact at the extremes of every width, and write the given rows only") {
  check::Random random(2);
  for_each_isa([&](const Kernels& kernels) {
    for (const int bits : kBits) {
      for (const int rows : {64, 80, 96, 128, 256})
        for (const int quads : {4, 8, 12, 16, 20, 24, 32, 64})
          for (int fill = 0; fill < 4; ++fill)
            check_dot(kernels, {bits, rows, quads, 0, rows, 3, 4 * quads + fill % 2 * 16}, fill, random);
      for (int vectors = 1; vectors <= kMaxRows; ++vectors)
        for (const auto& [begin, end] :
             std::vector<std::pair<int, int>>{{0, 16}, {16, 64}, {32, 80}, {64, 80}, {48, 48}})
          check_dot(kernels, {bits, 80, 8, begin, end, vectors, 32}, vectors % 4, random);
    }
  });
}

TEST("splitting loses at most half a step, keeps the exact total, and a vector of nothing has step 0") {
  check::Random random(3);
  for_each_isa([&](const Kernels& kernels) {
    for (int count = 16; count <= kMaxHeadDim; count += 16)
      for (const float size : {1.0f, 3e-30f, 1e30f, 1e-12f, 65504.0f, 0.0f, 1e-31f})
        for (int kind = 0; kind < 4; ++kind) {
          std::vector<float> x(at(count));
          for (float& value : x)
            value = size * (kind == 0 ? random.normal() : kind == 1 ? 1.0f : kind == 2 ? -1.0f : 0.0f);
          if (kind == 3) x[at(random.below(count))] = -size;  // one outlier
          std::vector<std::int8_t> hi(x.size() + kGuard, 99), lo(hi);
          std::int32_t total = -1;
          const float step = kernels.split(x.data(), count, hi.data(), lo.data(), &total);
          float largest = 0;
          for (const float value : x) largest = std::max(largest, std::abs(value));
          std::int64_t sum = 0;
          double worst = 0;
          for (std::size_t i = 0; i < x.size(); ++i) {
            const int whole = 256 * hi[i] + lo[i];
            sum += whole;
            worst = std::max(worst, std::abs(wide(x[i]) - wide(step) * whole));
          }
          CHECK_WITH(sum == total, say(kernels, {count, kind}));
          CHECK_WITH(largest > 1e-30f ? worst <= 0.503 * wide(step) : step == 0 && worst <= 1e-30,
                     say(kernels, {count, kind}));
          CHECK(std::all_of(hi.end() - kGuard, hi.end(), [](int b) { return b == 99; }) &&
                std::all_of(lo.end() - kGuard, lo.end(), [](int b) { return b == 99; }));
        }
  });
}

TEST("a prepared query equals the float64 chain of rotation, mean, normalisation and Hadamard") {
  check::Random random(4);
  for_each_isa([&](const Kernels& kernels) {
    for (const int D : kHeadDims)
      for (int parts = 0; parts < 32; ++parts) {
        const bool rotates = parts & 1, shifts = parts & 2, scales = parts & 4, hadamards = parts & 8,
                   half_layout = parts & 16;
        const int pairs = parts % 3 == 0 ? D / 2 : D / 4;  // full and partial rotary dimensions
        const int group = parts % 3 == 0 ? D : parts % 3 == 1 ? 32 : 64;
        std::vector<float> q(at(D)), cos(at(D), 1.0f), sin(at(D), 0.0f), mean(at(D)), lam(at(D));
        for (int c = 0; c < D; ++c) {
          q[at(c)] = random.normal() * (c == 3 ? 20.0f : 1.0f);
          mean[at(c)] = random.normal();
          lam[at(c)] = 0.1f + static_cast<float>(random.uniform());
        }
        std::vector<double> x(q.begin(), q.end());
        for (int i = 0; i < pairs; ++i) {
          const std::size_t a = at(half_layout ? i : 2 * i), b = at(half_layout ? i + pairs : 2 * i + 1);
          const double angle = 6.28 * random.uniform(), p = x[a], r = x[b];
          cos[a] = cos[b] = static_cast<float>(std::cos(angle));
          sin[a] = static_cast<float>(std::sin(angle));
          sin[b] = -sin[a];
          if (!rotates) continue;
          x[a] = p * std::cos(angle) + r * std::sin(angle);
          x[b] = r * std::cos(angle) - p * std::sin(angle);
        }
        double constant = 0, size = 0;
        for (int c = 0; c < D; ++c) {
          if (shifts)
            constant += x[at(c)] * wide(mean[at(c)]), size += std::abs(x[at(c)] * wide(mean[at(c)]));
          if (scales) x[at(c)] *= wide(lam[at(c)]);
        }
        if (hadamards)
          for (int begin = 0, n = 0; begin < D; begin += n) {
            for (n = 256; n > D - begin;) n /= 2;
            const std::vector<double> old(x.begin() + begin, x.begin() + begin + n);
            for (int i = 0; i < n; ++i) {
              double sum = 0;
              for (int j = 0; j < n; ++j)
                sum += __builtin_popcount(static_cast<unsigned>(i & j)) % 2 ? -old[at(j)] : old[at(j)];
              x[at(begin + i)] = sum / std::sqrt(n);
            }
          }
        std::vector<std::int8_t> hi(at(D)), lo(at(D));
        std::vector<std::int32_t> totals(at((D + group - 1) / group) + 1, 77);
        QueryArgs args{q.data(),
                       D,
                       rotates ? cos.data() : nullptr,
                       rotates ? sin.data() : nullptr,
                       pairs,
                       half_layout,
                       shifts ? mean.data() : nullptr,
                       scales ? lam.data() : nullptr,
                       hadamards,
                       hi.data(),
                       lo.data(),
                       group,
                       totals.data(),
                       -1,
                       -1};
        kernels.prepare_query(args);
        double worst = 0, largest = 0;
        for (int c = 0; c < D; ++c) {
          worst = std::max(worst, std::abs(x[at(c)] - wide(args.step) * (256 * hi[at(c)] + lo[at(c)])));
          largest = std::max(largest, std::abs(x[at(c)]));
        }
        CHECK_WITH(worst <= 0.503 * wide(args.step) + 2e-6 * largest, say(kernels, {D, parts}));
        CHECK(std::abs(wide(args.step) * 32639 - largest) < 1e-5 * largest);
        CHECK_WITH(std::abs(wide(args.constant) - constant) <= 1e-6 * size, say(kernels, {D, parts}));
        for (int g = 0; g * group < D; ++g) {
          std::int32_t total = 0;
          for (int c = g * group; c < std::min(D, (g + 1) * group); ++c) total += 256 * hi[at(c)] + lo[at(c)];
          CHECK(total == totals[at(g)]);
        }
        CHECK(totals.back() == 77);
      }
  });
}

TEST(
    "binary16 conversions of arrays equal the header's for every value and any length, and report what is "
    "not finite") {
  for_each_isa([&](const Kernels& kernels) {
    std::vector<std::uint16_t> halves(65536 + kGuard), back(halves.size(), 0xabcd);
    std::vector<float> values(halves.size(), 7.0f);
    for (int i = 0; i < 65536; ++i)
      halves[at(i)] = static_cast<std::uint16_t>(i * 257);  // each once, finite or not side by side
    kernels.half_to_float(halves.data(), values.data(), 65536);
    CHECK(!kernels.float_to_half(values.data(), back.data(), 65536));
    bool same = true;
    for (std::size_t i = 0; i < 65536; ++i) {
      const float own = half_value(halves[i]);
      same &= std::isnan(own) ? std::isnan(values[i]) && !half_is_finite(back[i])
                              : std::memcmp(&own, &values[i], 4) == 0 && back[i] == halves[i];
    }
    CHECK_WITH(same && values[65536] == 7.0f && back[65536] == 0xabcd, kernels.isa);
    check::Random random(5);
    for (std::size_t count = 0; count <= 70; ++count) {
      std::vector<float> x(count);
      for (float& value : x)
        value = __builtin_bit_cast(float, static_cast<std::uint32_t>(random.bits()) & 0xbfffffffu) * 4096.0f;
      std::vector<std::uint16_t> half(count + 1, 0xabcd);
      const bool finite = kernels.float_to_half(x.data(), half.data(), count);
      bool expected = true;
      for (std::size_t i = 0; i < count; ++i) {
        expected &= half_is_finite(half_bits_ieee(x[i]));
        CHECK(half[i] == half_bits_ieee(x[i]) || std::isnan(x[i]));
      }
      CHECK(finite == expected && half[count] == 0xabcd);
      for (std::size_t i = 0; i < count; ++i) {  // one bad value anywhere
        std::vector<float> bad(count, 1.0f);
        bad[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? HUGE_VALF : 65520.0f;
        CHECK(!kernels.float_to_half(bad.data(), half.data(), count));
      }
    }
  });
}

template <class T, class Scores, class Accumulate>
void check_raw(const Kernels& kernels, Scores scores_of, Accumulate accumulate, int D, int tokens, int rows,
               check::Random& random) {
  const std::ptrdiff_t stride = D + (tokens % 2 ? 16 : 0), p_stride = 131;
  std::vector<T> kv(static_cast<std::size_t>(stride) * at(tokens));
  std::vector<float> values(kv.size()), q(at(rows * D)), p(at(rows) * 131),
      out(at(rows) * 131 + kGuard, 99.0f), acc(at(rows * D) + kGuard);
  for (std::size_t i = 0; i < kv.size(); ++i) {
    const std::uint16_t half = half_bits(random.normal());
    values[i] = half_value(half);
    if constexpr (sizeof(T) == 2)
      kv[i] = half;
    else
      kv[i] = values[i];
  }
  for (auto* vector : {&q, &p, &acc})
    for (float& x : *vector) x = random.normal();
  const std::vector<float> before = acc;
  scores_of(kernels, kv.data(), stride, tokens, D, q.data(), rows, out.data(), p_stride);
  accumulate(kernels, kv.data(), stride, tokens, D, p.data(), rows, p_stride, acc.data());
  bool near = true, untouched = true;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 131; ++t) {
      const float got = out[at(r * 131 + t)];
      if (t >= tokens) {
        untouched &= got == 99.0f;
        continue;
      }
      double dot = 0, size = 0;
      for (int c = 0; c < D; ++c) {
        const double term =
            wide(q[at(r * D + c)]) * wide(values[static_cast<std::size_t>(stride) * at(t) + at(c)]);
        dot += term, size += std::abs(term);
      }
      near &= std::abs(dot - wide(got)) <= 2e-6 * size;
    }
    for (int c = 0; c < D; ++c) {
      double sum = wide(before[at(r * D + c)]), size = std::abs(sum);
      for (int t = 0; t < tokens; ++t) {
        const double term =
            wide(p[at(r * 131 + t)]) * wide(values[static_cast<std::size_t>(stride) * at(t) + at(c)]);
        sum += term, size += std::abs(term);
      }
      near &= std::abs(sum - wide(acc[at(r * D + c)])) <= 4e-6 * size;
    }
  }
  for (std::size_t i = 0; i < kGuard; ++i)
    untouched &= out[at(rows) * 131 + i] == 99.0f && acc[at(rows * D) + i] == before[at(rows * D) + i];
  CHECK_WITH(near, say(kernels, {D, tokens, rows, static_cast<int>(sizeof(T))}));
  CHECK_WITH(untouched, say(kernels, {D, tokens, rows, static_cast<int>(sizeof(T))}));
}

TEST("16-bit and 32-bit scores and outputs equal float64 sums for odd token counts, strides and row counts") {
  check::Random random(6);
  for_each_isa([&](const Kernels& kernels) {
    for (const int D : kHeadDims)
      for (const int tokens : {0, 1, 2, 3, 5, 7, 8, 33, 127, 128})
        for (int rows = 1 + tokens % 2; rows <= kMaxRows; rows += 1 + D / 64) {
          check_raw<std::uint16_t>(
              kernels, [](const Kernels& k, auto... args) { k.raw_scores_half(args...); },
              [](const Kernels& k, auto... args) { k.raw_accumulate_half(args...); }, D, tokens, rows,
              random);
          check_raw<float>(
              kernels, [](const Kernels& k, auto... args) { k.raw_scores_float(args...); },
              [](const Kernels& k, auto... args) { k.raw_accumulate_float(args...); }, D, tokens, rows,
              random);
        }
  });
}

TEST("softmax in pieces equals float64, with masked, huge, equal and no visible scores") {
  check::Random random(7);
  for_each_isa([&](const Kernels& kernels) {
    for (int kind = 0; kind < 7; ++kind)
      for (const int count : {0, 1, 3, 15, 16, 17, 127, 128}) {
        std::vector<float> all(at(3 * count));
        for (float& s : all) {
          const float x = random.normal();
          s = kind == 0   ? x
              : kind == 1 ? 40 * x
              : kind == 2 ? (random.below(2) ? kNone : x)
              : kind == 3 ? 2e37f * x
              : kind == 4 ? 5.0f
              : kind == 5 ? kNone
                          : -1e30f;
        }
        if (kind == 6) std::fill_n(all.begin(), count, kNone);  // nothing visible at first
        double top = -HUGE_VAL, sum = 0;
        for (const float s : all) top = std::max(top, wide(s));
        for (const float s : all) sum += top == -HUGE_VAL ? 0 : std::exp2(wide(s) - top);
        float running_max = kNone, running_sum = 0;
        std::vector<double> probabilities;
        bool finite = true;
        for (int piece = 0; piece < 3; ++piece) {
          std::vector<float> part(all.begin() + piece * count, all.begin() + (piece + 1) * count);
          part.push_back(99.0f);
          SoftmaxArgs args{part.data(), count, running_max, running_sum, -1.0f};
          kernels.softmax(args);
          CHECK(part.back() == 99.0f && args.rescale >= 0 && args.rescale <= 1 &&
                args.running_max >= running_max);
          for (double& p : probabilities) p *= wide(args.rescale);
          for (int t = 0; t < count; ++t)
            probabilities.push_back(wide(part[at(t)])), finite &= std::isfinite(part[at(t)]);
          running_max = args.running_max;
          running_sum = args.running_sum;
        }
        CHECK_WITH(finite && wide(running_max) == top, say(kernels, {kind, count}));
        CHECK_WITH(std::abs(wide(running_sum) - sum) <= 2e-6 * sum, say(kernels, {kind, count}));
        bool near = true;
        for (std::size_t i = 0; i < probabilities.size(); ++i) {
          const double p = top == -HUGE_VAL ? 0 : std::exp2(wide(all[i]) - top);
          // A difference of two floats of this size is this exact; huge ones differ by nothing or everything.
          const double slack = std::min(1e-4, 1e-7 * (std::abs(wide(all[i])) + std::abs(top)));
          near &=
              p == 0 ? probabilities[i] == 0 : std::abs(p - probabilities[i]) <= (1e-6 + slack) * p + 1e-37;
        }
        CHECK_WITH(near, say(kernels, {kind, count}));
      }
  });
}

TEST(
    "integer sums become scores and outputs as in exact arithmetic, also where intermediate products leave "
    "32 bits") {
  check::Random random(8);
  for_each_isa([&](const Kernels& kernels) {
    for (const int count : {1, 15, 16, 31, 128, 256})
      for (const int bits : kBits)
        for (const bool offsets : {false, true}) {
          const int center2 = offsets ? 0 : (1 << bits) - random.below(2);
          // What 256 elements of the largest codes and weights can give.
          const int elements = 256, total = (random.below(2) ? 1 : -1) * elements * (32639 - random.below(9));
          std::vector<std::int32_t> sums(at(count));
          std::vector<float> scale(at(count)), offset(at(count)), scores(at(count) + 1), values, plain;
          for (int i = 0; i < count; ++i) {
            sums[at(i)] = static_cast<std::int32_t>(
                static_cast<double>(total) * (random.below(2) ? 1.0 : random.uniform()) * ((1 << bits) - 1));
            scale[at(i)] = 0.01f * static_cast<float>(random.uniform());
            offset[at(i)] = random.normal();
            scores[at(i)] = random.normal();
          }
          const std::vector<float> before = values = plain = scores;
          const float step = 1e-4f;
          kernels.add_scores(sums.data(), count, scale.data(), offsets ? offset.data() : nullptr, step, total,
                             center2, scores.data());
          kernels.add_values(sums.data(), count, scale.data(), step, total, center2, values.data());
          kernels.add_values(sums.data(), count, nullptr, step, total, center2, plain.data());
          bool near = true;
          for (int i = 0; i < count; ++i) {
            const double whole = wide(step) * (static_cast<double>(sums[at(i)]) - 0.5 * center2 * total),
                         s = wide(scale[at(i)]);
            const double shift = offsets ? wide(offset[at(i)]) * wide(step) * total : 0.0,
                         old = wide(before[at(i)]);
            const double size = 2e-6 * (std::abs(old) + std::abs(s * whole) + std::abs(shift));
            near &= std::abs(wide(scores[at(i)]) - (old + s * whole + shift)) <= size;
            near &= std::abs(wide(values[at(i)]) - (old + s * whole)) <= size;
            near &= std::abs(wide(plain[at(i)]) - (old + whole)) <= 2e-6 * (std::abs(old) + std::abs(whole));
          }
          CHECK_WITH(near, say(kernels, {count, bits, offsets}));
          std::vector<float> product(at(count) + 1, 9.0f), scaled = before;
          kernels.multiply(before.data(), scale.data(), count, product.data());
          kernels.scale_by(scaled.data(), count, 0.3f);
          bool same =
              product.back() == 9.0f && scaled.back() == before.back() && scores.back() == before.back();
          for (int i = 0; i < count; ++i)
            same &= product[at(i)] == before[at(i)] * scale[at(i)] && scaled[at(i)] == before[at(i)] * 0.3f;
          CHECK_WITH(same, say(kernels, {count}));
        }
  });
}

TEST("a table can be chosen by name, and a name that this machine lacks is refused") {
  for_each_isa([&](const Kernels& kernels) { CHECK(&select_kernels(kernels.isa) == &kernels); });
  CHECK(&select_kernels(nullptr) == *available_kernels() && &select_kernels("") == *available_kernels());
  bool refused = false;
  try {
    select_kernels("sse9");
  } catch (const std::exception& error) {
    refused = std::string(error.what()).find("scalar") != std::string::npos;
  }
  CHECK(refused);
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("kernels", argc, argv); }
