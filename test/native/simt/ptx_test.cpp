// The emulated instructions against the PTX manual's own formulas, and CUDA's built-ins against plain loops.
#include "golden/ptx_golden.cuh"

namespace innerkv {
namespace {

using simt::Buffer;

TEST("the golden program agrees with itself in every order") {
  for (const simt::Schedule& schedule : simt::schedules()) {
    simt::use(schedule);
    golden::run_all(schedule.seed, [](const char* name, int wrong) { CHECK_WITH(wrong == 0, name); });
    CHECK(simt::take_reports().empty());
  }
}

// Element i of a fragment, as section "Matrix fragments" of the PTX ISA states it, not as ptx.h rephrases it.
struct Element {
  int row, column;
};
Element a16(int lane, int i) {  // .f16 and .bf16, a0...a7
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 || (i >= 4 && i < 6) ? group : group + 8, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Element b16(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane >> 2}; }
Element a8(int lane, int i) {  // .u8 and .s8, a0...a15
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 4 || (i >= 8 && i < 12) ? group : group + 8, in_group * 4 + (i & 3) + (i < 8 ? 0 : 16)};
}
Element b8(int lane, int i) { return {lane % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16), lane >> 2}; }
Element c32(int lane, int i) { return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)}; }

template <class Op>
std::vector<std::uint32_t> run_one(const std::vector<std::uint32_t>& words) {
  Buffer<std::uint32_t> in(words), out(32 * Op::kOut);
  CHECK(launch(golden::golden_kernel<Op>, dim3(1), dim3(32), 0, nullptr, in.get(), out.get()) == cudaSuccess);
  return out.download();
}

template <class A, class B>
void check_mma_bytes() {
  check::Random random(11);
  std::int32_t a[16][32], b[32][8], c[16][8];
  for (auto& row : a)
    for (std::int32_t& x : row) x = static_cast<A>(random.bits());
  for (auto& row : b)
    for (std::int32_t& x : row) x = static_cast<B>(random.bits());
  for (auto& row : c)
    for (std::int32_t& x : row) x = static_cast<std::int32_t>(random.bits() >> 40);
  std::vector<std::uint32_t> words(320);
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* in = &words[static_cast<std::size_t>(lane) * 10];
    for (int i = 0; i < 16; ++i)
      in[i / 4] |= (static_cast<std::uint32_t>(a[a8(lane, i).row][a8(lane, i).column]) & 255u) << 8 * (i % 4);
    for (int i = 0; i < 8; ++i)
      in[4 + i / 4] |= (static_cast<std::uint32_t>(b[b8(lane, i).row][b8(lane, i).column]) & 255u)
                       << 8 * (i % 4);
    for (int i = 0; i < 4; ++i)
      in[6 + i] = static_cast<std::uint32_t>(c[c32(lane, i).row][c32(lane, i).column]);
  }
  const std::vector<std::uint32_t> out = run_one<golden::MmaInt<A, B>>(words);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Element e = c32(lane, i);
      std::int64_t sum = c[e.row][e.column];
      for (int k = 0; k < 32; ++k) sum += std::int64_t{a[e.row][k]} * b[k][e.column];
      CHECK(static_cast<std::int32_t>(out[static_cast<std::size_t>(lane * 4 + i)]) == sum);
    }
}

TEST("mma.m16n8k32 multiplies the matrices of the manual's fragments, signed and unsigned") {
  check_mma_bytes<std::int8_t, std::int8_t>();
  check_mma_bytes<std::int8_t, std::uint8_t>();
  check_mma_bytes<std::uint8_t, std::int8_t>();
  check_mma_bytes<std::uint8_t, std::uint8_t>();
}

template <class T>
void check_mma_halves() {  // small integers: every sum is exact
  check::Random random(12);
  const auto bits = [](int x) {
    if constexpr (std::is_same_v<T, __half>) return std::uint32_t{half_bits(static_cast<float>(x))};
    return std::uint32_t{__builtin_bit_cast(std::uint32_t, static_cast<float>(x)) >> 16};
  };
  int a[16][16], b[16][8];
  for (auto& row : a)
    for (int& x : row) x = random.below(31) - 15;
  for (auto& row : b)
    for (int& x : row) x = random.below(31) - 15;
  std::vector<std::uint32_t> words(320);
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* in = &words[static_cast<std::size_t>(lane) * 10];
    for (int i = 0; i < 8; ++i) in[i / 2] |= bits(a[a16(lane, i).row][a16(lane, i).column]) << 16 * (i % 2);
    for (int i = 0; i < 4; ++i)
      in[4 + i / 2] |= bits(b[b16(lane, i).row][b16(lane, i).column]) << 16 * (i % 2);
  }
  const std::vector<std::uint32_t> out = run_one<golden::MmaFloat<T>>(words);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Element e = c32(lane, i);
      int sum = 1;  // the golden operand's c
      for (int k = 0; k < 16; ++k) sum += a[e.row][k] * b[k][e.column];
      const float got = __builtin_bit_cast(float, out[static_cast<std::size_t>(lane * 4 + i)]);
      CHECK(got == static_cast<float>(sum));
    }
}

TEST("mma.m16n8k16 multiplies the matrices of the manual's fragments") {
  check_mma_halves<__half>();
  check_mma_halves<__nv_bfloat16>();
}

TEST("ldmatrix hands lane l elements 2(l%4) and the next of row l/4, or of column l/4 when transposed") {
  std::vector<std::uint32_t> words;  // row r of matrix m holds 1000 m + 10 r + column
  const auto element = [](int m, int row, int column) {
    return static_cast<std::uint32_t>(1000 * m + 10 * row + column);
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      words.push_back(element(lane / 8, lane % 8, 2 * i) | element(lane / 8, lane % 8, 2 * i + 1) << 16);
  const auto plain = run_one<golden::LdMatrix<4, false>>(words),
             turned = run_one<golden::LdMatrix<4, true>>(words);
  const auto two = run_one<golden::LdMatrix<2, true>>(words);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int l4 = lane / 4, l2 = 2 * (lane % 4);
      CHECK(plain[static_cast<std::size_t>(4 * lane + m)] ==
            (element(m, l4, l2) | element(m, l4, l2 + 1) << 16));
      const std::uint32_t across = element(m, l2, l4) | element(m, l2 + 1, l4) << 16;
      CHECK(turned[static_cast<std::size_t>(4 * lane + m)] == across);
      if (m < 2) CHECK(two[static_cast<std::size_t>(2 * lane + m)] == across);
    }
}

TEST("lop3, prmt, dp4a, ex2, conversions and rcp are the manual's examples") {
  CHECK(ptx::lop3<0xf0>(1, 2, 4) == 1 && ptx::lop3<0xcc>(1, 2, 4) == 2 && ptx::lop3<0xaa>(1, 2, 4) == 4);
  CHECK((ptx::lop3<0xea>(0xff00ff00u, 0x0ff00ff0u, 0x64006400u) ==
         ((0xff00ff00u & 0x0ff00ff0u) | 0x64006400u)));
  CHECK((ptx::lop3<0x96>(0x1234u, 0x5678u, 0x9abcu) == (0x1234u ^ 0x5678u ^ 0x9abcu)));
  CHECK(ptx::prmt(0x03020100u, 0x07060504u, 0x7531u) == 0x07050301u);
  CHECK(ptx::prmt(0x80u, 0x7f00u, 0xd888u) == 0x00ffffffu);  // sign of byte 5, then three times of byte 0
  CHECK((ptx::dp4a<std::int8_t, std::int8_t>(0xff01ff01u, 0x7f7f7f7fu, 5) == 5));
  CHECK((ptx::dp4a<std::uint8_t, std::int8_t>(0xffffffffu, 0x80808080u, 0) == -4 * 255 * 128));
  CHECK(ptx::floats_of(0xc0003c00u).x == 1.0f && ptx::floats_of(0xc0003c00u).y == -2.0f);
  CHECK(ptx::float_of(1) == 0x1p-24f && ptx::rcp(4.0f) == 0.25f);
  CHECK(ptx::ex2(-INFINITY) == 0.0f && ptx::ex2(0.0f) == 1.0f && ptx::ex2(-127.0f) == 0.0f);
}

// ---- CUDA's built-ins ----

INNERKV_KERNEL(32) void builtins(int* out) {  // [20][32]
  const int lane = static_cast<int>(threadIdx.x), x = 100 + lane;
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(ptx::kFullWarp, x, 5));
  put(__shfl_sync(ptx::kFullWarp, x, 9, 8));
  put(__shfl_xor_sync(ptx::kFullWarp, x, 3));
  put(__shfl_down_sync(ptx::kFullWarp, x, 4u));
  put(__shfl_up_sync(ptx::kFullWarp, x, 4u, 16));
  put(static_cast<int>(__ballot_sync(ptx::kFullWarp, lane % 3 == 0)));
  put(__any_sync(ptx::kFullWarp, lane == 31) + 2 * __all_sync(ptx::kFullWarp, lane < 31));
  put(static_cast<int>(__match_any_sync(ptx::kFullWarp, lane % 2)));
  put(__reduce_add_sync(ptx::kFullWarp, x));
  put(__reduce_min_sync(ptx::kFullWarp, -x) + __reduce_max_sync(ptx::kFullWarp, x));
  put(static_cast<int>(__reduce_or_sync(ptx::kFullWarp, 1u << lane) ^ __reduce_and_sync(ptx::kFullWarp, 7u) ^
                       __reduce_xor_sync(ptx::kFullWarp, 1u << lane)));
  if (lane < 8)
    put(__shfl_xor_sync(0x000000ffu, x, 1));
  else
    put(__shfl_down_sync(0xffffff00u, x, 1u));
  put(__syncthreads_count(lane % 2) + 100 * __syncthreads_or(lane == 3) +
      1000 * __syncthreads_and(lane >= 0));
}

TEST("shuffles, votes, reductions and counting barriers are CUDA's") {
  for (const simt::Schedule& schedule : simt::schedules()) {
    simt::use(schedule);
    Buffer<int> out(13 * 32);
    CHECK(launch(builtins, dim3(1), dim3(32), 0, nullptr, out.get()) == cudaSuccess);
    const std::vector<int> got = out.download();
    for (int lane = 0; lane < 32; ++lane) {
      const int expected[] = {105,
                              100 + lane / 8 * 8 + 1,
                              100 + (lane ^ 3),
                              lane < 28 ? 104 + lane : 100 + lane,
                              lane % 16 >= 4 ? 96 + lane : 100 + lane,
                              0x49249249,
                              1,
                              lane % 2 ? static_cast<int>(0xaaaaaaaau) : 0x55555555,
                              32 * 100 + 496,
                              0,
                              7,
                              lane < 8 ? 100 + (lane ^ 1) : (lane < 31 ? 101 + lane : 131),
                              16 + 100 + 1000};
      for (int row = 0; row < 13; ++row)
        CHECK_WITH(got[static_cast<std::size_t>(32 * row + lane)] == expected[row],
                   "row " + std::to_string(row));
    }
    CHECK(simt::take_reports().empty());
  }
}

INNERKV_KERNEL(64) void atomics(int* values, unsigned* ring, float* sum) {
  const int i = static_cast<int>(threadIdx.x);
  atomicAdd(&values[0], i);
  atomicMax(&values[1], i);
  atomicMin(&values[2], -i);
  atomicOr(&values[3], 1 << i % 8);
  atomicAnd(&values[4], ~(1 << i % 4));
  atomicInc(ring, 9u);
  atomicAdd(sum, 0.5f);
  for (int seen = 0; (seen = atomicCAS(&values[5], seen, seen + 1)), false;) {
  }
  atomicExch(&values[6], 7);
}

TEST("atomics of all threads add up") {
  for (const simt::Schedule& schedule : simt::schedules()) {
    simt::use(schedule);
    Buffer<int> values(std::vector<int>{0, 0, 0, 0, 255, 0, 0});
    Buffer<unsigned> ring(std::vector<unsigned>{0});
    Buffer<float> sum(std::vector<float>{0});
    CHECK(launch(atomics, dim3(2), dim3(64), 0, nullptr, values.get(), ring.get(), sum.get()) == cudaSuccess);
    CHECK((values.download() == std::vector<int>{2 * 2016, 63, -63, 255, 240, 1, 7}));
    CHECK(ring.download()[0] == 128 % 10 && sum.download()[0] == 64.0f);
    CHECK(simt::take_reports().empty());
  }
}

INNERKV_KERNEL(24) void where_am_i(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] = block * 24 + thread;
}

TEST("grids and blocks have three dimensions") {
  Buffer<unsigned> out(30 * 24);
  CHECK(launch(where_am_i, dim3(2, 3, 5), dim3(4, 3, 2), 0, nullptr, out.get()) == cudaSuccess);
  const std::vector<unsigned> got = out.download();
  for (unsigned i = 0; i < 30 * 24; ++i) CHECK(got[i] == i);
  CHECK(simt::take_reports().empty());
}

}  // namespace
}  // namespace innerkv

int main(int argc, char** argv) { return check::run("ptx_test", argc, argv); }
