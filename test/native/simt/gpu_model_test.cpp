// The model runner on the GPU against the same runner on the CPU: small random models of every type of
// weights, through caches of their own backends. Runs on the emulated GPU (gpu_model_test) and on a real one
// (gpu_model_gpu_test).
// Long file: small models of every kind, and every way in which a pass can fail.
//
// Both sides add in other orders, so they differ by noise, whose size follows from what is rounded on the
// way:
//   float32   a key or value near the middle of two binary16 numbers may fall to the other one. If all did,
//             results would move by 2^-12 of their size; few do.
//   binary16  weights and rows of a product are rounded to 2^-12 each, which is 2^-12 sqrt(2/3) of its size;
//   14
//             products add in squares, and norms may amplify that 2.6 times: 2^-9.
//   8 bits    an activation near the middle of two codes may fall to the other one: less than rounding did.
#include "cuda/gpu_model.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "model/cpu_model.h"
#include "model/runner.h"
#include "model_support.h"
#include "simt/gpu_under_test.h"
#include "support.h"
#ifndef INNERKV_ON_GPU
#include "simt/device_log.h"
#endif

namespace innerkv::test {
namespace {

// ---- models ----

struct Shape {
  TensorType type = TensorType::kF32, head_type = TensorType::kF32;
  int hidden = 256, intermediate = 256, query_heads = 4, kv_heads = 2, head_dim = 64, vocabulary = 70,
      layers = 2;
  bool biases = false, head_norms = false, tied = false, half_layout = true, bare_norms = false;
  float value_bias = 0;  // of the last channel of the last layer's values
};

/// Small, because emulation is slow.
Shape small_shape() {
  Shape shape;
  shape.type = TensorType::kQ8_0;
  shape.hidden = shape.intermediate = 64;
  shape.query_heads = 2;
  shape.kv_heads = 1;
  shape.head_dim = 32;
  return shape;
}

/// In a file that is gone when the test has it in memory.
std::shared_ptr<const Model> random_model(const Shape& shape, std::uint64_t seed = 1) {
  check::Random random(seed);
  ModelConfig config;
  config.layers = shape.layers;
  config.hidden = shape.hidden;
  config.intermediate = shape.intermediate;
  config.query_heads = shape.query_heads;
  config.kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.vocabulary = shape.vocabulary;
  config.rms_epsilon = 1e-5f;
  config.half_layout = shape.half_layout;
  config.bare_norms = shape.bare_norms;
  for (int i = 0; i < shape.head_dim / 2; ++i)
    config.theta.push_back(std::pow(10000.0, -2.0 * i / shape.head_dim));
  std::string path = (std::filesystem::temp_directory_path() / "innerkv-gpu-model-XXXXXX").string();
  const int file = mkstemp(path.data());
  CHECK(file >= 0);
  std::vector<TensorPlace> places;
  std::vector<std::uint8_t> bytes(6);  // tensors lie at even addresses only
  const auto add = [&](const std::string& name, TensorType type, std::vector<std::int64_t> sizes,
                       const std::vector<std::uint8_t>& blocks) {
    places.push_back({name, path, type, std::move(sizes), static_cast<std::int64_t>(bytes.size()),
                      static_cast<std::int64_t>(blocks.size()), 1});
    bytes.insert(bytes.end(), blocks.begin(), blocks.end());
  };
  const auto matrix = [&](const std::string& name, TensorType type, int rows, int columns, float spread) {
    add(name, type, {rows, columns}, random_blocks(type, rows * columns, spread, random));
    if (type == TensorType::kTernary) places.back().scale = spread / 1.2f;  // codes of -2 to 1
  };
  const auto vector = [&](const std::string& name, int size, float center, float last = 0) {
    std::vector<std::uint8_t> blocks(at(4 * size));
    for (int i = 0; i < size; ++i) {
      const float value = center + 0.3f * random.normal() + (i == size - 1 ? last : 0.0f);
      std::memcpy(blocks.data() + 4 * i, &value, 4);
    }
    add(name, TensorType::kF32, {size}, blocks);
  };
  const auto scale = [](int columns) { return 1 / std::sqrt(static_cast<float>(columns)); };
  const int heads = shape.query_heads * shape.head_dim, keys = shape.kv_heads * shape.head_dim;
  matrix("embed", shape.type, shape.vocabulary, shape.hidden, 1);
  if (!shape.tied) matrix("head", shape.head_type, shape.vocabulary, shape.hidden, 4 * scale(shape.hidden));
  vector("norm", shape.hidden, 1);
  for (int i = 0; i < shape.layers; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    for (const char* norm : {"attnNorm", "ffnNorm"})
      if (!shape.bare_norms) vector(layer + norm, shape.hidden, 1);
    matrix(layer + "q", shape.type, heads, shape.hidden, scale(shape.hidden));
    matrix(layer + "k", shape.type, keys, shape.hidden, scale(shape.hidden));
    matrix(layer + "v", shape.head_type, keys, shape.hidden, scale(shape.hidden));  // mixed, as files are
    matrix(layer + "o", shape.type, shape.hidden, heads, scale(heads));
    matrix(layer + "gate", shape.type, shape.intermediate, shape.hidden, scale(shape.hidden));
    matrix(layer + "up", shape.type, shape.intermediate, shape.hidden, scale(shape.hidden));
    matrix(layer + "down", shape.type, shape.hidden, shape.intermediate, scale(shape.intermediate));
    if (shape.biases || shape.value_bias != 0) {
      vector(layer + "qBias", heads, 0);
      vector(layer + "kBias", keys, 0);
      vector(layer + "vBias", keys, 0, i == shape.layers - 1 ? shape.value_bias : 0);
    }
    if (shape.head_norms) {
      vector(layer + "qNorm", shape.head_dim, 1);
      vector(layer + "kNorm", shape.head_dim, 1);
    }
  }
  CHECK(write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  close(file);
  const auto model = std::make_shared<const Model>(config, places);
  unlink(path.c_str());
  return model;
}

// ---- both sides ----

/// A model with the caches of its device.
struct Side {
  std::shared_ptr<const Model> model;
  std::shared_ptr<CpuBackend> cpu;
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Runner> runner;

  std::shared_ptr<Cache> cache(const LayerScheme& scheme) const {
    const ModelConfig& shape = model->config();
    CacheConfig config = config_of({scheme}, shape.cache_head_dim(), shape.kv_heads);
    config.layers = shape.layers;
    config.scheme_of_layer.assign(at(shape.layers), 0);
    config.window_of_layer.assign(at(shape.layers), 0);
    config.query_heads = shape.query_heads;
    config.rope = {};
    config.softmax_scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
    return std::make_shared<Cache>(backend, config);
  }
};

Side cpu_side(std::shared_ptr<const Model> model) {
  Side side{model, std::make_shared<CpuBackend>(1, nullptr), nullptr, nullptr};
  side.backend = side.cpu;
  side.runner =
      std::make_unique<Runner>(model, std::make_unique<CpuModel>(model, side.cpu), side.cpu->pool());
  return side;
}

std::unique_ptr<ModelDevice> gpu_device(const std::shared_ptr<const Model>& model) {
#ifdef INNERKV_ON_GPU
  return make_cuda_model(model);
#else
  return std::make_unique<gpu::GpuModel>(model, nullptr);
#endif
}

Side gpu_side(std::shared_ptr<const Model> model) {
  Side side{model, std::make_shared<CpuBackend>(1, nullptr), gpu_backend(), nullptr};
  side.runner = std::make_unique<Runner>(model, gpu_device(model), side.cpu->pool());
  return side;
}

std::vector<std::int32_t> text(int count, std::uint64_t seed, int vocabulary) {
  check::Random random(seed);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(random.below(vocabulary));
  return tokens;
}

ForwardOptions options_of(bool bytes, int chunk = 512, int step = 512) {
  ForwardOptions options;
  options.byte_activations = bytes;
  options.chunk = chunk;
  options.step = step;
  return options;
}

struct Results {
  std::vector<float> prefill, decoded, nll;
};

/// A prompt in chunks of 9; then, after that prompt in float32, two steps of a batch of two; and losses.
Results run(const Side& side, bool bytes, const LayerScheme& scheme) {
  const int vocabulary = side.model->config().vocabulary;
  const auto cache = side.cache(scheme);
  const std::vector<std::int32_t> prompt = text(18, 2, vocabulary), other = text(3, 3, vocabulary),
                                  scored = text(10, 4, vocabulary);
  Results results;
  results.prefill.resize(prompt.size() * at(vocabulary));
  {
    const auto sequence = cache->sequence();
    ForwardItem item{sequence.get(), prompt, results.prefill.data(), 18, {}, nullptr};
    side.runner->forward({&item, 1}, options_of(bytes, 9), nullptr, nullptr);
  }
  const auto a = cache->sequence(), b = cache->sequence(), c = cache->sequence();
  ForwardItem items[] = {{a.get(), prompt, nullptr, 0, {}, nullptr},
                         {b.get(), other, nullptr, 0, {}, nullptr}};
  side.runner->forward(items, options_of(false), nullptr, nullptr);
  results.decoded.resize(at(4 * vocabulary));
  for (int i = 0; i < 2; ++i) {
    const std::int32_t next[] = {(i * 11 + 5) % vocabulary, (i * 7 + 1) % vocabulary};
    ForwardItem batch[] = {
        {a.get(), {next, 1}, results.decoded.data() + 2 * i * vocabulary, 1, {}, nullptr},
        {b.get(), {next + 1, 1}, results.decoded.data() + (2 * i + 1) * vocabulary, 1, {}, nullptr}};
    side.runner->forward(batch, options_of(bytes), nullptr, nullptr);
  }
  std::vector<std::int32_t> targets(scored.begin() + 1, scored.end());
  targets.push_back(-1);
  results.nll.resize(scored.size());
  ForwardItem item{c.get(), scored, nullptr, 0, targets, results.nll.data()};
  side.runner->forward({&item, 1}, options_of(bytes, 512, 1), nullptr, nullptr);
  CHECK(simt::take_reports().empty());
  return results;
}

/// Root mean square of a difference.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  CHECK(a.size() == b.size());
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum / static_cast<double>(a.size()));
}

LayerScheme sixteen_bits() { return scheme_of({}, {}); }

TEST(
    "models of every type: logits and losses agree with the CPU to the noise of roundings, in both kinds of "
    "activations") {
  // 10 tokens whose losses are wanted are 9 rows, the least that are not few.
  const auto schedules = simt::schedules();
  for (const TensorType type : kAllTypes) {
    if (static_cast<std::size_t>(type) % stride() != 0) continue;
    simt::use(schedules[static_cast<std::size_t>(type) % schedules.size()]);
    Shape shape;
    shape.type = type;
    shape.head_type = type == TensorType::kQ4_K ? TensorType::kQ6_K : type;
    shape.layers = type == TensorType::kF16 || type == TensorType::kQ4_K ? 2 : 1;  // emulation is slow
    const int kind = static_cast<int>(type);
    shape.tied = kind % 3 == 0;
    shape.biases = kind % 3 == 1;
    shape.head_norms = kind % 2 == 0;
    shape.half_layout = kind % 4 < 2;
    shape.bare_norms = type == TensorType::kTernary || type == TensorType::kBf16;
    if (info_of(type).elements < 256) {  // the least that a type allows, because emulation is slow
      const bool quantised = is_quantised(type);
      shape.hidden = quantised ? 96 : 100;
      shape.intermediate = quantised ? 64 : 84;
      shape.head_dim = quantised ? 32 : 20;
    }
    const auto model = random_model(shape, 10 + static_cast<std::uint64_t>(type));
    const Side cpu = cpu_side(model), gpu = gpu_side(model);
    const Results exact = run(cpu, false, sixteen_bits()), rounded = run(cpu, true, sixteen_bits()),
                  found = run(gpu, false, sixteen_bits()), found_rounded = run(gpu, true, sixteen_bits());
    const auto compare = [&](std::vector<float> Results::* part, const char* name, bool few) {
      const std::string what = std::string(info_of(type).name) + " " + name;
      const double size = distance(exact.*part, std::vector<float>((exact.*part).size()));
      CHECK_WITH(distance(exact.*part, found.*part) <= 0x1p-12 * size, what + " in float32");
      // Many rows: binary16, whatever the CPU does with them.
      const Results& measure = few ? rounded : exact;
      const double allowed = !few                 ? 0x1p-9 * size
                             : is_quantised(type) ? distance(exact.*part, rounded.*part)
                                                  : 0x1p-12 * size;
      CHECK_WITH(distance(measure.*part, found_rounded.*part) <= allowed, what + " in 8 bits");
      if (few != !is_quantised(type))
        CHECK_WITH(distance(exact.*part, found_rounded.*part) > 0, what + " is not rounded at all");
      if (std::getenv("INNERKV_SHOW"))
        std::printf("%-24s float32 %.2g of %.2g; 8 bits %.2g of %.2g\n", what.c_str(),
                    distance(exact.*part, found.*part) / size, 0x1p-12,
                    distance(measure.*part, found_rounded.*part) / size, allowed / size);
    };
    compare(&Results::prefill, "prefill", false);
    compare(&Results::decoded, "decoding", true);
    compare(&Results::nll, "losses", false);
  }
}

TEST("float32: a prompt token by token, in chunks and beside others gives the same bits") {
  Shape shape;
  shape.type = TensorType::kQ4_0;
  shape.head_type = TensorType::kBf16;
  const Side gpu = gpu_side(random_model(shape));
  const int vocabulary = shape.vocabulary;
  const std::vector<std::int32_t> prompt = text(11, 2, vocabulary), other = text(4, 5, vocabulary);
  LayerScheme scheme =
      scheme_of({4, Group::kToken, Mode::kMidRise}, {2, Group::kToken, Mode::kMidRise}, 2, 3);
  const auto cache = gpu.cache(scheme);
  const auto whole = cache->sequence(), pieces = cache->sequence(), single = cache->sequence(),
             beside = cache->sequence();
  std::vector<float> a(at(11 * vocabulary)), b(a.size()), c(a.size());
  ForwardItem first{whole.get(), prompt, a.data(), 11, {}, nullptr};
  gpu.runner->forward({&first, 1}, options_of(false, 512, 1), nullptr, nullptr);
  ForwardItem both[] = {{pieces.get(), prompt, b.data(), 11, {}, nullptr},
                        {beside.get(), other, nullptr, 0, {}, nullptr}};
  gpu.runner->forward(both, options_of(false, 5, 1), nullptr, nullptr);
  for (int i = 0; i < 11; ++i) {
    ForwardItem one{single.get(), {&prompt[at(i)], 1}, c.data() + i * vocabulary, 1, {}, nullptr};
    gpu.runner->forward({&one, 1}, options_of(false), nullptr, nullptr);
  }
  CHECK(same_bits(a, b));
  CHECK(same_bits(a, c));
  CHECK(saved(*whole) == saved(*pieces) && saved(*whole) == saved(*single));
  CHECK(simt::take_reports().empty());
}

TEST("a token of a batch of up to 8 in 8 bits is the token alone") {
  Shape shape;
  shape.type = TensorType::kQ4_K;
  shape.head_type = TensorType::kQ6_K;
  const Side gpu = gpu_side(random_model(shape));
  const auto cache = gpu.cache(sixteen_bits());
  const std::vector<std::int32_t> tokens = text(5, 7, shape.vocabulary);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<ForwardItem> items;
  std::vector<float> together(at(5 * shape.vocabulary));
  for (int i = 0; i < 5; ++i) {
    sequences.push_back(cache->sequence());
    items.push_back({sequences.back().get(),
                     {&tokens[at(i)], 1},
                     together.data() + i * shape.vocabulary,
                     1,
                     {},
                     nullptr});
  }
  gpu.runner->forward(items, options_of(true), nullptr, nullptr);
  for (int i = 0; i < 5; ++i) {
    const auto sequence = cache->sequence();
    std::vector<float> alone(at(shape.vocabulary));
    ForwardItem item{sequence.get(), {&tokens[at(i)], 1}, alone.data(), 1, {}, nullptr};
    gpu.runner->forward({&item, 1}, options_of(true), nullptr, nullptr);
    CHECK(std::memcmp(alone.data(), together.data() + i * shape.vocabulary, sizeof(float) * alone.size()) ==
          0);
  }
  CHECK(simt::take_reports().empty());
}

TEST("observed heads are the CPU's") {
  Shape shape;
  shape.head_norms = true;
  shape.hidden = 96;
  const auto model = random_model(shape);
  const std::vector<std::int32_t> tokens = text(9, 3, shape.vocabulary);
  std::vector<Moments> moments;
  for (const Side& side : {cpu_side(model), gpu_side(model)}) {
    moments.emplace_back(shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim, 4);
    const auto cache = side.cache(sixteen_bits());
    const auto sequence = cache->sequence();
    ForwardItem item{sequence.get(), tokens, nullptr, 0, {}, nullptr};
    side.runner->forward({&item, 1}, options_of(false), &moments.back(), nullptr);
  }
  CHECK(moments[0].tokens == moments[1].tokens && moments[0].query_tokens == moments[1].query_tokens);
  for (const auto part : {&Moments::key_sum, &Moments::key_square, &Moments::query_square}) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < (moments[0].*part).size(); ++i) {
      difference += std::pow((moments[0].*part)[i] - (moments[1].*part)[i], 2);
      size += std::pow((moments[0].*part)[i], 2);
    }
    CHECK(size > 0 && std::sqrt(difference) <= 0x1p-12 * std::sqrt(size));
  }
  CHECK(simt::take_reports().empty());
}

/// Passes everything on, sets a flag on the way into a layer and notes which rows are scored together.
class Watched final : public ModelDevice {
 public:
  using Scores = std::vector<std::pair<int, int>>;  // first row, rows
  Watched(std::unique_ptr<ModelDevice> device, int layer, std::atomic<bool>& flag, Scores* scores = nullptr)
      : device_(std::move(device)), layer_(layer), flag_(flag), scores_(scores) {}
  std::string products() const override { return device_->products(); }
  double product_seconds() const override { return device_->product_seconds(); }
  void begin(const Round& round) override { device_->begin(round); }
  HeadRows heads(int layer) override {
    if (layer == layer_) flag_ = true;
    return device_->heads(layer);
  }
  ObservedRows observed() override { return device_->observed(); }
  void finish(int layer) override { device_->finish(layer); }
  void score(int first, std::span<const ScoredRow> rows) override {
    if (scores_) scores_->emplace_back(first, static_cast<int>(rows.size()));
    device_->score(first, rows);
  }
  void end() override { device_->end(); }
  void cancel() noexcept override { device_->cancel(); }

 private:
  std::unique_ptr<ModelDevice> device_;
  int layer_;
  std::atomic<bool>& flag_;
  Scores* scores_;
};

/// `side` with a runner whose device is watched.
Side watched(const Side& side, std::unique_ptr<ModelDevice> device, int layer, std::atomic<bool>& flag,
             Watched::Scores* scores = nullptr) {
  Side result = side;
  result.runner = std::make_unique<Runner>(
      side.model, std::make_unique<Watched>(std::move(device), layer, flag, scores), side.cpu->pool());
  return result;
}

TEST("neighbouring rows are scored together, whichever sequences they belong to, with the bits of one each") {
  const auto model = random_model(small_shape());
  const std::size_t vocabulary = at(model->config().vocabulary);
  std::atomic<bool> unused{false};
  struct Wish {
    int tokens;
    bool logits, losses;
  };
  const std::vector<Wish> mixed = {{4, false, true}, {2, true, false}, {3, false, false}, {1, true, true}};
  const std::vector<Wish> apart(3, {1, true, false}), many(70, {1, true, false});
  const auto check = [&](const Side& side, std::unique_ptr<ModelDevice> device,
                         const std::vector<Wish>& wishes, const Watched::Scores& expected) {
    Watched::Scores scores;
    const Side counted = watched(side, std::move(device), -1, unused, &scores);
    const auto cache = side.cache(sixteen_bits());
    struct Text {
      std::unique_ptr<Sequence> sequence;
      std::vector<std::int32_t> tokens, targets;
      std::vector<float> logits, nll;
      ForwardItem item(const Wish& wish) {
        return {sequence.get(), tokens, logits.data(), wish.logits ? wish.tokens : 0, targets, nll.data()};
      }
    };
    const auto texts = [&] {
      std::vector<Text> all;
      for (std::size_t i = 0; i < wishes.size(); ++i) {
        Text text{cache->sequence(), test::text(wishes[i].tokens, i, 70), {}, {}, {}};
        text.logits.assign(wishes[i].logits ? text.tokens.size() * vocabulary : 0, NAN);
        if (wishes[i].losses) {
          text.targets = test::text(wishes[i].tokens, 100 + i, 70);
          if (wishes[i].tokens > 1) text.targets[1] = -1;
          text.nll.assign(text.tokens.size(), NAN);
        }
        all.push_back(std::move(text));
      }
      return all;
    };
    std::vector<Text> together = texts(), alone = texts();
    std::vector<ForwardItem> items;
    for (std::size_t i = 0; i < wishes.size(); ++i) items.push_back(together[i].item(wishes[i]));
    counted.runner->forward(items, options_of(false), nullptr, nullptr);
    CHECK(scores == expected);
    for (std::size_t i = 0; i < wishes.size(); ++i) {
      const ForwardItem item = alone[i].item(wishes[i]);
      side.runner->forward({&item, 1}, options_of(false), nullptr, nullptr);
      CHECK(same_bits(together[i].logits, alone[i].logits) && same_bits(together[i].nll, alone[i].nll));
      for (const auto* numbers : {&together[i].logits, &together[i].nll})
        CHECK(std::all_of(numbers->begin(), numbers->end(), [](float x) { return std::isfinite(x); }));
      if (together[i].nll.size() > 1) CHECK(together[i].nll[1] == 0 && together[i].nll[0] > 0);
    }
  };
  const Side cpu = cpu_side(model), gpu = gpu_side(model);
  const Watched::Scores runs = {{0, 1}, {2, 4}, {9, 1}};
  check(cpu, std::make_unique<CpuModel>(model, cpu.cpu), mixed, runs);
  check(gpu, gpu_device(model), mixed, runs);
  check(gpu, gpu_device(model), apart, {{0, 3}});
  check(cpu, std::make_unique<CpuModel>(model, cpu.cpu), many, {{0, 64}, {64, 6}});
  CHECK(simt::take_reports().empty());
}

/// Two sequences of different lengths, in a scheme whose windows and pages both change.
struct Pair {
  std::unique_ptr<Sequence> a, b;
  std::vector<std::int32_t> more_a = text(9, 21, 70), more_b = text(3, 22, 70);
  explicit Pair(const Side& side) {
    const auto cache =
        side.cache(scheme_of({3, Group::kToken, Mode::kMidRise}, {2, Group::kTokens32, Mode::kHybrid}, 4, 8));
    a = cache->sequence();
    b = cache->sequence();
    for (auto [sequence, count] : {std::pair{a.get(), 43}, {b.get(), 5}}) {
      const Tokens tokens = tokens_of(cache->config(), count, 5);
      for (int layer = 0; layer < cache->config().layers; ++layer) append(*sequence, tokens, 0, count, layer);
    }
  }
  int forward(const Side& side, const std::atomic<bool>* aborted) {
    ForwardItem items[] = {{a.get(), more_a, nullptr, 0, {}, nullptr},
                           {b.get(), more_b, nullptr, 0, {}, nullptr}};
    return error_of([&] { side.runner->forward(items, options_of(true, 6), nullptr, aborted); });
  }
  std::pair<Bytes, Bytes> bytes() const { return {saved(*a), saved(*b)}; }
};

TEST("aborted in any layer: sequences are as they were, and the next call is none the worse") {
  Shape shape;
  shape.type = TensorType::kQ8_0;
  const auto model = random_model(shape);
  Side gpu = gpu_side(model);
  Pair pair(gpu), untouched(gpu);
  const auto before = pair.bytes();
  for (const int layer : {-1, 0, 1}) {
    std::atomic<bool> flag{layer < 0};
    CHECK(pair.forward(watched(gpu, gpu_device(model), layer, flag), &flag) ==
          static_cast<int>(ErrorCode::kAborted));
    CHECK(pair.bytes() == before);
  }
  CHECK(pair.forward(gpu, nullptr) == -1 && untouched.forward(gpu, nullptr) == -1);
  CHECK(pair.bytes() == untouched.bytes() && pair.bytes() != before);
  CHECK(simt::take_reports().empty());
}

TEST("a key or value beyond binary16: the layer is named and sequences are as they were") {
  Shape shape;
  shape.value_bias = 70000;
  const Side gpu = gpu_side(random_model(shape)), cpu = cpu_side(gpu.model);
  std::string texts[2];
  for (const Side* side : {&gpu, &cpu}) {
    Pair pair(*side);
    const auto before = pair.bytes();
    ForwardItem item{pair.a.get(), pair.more_a, nullptr, 0, {}, nullptr};
    try {
      side->runner->forward({&item, 1}, options_of(true), nullptr, nullptr);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kNotFinite);
      texts[side == &cpu] = error.what();
    }
    CHECK(pair.bytes() == before);
  }
  CHECK(texts[0] == texts[1] && texts[0].find("Layer 1") == 0);
  CHECK(simt::take_reports().empty());
}

#ifndef INNERKV_ON_GPU
TEST("no memory at the n-th allocation: sequences are as they were, and the next call is none the worse") {
  Shape shape;
  shape.type = TensorType::kQ5_1;
  const auto model = random_model(shape);
  constexpr int kPlenty = 1 << 30, kNone = static_cast<int>(ErrorCode::kOutOfMemory);
  int refused = 0;
  for (int n = 0;; ++n) {
    simt::allocations_left = n;
    const int error = error_of([&] { gpu_device(model); });
    simt::allocations_left = kPlenty;
    if (error == -1) break;
    CHECK(error == kNone);
    ++refused;
  }
  CHECK(refused >= 2);  // the weights and the piece on its way
  const Side gpu = gpu_side(model);
  Pair pair(gpu), untouched(gpu);
  const auto before = pair.bytes();
  refused = 0;
  for (int n = 0;; ++n) {
    simt::allocations_left = n;
    const int error = pair.forward(gpu, nullptr);
    simt::allocations_left = kPlenty;
    if (error == -1) break;
    CHECK(error == kNone);
    CHECK(pair.bytes() == before);
    ++refused;
  }
  CHECK(refused >= 2);  // the round's memory, its uploads, and what the cache needs
  CHECK(untouched.forward(gpu, nullptr) == -1);
  CHECK(pair.bytes() == untouched.bytes());
  CHECK(simt::take_reports().empty());
}

/// Logits of `steps` steps of a batch of two behind `first` and 2 tokens, and the sequences' bytes after
/// them.
std::pair<std::vector<float>, std::vector<Bytes>> decode(const Side& side, const LayerScheme& scheme,
                                                         int first, int steps) {
  const int vocabulary = side.model->config().vocabulary;
  const auto cache = side.cache(scheme);
  const auto a = cache->sequence(), b = cache->sequence();
  for (auto [sequence, count] : {std::pair{a.get(), first}, {b.get(), 2}}) {
    const Tokens tokens = tokens_of(cache->config(), count, 5);
    for (int layer = 0; layer < cache->config().layers; ++layer) append(*sequence, tokens, 0, count, layer);
  }
  std::vector<float> logits(at(2 * steps * vocabulary));
  for (int i = 0; i < steps; ++i) {
    const std::int32_t next[] = {(i * 11 + 5) % vocabulary, (i * 7 + 1) % vocabulary};
    float* const row = logits.data() + 2 * i * vocabulary;
    ForwardItem batch[] = {{a.get(), {next, 1}, row, 1, {}, nullptr},
                           {b.get(), {next + 1, 1}, row + vocabulary, 1, {}, nullptr}};
    side.runner->forward(batch, options_of(true), nullptr, nullptr);
  }
  return {std::move(logits), {saved(*a), saved(*b)}};
}

/// A side whose recordings can be counted.
struct Counted {
  Side side;
  const gpu::GpuModel* device;
  explicit Counted(const std::shared_ptr<const Model>& model)
      : side{model, std::make_shared<CpuBackend>(1, nullptr), gpu_backend(), nullptr} {
    auto made = std::make_unique<gpu::GpuModel>(model, nullptr);
    device = made.get();
    side.runner = std::make_unique<Runner>(model, std::move(made), side.cpu->pool());
  }
  const gpu::Recording::Counts& counts() const { return device->recorded(); }
};

struct WithoutGraphs {
  WithoutGraphs() { setenv("INNERKV_CUDA_GRAPHS", "0", 1); }
  ~WithoutGraphs() { unsetenv("INNERKV_CUDA_GRAPHS"); }
};

TEST("a decoding step is one graph, with the bits of kernels enqueued one by one") {
  const auto model = random_model(small_shape());
  struct Case {
    LayerScheme scheme;
    int first, steps;
  };
  // Windows fill and pages begin; a page is full and the next begins; 32 values at a time, counts come back.
  const Case cases[] = {
      {scheme_of({2, Group::kToken, Mode::kMidRise}, {2, Group::kToken, Mode::kMidRise}, 2, 3), 1, 14},
      {scheme_of({4, Group::kToken, Mode::kMidRise, 1}, {4, Group::kToken, Mode::kMidRise}, 0, 2), 126, 14},
      {scheme_of({3, Group::kToken, Mode::kMidRise}, {2, Group::kTokens32, Mode::kHybrid}, 2, 4), 34, 8}};
  for (const Case& one : cases) {
    const Counted graphs(model);
    const auto found = decode(graphs.side, one.scheme, one.first, one.steps);
    const gpu::Recording::Counts counts = graphs.counts();
    if (std::getenv("INNERKV_SHOW"))
      std::printf("alone %zu, made %zu, launched %zu, set %zu\n", counts.alone, counts.made, counts.launched,
                  counts.set);
    const auto plain = [&] {
      const WithoutGraphs off;
      const Counted none(model);
      const auto expected = decode(none.side, one.scheme, one.first, one.steps);
      CHECK(none.counts().alone == 0 && none.counts().launched == 0);
      return expected;
    }();
    CHECK(same_bits(found.first, plain.first));
    CHECK(found.second == plain.second);
    // All but the steps that do something for the first time; parameters stay but where a grid grows.
    if (&one == &cases[0]) CHECK(counts.launched >= 9 && counts.set == 0);
    if (&one == &cases[1]) CHECK(counts.launched >= 10 && counts.set > 0);
    CHECK(counts.launched > counts.made && counts.made > 0);
  }
  CHECK(simt::take_reports().empty());
}

TEST("a device that refuses graphs, or to launch one, still decodes") {
  const auto model = random_model(small_shape());
  const LayerScheme scheme =
      scheme_of({2, Group::kToken, Mode::kMidRise}, {2, Group::kToken, Mode::kMidRise}, 2, 3);
  const auto expected = decode(Counted(model).side, scheme, 5, 7);
  for (const int granted : {0, 1, 2, 5}) {
    const Counted counted(model);
    simt::graphs_refused = granted;
    const auto found = decode(counted.side, scheme, 5, 7);
    simt::graphs_refused = -1;
    CHECK(same_bits(found.first, expected.first) && found.second == expected.second);
  }
  CHECK(simt::take_reports().empty());
}

TEST("a decoding step brings nothing to the host but its logits and whether all keys were finite") {
  Shape shape;
  shape.type = TensorType::kQ8_0;
  const Side gpu = gpu_side(random_model(shape));
  const auto cache =
      gpu.cache(scheme_of({3, Group::kToken, Mode::kMidRise}, {3, Group::kToken, Mode::kMidRise}));
  const auto sequence = cache->sequence();
  std::vector<float> logits(at(shape.vocabulary));
  for (std::int32_t token = 0; token < 20; ++token) {
    const std::size_t before = simt::bytes_to_host;
    ForwardItem item{sequence.get(), {&token, 1}, logits.data(), 1, {}, nullptr};
    gpu.runner->forward({&item, 1}, options_of(true), nullptr, nullptr);
    CHECK(simt::bytes_to_host - before == sizeof(float) * logits.size() + sizeof(int));
  }
  CHECK(simt::take_reports().empty());
}
#endif

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return innerkv::test::run_gpu_tests("gpu_model", argc, argv); }
