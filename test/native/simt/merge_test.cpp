// The merge kernel against float64, for every head_dim, in every order of threads.
#include "cuda/merge.cu"

#include <algorithm>
#include <string>

#include "check.h"
#include "simt/buffer.h"

namespace innerkv {
namespace {

using simt::Buffer;

constexpr double kUnit = 0x1p-24;  // half an ulp of float32, relative
constexpr float kNone = -INFINITY;

struct Problem {
  int head_dim, splits, rows, rotated;
  double spread;  // of the maxima, in units of log2
  std::size_t at(int split, int row) const { return static_cast<std::size_t>(split * rows + row); }
  std::size_t width() const { return static_cast<std::size_t>(head_dim); }
};

struct Input {
  std::vector<float> partial;
  std::vector<float2> state;
};

/// Row 1 has no tokens at all, and every fifth split has none.
Input random_input(const Problem& p, std::uint64_t seed) {
  check::Random random(seed);
  Input in;
  for (int s = 0; s < p.splits; ++s)
    for (int r = 0; r < p.rows; ++r) {
      const bool empty = r == 1 || (s + r) % 5 == 4;
      in.state.push_back(empty ? float2{kNone, 0.0f}
                               : float2{static_cast<float>(p.spread * random.normal()),
                                        static_cast<float>(1 + 100 * random.uniform())});
      for (int c = 0; c < p.head_dim; ++c) in.partial.push_back(random.normal() * in.state.back().y);
    }
  return in;
}

/// Sylvester's matrices by their definition: the sign is the parity of the common bits.
double hadamard_sign(int i, int j) {
  return __builtin_popcount(static_cast<unsigned>(i & j)) % 2 ? -1.0 : 1.0;
}

struct Expected {
  std::vector<double> out, bound;
  double lse = -INFINITY, lse_bound = 0;
};

/// float64 result of one row, and the most that float32 roundings in any order of the splits can move it.
Expected merged(const Problem& p, const Input& in, int row) {
  Expected expected{std::vector<double>(p.width()), std::vector<double>(p.width())};
  double largest = -INFINITY;
  for (int s = 0; s < p.splits; ++s)
    largest = std::max(largest, static_cast<double>(in.state[p.at(s, row)].x));
  if (largest == -INFINITY) return expected;
  std::vector<double> sums[2], size[2], error[2];  // raw, rotated
  for (auto* all : {sums, size, error}) all[0] = all[1] = std::vector<double>(p.width());
  double total = 0, total_error = 0;
  const double adding = (p.splits + 2) * kUnit;
  for (int s = 0; s < p.splits; ++s) {
    const float2 state = in.state[p.at(s, row)];
    if (!(state.y > 0)) continue;
    const double gap = static_cast<double>(state.x) - largest, weight = std::exp2(gap);
    if (weight < 0x1p-126) continue;  // ex2 flushes it, see below
    const double relative = 0x1p-22 + std::fabs(gap) * 0.7 * kUnit + adding;
    total += weight * static_cast<double>(state.y);
    total_error += weight * static_cast<double>(state.y) * relative;
    const int basis = s < p.rotated;
    for (std::size_t c = 0; c < p.width(); ++c) {
      const double term = weight * static_cast<double>(in.partial[p.at(s, row) * p.width() + c]);
      sums[basis][c] += term;
      size[basis][c] += std::fabs(term);
      error[basis][c] += std::fabs(term) * relative;
    }
  }
  for (int first = 0; first < p.head_dim;) {
    int n = 1;
    while (2 * n <= p.head_dim - first) n *= 2;
    const double norm = 1 / std::sqrt(static_cast<double>(n)), rounding = (std::log2(n) + 2) * kUnit;
    for (int i = 0; i < n; ++i) {
      double turned = 0, bound = 0;
      for (int j = 0; j < n; ++j) {
        const auto c = static_cast<std::size_t>(first + j);
        turned += norm * hadamard_sign(i, j) * sums[1][c];
        bound += norm * (error[1][c] + rounding * size[1][c]);
      }
      const auto c = static_cast<std::size_t>(first + i);
      const double value = (turned + sums[0][c]) / total;
      expected.out[c] = value;
      // p.splits * 2^-126: weights that ex2 flushes to zero, times sums that are at most a few thousand.
      expected.bound[c] = (bound + error[0][c] + kUnit * std::fabs(turned + sums[0][c])) / total +
                          std::fabs(value) * (total_error / total + kUnit) + p.splits * 0x1p-110;
    }
    first += n;
  }
  expected.lse = (largest + std::log2(total)) * 0.69314718055994530942;
  // Two roundings of a number of at most |largest| + log2(total), one of log2 itself.
  expected.lse_bound =
      3 * kUnit * (std::fabs(largest) + std::fabs(std::log2(total)) + 1) + total_error / total;
  return expected;
}

struct Output {
  std::vector<float> out, lse;
};

Output run_merge(const Problem& p, const Input& in) {
  Buffer<float> partial(in.partial.size()), out(static_cast<std::size_t>(p.rows) * p.width()),
      lse(static_cast<std::size_t>(p.rows));
  for (std::size_t i = 0; i < in.state.size(); ++i)  // states without tokens own no values
    if (in.state[i].y > 0)
      simt::device_upload(partial.get() + i * p.width(), in.partial.data() + i * p.width(),
                          p.width() * sizeof(float));
  Buffer<float2> state(in.state);
  // A second, shorter request shares the launch: the first row again.
  Buffer<float> other_out(p.width());
  const Buffer<MergeArgs> args(std::vector<MergeArgs>{
      {partial.get(), state.get(), out.get(), lse.get(), p.splits, p.rows, p.rotated},
      {partial.get(), state.get(), other_out.get(), nullptr, 1, p.rows > 1 ? 0 : 1, p.rotated > 0 ? 1 : 0}});
  CHECK(merge_states(args.get(), 2, p.rows, p.splits, p.head_dim, nullptr) == cudaSuccess);
  return {out.download(), lse.download()};
}

std::string describe(const Problem& p, int row, std::size_t channel) {
  return "D " + std::to_string(p.head_dim) + ", splits " + std::to_string(p.splits) + ", rotated " +
         std::to_string(p.rotated) + ", row " + std::to_string(row) + ", channel " + std::to_string(channel);
}

void check_all(const std::vector<Problem>& problems) {
  for (const Problem& p : problems) {
    const Input in = random_input(p, static_cast<std::uint64_t>(p.head_dim * 1000 + p.splits));
    std::vector<Expected> expected;
    for (int row = 0; row < p.rows; ++row) expected.push_back(merged(p, in, row));
    Output first;
    for (const simt::Schedule& schedule : simt::schedules()) {
      simt::use(schedule);
      const Output got = run_merge(p, in);
      CHECK(simt::take_reports().empty());
      if (first.out.empty()) {
        first = got;
        for (int row = 0; row < p.rows; ++row) {
          const Expected& e = expected[static_cast<std::size_t>(row)];
          for (std::size_t c = 0; c < p.width(); ++c) {
            const auto value = static_cast<double>(got.out[static_cast<std::size_t>(row) * p.width() + c]);
            CHECK_WITH(std::fabs(value - e.out[c]) <= e.bound[c], describe(p, row, c));
          }
          const auto lse = static_cast<double>(got.lse[static_cast<std::size_t>(row)]);
          CHECK_WITH(lse == e.lse || std::fabs(lse - e.lse) <= e.lse_bound, describe(p, row, 0));
        }
      } else {  // no order of threads changes a bit
        CHECK(std::memcmp(first.out.data(), got.out.data(), got.out.size() * sizeof(float)) == 0);
        CHECK(std::memcmp(first.lse.data(), got.lse.data(), got.lse.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST("splits merge to float64's result within the bound of float32, in the raw basis and the rotated one") {
  std::vector<Problem> problems;
  for (const int head_dim : {64, 80, 96, 128, 256})
    for (const int splits : {1, 2, 7, 8, 9, 33})
      for (const int rotated : {0, (splits + 1) / 2, splits})
        problems.push_back({head_dim, splits, 3, rotated, 5});
  check_all(problems);
}

TEST("maxima far apart neither overflow nor cancel") {
  check_all({{128, 12, 3, 6, 1000}, {80, 40, 2, 40, 100}, {64, 3, 1, 0, 30}});
}

TEST("the butterflies are the CPU's, bit for bit") {
  simt::use({simt::Order::kRandom, 1});
  for (const int head_dim : {64, 80, 96, 128, 256}) {
    const Problem p{head_dim, 1, 1, 1, 0};
    Input in = random_input(p, 3);
    in.state[0] = {0.0f, 1.0f};
    const Output got = run_merge(p, in);
    hadamard(in.partial.data(), head_dim);
    CHECK(std::memcmp(got.out.data(), in.partial.data(), p.width() * sizeof(float)) == 0);
  }
  CHECK(simt::take_reports().empty());
}

TEST("arguments that make no sense are refused before anything runs") {
  const auto with = [&](int count, int rows, int splits, int head_dim) {
    return merge_states(nullptr, count, rows, splits, head_dim, nullptr);
  };
  CHECK(with(1, 1, 1, 72) == cudaErrorInvalidValue);
  CHECK(with(1, 1, 0, 64) == cudaErrorInvalidValue);
  CHECK(with(1, -1, 1, 64) == cudaErrorInvalidValue);
  CHECK(with(-1, 1, 1, 64) == cudaErrorInvalidValue);
  CHECK(with(0, 1, 1, 64) == cudaSuccess);
  CHECK(with(1, 0, 1, 64) == cudaSuccess);
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("merge_test", argc, argv); }
