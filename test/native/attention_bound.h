// How far two native attention runs over the same stored bits may be apart: the bound of
// test/reference/tolerance.ts, term by term, from the numbers that a sequence holds. Nothing here is tuned.
//
// Either run is within tolerance.ts's bound T of exact attention. One of them, the CPU's, serves as the place
// where that bound is evaluated, in float64: its logits are at most d away from the exact ones, the other
// run's at most 2 d from them, so outputs differ by at most T(d) + T(2 d). Written here with tolerance.ts's
// names: u, gamma, step, transformed, relative, level, magnitude, inflation, chain.
#pragma once

#include "support.h"

namespace innerkv::test {

// The emulator watches every access of a test program; these loops over plain numbers would only be slow.
#define INNERKV_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

/// Outputs, log-sum-exps and logits of one sequence as AttendRequest has them; or bounds of their
/// differences.
struct Attended {
  std::vector<float> out, lse, logits;
};

namespace bounds {

inline constexpr double kU = 0x1p-24, kTiny = 1e-30, kIntegers = 32639, kOutlierUnits = 4194048;
inline double gamma(double k) { return k * kU / (1 - k * kU); }

/// The keys or values of one head, [tokens][D], as stored; raw tokens as they came. `added`: outliers.
struct Numbers {
  std::vector<double> x, magnitude, level, scale, added;
  std::vector<char> raw;
};

/// x <- H x, or |H| x with magnitudes; largest powers of two first (docs/format.md section 5.4).
INNERKV_UNWATCHED inline void hadamard(double* x, int count, bool magnitudes) {
  while (count > 0) {
    int n = 1;
    while (2 * n <= count) n *= 2;
    for (int h = 1; h < n; h *= 2)
      for (int i = 0; i < n; ++i) {
        if (i & h) continue;
        const double a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = magnitudes ? a + b : a - b;
      }
    for (int i = 0; i < n; ++i) x[i] /= std::sqrt(static_cast<double>(n));
    x += n;
    count -= n;
  }
}

inline void put_raw(Numbers& to, int token, int D, const std::uint16_t* row) {
  to.raw[at(token)] = 1;
  for (int c = 0; c < D; ++c) {
    const double x = static_cast<double>(half_value(row[c]));
    to.x[at(token * D + c)] = x;
    to.magnitude[at(token * D + c)] = std::abs(x);
  }
}

inline Numbers numbers_of(const HeadView& view, const TensorLayout& layout, std::size_t base_at) {
  const bool value = layout.value;
  const int D = layout.head_dim, quantised = value ? view.v_quantised : view.k_quantised;
  const TensorSpec spec = layout.spec;
  const std::size_t size = at(view.tokens * D);
  Numbers all{std::vector<double>(size), std::vector<double>(size), std::vector<double>(size),
              std::vector<double>(size), std::vector<double>(size), std::vector<char>(at(view.tokens))};
  for (int p = 0; p < view.sink; ++p) put_raw(all, p, D, (value ? view.sink_v : view.sink_k) + p * D);
  for (int t = quantised; t < view.tokens - view.sink; ++t)
    put_raw(all, view.sink + t, D, (value ? view.ring_v : view.ring_k) + t % view.ring * D);
  for (int first = 0; first < quantised; first += kPageTokens) {
    const Page* page = (*view.table)[at(first / kPageTokens)].get();
    const int slots = std::min(kPageTokens, quantised - first);
    const std::uint8_t* base = page ? page->bytes.data() + base_at : nullptr;
    const auto half_at = [&](std::size_t from, int index) {
      std::uint16_t bits;
      std::memcpy(&bits, base + from + 2 * at(index), 2);
      return bits;
    };
    int compact = 0;
    std::vector<std::uint16_t> zeros(at(layout.scales()));
    for (int slot = 0; page && !spec.raw() && slot < slots; ++slot)
      for (int g = 0; g < layout.groups() && (spec.per_token() || slot % kBlockTokens32 == 0); ++g) {
        const int index = layout.scale_index(slot, g);
        if (spec.dense_zeros()) zeros[at(index)] = half_at(layout.zeros_at(), index);
        if (!spec.compact_zeros() || !(half_at(layout.scales_at(), index) & 0x8000u)) continue;
        const Slot& extent = (value ? page->v_zeros : page->k_zeros)[at(compact / kZeroExtent)];
        std::memcpy(&zeros[at(index)], extent.data() + 2 * (compact % kZeroExtent), 2);
        ++compact;
      }
    for (int slot = 0; slot < slots; ++slot) {
      const int token = view.sink + first + slot;
      if (!page) {
        continue;  // removed tokens have no logit
      } else if (spec.raw()) {
        put_raw(all, token, D, reinterpret_cast<const std::uint16_t*>(base) + slot * D);
      } else {
        for (int c = 0; c < D; ++c) {
          const int group = spec.per_token() ? c / group_channels(spec.group, D) : c;
          const int index = layout.scale_index(slot, group);
          const Dequantiser map =
              dequantiser(spec.bits, spec.mode, half_at(layout.scales_at(), index), zeros[at(index)]);
          const double code =
              value ? get_code(base, layout.codes(), c, slot) : get_code(base, layout.codes(), slot, c);
          const double scale = static_cast<double>(map.scale), offset = static_cast<double>(map.offset),
                       centre = spec.mode == Mode::kMidRise ? 0.5 * (spec.levels() - 1) : 0.5 * spec.levels();
          const bool bare = spec.dense_zeros() || spec.compact_zeros();
          const std::size_t i = at(token * D + c);
          all.x[i] = scale * code + offset;
          all.magnitude[i] = std::abs(scale) * code + std::abs(offset);
          all.level[i] = bare ? code : std::abs(code - centre);
          all.scale[i] = std::abs(scale);
        }
        const std::uint8_t* section = base + layout.outliers_at();
        const OutlierLayout rows = layout.outliers();
        const int past = spec.outliers > 0 ? outlier_start(section, rows, slot + 1) : 0;
        for (int i = spec.outliers > 0 ? outlier_start(section, rows, slot) : 0; i < past; ++i) {
          const Outlier outlier = outlier_at(section, rows, i);
          all.added[at(token * D + outlier.index)] = static_cast<double>(half_value(outlier.value));
        }
      }
    }
  }
  return all;
}

/// One KV head of a sequence, or of plain rows.
struct Head {
  const CacheConfig& config;
  const LayerScheme& scheme;
  HeadView view;
  Numbers k, v;
  std::vector<double> values;  // [tokens][D] in the model's space
  int D, parts, most_outliers = 0;

  Head(const Sequence& sequence, int layer, int kv_head)
      : Head(sequence.cache().config(), sequence.view(layer, kv_head)) {
    const PageLayout layout(scheme.k, scheme.v, D);
    k = numbers_of(view, layout.k, layout.k_at());
    v = numbers_of(view, layout.v, layout.v_at());
    values = v.x;
    std::vector<int> many(at(D));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] += v.added[i];
      v.magnitude[i] += std::abs(v.added[i]);
      if (v.added[i] != 0) most_outliers = std::max(most_outliers, ++many[i % at(D)]);
    }
    for (int j = 0; j < view.tokens; ++j)
      if (rotates(j)) hadamard(&values[at(j * D)], D, false);
  }
  /// Rows [tokens][D] of keys and values.
  Head(const CacheConfig& of, const LayerScheme& raw, int tokens, const float* keys, const float* rows)
      : Head(of, view_of(raw, tokens)) {
    k = raw_numbers(keys);
    v = raw_numbers(rows);
    values = v.x;
  }
  bool rotates(int token) const { return scheme.hadamard_v && !v.raw[at(token)]; }

 private:
  Head(const CacheConfig& of, const HeadView& seen)
      : config(of), scheme(*seen.scheme), view(seen), D(of.head_dim), parts(seen.tokens / kPageTokens + 4) {}
  static HeadView view_of(const LayerScheme& scheme, int tokens) {
    HeadView view;
    view.scheme = &scheme;
    view.tokens = tokens;
    return view;
  }
  Numbers raw_numbers(const float* rows) const {
    Numbers all;
    all.x.assign(rows, rows + view.tokens * D);
    all.raw.assign(at(view.tokens), 1);
    for (const double x : all.x) all.magnitude.push_back(std::abs(x));
    return all;
  }

 public:
  /// Bounds |R||q| and |H| lam |R||q| of the query in a block of keys, and its constant with the mean.
  struct Query {
    std::vector<double> relative, transformed;
    double constant = 0, step = 0;
  };
  Query query_in(const float* q, int block) const {
    Query in;
    for (int c = 0; c < D; ++c) in.relative.push_back(std::abs(static_cast<double>(q[c])));
    const int pairs = static_cast<int>(config.rope.theta.size());
    const double P = view.sink + static_cast<double>(block) * scheme.block_tokens;
    for (int i = 0; scheme.block_tokens > 0 && i < pairs; ++i) {
      const double angle = P * config.rope.theta[at(i)], c = std::abs(std::cos(angle)),
                   s = std::abs(std::sin(angle));
      double &a = in.relative[at(config.rope.half_layout ? i : 2 * i)],
             &b = in.relative[at(config.rope.half_layout ? i + pairs : 2 * i + 1)];
      const double x = a, y = b;
      a = x * c + y * s;
      b = y * c + x * s;
    }
    in.transformed = in.relative;
    const Basis* basis = scheme.k.raw() ? nullptr : view.basis;
    if (basis && !basis->mean.empty())
      for (int c = 0; c < D; ++c)
        in.constant += gamma(D + 30 + scheme.k.outliers) * in.relative[at(c)] *
                       std::abs(static_cast<double>(basis->mean[at(c)]));
    if (basis && !basis->lam.empty())
      for (int c = 0; c < D; ++c) in.transformed[at(c)] *= static_cast<double>(basis->lam[at(c)]);
    if (scheme.hadamard_k) hadamard(in.transformed.data(), D, true);
    for (const double x : in.transformed) in.step = std::max(in.step, x / kIntegers);
    return in;
  }

  INNERKV_UNWATCHED double logit_error(const float* q, const Query& in, int token) const {
    const double *x = &k.x[at(token * D)], *magnitude = &k.magnitude[at(token * D)],
                 *transformed = in.transformed.data();
    double products = 0, size = 0, scaling = 0, added = 0;
    for (int c = 0; c < D; ++c) {
      products += std::abs(x[c]) * (k.raw[at(token)] ? std::abs(static_cast<double>(q[c])) : transformed[c]);
      size += std::abs(x[c]);
      scaling += (transformed[c] + in.step) * magnitude[c];
      added += k.raw[at(token)] ? 0 : transformed[c] * std::abs(k.added[at(token * D + c)]);
    }
    if (k.raw[at(token)]) return gamma(D + 6) * products;
    const int groups = TensorLayout{scheme.k, false, D}.groups();
    const int outliers = scheme.k.outliers;
    return (in.step / 2 + kTiny) * size + gamma(20) * products + gamma(12 + groups + outliers) * scaling +
           gamma(22 + outliers) * added + in.constant;
  }

  /// Adds the bounds of one query row: [D], one, [tokens].
  INNERKV_UNWATCHED void bound(const float* q, const float* logits, Attended& to) const {
    const int tokens = view.tokens;
    std::vector<double> p(at(tokens)), delta(at(tokens));
    double largest = 0, top = -INFINITY, sum = 0;
    for (int j = 0; j < tokens; ++j)
      if (logits[j] > -INFINITY) {
        largest = std::max(largest, std::abs(static_cast<double>(logits[j])));
        top = std::max(top, static_cast<double>(logits[j]));
      }
    Query in;
    int block = -1, plain_values = 0;
    for (int j = 0; j < tokens; ++j) {
      if (!(logits[j] > -INFINITY)) continue;
      const int wanted = scheme.block_tokens > 0 ? std::max(0, j - view.sink) / scheme.block_tokens : 0;
      if (wanted != block) in = query_in(q, block = wanted);
      const double exponent =
          kU * (8 * (std::abs(static_cast<double>(logits[j])) + largest + 1) + 4.0 * parts);
      delta[at(j)] = static_cast<double>(config.softmax_scale) * logit_error(q, in, j) +
                     8 * kU * static_cast<double>(config.softcap) + exponent;
      p[at(j)] = std::exp(static_cast<double>(logits[j]) - top);
      sum += p[at(j)];
      plain_values += v.raw[at(j)];
    }
    std::vector<double> out(at(D)), magnitude(at(D)), stored(at(D)), rounding(at(D)), total(at(D));
    for (int j = 0; j < tokens; ++j) {
      p[at(j)] /= sum > 0 ? sum : 1;
      const double weight = p[at(j)], *x = &values[at(j * D)], *size = &v.magnitude[at(j * D)];
      double* sized = v.raw[at(j)] ? magnitude.data() : stored.data();
      for (int c = 0; c < D && weight > 0; ++c) {
        out[at(c)] += weight * x[c];
        sized[c] += weight * size[c];
      }
    }
    weight_rounding(p.data(), rounding.data());
    if (scheme.hadamard_v) {
      hadamard(stored.data(), D, true);
      hadamard(rounding.data(), D, true);
    }
    const double chain =
        gamma(kPageTokens + 2 * parts + plain_values + (most_outliers > 0 ? most_outliers + 8 : 0) + 24);
    double lse = 0;
    for (const double times : {1.0, 2.0}) {
      double growth = 0, least = 0, most = 0;
      std::vector<double> softmax(at(D));
      for (int j = 0; j < tokens; ++j) {
        if (!(p[at(j)] > 0)) continue;
        const double d = times * delta[at(j)], more = p[at(j)] * std::expm1(d), *x = &values[at(j * D)];
        growth += more;
        least += p[at(j)] * std::exp(-d);
        most = std::max(most, d);
        for (int c = 0; c < D; ++c) softmax[at(c)] += more * std::abs(x[c] - out[at(c)]);
      }
      if (!(least > 0)) break;  // nothing is visible
      lse += std::max(std::log1p(growth), -std::log(least)) + chain + kU * (std::abs(top) + std::log(tokens));
      for (int c = 0; c < D; ++c)
        total[at(c)] += softmax[at(c)] / least + std::exp(most) / least * rounding[at(c)] +
                        chain * (std::abs(out[at(c)]) + magnitude[at(c)] + stored[at(c)]);
    }
    for (int c = 0; c < D; ++c) to.out.push_back(static_cast<float>(total[at(c)]));
    to.lse.push_back(static_cast<float>(lse));
    for (int j = 0; j < tokens; ++j) to.logits.push_back(static_cast<float>(2 * delta[at(j)]));
  }

  /// Of 16-bit integer weights and of outliers summed as integers, page by page, in the stored basis.
  INNERKV_UNWATCHED void weight_rounding(const double* p, double* worst) const {
    const bool folds = scheme.v.group != Group::kTokens32;
    for (int first = 0; first < view.v_quantised; first += kPageTokens) {
      const int end = std::min(first + kPageTokens, view.v_quantised);
      for (int c = 0; c < D && !scheme.v.raw(); ++c) {
        double heaviest = 0, reach = 0;
        for (int t = first; t < end; ++t) {
          const int j = view.sink + t;
          const std::size_t i = at(j * D + c);
          const double weight = p[j] * (folds ? v.scale[i] : 1);
          heaviest = std::max(heaviest, weight);
          reach += folds ? (weight > 0 ? v.level[i] : 0) : (p[j] > 0 ? std::abs(v.x[i]) : 0);
        }
        worst[c] += (heaviest / kIntegers / 2 + kTiny) * reach;
      }
      if (scheme.v.outliers == 0) continue;
      double likeliest = 0, largest = 0;
      std::vector<int> many(at(D));
      for (int t = first; t < end; ++t) {
        const int j = view.sink + t;
        const Page* page = (*view.table)[at(first / kPageTokens)].get();
        if (!page || page->is_removed(t - first)) continue;
        likeliest = std::max(likeliest, p[j]);
        for (int c = 0; c < D; ++c) {
          largest = std::max(largest, std::abs(v.added[at(j * D + c)]));
          many[at(c)] += v.added[at(j * D + c)] != 0;
        }
      }
      for (int c = 0; c < D; ++c) worst[c] += likeliest * largest / kOutlierUnits / 2 * many[at(c)];
    }
  }
};

}  // namespace bounds

/// Of one sequence's attention; `logits`: what the CPU backend returned, [q_tokens][query_heads][tokens].
inline Attended attention_bound(const Sequence& sequence, int layer, const float* q, int q_tokens,
                                const float* logits) {
  const CacheConfig& config = sequence.cache().config();
  std::vector<bounds::Head> heads;
  heads.reserve(at(config.kv_heads));
  for (int kv = 0; kv < config.kv_heads; ++kv) heads.emplace_back(sequence, layer, kv);
  Attended all;
  const int group = config.query_heads / config.kv_heads, tokens = sequence.tokens(layer);
  for (int row = 0; row < q_tokens * config.query_heads; ++row)
    heads[at(row % config.query_heads / group)].bound(q + std::ptrdiff_t{row} * config.head_dim,
                                                      logits + std::ptrdiff_t{row} * tokens, all);
  return all;
}

/// |a - b| <= bound everywhere; equal infinities are equal.
inline bool within(const std::vector<float>& a, const std::vector<float>& b,
                   const std::vector<float>& bound) {
  if (a.size() != b.size() || a.size() != bound.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::abs(a[i] - b[i]) <= bound[i])) return false;
  return true;
}
/// Logits count if `found` has them.
inline bool within(const Attended& found, const Attended& expected, const Attended& bound) {
  return within(found.out, expected.out, bound.out) && within(found.lse, expected.lse, bound.lse) &&
         (found.logits.empty() || within(found.logits, expected.logits, bound.logits));
}

}  // namespace innerkv::test
