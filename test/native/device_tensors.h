// Callers' tensors in device memory: what a backend does with them is, bit for bit, what it does with arrays
// on the host, and what is refused is refused before anything changes. For every backend.
#pragma once

#include <memory>

#include "support.h"

namespace innerkv::test {

/// Device memory with the contents of a vector.
template <class T>
class OnDevice {
 public:
  OnDevice(std::shared_ptr<Backend> backend, const std::vector<T>& values)
      : backend_(std::move(backend)), count_(values.size()) {
    memory_ = backend_->allocate_memory(bytes());
    backend_->copy_memory(memory_, values.data(), bytes());
  }
  ~OnDevice() { backend_->free_memory(memory_, bytes()); }
  OnDevice(const OnDevice&) = delete;

  T* get() const { return static_cast<T*>(memory_); }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    backend_->copy_memory(values.data(), memory_, bytes());
    return values;
  }

 private:
  std::size_t bytes() const { return sizeof(T) * count_; }
  std::shared_ptr<Backend> backend_;
  std::size_t count_;
  void* memory_ = nullptr;
};

inline std::uint16_t bf16_bits(float value) {
  return static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16);
}
inline float bf16_value(std::uint16_t bits) { return __builtin_bit_cast(float, std::uint32_t{bits} << 16); }

/// Numbers of one type on the device, and what they are in the two types that are worked with.
struct DeviceNumbers {
  Dtype dtype;
  std::vector<float> as_floats;
  std::vector<std::uint16_t> as_halves;
  std::unique_ptr<OnDevice<float>> floats;
  std::unique_ptr<OnDevice<std::uint16_t>> bits;

  DeviceNumbers(const std::shared_ptr<Backend>& backend, Dtype type, const std::vector<float>& values)
      : dtype(type) {
    std::vector<std::uint16_t> narrow;
    for (const float x : values) {
      narrow.push_back(type == Dtype::kBf16 ? bf16_bits(x) : half_bits_ieee(x));
      as_floats.push_back(type == Dtype::kF32    ? x
                          : type == Dtype::kBf16 ? bf16_value(narrow.back())
                                                 : half_value(narrow.back()));
      as_halves.push_back(half_bits(as_floats.back()));
    }
    if (type == Dtype::kF32)
      floats = std::make_unique<OnDevice<float>>(backend, values);
    else
      bits = std::make_unique<OnDevice<std::uint16_t>>(backend, narrow);
  }
  TensorView view(std::size_t first = 0, bool known_finite = false) const {
    return floats ? TensorView::device(floats->get() + first, dtype, known_finite)
                  : TensorView::device(bits->get() + first, dtype, known_finite);
  }
};

inline constexpr Dtype kDtypes[] = {Dtype::kF32, Dtype::kF16, Dtype::kBf16};

inline std::vector<float> gaussians(std::size_t count, std::uint64_t seed) {
  check::Random random(seed);
  std::vector<float> values(count);
  for (float& x : values) x = 3.0f * random.normal();
  return values;
}

/// Appends and attends with tensors and with arrays of the same numbers.
inline void check_same_as_arrays(const std::shared_ptr<Backend>& backend, const Family& family, Dtype dtype,
                                 int tokens = 150, int more = 20) {
  const CacheConfig& config = family.config;
  const std::size_t row = at(config.kv_heads * config.head_dim), heads = at(config.query_heads),
                    q_row = heads * at(config.head_dim);
  const int queries = 3;
  const auto cache = std::make_shared<Cache>(backend, config);
  const DeviceNumbers k(backend, dtype, gaussians(row * at(tokens + more), 11)),
      v(backend, dtype, gaussians(row * at(tokens + more), 12)),
      q(backend, dtype, gaussians(q_row * at(queries), 13));
  const auto a = cache->sequence(), b = cache->sequence();
  for (int done = 0; done < tokens + more;) {
    const int count = done < tokens ? tokens : 1;
    const std::size_t first = row * at(done);
    a->append(0, k.as_halves.data() + first, v.as_halves.data() + first, count);
    b->append(0, k.view(first, done == tokens), v.view(first), count);  // one side may be vouched for
    done += count;
  }
  if (family.editable()) {
    a->replace(0, 20, k.as_halves.data(), v.as_halves.data());
    b->replace(0, 20, k.view(), v.view());
  }
  CHECK_WITH(saved(*a) == saved(*b), family.name);

  // Two items of a batch, one with everything on the device and one with everything on the host.
  const std::vector<float> nothing(q.as_floats.size(), 7.0f);
  std::vector<float> out = nothing, lse(heads * at(queries), 7.0f), host_out = out, host_lse = lse;
  const OnDevice<float> device_out(backend, out), device_lse(backend, lse);
  const BatchItem alone{a.get(), q.as_floats.data(), out.data(), lse.data(), nullptr, queries};
  CHECK(attend_batch(*cache, 0, std::span(&alone, 1), true, nullptr));
  const BatchItem items[] = {
      {b.get(), q.view(), Target::device(device_out.get()), Target::device(device_lse.get()), nullptr,
       queries},
      {b.get(), q.as_floats.data(), host_out.data(), host_lse.data(), nullptr, queries},
  };
  CHECK(attend_batch(*cache, 0, items, true, nullptr));
  backend->settle();
  CHECK_WITH(same_bits(device_out.read(), out) && same_bits(device_lse.read(), lse), family.name);
  CHECK_WITH(same_bits(host_out, out) && same_bits(host_lse, lse), family.name);
  // Queries from the host, results on the device, and no log-sum-exp.
  const OnDevice<float> other_out(backend, nothing);
  const BatchItem mixed{b.get(), q.as_floats.data(), Target::device(other_out.get()), nullptr, nullptr,
                        queries};
  CHECK(attend_batch(*cache, 0, std::span(&mixed, 1), true, nullptr));
  CHECK_WITH(same_bits(other_out.read(), out), family.name);
}

/// What a NaN, an infinity or a number beyond binary16 in a device tensor does.
inline void check_not_finite(const std::shared_ptr<Backend>& backend, const Family& family, Dtype dtype) {
  const CacheConfig& config = family.config;
  const int heads = config.kv_heads, D = config.head_dim, tokens = 40;
  const std::size_t row = at(heads * D);
  const auto cache = std::make_shared<Cache>(backend, config);
  const auto sequence = filled(cache, tokens_of(config, 60, 3), 60);
  const Bytes before = saved(*sequence);
  const auto refused = [&](const char* tensor, int token, int head, int channel, auto&& body) {
    bool thrown = false;
    try {
      body();
    } catch (const NotFinite& error) {
      thrown = error.tensor() == tensor && error.token() == at(token) && error.head() == at(head) &&
               error.channel() == at(channel);
    }
    CHECK_WITH(thrown, tensor);
    CHECK(saved(*sequence) == before);
  };
  const std::vector<float> good(row * at(tokens), 1.0f);
  const DeviceNumbers fine(backend, dtype, good);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -infinity, 1e5f}) {
    if (dtype == Dtype::kF16 && bad == 1e5f) continue;  // is infinite there
    std::vector<float> numbers = good;
    numbers[row * 33 + at(D) + 5] = bad;
    numbers[row * 39 + 7] = bad;  // the first one is named
    const DeviceNumbers spoilt(backend, dtype, numbers);
    refused("k", 33, 1, 5, [&] { sequence->append(0, spoilt.view(), fine.view(), tokens); });
    refused("v", 33, 1, 5, [&] { sequence->append(0, fine.view(), spoilt.view(), tokens); });
    if (bad == 1e5f) continue;  // a query may be as large
    const std::size_t q_row = at(config.query_heads * D);
    std::vector<float> q(2 * q_row, 1.0f);
    q[q_row + at(3 * D) + 9] = bad;
    const DeviceNumbers spoilt_q(backend, dtype, q),
        fine_q(backend, dtype, std::vector<float>(2 * q_row, 1.0f));
    const OnDevice<float> out(backend, std::vector<float>(2 * q_row, 7.0f)),
        other(backend, std::vector<float>(2 * q_row));
    const BatchItem items[] = {
        {sequence.get(), fine_q.view(), Target::device(out.get()), nullptr, nullptr, 2},
        {sequence.get(), spoilt_q.view(), Target::device(other.get()), nullptr, nullptr, 2}};
    refused("q of item 1", 1, 3, 9, [&] { attend_batch(*cache, 0, items, true, nullptr); });
    CHECK(same_bits(out.read(), std::vector<float>(2 * q_row, 7.0f)));
  }
  const int invalid = static_cast<int>(ErrorCode::kInvalidArgument);
  const TensorView off = TensorView::device(static_cast<const char*>(fine.view().data) + 16, dtype);
  CHECK(error_of([&] { sequence->append(0, off, fine.view(), 1); }) == invalid);
  CHECK(error_of([&] { sequence->append(0, fine.view(), off, 1); }) == invalid);
  const BatchItem crooked{sequence.get(), off, Target(), nullptr, nullptr, 1};
  CHECK(error_of([&] { attend_batch(*cache, 0, std::span(&crooked, 1), true, nullptr); }) == invalid);
  CHECK(saved(*sequence) == before);
}

}  // namespace innerkv::test
