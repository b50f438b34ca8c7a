// Times the GPU backend's own kernels with events on its stream and prints one JSON object.
//
// usage: innerkv_cuda_bench [--repeats N] [--batch 1,8,32] [--tokens 1024,4096,...] [--schemes NAME,...]
// [--seconds S] Exit code 77 without a device. Before every timed call a buffer of several L2 caches is
// overwritten, on the same stream, which also gives the host time to enqueue the call's launches behind it.
// Cells that do not fit into memory, or come after `--seconds`, say so instead of being left out.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "core/error.h"
#include "cuda/device.h"
#include "cuda/factory.h"
#include "cuda/gpu_backend.h"
#include "workload.h"

namespace innerkv::bench {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Options {
  int repeats = 25;
  double seconds = 150;
  std::vector<int> batches{1, 8, 32}, contexts{1024, 4096, 32768, 131072};
  std::vector<std::string> schemes;
};

std::vector<std::string> parts(const std::string& list) {
  std::vector<std::string> all;
  std::stringstream stream(list);
  for (std::string one; std::getline(stream, one, ',');) all.push_back(one);
  return all;
}

Options read(int argc, char** argv) {
  Options options;
  const auto wrong = [](const std::string& what) {
    std::fprintf(stderr, "innerkv_cuda_bench: %s\n", what.c_str());
    std::exit(2);
  };
  const auto numbers = [&](const std::string& list) {
    std::vector<int> all;
    for (const std::string& one : parts(list)) all.push_back(std::atoi(one.c_str()));
    if (all.empty() || *std::min_element(all.begin(), all.end()) < 1) wrong("bad numbers: " + list);
    return all;
  };
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--repeats")
      options.repeats = numbers(value)[0];
    else if (name == "--seconds")
      options.seconds = numbers(value)[0];
    else if (name == "--batch")
      options.batches = numbers(value);
    else if (name == "--tokens")
      options.contexts = numbers(value);
    else if (name == "--schemes")
      options.schemes = parts(value);
    else
      wrong("unknown option " + name);
  }
  if (argc % 2 == 0) wrong("every option has a value");
  for (const int context : options.contexts)
    if (context < 384 || context % kPageTokens) wrong("--tokens must be multiples of 128 from 384 on");
  return options;
}

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "innerkv_cuda_bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

/// Adds up the time of all launches of a call; with a cold cache it flushes before each.
class Stopwatch final : public gpu::LaunchObserver {
 public:
  explicit Stopwatch(std::size_t flush_bytes) : flush_bytes_(flush_bytes) {
    if (flush_bytes > 0) must(cudaMalloc(&flush_, flush_bytes), "memory for the flush");
  }
  ~Stopwatch() override {
    cudaFree(flush_);
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  Stopwatch(const Stopwatch&) = delete;
  void before() override {
    if (flush_)
      must(cudaMemsetAsync(flush_, static_cast<int>(used_ & 255u), flush_bytes_, stream()), "flush");
    mark();
  }
  void after() override { mark(); }
  /// Microseconds since the last call of this.
  double take() {
    must(cudaStreamSynchronize(stream()), "the timed call");
    double all = 0;
    for (std::size_t i = 0; i + 1 < used_; i += 2) {
      float milliseconds = 0;
      must(cudaEventElapsedTime(&milliseconds, events_[i], events_[i + 1]), "the time between two events");
      all += 1e3 * static_cast<double>(milliseconds);
    }
    used_ = 0;
    return all;
  }

 private:
  static cudaStream_t stream() { return gpu::device::stream(); }
  void mark() {
    if (used_ == events_.size()) {
      events_.emplace_back();
      must(cudaEventCreate(&events_.back()), "an event");
    }
    must(cudaEventRecord(events_[used_++], stream()), "an event");
  }
  void* flush_ = nullptr;
  std::size_t flush_bytes_, used_ = 0;
  std::vector<cudaEvent_t> events_;
};

struct Quartiles {
  double low, median, high;
};
Quartiles quartiles(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const std::size_t n = times.size();
  return {times[n / 4], times[n / 2], times[3 * n / 4]};
}

/// GB/s of device-to-device copies, bytes read plus bytes written.
double copy_bandwidth(int repeats, std::size_t bytes) {
  Stopwatch watch(0);
  void *from = nullptr, *to = nullptr;
  must(cudaMalloc(&from, bytes), "memory for the copy");
  must(cudaMalloc(&to, bytes), "memory for the copy");
  must(cudaMemset(from, 0x5a, bytes), "filling");
  std::vector<double> times;
  for (int i = 0; i < repeats + 3; ++i) {
    watch.before();
    must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, gpu::device::stream()), "copying");
    watch.after();
    const double time = watch.take();
    if (i >= 3) times.push_back(time);
  }
  cudaFree(from);
  cudaFree(to);
  return 2.0 * static_cast<double>(bytes) / quartiles(times).median / 1e3;
}

class Report {
 public:
  void add(const char* format, auto... values) {
    char line[1024];
    std::snprintf(line, sizeof line, format, values...);
    text_ += text_.empty() ? "" : ",\n";
    text_ += line;
  }
  const char* text() const { return text_.c_str(); }

 private:
  std::string text_;
};

struct Benchmark {
  Options options;
  std::shared_ptr<gpu::GpuBackend> backend;
  cudaDeviceProp device;
  std::size_t flush_bytes = 0;
  double copy = 0;
  Clock::time_point begin = Clock::now();
  Report cells, append, prefill;
  std::vector<double> baseline = {};          // medians of the first scheme, 0 where it was not measured
  std::vector<double> prefill_baseline = {};  // the same of prefill_of()

  std::size_t free_memory() const {
    std::size_t free = 0, total = 0;
    must(cudaMemGetInfo(&free, &total), "free memory");
    return free / 10 * 9;
  }

  void attend(const NamedScheme& one, bool is_baseline) {
    const int longest = *std::max_element(options.contexts.begin(), options.contexts.end());
    int most = *std::max_element(options.batches.begin(), options.batches.end());
    // One filling serves all cells; what does not fit is halved until it does.
    const PageLayout layout(one.scheme.k, one.scheme.v, kHeadDim);
    const auto needed = [&](int sequences, int context) {
      return 1.1 * static_cast<double>(layout.bytes() + 2 * kZeroExtent * 4) * kKvHeads * sequences *
             (static_cast<double>(context) / kPageTokens);
    };
    const double free = static_cast<double>(free_memory()) - 2.0 * static_cast<double>(flush_bytes);
    while (most > 1 && needed(most, longest) > free) most /= 2;
    Stopwatch watch(flush_bytes);
    std::size_t cell = 0;
    try {
      Batch batch(backend, one.scheme, most, longest, static_cast<std::size_t>(free));
      for (const int context : options.contexts)
        for (const int sequences : options.batches) {
          const std::size_t at_cell = cell++;
          if (baseline.size() <= at_cell) baseline.push_back(0);
          const auto skip = [&](const char* why) {
            cells.add("    {\"scheme\": \"%s\", \"batch\": %d, \"context\": %d, \"skipped\": \"%s\"}",
                      one.name.c_str(), sequences, context, why);
          };
          if (sequences > most) {
            skip("out of memory");
            continue;
          }
          if (seconds_since(begin) > options.seconds) {
            skip("out of time");
            continue;
          }
          backend->observe(&watch);
          std::vector<double> times;
          for (int i = 0; i < options.repeats + 3; ++i) {
            batch.attend(sequences, context);
            const double time = watch.take();
            if (i >= 3) times.push_back(time);
          }
          backend->observe(nullptr);
          const Quartiles q = quartiles(times);
          if (is_baseline) baseline[at_cell] = q.median;
          const double bytes = batch.bytes(sequences, context), rate = bytes / q.median / 1e3;
          cells.add(
              "    {\"scheme\": \"%s\", \"batch\": %d, \"context\": %d, \"microseconds\": %.3f, \"low\": "
              "%.3f, "
              "\"high\": %.3f, \"bytes\": %.0f, \"gigabytesPerSecond\": %.2f, \"ofCopy\": %.4f, "
              "\"overFp16\": %s}",
              one.name.c_str(), sequences, context, q.median, q.low, q.high, bytes, rate, rate / copy,
              baseline[at_cell] > 0 ? std::to_string(baseline[at_cell] / q.median).c_str() : "null");
        }
      prefill_of(one, batch, longest, is_baseline, watch);
    } catch (const Error& error) {
      backend->observe(nullptr);
      std::fprintf(stderr, "innerkv_cuda_bench: %s: %s\n", one.name.c_str(), error.what());
      cells.add("    {\"scheme\": \"%s\", \"skipped\": \"failed\"}", one.name.c_str());
    }
  }

  /// The last tokens of one sequence attend causally to all of it.
  void prefill_of(const NamedScheme& one, Batch& batch, int longest, bool is_baseline, Stopwatch& watch) {
    std::size_t cell = 0;
    for (const int context : {4096, 32768})
      for (const int queries : {512, 2048}) {
        const std::size_t at_cell = cell++;
        if (prefill_baseline.size() <= at_cell) prefill_baseline.push_back(0);
        if (context > longest || seconds_since(begin) > options.seconds) {
          prefill.add("    {\"scheme\": \"%s\", \"queries\": %d, \"context\": %d, \"skipped\": \"%s\"}",
                      one.name.c_str(), queries, context,
                      context > longest ? "longer than --tokens" : "out of time");
          continue;
        }
        backend->observe(&watch);
        std::vector<double> times;
        for (int i = 0; i < std::min(options.repeats, 9) + 2; ++i) {
          batch.attend(1, context, queries);
          const double time = watch.take();
          if (i >= 2) times.push_back(time);
        }
        backend->observe(nullptr);
        const Quartiles q = quartiles(times);
        if (is_baseline) prefill_baseline[at_cell] = q.median;
        const double pairs = static_cast<double>(queries) * (context - 0.5 * (queries - 1)),
                     operations = 4.0 * pairs * kQueryHeads * kHeadDim;
        prefill.add(
            "    {\"scheme\": \"%s\", \"queries\": %d, \"context\": %d, \"microseconds\": %.3f, \"low\": "
            "%.3f, \"high\": %.3f, \"teraflops\": %.2f, \"ofFp16Time\": %s}",
            one.name.c_str(), queries, context, q.median, q.low, q.high, operations / q.median / 1e6,
            prefill_baseline[at_cell] > 0 ? std::to_string(q.median / prefill_baseline[at_cell]).c_str()
                                          : "null");
      }
  }

  /// One token for every layer of a model, then many tokens for one layer. Caches are warm: the tokens were
  /// just made.
  void append_of(const NamedScheme& one) {
    constexpr int kLayers = 32, kBefore = 512, kSteps = 64, kBulk = 4096, kRounds = 20;
    Stopwatch watch(0);
    const std::size_t row = at(kKvHeads * kHeadDim);
    const auto k = random_tokens(kBulk, 11), v = random_tokens(kBulk, 12);
    double mean = 0;
    Quartiles wall{}, bulk{};
    try {
      const auto budget = free_memory();
      {
        const auto cache = std::make_shared<Cache>(backend, config_of(one.scheme, kLayers, budget));
        const auto sequence = cache->sequence();
        for (int layer = 0; layer < kLayers; ++layer) sequence->append(layer, k.data(), v.data(), kBefore);
        backend->observe(&watch);
        std::vector<double> times;
        for (int step = -32; step < kSteps;
             ++step) {  // 32 steps of warm-up: a whole period of values in blocks
          const auto start = Clock::now();
          for (int layer = 0; layer < kLayers; ++layer)
            sequence->append(layer, k.data() + row * at(kBefore + step + 32),
                             v.data() + row * at(kBefore + step + 32), 1);
          const double kernels = watch.take();
          if (step < 0) continue;
          times.push_back(1e6 * seconds_since(start));
          mean += kernels / kSteps;
        }
        wall = quartiles(times);
      }
      std::vector<double> times;
      for (int round = -3; round < kRounds; ++round) {
        const auto cache = std::make_shared<Cache>(backend, config_of(one.scheme, 1, budget));
        const auto sequence = cache->sequence();
        sequence->append(0, k.data(), v.data(), kBulk);
        const double kernels = watch.take();
        if (round >= 0) times.push_back(kernels);
      }
      backend->observe(nullptr);
      bulk = quartiles(times);
    } catch (const Error& error) {
      backend->observe(nullptr);
      std::fprintf(stderr, "innerkv_cuda_bench: %s: %s\n", one.name.c_str(), error.what());
      append.add("    {\"scheme\": \"%s\", \"skipped\": \"failed\"}", one.name.c_str());
      return;
    }
    append.add(
        "    {\"scheme\": \"%s\", \"tokenKernelMicroseconds\": %.3f, \"tokenWallMicroseconds\": %.3f, "
        "\"bulkKernelMicroseconds\": %.3f, \"bulkTokensPerSecond\": %.1f, \"bulkInputGigabytesPerSecond\": "
        "%.3f}",
        one.name.c_str(), mean, wall.median, bulk.median, 1e6 * kBulk / bulk.median,
        4.0 * static_cast<double>(row) * kBulk / bulk.median / 1e3);
  }

  void run() {
    for (const NamedScheme& one : compared_schemes()) {
      const auto& wanted = options.schemes;
      if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), one.name) == wanted.end()) continue;
      std::fprintf(stderr, "%6.1f s  %s\n", seconds_since(begin), one.name.c_str());
      append_of(one);
      attend(one, one.name == "fp16");
    }
    int driver = 0, runtime = 0;
    must(cudaDriverGetVersion(&driver), "the driver's version");
    must(cudaRuntimeGetVersion(&runtime), "the runtime's version");
    std::printf(
        "{\n  \"benchmark\": \"cuda\",\n  \"device\": {\"name\": \"%s\", \"capability\": \"%d.%d\", "
        "\"multiprocessors\": %d, \"memoryBytes\": %zu, \"l2Bytes\": %d, \"driver\": %d, \"runtime\": %d},\n"
        "  \"shape\": {\"queryHeads\": %d, \"kvHeads\": %d, \"headDim\": %d},\n"
        "  \"windows\": {\"sink\": %d, \"recent\": %d},\n  \"repeats\": %d,\n  \"flushBytes\": %zu,\n"
        "  \"copyGigabytesPerSecond\": %.2f,\n  \"seconds\": %.1f,\n",
        device.name, device.major, device.minor, device.multiProcessorCount, device.totalGlobalMem,
        device.l2CacheSize, driver, runtime, kQueryHeads, kKvHeads, kHeadDim, kSink, kRecent, options.repeats,
        flush_bytes, copy, seconds_since(begin));
    std::printf(
        "  \"filling\": \"pages are copies of a few quantised ones; timing does not depend on values\",\n"
        "  \"cells\": [\n%s\n  ],\n  \"append\": [\n%s\n  ],\n  \"prefill\": [\n%s\n  ]\n}\n",
        cells.text(), append.text(), prefill.text());
  }
};

}  // namespace
}  // namespace innerkv::bench

int main(int argc, char** argv) {
  using namespace innerkv;
  using namespace innerkv::bench;
  const Options options = read(argc, argv);
  try {
    const auto backend = std::static_pointer_cast<gpu::GpuBackend>(make_cuda_backend());
    Benchmark benchmark{options, backend, {}};
    must(cudaGetDeviceProperties(&benchmark.device, 0), "the device's properties");
    benchmark.flush_bytes = 4 * static_cast<std::size_t>(benchmark.device.l2CacheSize);
    benchmark.copy =
        copy_bandwidth(options.repeats, std::min(std::size_t{2} << 30, benchmark.free_memory() / 4));
    benchmark.run();
  } catch (const Error& error) {
    std::fprintf(stderr, "innerkv_cuda_bench: *** NOT RUN: %s ***\n", error.what());
    return error.code() == ErrorCode::kUnsupported ? 77 : 1;
  }
  return 0;
}
