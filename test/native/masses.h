// Attention masses against the logits and log-sum-exps of the same attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "check.h"
#include "core/sequence.h"

namespace innerkv::test {

/// Of the query at once and, if `cut`, of its tokens one by one. `item` was attended to with these results.
inline void check_masses(Cache& cache, BatchItem item, const std::vector<float>& logits,
                         const std::vector<float>& lse, bool cut, const std::string& name) {
  const CacheConfig& config = cache.config();
  const std::size_t n = static_cast<std::size_t>(item.sequence->tokens(0)),
                    heads = static_cast<std::size_t>(config.query_heads),
                    group = static_cast<std::size_t>(config.group_size());
  std::vector<double> expected(heads / group * n), allowed(expected.size());
  for (std::size_t row = 0; row < lse.size(); ++row)
    for (std::size_t t = 0; t < n; ++t) {
      const double logit = static_cast<double>(logits[row * n + t]), sum = static_cast<double>(lse[row]);
      const double p = std::exp(logit - sum);
      const std::size_t at = row % heads / group * n + t;
      expected[at] += p;
      // Logit and lse are rounded twice each on their way out, their difference twice, 2^x is off by 2^-22,
      // and the rows are added up.
      const double u = std::ldexp(1.0, -24), rows = static_cast<double>(lse.size());
      if (p > 0) allowed[at] += p * u * (3 * std::abs(logit) + 5 * std::abs(sum) + 2 + 4 + rows);
      allowed[at] += std::ldexp(1.0, -126);  // smaller ones are 0
    }
  const std::vector<float> out(item.out.data,
                               item.out.data + lse.size() * static_cast<std::size_t>(config.head_dim));
  item.logits = nullptr;
  for (const bool in_parts : {false, true}) {
    if (in_parts && !cut) continue;
    std::vector<float> mass(expected.size(), NAN);
    item.mass = mass.data();
    std::fill_n(item.out.data, out.size(), NAN);
    CHECK(attend_batch(cache, 0, std::span(&item, 1), true, nullptr, in_parts ? 1 : kMassNumbers));
    bool right = true;
    for (std::size_t i = 0; i < mass.size(); ++i)
      right &= std::abs(static_cast<double>(mass[i]) - expected[i]) <= allowed[i];
    CHECK_WITH(right, name + ": masses");
    // How many rows go together may change the order of a sum, so parts need not have the same bits.
    CHECK_WITH(in_parts || std::equal(out.begin(), out.end(), item.out.data),
               name + ": output beside masses");
  }
}

}  // namespace innerkv::test
