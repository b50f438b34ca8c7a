// What a cache asks of the GPU backend besides attention: callers' tensors, checkpoints, page tables that
// follow a sequence, batches of tokens; and what only the emulated device can tell of that: what is copied to
// the host and to the device, what is allocated, and in which order streams wait. Runs on the emulated GPU
// (gpu_cache_test) and on a real one (gpu_cache_gpu_test). INNERKV_GPU_STRIDE, for slow sanitizers: every so
// manieth case. Long file: a test of each of these.
#include <algorithm>
#include <climits>

#include "device_tensors.h"
#include "simt/gpu_jobs.h"
#ifndef INNERKV_ON_GPU
#include "simt/device_log.h"
#endif

namespace innerkv::test {
namespace {

// ---- callers' tensors ----

/// Families whose tokens go three different ways into pages, and one for every dtype.
std::vector<Family> some_families() {
  std::vector<Family> all = dense_families();
  return {all[0], all[1], all[6]};
}

TEST("tensors of every type give what arrays give, bit for bit") {
  const auto schedules = simt::schedules();
  std::size_t turn = 0;
  for (const Family& family : some_families())
    for (const Dtype dtype : kDtypes) {
      simt::use(schedules[turn % schedules.size()]);
      if (turn++ % std::min<std::size_t>(stride(), 4) != 0) continue;
      check_same_as_arrays(gpu_backend(), family, dtype, 60, 3);
      CHECK_WITH(simt::take_reports().empty(), family.name);
    }
}

TEST("what is not finite in a tensor is refused by name, and nothing has changed") {
  for (const Dtype dtype : kDtypes) check_not_finite(gpu_backend(), dense_families()[0], dtype);
  CHECK(simt::take_reports().empty());
}

TEST("plain attention says that k or v is not finite, before it writes") {
  const int tokens = 200, D = 64;
  for (const bool half : {false, true})
    for (const int bad : {-1, 0, 1}) {
      std::vector<float> kv[2], q(at(D), 1.0f), out(at(D), 7.0f);
      std::vector<std::uint16_t> kv16[2];
      for (const int i : {0, 1}) {
        kv[i].assign(at(tokens * D), 0.5f);
        if (bad == i) kv[i][at(150 * D + 3)] = std::numeric_limits<float>::quiet_NaN();
        for (const float x : kv[i]) kv16[i].push_back(half_bits_ieee(x));
      }
      DenseRequest request;
      request.k = half ? static_cast<const void*>(kv16[0].data()) : kv[0].data();
      request.v = half ? static_cast<const void*>(kv16[1].data()) : kv[1].data();
      request.half = half;
      request.q = q.data();
      request.out = out.data();
      request.tokens = tokens;
      request.q_tokens = request.query_heads = request.kv_heads = 1;
      request.head_dim = D;
      request.scale = 0.1f;
      request.causal = false;
      int called = 0;
      request.suspect = [&] {
        ++called;
        throw Error(ErrorCode::kNotFinite, "suspect");
      };
      CHECK(error_of([&] { gpu_backend()->attend_dense(request); }) ==
            (bad < 0 ? -1 : static_cast<int>(ErrorCode::kNotFinite)));
      CHECK(called == (bad < 0 ? 0 : 1));
      CHECK((out[0] == 7.0f) == (bad >= 0));
    }
  CHECK(simt::take_reports().empty());
}

TEST("a checkpoint on the device brings back windows and pages to the bit") {
  for (const Family& family : some_families()) {
    const Tokens tokens = tokens_of(family.config, 60, 1), others = tokens_of(family.config, 40, 2);
    for (const int n : {0, 60})
      for (const int added : {1, 40}) {
        const auto cache = gpu_cache(family.config);
        const auto sequence = filled(cache, tokens, n);
        const Bytes before = saved(*sequence);
        {
          const Checkpoint point = sequence->checkpoint(added);
          for (int done = 0; done < added; done += std::min(added - done, 30))
            append(*sequence, others, done, std::min(added - done, 30));
          sequence->restore(point);
        }
        CHECK_WITH(saved(*sequence) == before, family.name);
      }
    CHECK_WITH(simt::take_reports().empty(), family.name);
  }
}

#ifndef INNERKV_ON_GPU

/// A sequence of 40 tokens, tensors for more, and results, all on the device.
struct DeviceWorld {
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Cache> cache;
  DeviceNumbers k, v, q;
  OnDevice<float> out;
  std::unique_ptr<Sequence> sequence;
  std::size_t row;

  DeviceWorld(const Family& family, Dtype kv, Dtype queries, std::shared_ptr<Backend> on = gpu_backend())
      : backend(std::move(on)),
        cache(std::make_shared<Cache>(backend, family.config)),
        k(backend, kv, gaussians(at(40 * family.config.kv_heads * family.config.head_dim), 1)),
        v(backend, kv, gaussians(at(40 * family.config.kv_heads * family.config.head_dim), 2)),
        q(backend, queries, gaussians(at(family.config.query_heads * family.config.head_dim), 3)),
        out(backend, std::vector<float>(at(family.config.query_heads * family.config.head_dim))),
        sequence(filled(cache, tokens_of(family.config, 40, 4), 40)),
        row(at(family.config.kv_heads * family.config.head_dim)) {}
  void append_one(int token, bool known = false) {
    sequence->append(0, k.view(row * at(token), known), v.view(row * at(token), known), 1);
  }
  void attend(bool known = false) {
    const BatchItem item{sequence.get(), q.view(0, known), Target::device(out.get()), nullptr, nullptr, 1};
    CHECK(attend_batch(*cache, 0, std::span(&item, 1), true, nullptr));
  }
};

TEST("a decode step on the device copies nothing to the host but what is said of NaN, and takes no memory") {
  for (const Family& family : {families()[0], dense_families()[6]}) {
    DeviceWorld known(family, Dtype::kF16, Dtype::kF32), searched(family, Dtype::kF32, Dtype::kBf16);
    for (int token = 0; token < 4; ++token) {  // scratch grows to what a step needs
      known.append_one(token, true);
      known.attend(true);
      searched.append_one(token);
      searched.attend();
      const Checkpoint point = known.sequence->checkpoint(1);
    }
    simt::allocations_left = 0;
    simt::bytes_to_host = 0;
    for (int token = 4; token < 20; ++token) {
      const Checkpoint point = known.sequence->checkpoint(1);
      known.append_one(token, true);
      known.attend(true);
      if (token % 4 == 0) known.sequence->restore(point);
    }
    CHECK_WITH(simt::bytes_to_host == 0, family.name);
    for (int token = 4; token < 20; ++token) {
      searched.append_one(token);
      searched.attend();
    }
    CHECK_WITH(simt::bytes_to_host == 16 * 3 * sizeof(unsigned), family.name);  // k, v, q
    simt::allocations_left = INT_MAX;
    CHECK(simt::take_reports().empty());
  }
}

TEST("a GPU that refuses its n-th piece of memory leaves everything as it was") {
  struct Operation {
    const char* name;
    void (*run)(DeviceWorld&);
  };
  const Operation operations[] = {
      {"append", [](DeviceWorld& w) { w.sequence->append(0, w.k.view(), w.v.view(), 12); }},
      {"append what is vouched for",
       [](DeviceWorld& w) { w.sequence->append(0, w.k.view(0, true), w.v.view(0, true), 12); }},
      {"append a batch",
       [](DeviceWorld& w) {
         const CacheConfig& config = w.cache->config();
         const std::vector<std::uint16_t> zeros(at(60 * config.kv_heads * config.head_dim));
         const auto other = w.cache->sequence();
         append_batch(*w.cache, 0,
                      std::vector<AppendItem>{{w.sequence.get(), w.k.view(), w.v.view(), 12},
                                              {other.get(), zeros.data(), zeros.data(), 60}});
       }},
      {"attend", [](DeviceWorld& w) { w.attend(); }},
      {"a checkpoint", [](DeviceWorld& w) { w.sequence->checkpoint(30); }},
      {"replace", [](DeviceWorld& w) { w.sequence->replace(0, 20, w.k.view(), w.v.view()); }},
  };
  for (const Operation& operation : operations) {
    int failures = 0, code = 0;
    for (int allowed = 0; code >= 0 && allowed < 100; allowed += std::min(static_cast<int>(stride()), 5)) {
      // A backend of its own, so that its scratch memory is fresh and has to be taken.
      DeviceWorld world(dense_families()[0], Dtype::kF32, Dtype::kF16, std::make_shared<gpu::GpuBackend>());
      const Bytes before = saved(*world.sequence);
      const std::size_t used = world.cache->pool().used_bytes();
      simt::allocations_left = allowed;
      code = error_of([&] { operation.run(world); });
      simt::allocations_left = INT_MAX;
      if (code < 0) break;
      ++failures;
      CHECK_WITH(code == static_cast<int>(ErrorCode::kOutOfMemory), operation.name);
      CHECK_WITH(saved(*world.sequence) == before && world.cache->pool().used_bytes() == used,
                 operation.name);
      operation.run(world);  // and nothing is broken
    }
    CHECK_WITH(code < 0 && failures > 0, operation.name);
  }
  CHECK(simt::take_reports().empty());
}

TEST("calls are ordered with the caller's stream by events, and wait only when he has none") {
  const auto log_of = [](std::optional<cudaStream_t> stream) {
    gpu::GpuBackend backend(stream);
    simt::device_log.clear();
    backend.follow_caller();
    backend.settle();
    return std::exchange(simt::device_log, {});
  };
  using Log = std::vector<std::string>;
  int there = 0;
  CHECK((log_of(reinterpret_cast<cudaStream_t>(&there)) == Log{"follow", "lead"}));
  CHECK((log_of(nullptr) == Log{"follow", "lead"}));  // the default stream is one, too
  CHECK((log_of(std::nullopt) == Log{"synchronize"}));
}

TEST("memory of others is looked at as far as the device can tell; a handle opens it again") {
  const auto backend = gpu_backend();
  auto* memory = static_cast<std::uint8_t*>(backend->allocate_memory(1000));
  CHECK(backend->objection(memory, 1000).empty() && backend->objection(memory + 200, 800).empty());
  CHECK(!backend->objection(memory, 1001).empty() && !backend->objection(&memory, 1).empty());
  void* again = backend->import_memory(backend->export_memory(memory));
  CHECK(again == memory);
  backend->close_memory(again);
  CHECK(error_of([&] { backend->import_memory({}); }) == static_cast<int>(ErrorCode::kInvalidArgument));
  backend->free_memory(memory, 1000);
}

TEST("pinned memory: a late copy whose source changes is found, and one that is awaited is not") {
  gpu::DeviceBuffer buffer;
  buffer.reserve(64);
  std::vector<std::uint8_t> bytes(64, 1), back(64);
  for (int i = 0; i < 20; ++i) {
    bytes.assign(64, static_cast<std::uint8_t>(i));
    buffer.put(bytes.data(), 64);
    buffer.fetch(back.data(), buffer.reserve(64), 64);
    CHECK(back == bytes);
  }
  CHECK(simt::take_reports().empty());
  std::uint8_t* host = buffer.host(64);
  buffer.send(64);
  host[0] ^= 1;
  gpu::device::synchronize();
  const auto reports = simt::take_reports(true);
  CHECK(reports.size() == 1 && reports[0].kind == simt::Kind::kPinned);
}

#endif

// ---- page tables and batches ----

TEST("page tables in device memory follow whatever happens to a sequence") {
  const TensorSpec code{3, Group::kToken, Mode::kMidRise}, raw;
  const Family kinds[] = {{"editable", config_of({scheme_of(code, code)})},
                          {"extents", config_of({scheme_of(raw, {2, Group::kTokens32, Mode::kHybrid})})}};
  for (const Family& family : kinds) {
    check::Random random(17);
    const auto cpu = cache_of(family.config), gpu = gpu_cache(family.config);
    const Tokens tokens = tokens_of(family.config, 600, 4);
    std::vector<Job> a, b;
    a.push_back({filled(cpu, tokens, 30), {}});
    b.push_back({filled(gpu, tokens, 30), {}});
    const auto both = [&](std::size_t i, auto&& change) {
      for (std::vector<Job>* side : {&a, &b}) change(*side, *(*side)[i].sequence);
    };
    const int rounds = std::max(1, 45 / static_cast<int>(stride()));
    for (int round = 0; round < rounds; ++round) {
      const std::size_t i = at(random.below(static_cast<int>(a.size())));
      const int length = a[i].sequence->tokens(0), kind = random.below(8), draw = random.below(1 << 20),
                stored_tokens = a[i].sequence->layer_state(0).reach.k;
      if (kind < 3 && length < 500)
        both(i,
             [&](auto&, Sequence& s) { append(s, tokens, draw % 400, 1 + draw % (kind == 0 ? 190 : 40)); });
      else if (kind == 3 && a.size() < 3)
        both(i, [&](std::vector<Job>& side, Sequence& s) { side.push_back({s.fork(), {}}); });
      else if (kind == 4)
        both(i, [&](auto&, Sequence& s) { s.truncate(length - draw % std::min(length, 150)); });
      else if (kind == 5)
        both(i, [&](auto&, Sequence& s) {
          const Checkpoint point = s.checkpoint(140);
          append(s, tokens, 9, 1 + draw % 140);
          s.restore(point);
        });
      else if (kind == 6 && family.editable() && stored_tokens > 0)
        both(i, [&](auto&, Sequence& s) {
          const int first = s.layer_state(0).reach.sink + draw % stored_tokens;
          std::vector<int> gone;
          for (int t = first; t < first + draw % 9 + 1 && t < s.layer_state(0).reach.sink + stored_tokens;
               ++t)
            gone.push_back(t);
          s.remove(0, draw % 3 - 1, gone);
        });
      else if (kind == 7 && a.size() > 1)
        both(i, [&](std::vector<Job>& side, Sequence&) { side.erase(side.begin() + static_cast<int>(i)); });
      for (std::size_t j = 0; j < a.size(); ++j) add_queries(family.config, 1, random, a[j], b[j]);
      CHECK_WITH(agree(a, b, 1, true), std::string(family.name) + " round " + std::to_string(round));
    }
    CHECK(simt::take_reports().empty());
  }
}

#ifndef INNERKV_ON_GPU
TEST("a step sends entries of page tables only when they change") {
  for (const bool hybrid : {false, true}) {
    const LayerScheme scheme =
        hybrid ? scheme_of({}, {2, Group::kTokens32, Mode::kHybrid})
               : scheme_of({2, Group::kToken, Mode::kMidRise}, {2, Group::kToken, Mode::kMidRise});
    CacheConfig config = config_of({scheme});
    config.budget_bytes = std::size_t{256} << 20;
    const auto cache = gpu_cache(config);
    const Tokens tokens = tokens_of(config, 1500, 4);
    Job job{filled(cache, tokens, 1500), std::vector<float>(at(config.query_heads * config.head_dim), 0.5f)};
    std::vector<Job> jobs;
    jobs.push_back(std::move(job));
    const auto sent = [&] {
      const std::size_t before = simt::bytes_to_device;
      attended_batch(jobs, 1, true, false);
      return simt::bytes_to_device - before;
    };
    const std::size_t all = sent(), none = sent();
    const std::size_t entries = at(config.kv_heads) * jobs[0].sequence->layer_state(0).pages[0].size();
    CHECK(all - none >= entries * sizeof(gpu::PagePatch));
    append(*jobs[0].sequence, tokens, 0, 140);  // at least one more page
    CHECK(sent() - none <=
          2 * at(config.kv_heads) * (sizeof(gpu::PagePatch) + sizeof(gpu::ExtentPatch)) + 2048);
    CHECK(sent() - none <= 256);  // tasks for the longer sequence
    append(*jobs[0].sequence, tokens, 0, 140);
    std::vector<float> out(2 * jobs[0].q.size());
    const Sequence* same = jobs[0].sequence.get();  // asked twice in one call
    const BatchItem items[] = {{same, jobs[0].q.data(), out.data(), {}, nullptr, 1},
                               {same, jobs[0].q.data(), out.data() + jobs[0].q.size(), {}, nullptr, 1}};
    CHECK(attend_batch(*cache, 0, items, true, nullptr));
    CHECK(std::equal(out.begin(), out.begin() + static_cast<int>(jobs[0].q.size()),
                     out.begin() + static_cast<int>(jobs[0].q.size())));
  }
  CHECK(simt::take_reports().empty());
}
#endif

TEST("a batch is appended with the bits of the CPU backend, by as many launches as one sequence") {
#ifndef INNERKV_ON_GPU
  struct Counter final : gpu::LaunchObserver {
    int sets = 0;
    void before() override { ++sets; }
    void after() override {}
  } counter;
#endif
  const auto schedules = simt::schedules();
  const auto all = families();
  for (std::size_t f = 0; f < all.size(); f += stride()) {
    const Family& family = all[f];
    simt::use(schedules[f % schedules.size()]);
    const bool large = family.scheme().k.raw() && family.scheme().v.raw();  // more than goes by pinned memory
    const Tokens tokens = tokens_of(family.config, large ? 2500 : 320, 6);
    const auto device = gpu_backend();
    const auto cpu = cache_of(family.config), gpu = std::make_shared<Cache>(device, family.config);
    std::vector<std::unique_ptr<Sequence>> a, b;
    for (const int length : {30, 139, 172}) {
      a.push_back(filled(cpu, tokens, length));
      b.push_back(filled(gpu, tokens, length));
    }
    a.push_back(a[2]->fork());
    b.push_back(b[2]->fork());
    for (const int count : {150, 1}) {
      std::vector<AppendItem> on_cpu, on_gpu;
      for (std::size_t i = 0; i < a.size(); ++i) {
        const std::size_t from = tokens.row * i;
        const int more = large && count > 100 ? 2400 : count;
        on_cpu.push_back({a[i].get(), tokens.k.data() + from, tokens.v.data() + from, more});
        on_gpu.push_back(on_cpu.back());
        on_gpu.back().sequence = b[i].get();
      }
      append_batch(*cpu, 0, on_cpu);
#ifndef INNERKV_ON_GPU
      static_cast<gpu::GpuBackend&>(*device).observe(&counter);
      counter.sets = 0;
#endif
      append_batch(*gpu, 0, on_gpu);
#ifndef INNERKV_ON_GPU
      static_cast<gpu::GpuBackend&>(*device).observe(nullptr);
      // Quantised, copied into windows; statistics gathered; a set more for a second length of the sink.
      const int most = 2 + (family.scheme().online() && count == 150) + family.scheme().released_windows;
      CHECK_WITH(counter.sets <= most, family.name + std::string(": ") + std::to_string(counter.sets));
#endif
      for (std::size_t i = 0; i < a.size(); ++i) CHECK_WITH(stored(*a[i]) == stored(*b[i]), family.name);
    }
    CHECK_WITH(simt::take_reports().empty(), family.name);
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("gpu_cache", argc, argv); }
