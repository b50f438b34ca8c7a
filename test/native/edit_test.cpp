// Forks share pages and never see each other's changes; truncation, replacement and removal do what they say
// to the tokens they name, leave every other token's bits alone, and give memory back.
#include <numeric>
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

std::vector<int> range(int first, int end) {
  std::vector<int> numbers(at(std::max(0, end - first)));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

TEST(
    "a fork costs its windows only, and neither side sees what the other appends, truncates, replaces or "
    "removes") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 300, 1), others = tokens_of(family.config, 300, 2);
    const auto cache = cache_of(family.config);
    for (const int n : {3, 40, 160, 175}) {
      auto sequence = filled(cache, tokens, n);
      const std::size_t alone = cache->pool().used_bytes();
      const Bytes before = contents(*sequence);
      const std::vector<float> output = attended(*sequence);
      for (const bool other_way : {false, true}) {
        auto fork = sequence->fork();
        CHECK(cache->pool().used_bytes() == alone + family.config.window_bytes(family.scheme()));
        CHECK(contents(*fork) == before && same_bits(attended(*fork), output));
        Sequence &changed = other_way ? *sequence : *fork, &kept = other_way ? *fork : *sequence;
        append(changed, others, 0, 90);
        CHECK_WITH(contents(kept) == before && same_bits(attended(kept), output), family.name);
        if (family.editable() && n > 100) {
          changed.replace(0, 20, others.k.data(), others.v.data());
          changed.remove(0, 0, range(30, 60));
          CHECK_WITH(contents(kept) == before && same_bits(attended(kept), output), family.name);
        }
        changed.truncate(n / 2);
        append(changed, others, 100, 30);
        CHECK_WITH(contents(kept) == before && same_bits(attended(kept), output), family.name);
        if (other_way) sequence = std::move(fork);  // the untouched one goes on
      }
      CHECK(cache->pool().used_bytes() == alone);
    }
    // A chain of forks that each go their own way equals sequences that were never forked.
    std::vector<std::unique_ptr<Sequence>> chain;
    chain.push_back(filled(cache, tokens, 60));
    for (int i = 1; i < 5; ++i) {
      chain.push_back(chain.back()->fork());
      append(*chain.back(), tokens, 60 * i, 60);
    }
    for (int i = 0; i < 5; ++i) {
      const auto fresh = filled(cache, tokens, 60);
      for (int j = 1; j <= i; ++j) append(*fresh, tokens, 60 * j, 60);
      CHECK_WITH(contents(*chain[at(i)]) == contents(*fresh), family.name);
    }
    chain.clear();
    CHECK(cache->pool().used_bytes() == 0);
  }
}

TEST("truncation keeps the bits of what stays, and what follows is as if the rest had never been") {
  for (const Family& family : families()) {
    const LayerScheme& scheme = family.scheme();
    const Tokens tokens = tokens_of(family.config, 330, 3);
    const auto cache = cache_of(family.config);
    const int n = 300, flush = scheme.v.flush_tokens(), D = family.config.head_dim;
    const auto sequence = filled(cache, tokens, n);
    const Decoded full = read_back(*sequence, 0, 1);
    const Reach old = sequence->layer_state(0).reach;
    for (const int left :
         {299, 291, 288, 287, 260, 164, 163, 140, 133, 132, 131, 100, 37, 36, 35, 5, 4, 3, 1, 0}) {
      const std::string what = std::string(family.name) + " cut to " + std::to_string(left);
      const auto cut = sequence->fork();
      cut->truncate(left);
      const LayerState& state = cut->layer_state(0);
      const int sink = std::min(scheme.sink, left), body = left - sink;
      CHECK_WITH(cut->tokens(0) == left && state.reach.k == std::min(old.k, body), what);
      CHECK_WITH(state.reach.v == (old.v > body ? body / flush * flush : old.v), what);
      CHECK(static_cast<int>(state.pages[0].size()) == (std::max(state.reach.k, state.reach.v) + 127) / 128);
      const Decoded kept = read_back(*cut, 0, 1);
      // Values whose block was cut return to 16 bits as what they decoded to; everything else is untouched.
      bool same = true;
      for (int i = 0; i < left * D; ++i) {
        const int t = i / D - sink;
        const bool melted = old.v > body && t >= state.reach.v;
        same &= kept.k[at(i)] == full.k[at(i)] &&
                kept.v[at(i)] == (melted ? round_half(full.v[at(i)]) : full.v[at(i)]);
      }
      CHECK_WITH(same, what);
      // Append the same tokens again.
      const bool lossless = old.v <= body || body % flush == 0;
      if (lossless && !(scheme.released_windows && left > 0)) {
        append(*cut, tokens, left, 330 - left);
        const auto fresh = filled(cache, tokens, 330);
        CHECK_WITH(contents(*cut) == contents(*fresh), what);
        CHECK_WITH(same_bits(attended(*cut), attended(*fresh)), what);
      } else if (left > 0) {
        append(*cut, tokens, left, 30);
        CHECK_WITH(std::isfinite(attended(*cut)[0]) && cut->tokens(0) == left + 30, what);
      }
    }
    CHECK(same_bits(read_back(*sequence, 0, 1).k, full.k));
    sequence->truncate(0);
    CHECK_WITH(cache->pool().used_bytes() == family.config.window_bytes(scheme), family.name);
  }
}

TEST("a replaced token is as if it had been appended so, and its neighbours keep their bits") {
  for (const Family& family : families()) {
    const auto cache = cache_of(family.config);
    Tokens tokens = tokens_of(family.config, 300, 4), others = tokens_of(family.config, 1, 5);
    const auto sequence = filled(cache, tokens, 300);
    const Bytes before = contents(*sequence);
    const auto replace = [&](int position) {
      sequence->replace(0, position, others.k.data(), others.v.data());
    };
    if (!family.editable()) {
      CHECK(error_of([&] { replace(100); }) == static_cast<int>(ErrorCode::kUnsupported));
      CHECK(contents(*sequence) == before);
      continue;
    }
    const int quantised = sequence->layer_state(0).reach.k;
    for (const int position : {-1, 0, 3, 4 + quantised, 299, 300})  // windows are not for replacing
      CHECK(error_of([&] { replace(position); }) == static_cast<int>(ErrorCode::kInvalidArgument));
    CHECK(contents(*sequence) == before);
    const auto fork = sequence->fork();
    for (const int position : {4, 131, 132, 3 + quantised}) {
      replace(position);
      std::copy(others.k.begin(), others.k.end(),
                tokens.k.begin() + static_cast<std::ptrdiff_t>(tokens.row) * position);
      std::copy(others.v.begin(), others.v.end(),
                tokens.v.begin() + static_cast<std::ptrdiff_t>(tokens.row) * position);
    }
    const auto fresh = filled(cache, tokens, 300);
    CHECK_WITH(contents(*sequence) == contents(*fresh) && raw_pages(*sequence) == raw_pages(*fresh),
               family.name);
    CHECK(contents(*fork) == before);
    sequence->remove(0, 1, range(50, 51));
    CHECK(error_of([&] { replace(50); }) == static_cast<int>(ErrorCode::kInvalidArgument));
  }
}

/// Logits of the removed tokens of `head` are -inf and its other tokens decode as before.
void check_removed(const Sequence& sequence, int head, const std::vector<int>& removed, const Decoded& before,
                   const std::string& what) {
  const CacheConfig& config = sequence.cache().config();
  const int D = config.head_dim, n = sequence.tokens(0), group = config.group_size();
  const Decoded now = read_back(sequence, 0, head);
  const std::vector<float> output = attended(sequence);
  const float* logits = output.data() + at(config.query_heads * (D + 1));
  std::vector<bool> gone(at(n));
  for (const int position : removed) gone[at(position)] = true;
  bool right = true;
  for (int t = 0; t < n; ++t) {
    for (int c = 0; c < D; ++c) {
      const std::size_t i = at(t * D + c);
      if (gone[at(t)])
        right &= std::isnan(now.k[i]) && std::isnan(now.v[i]);
      else if (i < before.k.size())
        right &= now.k[i] == before.k[i] && now.v[i] == before.v[i];
      else
        right &= std::isfinite(now.k[i]) && std::isfinite(now.v[i]);
    }
    for (int q = head * group; q < (head + 1) * group; ++q)
      right &= std::isinf(logits[q * n + t]) == gone[at(t)];
  }
  for (int i = 0; i < config.query_heads * D; ++i) right &= std::isfinite(output[at(i)]);
  CHECK_WITH(right, what);
}

TEST("removed tokens are seen by nobody, in one head or all, and empty pages go back to the pool") {
  for (const Family& family : families()) {
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 300, 6);
    const auto sequence = filled(cache, tokens, 300);
    const Bytes before = contents(*sequence);
    if (!family.editable()) {
      CHECK(error_of([&] { sequence->remove(0, -1, range(50, 60)); }) ==
            static_cast<int>(ErrorCode::kUnsupported));
      CHECK(contents(*sequence) == before);
      continue;
    }
    const int sink = family.scheme().sink, reach = sequence->layer_state(0).reach.k;
    const std::size_t full = cache->pool().used_bytes();
    const std::size_t page = PageLayout(family.scheme().k, family.scheme().v, family.config.head_dim).bytes();
    for (const std::vector<int>& bad :
         {std::vector<int>{50, sink - 1}, {50, sink + reach}, {50, -1}, {50, 1000}}) {
      CHECK(error_of([&] { sequence->remove(0, -1, bad); }) == static_cast<int>(ErrorCode::kInvalidArgument));
      CHECK(contents(*sequence) == before);
    }
    const Decoded one = read_back(*sequence, 0, 0), two = read_back(*sequence, 0, 1);
    std::vector<int> gone = {sink, 50,         50,         49,
                             131,  sink + 127, sink + 128, sink + reach - 1};  // any order, repeats
    sequence->remove(0, 1, gone);
    check_removed(*sequence, 1, gone, two, family.name);
    check_removed(*sequence, 0, {}, one, family.name);
    CHECK(sequence->layer_state(0).removed == 6 && cache->pool().used_bytes() == full);
    const auto fork = sequence->fork();
    const Bytes forked = contents(*fork);
    sequence->remove(0, -1, range(sink, sink + 128));  // the first page, in both heads
    CHECK(contents(*fork) == forked);
    CHECK(sequence->layer_state(0).pages[0][0] == nullptr && sequence->layer_state(0).pages[1][0] == nullptr);
    CHECK(sequence->layer_state(0).removed == 256 + 2);
    check_removed(*sequence, 0, range(sink, sink + 128), one, family.name);
    sequence->remove(0, -1, range(sink, sink + 128));  // again: nothing left to do
    CHECK(sequence->layer_state(0).removed == 256 + 2);
    CHECK(error_of([&] { sequence->replace(0, sink + 5, tokens.k.data(), tokens.v.data()); }) ==
          static_cast<int>(ErrorCode::kInvalidArgument));
    fork->truncate(0);
    CHECK_WITH(cache->pool().used_bytes() == bytes_held(*sequence) + bytes_held(*fork), family.name);
    CHECK(bytes_held(*sequence) == full - 2 * page);
    // Removal in a page that is still filling: later tokens are not affected.
    std::vector<int> later = range(sink, sink + 128);
    for (const int t : range(sink + 128, sink + reach)) later.push_back(t);
    sequence->remove(0, 0, range(sink + 128, sink + reach));
    append(*sequence, tokens, 0, 100);
    const std::ptrdiff_t stored =
        std::ptrdiff_t{sink + reach} * family.config.head_dim;  // the rest is rounded by now
    check_removed(*sequence, 0, later,
                  {{one.k.begin(), one.k.begin() + stored}, {one.v.begin(), one.v.begin() + stored}},
                  family.name);
  }
}

TEST("a removed token stays removed when its empty page is truncated and filled again") {
  for (const Family& family : families()) {
    if (!family.editable()) continue;
    const auto cache = cache_of(family.config);
    const Tokens tokens = tokens_of(family.config, 300, 7);
    const int sink = family.scheme().sink;
    for (const int left : {sink + 1, sink + 60, sink + 127, sink + 128, sink + 129}) {
      const auto sequence = filled(cache, tokens, 300);
      const Decoded one = read_back(*sequence, 0, 0), two = read_back(*sequence, 0, 1);
      sequence->remove(0, 0, range(sink, sink + 128));
      sequence->remove(0, 1, range(sink + 10, sink + 20));
      sequence->truncate(left);
      const std::string what = family.name + std::string(" cut to ") + std::to_string(left);
      const auto check = [&](const Sequence& s) {
        const std::vector<int> first = range(sink, std::min(left, sink + 128)),
                               second = range(std::min(left, sink + 10), std::min(left, sink + 20));
        check_removed(s, 0, first, {}, what);
        check_removed(s, 1, second, {}, what);
        CHECK_WITH(s.layer_state(0).removed == first.size() + second.size(), what);
      };
      check(*sequence);
      CHECK_WITH(contents(*loaded(cache, saved(*sequence))) == contents(*sequence), what);
      append(*sequence, tokens, left, 300 - left);
      check(*sequence);
      CHECK_WITH(contents(*loaded(cache, saved(*sequence))) == contents(*sequence), what);
      // The tokens that were not removed are as ever.
      const Decoded now = read_back(*sequence, 0, 0);
      for (int i = left * family.config.head_dim; i < 300 * family.config.head_dim; ++i)
        if (!std::isnan(now.k[at(i)])) CHECK(now.k[at(i)] == one.k[at(i)] && now.v[at(i)] == one.v[at(i)]);
    }
    CHECK(cache->pool().used_bytes() == 0);
  }
}

TEST(
    "truncating a short prompt of the released windows below its sink leaves a sequence that can be saved "
    "and go on") {
  const CacheConfig config = config_of({released(32, 96)});
  const auto cache = cache_of(config);
  const Tokens tokens = tokens_of(config, 300, 8);
  const auto sequence = filled(cache, tokens, 20);
  sequence->truncate(10);
  CHECK(contents(*sequence) == contents(*filled(cache, tokens, 10)));
  CHECK(contents(*loaded(cache, saved(*sequence))) == contents(*sequence));
  for (int t = 10; t < 200; ++t) append(*sequence, tokens, t, 1);
  CHECK(contents(*loaded(cache, saved(*sequence))) == contents(*sequence));
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("edit", argc, argv); }
