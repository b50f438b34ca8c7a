// Attention in float64 over given keys and values, and how far a kernel may be from it. The bounds follow
// test/reference/tolerance.ts; what is 0 there and not here is the rounding of operands to 16 bits.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"

namespace innerkv::test {

/// One KV head as float64, in the space of the input.
struct ReferenceTokens {
  std::vector<std::vector<double>> k, v;  // [tokens][D]
  std::vector<bool> removed;              // [tokens]
};

struct ReferenceRules {
  double scale = 1, softcap = 0;
  int window = 0;
  bool causal = true;
  double operand = 0;  // relative error of each query number and each weight: of a 16-bit operand
  double stored = 0;   // relative error of each key and value number on its way to the operand
  double decoded = 0;  // absolute error of the same, in units of the row's Euclidean norm
};

struct ReferenceRow {
  std::vector<double> out, out_bound;        // [D]
  std::vector<double> logits, logits_bound;  // [tokens], -infinity where masked
  double lse = 0, lse_bound = 0;
};

inline constexpr double kUnit = 0x1p-24;
inline double gamma_of(double k) { return k * kUnit / (1 - k * kUnit); }

/// Query row `q` [D] of query token `query` of `queries`.
inline ReferenceRow reference_row(const float* q, const ReferenceTokens& tokens, const ReferenceRules& rules,
                                  int query, int queries) {
  const std::size_t D = tokens.k[0].size(), count = tokens.k.size();
  const double infinity = std::numeric_limits<double>::infinity();
  ReferenceRow row{std::vector<double>(D),
                   std::vector<double>(D),
                   std::vector<double>(count, -infinity),
                   std::vector<double>(count),
                   -infinity,
                   0};
  const int end = rules.causal ? static_cast<int>(count) - queries + query + 1 : static_cast<int>(count);
  const int begin = rules.window > 0 ? std::max(0, end - rules.window) : 0;
  double largest = -infinity, magnitude = 0, largest_q = 0;
  for (std::size_t c = 0; c < D; ++c) largest_q = std::max(largest_q, std::abs(double{q[c]}));
  std::vector<double> errors(count);
  std::vector<std::size_t> visible;
  for (int t = begin; t < end; ++t) {
    const auto j = static_cast<std::size_t>(t);
    if (tokens.removed[j]) continue;
    visible.push_back(j);
    double dot = 0, sizes = 0, keys = 0, squares = 0, queries_sum = 0;
    for (std::size_t c = 0; c < D; ++c) {
      dot += double{q[c]} * tokens.k[j][c];
      sizes += std::abs(q[c] * tokens.k[j][c]);
      keys += std::abs(tokens.k[j][c]);
      squares += tokens.k[j][c] * tokens.k[j][c];
      queries_sum += std::abs(double{q[c]});
    }
    double logit = rules.scale * dot;
    if (rules.softcap > 0) logit = rules.softcap * std::tanh(logit / rules.softcap);
    row.logits[j] = logit;
    largest = std::max(largest, logit);
    magnitude = std::max(magnitude, std::abs(logit));
    // Each product has one rounded query and one rounded key; the sum is taken 16 at a time, each product
    // cut off against the largest of 17 numbers.
    errors[j] =
        rules.scale *
        (((1 + rules.operand) * (1 + rules.stored) - 1 + gamma_of(17.0 / 16 * static_cast<double>(D) + 8)) *
             sizes +
         0x1p-37 * largest_q * keys);
  }
  const double parts = static_cast<double>(count) / 16 + 3;  // running maxima: every 16 tokens at most
  double total = 0, growth = 0, least = 0;
  for (const std::size_t j : visible) {
    row.logits_bound[j] = errors[j] + 8 * kUnit * rules.softcap +
                          kUnit * (8 * (std::abs(row.logits[j]) + magnitude + 1) + 4 * parts);
    total += std::exp(row.logits[j] - largest);
  }
  if (visible.empty()) return row;
  std::vector<double> p(count);
  double tiny = 0, decoding = 0;
  for (const std::size_t j : visible) {
    p[j] = std::exp(row.logits[j] - largest) / total;
    growth += p[j] * std::expm1(row.logits_bound[j]);
    least += p[j] * std::exp(-row.logits_bound[j]);
    double squares = 0;
    for (std::size_t c = 0; c < D; ++c) {
      row.out[c] += p[j] * tokens.v[j][c];
      squares += tokens.v[j][c] * tokens.v[j][c];
    }
    decoding += rules.decoded * p[j] * std::sqrt(squares);
  }
  const double sums = gamma_of(17.0 / 16 * static_cast<double>(visible.size()) + 2 * parts + 64);
  row.lse = largest + std::log(total);
  row.lse_bound = std::max(std::log1p(growth), -std::log(least)) + sums + kUnit * (std::abs(row.lse) + 1);
  for (std::size_t c = 0; c < D; ++c) {
    double spread = 0, sizes = 0;
    tiny = 0;
    for (const std::size_t j : visible) {
      spread += std::expm1(row.logits_bound[j]) * p[j] * std::abs(tokens.v[j][c] - row.out[c]);
      sizes += p[j] * std::abs(tokens.v[j][c]);
      tiny += 0x1p-38 * std::abs(tokens.v[j][c]) / total;
    }
    row.out_bound[c] = spread / least +
                       std::exp(growth) * ((1 + rules.operand) * (1 + rules.stored) - 1) * sizes + tiny +
                       sums * (std::abs(row.out[c]) + sizes);
  }
  return row;
}

/// Empty, or what leaves its bound. `logits` may be null.
inline std::string difference(const ReferenceRow& row, const float* out, float lse, const float* logits,
                              double* worst = nullptr) {
  const auto beyond = [&](double found, double wanted, double bound) {
    if (found == wanted) return false;  // infinities too
    if (worst && bound > 0) *worst = std::max(*worst, std::abs(found - wanted) / bound);
    return !(std::abs(found - wanted) <= bound);
  };
  const auto text = [](const char* what, std::size_t i, double found, double wanted, double bound) {
    return std::string(what) + " " + std::to_string(i) + ": " + std::to_string(found) + ", not " +
           std::to_string(wanted) + " within " + std::to_string(bound);
  };
  for (std::size_t c = 0; c < row.out.size(); ++c)
    if (beyond(double{out[c]}, row.out[c], row.out_bound[c]))
      return text("out", c, double{out[c]}, row.out[c], row.out_bound[c]);
  if (beyond(double{lse}, row.lse, row.lse_bound)) return text("lse", 0, double{lse}, row.lse, row.lse_bound);
  for (std::size_t j = 0; logits && j < row.logits.size(); ++j)
    if (beyond(double{logits[j]}, row.logits[j], row.logits_bound[j]))
      return text("logit", j, double{logits[j]}, row.logits[j], row.logits_bound[j]);
  return "";
}

}  // namespace innerkv::test
