// Windows, statistics and appending: where each token of a sequence lives after every call, and that how the
// tokens were cut into calls leaves no trace.
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

constexpr int kPrompts[] = {0, 1, 31, 32, 33, 40, 127, 128, 129, 1000};
constexpr int kSteps = 300;

void check_exact_windows(const Sequence& sequence, const Tokens& tokens, const std::string& what) {
  const CacheConfig& config = sequence.cache().config();
  const std::size_t D = at(config.head_dim);
  for (int head = 0; head < config.kv_heads; ++head) {
    const HeadView view = sequence.view(0, head);
    const Decoded decoded = read_back(sequence, 0, head);
    bool exact = true, finite = true;
    for (int t = 0; t < view.tokens; ++t)
      for (std::size_t c = 0; c < D; ++c) {
        const std::size_t from = tokens.row * at(t) + at(head) * D + c, to = at(t) * D + c;
        const bool sunk = t < view.sink;
        if (sunk || t - view.sink >= view.k_quantised) exact &= decoded.k[to] == half_value(tokens.k[from]);
        if (sunk || t - view.sink >= view.v_quantised) exact &= decoded.v[to] == half_value(tokens.v[from]);
        finite &= std::isfinite(decoded.k[to]) && std::isfinite(decoded.v[to]);
      }
    CHECK_WITH(exact && finite, what);
  }
}

TEST(
    "tokens are sink, quantised or recent, and the recent window never shrinks below its size once it was "
    "full") {
  const TensorSpec per_token{2, Group::kToken, Mode::kMidRise}, blocks{2, Group::kTokens32, Mode::kMidRise};
  for (const TensorSpec& v : {per_token, blocks})
    for (const auto& [sink, recent] : std::vector<std::pair<int, int>>{{32, 96}, {0, 0}, {5, 1}, {0, 40}}) {
      const CacheConfig config = config_of({scheme_of(per_token, v, sink, recent)}, 64, 1);
      const Tokens tokens = tokens_of(config, 1000 + kSteps, 1);
      const auto cache = cache_of(config);
      for (const int prompt : kPrompts) {
        const auto sequence = cache->sequence();
        append(*sequence, tokens, 0, prompt);
        for (int n = prompt;; ++n) {
          const LayerState& state = sequence->layer_state(0);
          const HeadView view = sequence->view(0, 0);
          const int body = std::max(0, n - sink), flush = v.flush_tokens();
          const std::string what = "prompt " + std::to_string(prompt) + ", n " + std::to_string(n);
          CHECK_WITH(state.tokens == n && view.sink == std::min(n, sink), what);
          CHECK_WITH(state.reach.k == std::max(0, body - recent), what);
          CHECK_WITH(state.reach.v == std::max(0, body - recent) / flush * flush, what);
          for (const int quantised : {state.reach.k, state.reach.v}) {
            CHECK_WITH(body - quantised >= std::min(recent, body), what);
            CHECK_WITH(body - quantised <= recent + flush - 1 && body - quantised <= view.ring, what);
          }
          CHECK_WITH(
              static_cast<int>(state.pages[0].size()) == (std::max(state.reach.k, state.reach.v) + 127) / 128,
              what);
          CHECK_WITH(cache->pool().used_bytes() == bytes_held(*sequence), what);
          if (n % 50 == 0 || n == prompt + 3) check_exact_windows(*sequence, tokens, what);
          if (n == prompt + kSteps) break;
          append(*sequence, tokens, n, 1);
        }
      }
    }
}

TEST(
    "released windows follow InnerQ's published code: 72, 41, 10, then 0 to 31 values, and a frozen key "
    "window") {
  const CacheConfig config = config_of({released(32, 96)}, 64, 1);
  const Tokens tokens = tokens_of(config, 1000 + kSteps, 2);
  const auto cache = cache_of(config);
  for (const int prompt : kPrompts) {
    if (prompt == 0) continue;  // a prefill of nothing is no call
    const auto sequence = cache->sequence();
    append(*sequence, tokens, 0, prompt);
    const int sink = std::min(32, prompt), body = prompt - sink, middle = std::max(0, body - 96);
    // The recent values are reduced, never enlarged, until whole blocks of 32 have been taken.
    int keys = std::min(body, 96), values = body - (middle + 31) / 32 * 32;
    if (prompt == 1000) CHECK(values == 72);
    for (int n = prompt; n <= prompt + kSteps; ++n) {
      const LayerState& state = sequence->layer_state(0);
      const std::string what = "prompt " + std::to_string(prompt) + ", n " + std::to_string(n);
      CHECK_WITH(state.reach.sink == sink && n - sink - state.reach.k == keys, what);
      CHECK_WITH(n - sink - state.reach.v == values && state.reach.v % 32 == 0,
                 what + " values " + std::to_string(n - sink - state.reach.v));
      CHECK_WITH(std::max(keys, values) <= sequence->view(0, 0).ring, what);
      if (prompt == 1000 && n == 1001) CHECK(values == 41);
      if (prompt == 1000 && n == 1002) CHECK(values == 10);
      if (prompt == 1000 && n > 1002) CHECK(values >= 0 && values <= 31);
      if (n % 50 == 0 || n == prompt + 3) check_exact_windows(*sequence, tokens, what);
      if (n == prompt + kSteps) break;
      append(*sequence, tokens, n, 1);
      if (++values >= 32)
        values -= 32;  // append one, pop 32 when there are that many; keys pop the one they got
    }
  }
}

TEST(
    "nothing is quantised before statTokens tokens are in, and the statistics are those of exactly these "
    "tokens") {
  for (const auto& [sink, recent, stats] : std::vector<std::array<int, 3>>{
           {4, 8, 48}, {32, 96, 160}, {0, 0, 1}, {0, 0, 64}, {40, 0, 20}, {2, 64, 33}}) {
    const CacheConfig config = config_of({innerq(sink, recent, stats)});
    const Tokens tokens = tokens_of(config, 420, 3);
    const auto cache = cache_of(config);
    const std::size_t D = at(config.head_dim);
    for (const int prompt : {1, stats - 1, stats, stats + 1, 200}) {
      if (prompt < 1) continue;
      const auto sequence = cache->sequence();
      append(*sequence, tokens, 0, prompt);
      for (int n = prompt; n < prompt + 200; append(*sequence, tokens, n++, 1)) {
        const LayerState& state = sequence->layer_state(0);
        const int body = n < stats ? 0 : std::max(0, n - sink - recent);
        const std::string what = "statTokens " + std::to_string(stats) + ", n " + std::to_string(n);
        CHECK_WITH(state.reach.k == body && state.reach.v == body / 32 * 32, what);
        CHECK_WITH((state.online != nullptr) == (body > 0), what);
        CHECK_WITH(n - sink - state.reach.v <= sequence->view(0, 0).ring, what);
        if (n % 64 == 0) check_exact_windows(*sequence, tokens, what);
      }
      for (int head = 0; head < config.kv_heads; ++head) {
        const Basis& basis = *sequence->view(0, head).basis;
        bool same = true;
        for (std::size_t c = 0; c < D; ++c) {
          float sum = 0, largest = 0;
          for (int t = 0; t < stats; ++t) {
            const float key = half_value(tokens.k[tokens.row * at(t) + at(head) * D + c]);
            sum += key;
            largest = std::max(largest, std::abs(key));
          }
          const float lam = std::max(std::sqrt(largest), 0x1p-10f);
          same &= basis.mean[c] == sum / static_cast<float>(stats) && basis.lam[c] == lam &&
                  basis.inv_lam[c] == 1.0f / lam;
        }
        CHECK(same);
      }
    }
  }
}

TEST("one call, one call per token, and any cut between them leave identical bits in pages and windows") {
  check::Random random(4);
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 330, 5);
    const auto cache = cache_of(family.config, 2);
    for (const int n : {1, 5, 12, 44, 45, 140, 172, 330}) {
      // The released windows depend on the prefill by design: it stays one call, what follows may be cut.
      const int prefill = family.scheme().released_windows ? std::min(n, 60) : 0;
      std::vector<Bytes> all, pages;
      std::vector<std::vector<float>> outputs;
      for (int way = 0; way < 6; ++way) {
        const auto sequence = cache->sequence();
        append(*sequence, tokens, 0, prefill);
        for (int t = prefill; t < n;) {
          const int count = way == 0   ? n - t
                            : way == 1 ? 1
                                       : std::min(n - t, 1 + random.below(way == 2 ? 200 : 40));
          append(*sequence, tokens, t, count);
          t += count;
        }
        append(*sequence, tokens, 0, 0);  // nothing is nothing
        all.push_back(contents(*sequence));
        pages.push_back(raw_pages(*sequence));
        outputs.push_back(attended(*sequence));
        CHECK(cache->pool().used_bytes() == bytes_held(*sequence));
        CHECK_WITH(all.back() == all.front() && pages.back() == pages.front(),
                   family.name + std::string(", n ") + std::to_string(n));
        CHECK_WITH(same_bits(outputs.back(), outputs.front()), family.name);
      }
    }
  }
}

TEST(
    "unused slots of a page hold zero bits, and removing nothing or truncating beyond the end changes "
    "nothing") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 200, 6);
    const auto cache = cache_of(family.config);
    const auto sequence = filled(cache, tokens, 200);
    const LayerState& state = sequence->layer_state(0);
    const PageLayout layout(family.scheme().k, family.scheme().v, family.config.head_dim);
    const Page& page = *state.pages[0].back();
    const int index = static_cast<int>(state.pages[0].size()) - 1;
    for (const TensorLayout& t : {layout.k, layout.v}) {
      const std::uint8_t* base = page.bytes.data() + (t.value ? layout.v_at() : layout.k_at());
      const int slots = stored_slots(t.value ? state.reach.v : state.reach.k, index);
      int used = 0;
      for (int slot = slots; slot < kPageTokens; ++slot) {
        for (int c = 0; c < t.head_dim; ++c)
          used += t.spec.raw() ? base[2 * (slot * t.head_dim + c)] | base[2 * (slot * t.head_dim + c) + 1]
                               : static_cast<int>(t.value ? get_code(base, t.codes(), c, slot)
                                                          : get_code(base, t.codes(), slot, c));
        for (int g = 0; g < t.groups() && !t.spec.raw(); ++g)
          used += base[t.scales_at() + at(2 * t.scale_index(slot, g))];
        for (int i = 0; i < t.spec.outliers; ++i) {
          const Outlier outlier =
              outlier_at(base + t.outliers_at(), t.outliers(), slot * t.spec.outliers + i);
          used +=
              outlier.index + outlier.value + outlier_start(base + t.outliers_at(), t.outliers(), slot + 1);
        }
      }
      CHECK_WITH(used == 0, family.name);
    }
    const Bytes before = contents(*sequence);
    sequence->truncate(200);
    sequence->truncate(5000);
    if (family.editable()) sequence->remove(0, -1, {});
    CHECK(contents(*sequence) == before);
  }
}

TEST("a layer, head or count that does not exist is refused and changes nothing") {
  const Family family = families().front();
  const Tokens tokens = tokens_of(family.config, 150, 7);
  const auto cache = cache_of(family.config);
  const auto sequence = filled(cache, tokens, 150);
  const Bytes before = contents(*sequence);
  const int bad = static_cast<int>(ErrorCode::kInvalidArgument), position = 20;
  std::vector<float> out(150 * 64);
  CHECK(error_of([&] { append(*sequence, tokens, 0, 1, 1); }) == bad);
  CHECK(error_of([&] { append(*sequence, tokens, 0, 1, -1); }) == bad);
  CHECK(error_of([&] { append(*sequence, tokens, 0, -1); }) == bad);
  CHECK(error_of([&] { append(*sequence, tokens, 0, 0x7fffffff); }) == bad);
  CHECK(error_of([&] { sequence->truncate(-1); }) == bad);
  CHECK(error_of([&] { sequence->read_back(0, 2, out.data(), out.data()); }) == bad);
  CHECK(error_of([&] { sequence->read_back(0, -1, out.data(), out.data()); }) == bad);
  CHECK(error_of([&] { sequence->remove(0, 2, std::span(&position, 1)); }) == bad);
  CHECK(error_of([&] { sequence->remove(0, -2, std::span(&position, 1)); }) == bad);
  CHECK(error_of([&] { check_attend(*sequence, 0, 151, true); }) == bad);
  CHECK(error_of([&] { check_attend(*sequence, 0, 0, true); }) == bad);
  CHECK(error_of([&] { check_attend(*sequence, 1, 1, true); }) == bad);
  CHECK(contents(*sequence) == before);
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("sequence", argc, argv); }
