// Sequences with queries to them on the CPU backend and on the GPU backend under test, and whether both say
// the same.
#pragma once

#include <memory>
#include <vector>

#include "attention_bound.h"
#include "simt/gpu_under_test.h"
#include "support.h"

namespace innerkv::test {

inline std::shared_ptr<Cache> gpu_cache(const CacheConfig& config) {
  return std::make_shared<Cache>(gpu_backend(), config);
}

/// contents() of a sequence whose pages and windows are on the device: its file holds the same.
inline Bytes stored(const Sequence& sequence) { return saved(sequence); }

/// A sequence and queries to it.
struct Job {
  std::unique_ptr<Sequence> sequence;
  std::vector<float> q;
};

inline void add_queries(const CacheConfig& config, int q_tokens, check::Random& random, Job& a, Job& b) {
  std::vector<float> q(at(q_tokens * config.query_heads * config.head_dim));
  for (float& x : q) x = random.normal();
  a.q = b.q = q;
}

/// All jobs in one call.
inline std::vector<Attended> attended_batch(const std::vector<Job>& jobs, int q_tokens, bool causal,
                                            bool logits) {
  Cache& cache = jobs[0].sequence->cache();
  std::vector<Attended> results;
  std::vector<BatchItem> items;
  for (const Job& job : jobs) {
    const std::size_t rows = at(cache.config().query_heads * q_tokens);
    results.push_back({std::vector<float>(job.q.size()), std::vector<float>(rows),
                       std::vector<float>(logits ? rows * at(job.sequence->tokens(0)) : 0)});
  }
  for (std::size_t i = 0; i < jobs.size(); ++i)
    items.push_back({jobs[i].sequence.get(), jobs[i].q.data(), results[i].out.data(), results[i].lse.data(),
                     logits ? results[i].logits.data() : nullptr, q_tokens});
  CHECK(attend_batch(cache, 0, items, causal, nullptr));
  return results;
}

/// The jobs of `cpu` and the same ones of `gpu` give results whose difference is explained.
inline bool agree(const std::vector<Job>& cpu, const std::vector<Job>& gpu, int q_tokens, bool causal,
                  bool logits = true) {
  const auto expected = attended_batch(cpu, q_tokens, causal, true),
             found = attended_batch(gpu, q_tokens, causal, logits);
  bool all = true;
  for (std::size_t i = 0; i < cpu.size(); ++i)
    all &= within(found[i], expected[i],
                  attention_bound(*cpu[i].sequence, 0, cpu[i].q.data(), q_tokens, expected[i].logits.data()));
  return all;
}

}  // namespace innerkv::test
