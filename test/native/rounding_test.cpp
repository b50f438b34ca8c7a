// What decides stored bits, of every instruction set: transforms bit-identical to the scalar headers,
// rounding of groups bit-identical to format/group.h and true to its promises, rounding with error feedback
// bit-identical to a plain transcription of docs/format.md section 6.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "format/page.h"
#include "numerics/half.h"

namespace innerkv {
namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }
double wide(float x) { return static_cast<double>(x); }

template <class Body>
void for_each_isa(Body body) {
  for (const Kernels* const* table = available_kernels(); *table; ++table) body(**table);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(float) * a.size()) == 0;
}

std::string say(const char* isa, std::initializer_list<int> numbers) {
  std::string text = isa;
  for (const int number : numbers) text += " " + std::to_string(number);
  return text;
}

// ---- groups that have broken quantisers ----

constexpr int kKinds = 14;

std::vector<float> group_of(int kind, int count, check::Random& random) {
  std::vector<float> x(at(count));
  for (int i = 0; i < count; ++i) {
    const float sign = i % 2 ? -1.0f : 1.0f, normal = round_half(random.normal());
    const float made[kKinds] = {
        normal,                            // as a key
        0.0f,                              // nothing
        0.0f * sign,                       // both zeros
        round_half(0.3f),                  // constant
        -2.5f,                             // constant, negative
        65504.0f * sign,                   // the whole range of binary16
        i == count / 2 ? 65504.0f : 0.0f,  // a single outlier
        i == count - 1 ? -1000.0f : round_half(0.01f * normal),
        0x1p-24f * static_cast<float>(random.below(9) - 4),  // subnormal, scale may round to 0
        sign,                                                // alternating
        i == 0 ? 0x1p-24f : 0.0f,                            // the smallest number
        round_half(100.0f + 0.1f * normal),                  // far from zero
        round_half(std::exp2(static_cast<float>(random.below(30) - 15)) * sign),
        -65504.0f};
    x[at(i)] = made[kind];
  }
  return x;
}

struct Rounded {
  GroupScale scale;
  std::vector<std::uint8_t> codes;
  bool operator==(const Rounded& other) const {
    return scale.scale == other.scale.scale && scale.has_zero == other.scale.has_zero &&
           (!scale.has_zero || scale.zero == other.scale.zero) && codes == other.codes;
  }
};

constexpr float kRatios[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.7f, 0.6f, 0.5f};

template <class Body>
void for_each_rule(Body body) {
  for (const int bits : {1, 2, 3, 4, 8})
    for (int mode = 0; mode < 6; ++mode) {
      if (!is_supported({bits, Group::kToken, static_cast<Mode>(mode)}, true)) continue;
      for (const int ratios : {0, 1, 3, 8})
        for (const bool unbiased : {false, true}) {
          if (static_cast<Mode>(mode) != Mode::kMidRise && (ratios > 0 || unbiased)) continue;
          body(GroupRule{bits, static_cast<Mode>(mode), ratios ? kRatios : nullptr, ratios, unbiased});
        }
    }
}

TEST("every instruction set rounds hard groups of every mode and width to the bits of format/group.h") {
  check::Random random(1);
  for_each_rule([&](const GroupRule& rule) {
    for (const int count : {16, 32, 64, 80, 96, 128, 256})
      for (int kind = 0; kind < kKinds; ++kind) {
        std::vector<float> x = group_of(kind, count, random);
        if (random.below(2) && (kind == 0 || kind == 11))
          hadamard(x.data(), count);  // no longer binary16 numbers
        Rounded expected{{}, std::vector<std::uint8_t>(at(count) + 8, 0xee)};
        expected.scale = quantise_group(x.data(), count, rule, expected.codes.data());
        for_each_isa([&](const Kernels& kernels) {
          Rounded got{{}, std::vector<std::uint8_t>(at(count) + 8, 0xee)};
          got.scale = kernels.quantise_group(x.data(), count, rule, got.codes.data());
          CHECK_WITH(got == expected, say(kernels.isa, {rule.bits, static_cast<int>(rule.mode),
                                                        rule.ratio_count, count, kind}));
        });
        CHECK(std::all_of(expected.codes.end() - 8, expected.codes.end(),
                          [](int code) { return code == 0xee; }));
      }
  });
}

TEST("a rounded group is finite, uses its mode's codes, and is within half a step where nothing is clipped") {
  check::Random random(2);
  for_each_rule([&](const GroupRule& rule) {
    for (const int count : {16, 32, 128})
      for (int kind = 0; kind < kKinds; ++kind) {
        const std::vector<float> x = group_of(kind, count, random);
        const std::string what = say(kModeNames[static_cast<std::size_t>(rule.mode)],
                                     {rule.bits, rule.ratio_count, rule.unbiased, count, kind});
        std::vector<std::uint8_t> codes(at(count));
        const GroupScale scale = quantise_group(x.data(), count, rule, codes.data());
        CHECK_WITH(half_is_finite(scale.scale) && half_is_finite(scale.zero), what);
        const bool hybrid = rule.mode == Mode::kHybrid || rule.mode == Mode::kHybridReleased,
                   asymmetric = scale.has_zero;
        CHECK(scale.has_zero == (rule.mode == Mode::kAsymmetric || (hybrid && (scale.scale & 0x8000))));
        CHECK(rule.mode == Mode::kSignedMax || hybrid || !(scale.scale & 0x8000));
        CHECK_WITH(scale.zero != 0x8000, what + ": a zero point of -0");
        const int n = 1 << rule.bits, used = asymmetric && rule.mode == Mode::kHybridReleased ? n / 2 : n;
        const int low = !asymmetric && (hybrid || rule.mode == Mode::kZeroLevel) ? 1 : 0;
        const Dequantiser map = dequantiser(rule.bits, rule.mode, scale.scale, scale.zero);
        const double step = std::abs(wide(map.scale)),
                     zero_slack = asymmetric ? std::abs(wide(half_value(scale.zero))) * 0x1p-11 : 0.0;
        const float highest = *std::max_element(x.begin(), x.end());
        for (int i = 0; i < count; ++i) {
          CHECK_WITH(codes[at(i)] >= low && codes[at(i)] < used, what);
          const double decoded = wide(map.scale) * codes[at(i)] + wide(map.offset), value = wide(x[at(i)]);
          CHECK(std::isfinite(decoded));
          if (rule.ratio_count > 0 || rule.unbiased) continue;
          // The scale is rounded to binary16: the ends of the range move by 2^-11 of it (and by a subnormal
          // unit per level), a saturated scale or signedMax's missing level n/2 clip for good.
          const bool clipped =
              (scale.scale & 0x7fff) == 0x7bff || (rule.mode == Mode::kSignedMax && codes[at(i)] == n - 1);
          const double rounding = n * (step * 0x1p-11 + 0x1p-25) + zero_slack + 1e-6 * std::abs(value);
          CHECK_WITH(clipped || std::abs(decoded - value) <= 0.5 * step + rounding,
                     what + " " + std::to_string(value) + " -> " + std::to_string(decoded));
        }
        if (kind == 1 || kind == 2)
          for (const int code : codes)
            CHECK_WITH(map.scale == 0 && wide(map.offset) == 0 && code == (asymmetric ? 0 : n / 2), what);
        if ((kind == 3 || kind == 4) && asymmetric) CHECK_WITH(map.offset == highest && map.scale == 0, what);
      }
  });
}

TEST(
    "a clip search never leaves more error than any of its ratios alone, and hybrid never more than either "
    "side") {
  check::Random random(3);
  for (const int bits : {2, 3, 4})
    for (int run = 0; run < 300; ++run) {
      const std::vector<float> x = group_of(run % 2 ? 0 : 11, 32, random);
      const auto error = [&](const GroupRule& rule) {
        std::vector<std::uint8_t> codes(32);
        const GroupScale scale = quantise_group(x.data(), 32, rule, codes.data());
        const Dequantiser map = dequantiser(bits, rule.mode, scale.scale, scale.zero);
        double sum = 0;
        for (int i = 0; i < 32; ++i)
          sum += std::pow(wide(map.scale) * codes[at(i)] + wide(map.offset) - wide(x[at(i)]), 2);
        return sum;
      };
      const double searched = error({bits, Mode::kMidRise, kRatios, 8, false}),
                   hybrid = error({bits, Mode::kHybrid, nullptr, 0, false});
      for (const float& ratio : kRatios)
        CHECK(searched <= error({bits, Mode::kMidRise, &ratio, 1, false}) * (1 + 1e-4) + 1e-9);
      for (const Mode mode : {Mode::kZeroLevel, Mode::kAsymmetric})
        CHECK(hybrid <= error({bits, mode, nullptr, 0, false}) * (1 + 1e-4) + 1e-9);
    }
}

// ---- transforms ----

TEST("the Hadamard transform of every instruction set has the bits of the scalar header") {
  check::Random random(4);
  for (const int D : {16, 32, 64, 80, 96, 128, 256})
    for (int kind = 0; kind < kKinds; ++kind) {
      std::vector<float> expected = group_of(kind, D, random);
      const std::vector<float> x = expected;
      hadamard(expected.data(), D);
      for_each_isa([&](const Kernels& kernels) {
        std::vector<float> got = x;
        got.push_back(5.0f);
        kernels.hadamard(got.data(), D);
        CHECK(got.back() == 5.0f);
        got.pop_back();
        CHECK_WITH(same_bits(got, expected), say(kernels.isa, {D, kind}));
      });
    }
}

TEST(
    "rotations of every instruction set are the documented products and sums, and leave other channels "
    "alone") {
  check::Random random(5);
  for (const int D : kHeadDims)
    for (const int pairs : {D / 2, D / 4, 8, 0})
      for (const bool half_layout : {false, true})
        for (int kind = 0; kind < kKinds; ++kind) {
          const std::vector<float> x = group_of(kind, D, random);
          std::vector<float> expected = x, cos(at(D), 1.0f), sin(at(D), 0.0f);
          for (int i = 0; i < pairs; ++i) {
            const std::size_t a = at(half_layout ? i : 2 * i), b = at(half_layout ? i + pairs : 2 * i + 1);
            const double angle = 1e6 * random.uniform();
            const float c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
            cos[a] = cos[b] = c;
            sin[a] = s;
            sin[b] = -s;
            expected[a] = x[a] * c + x[b] * s;
            expected[b] = x[b] * c - x[a] * s;
          }
          for_each_isa([&](const Kernels& kernels) {
            std::vector<float> got = x;
            kernels.rotate(got.data(), D, cos.data(), sin.data(), pairs, half_layout);
            for (float& value : got) value += 0.0f;  // -0 and +0 decode alike
            for (float& value : expected) value += 0.0f;
            CHECK_WITH(same_bits(got, expected), say(kernels.isa, {D, pairs, half_layout, kind}));
          });
        }
}

// ---- rounding with error feedback ----

struct FeedbackBasis {
  std::vector<std::uint8_t> order;
  std::vector<float> metric, feedback, pivot;
};

FeedbackBasis feedback_basis(int D, bool wild, check::Random& random) {
  FeedbackBasis b;
  for (int i = 0; i < D; ++i) b.order.push_back(static_cast<std::uint8_t>(i));
  for (int i = D - 1; i > 0; --i) std::swap(b.order[at(i)], b.order[at(random.below(i + 1))]);
  b.metric.resize(at(D * D));
  b.feedback.resize(at(D * D));
  for (int i = 0; i < D; ++i) {
    b.pivot.push_back(wild ? 10 * random.normal() : 0.5f + static_cast<float>(random.uniform()));
    for (int j = 0; j < D; ++j) {
      b.metric[at(i * D + j)] = i == j ? 1.0f : 0.02f * random.normal();
      if (j > i) b.feedback[at(i * D + j)] = (wild ? 1.0f : 0.05f) * random.normal();
    }
  }
  return b;
}

/// docs/format.md section 6, one clip ratio after the other.
Rounded documented_feedback(const std::vector<float>& key, int bits, const FeedbackBasis& b,
                            const float* ratios, int ratio_count, bool unbiased) {
  const int D = static_cast<int>(key.size());
  const float n = static_cast<float>(1 << bits), center = (n - 1.0f) / 2.0f;
  std::vector<float> x(key.size());
  float A = 0;
  for (int i = 0; i < D; ++i) {
    x[at(i)] = key[b.order[at(i)]];
    A = std::max(A, std::abs(x[at(i)]));
  }
  float best_loss = 0, best_scale = 0;
  std::vector<std::uint8_t> best;
  for (int r = 0; r < ratio_count; ++r) {
    const float s = round_half(ratios[r] * ((2.0f * A) / (n - 1.0f))), inverse = s == 0 ? 0.0f : 1.0f / s;
    std::vector<float> y = x;
    std::vector<std::uint8_t> codes;
    float L = 0;
    for (int c = 0; c < D; ++c) {
      const float code = std::trunc(std::min(std::max(y[at(c)] * inverse + n / 2, 0.0f), n - 1.0f));
      const float e = y[at(c)] - s * (code - center), part = e * b.pivot[at(c)];
      L = L + part * part;
      for (int j = c + 1; j < D; ++j) y[at(j)] = y[at(j)] - e * b.feedback[at(c * D + j)];
      codes.push_back(static_cast<std::uint8_t>(code));
    }
    if (r == 0 || L < best_loss) best_loss = L, best_scale = s, best = codes;
  }
  Rounded out{{half_bits(best_scale), 0, false}, std::vector<std::uint8_t>(key.size())};
  for (int i = 0; i < D; ++i) out.codes[b.order[at(i)]] = best[at(i)];
  if (!unbiased) return out;
  std::vector<float> v(key.size()), num(32), den(32);
  for (int j = 0; j < D; ++j)
    for (int c = 0; c < D; ++c) v[at(c)] += b.metric[at(j * D + c)] * x[at(j)];
  for (int i = 0; i < D; ++i) {
    num[at(i % 32)] += x[at(i)] * v[at(i)];
    den[at(i % 32)] += best_scale * (static_cast<float>(best[at(i)]) - center) * v[at(i)];
  }
  for (int h = 16; h >= 1; h /= 2)
    for (int l = 0; l < h; ++l) num[at(l)] += num[at(l + h)], den[at(l)] += den[at(l + h)];
  float g = num[0] / den[0];
  if (!(den[0] > 0) || !std::isfinite(g)) g = 1;
  out.scale.scale = half_bits(best_scale * std::min(std::max(g, 0.5f), 2.0f));
  return out;
}

TEST("rounding with error feedback has the documented bits on every instruction set") {
  check::Random random(6);
  for (const int D : kHeadDims)
    for (const bool wild : {false, true}) {
      const FeedbackBasis b = feedback_basis(D, wild, random);
      for (const int bits : {2, 3, 4, 8})
        for (const int ratio_count : {1, 2, 5, 8})
          for (int kind = 0; kind < kKinds; ++kind) {
            const std::vector<float> key = group_of(kind, D, random);
            const bool unbiased = (kind + ratio_count) % 2 == 0;
            const Rounded expected = documented_feedback(key, bits, b, kRatios, ratio_count, unbiased);
            for_each_isa([&](const Kernels& kernels) {
              Rounded got{{}, std::vector<std::uint8_t>(at(D), 0xee)};
              kernels.round_feedback({key.data(), 1, D, bits, b.order.data(), b.feedback.data(),
                                      b.pivot.data(), b.metric.data(), kRatios, ratio_count, unbiased,
                                      got.codes.data(), &got.scale.scale});
              CHECK_WITH(got == expected, say(kernels.isa, {D, bits, ratio_count, kind, wild}));
            });
          }
    }
}

TEST("keys rounded together have the bits of keys rounded alone") {
  check::Random random(7);
  for (const int D : kHeadDims) {
    const FeedbackBasis b = feedback_basis(D, false, random);
    for (int tokens = 1; tokens <= 9; ++tokens) {
      std::vector<float> keys;
      for (int t = 0; t < tokens; ++t)
        for (const float x : group_of((t + D / 16) % kKinds, D, random)) keys.push_back(x);
      for_each_isa([&](const Kernels& kernels) {
        const auto round = [&](int first, int count, std::uint8_t* codes, std::uint16_t* scales) {
          kernels.round_feedback({keys.data() + first * D, count, D, 2, b.order.data(), b.feedback.data(),
                                  b.pivot.data(), b.metric.data(), kRatios, 8, true, codes, scales});
        };
        // One more of each, to see that nothing beyond the end is written.
        std::vector<std::uint8_t> together(at((tokens + 1) * D), 0xee), alone = together;
        std::vector<std::uint16_t> scales(at(tokens + 1), 0xeeee), alone_scales = scales;
        round(0, tokens, together.data(), scales.data());
        for (int t = 0; t < tokens; ++t) round(t, 1, &alone[at(t * D)], &alone_scales[at(t)]);
        CHECK_WITH(together == alone && scales == alone_scales, say(kernels.isa, {D, tokens, 0, 0, 0}));
      });
    }
  }
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("rounding", argc, argv); }
