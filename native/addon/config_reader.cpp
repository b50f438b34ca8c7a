#include "config_reader.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "failure.h"

namespace innerkv {

namespace {

bool is_int(double number) {
  return number == std::floor(number) && number >= std::numeric_limits<int>::min() &&
         number <= std::numeric_limits<int>::max();
}

template <class Element>
std::vector<Element> typed(const Napi::Value& value, napi_typedarray_type expected) {
  napi_typedarray_type type;
  std::size_t count = 0;
  void* data = nullptr;
  if (!value.IsTypedArray() ||
      napi_get_typedarray_info(value.Env(), value, &type, &count, &data, nullptr, nullptr) != napi_ok ||
      type != expected)
    return {};
  const auto* from = static_cast<const Element*>(data);
  return {from, from + count};
}

template <class Names>
int index_of(const Names& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) refuse("'" + name + "' is no group or mode of a tensor. See supportedSpecs().");
  return static_cast<int>(found - names.begin());
}

TensorSpec read_spec(const Napi::Value& value) {
  const Fields fields(value, "tensor spec");
  return {fields.integer("bits"), static_cast<Group>(index_of(kGroupNames, fields.text("group"))),
          static_cast<Mode>(index_of(kModeNames, fields.text("mode"))),
          fields.has("outliers") ? fields.integer("outliers") : 0};
}

Basis read_basis(const Napi::Value& value) {
  const Fields fields(value, "basis");
  Basis basis{fields.floats("mean"),
              fields.floats("lam"),
              {},
              fields.bytes("order"),
              fields.floats("metric"),
              fields.floats("feedback"),
              fields.floats("pivot"),
              nullptr};
  for (const float lam : basis.lam) basis.inv_lam.push_back(1.0f / lam);
  return basis;
}

LayerScheme read_scheme(const Napi::Value& value) {
  const Fields fields(value, "layer scheme");
  LayerScheme scheme;
  scheme.k = read_spec(fields.get("k"));
  scheme.v = read_spec(fields.get("v"));
  scheme.sink = fields.integer("sink");
  scheme.recent = fields.integer("recent");
  scheme.block_tokens = fields.integer("blockTokens");
  scheme.hadamard_k = fields.flag("hadamardK");
  scheme.hadamard_v = fields.flag("hadamardV");
  scheme.online_mean = fields.flag("onlineMean");
  scheme.online_lambda = fields.flag("onlineLambda");
  scheme.stat_tokens = fields.integer("statTokens");
  scheme.unbiased_k = fields.flag("unbiasedK");
  scheme.unbiased_v = fields.flag("unbiasedV");
  scheme.clip_k = fields.ratios("clipK");
  scheme.clip_v = fields.ratios("clipV");
  scheme.released_windows = fields.flag("releasedWindows");
  if (fields.has("basis")) {
    const Napi::Array heads = fields.list("basis");
    for (std::uint32_t i = 0; i < heads.Length(); ++i) scheme.basis.push_back(read_basis(heads.Get(i)));
  }
  return scheme;
}

}  // namespace

Fields::Fields(const Napi::Value& object, std::string what) : what_(std::move(what)) {
  if (!object.IsObject()) refuse("The " + what_ + " must be an object.");
  object_ = object.As<Napi::Object>();
}

void Fields::wrong(const char* name, const char* expected) const {
  refuse(std::string("'") + name + "' of the " + what_ + " must be " + expected + ".");
}

Napi::Value Fields::get(const char* name) const { return object_.Get(name); }

double Fields::number(const char* name) const {
  const Napi::Value value = get(name);
  if (!value.IsNumber()) wrong(name, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

int Fields::integer(const char* name) const {
  const double value = number(name);
  if (!is_int(value)) wrong(name, "a 32-bit integer");
  return static_cast<int>(value);
}

bool Fields::flag(const char* name) const {
  const Napi::Value value = get(name);
  if (!value.IsBoolean()) wrong(name, "true or false");
  return value.As<Napi::Boolean>().Value();
}

std::string Fields::text(const char* name) const {
  const Napi::Value value = get(name);
  if (!value.IsString()) wrong(name, "a string");
  return value.As<Napi::String>().Utf8Value();
}

Napi::Array Fields::list(const char* name) const {
  const Napi::Value value = get(name);
  if (!value.IsArray()) wrong(name, "an array");
  return value.As<Napi::Array>();
}

std::vector<int> Fields::integers(const char* name) const {
  const Napi::Array array = list(name);
  std::vector<int> values;
  for (std::uint32_t i = 0; i < array.Length(); ++i) values.push_back(to_int(array.Get(i), name));
  return values;
}

std::vector<float> Fields::ratios(const char* name) const {
  const Napi::Array array = list(name);
  std::vector<float> values;
  for (std::uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::Value value = array.Get(i);
    if (!value.IsNumber()) wrong(name, "a list of numbers");
    values.push_back(value.As<Napi::Number>().FloatValue());
  }
  return values;
}

std::vector<float> Fields::floats(const char* name) const {
  if (!has(name)) return {};
  auto values = typed<float>(get(name), napi_float32_array);
  if (values.empty()) wrong(name, "a Float32Array that is not empty");
  return values;
}

std::vector<double> Fields::doubles(const char* name) const {
  if (!has(name)) return {};
  auto values = typed<double>(get(name), napi_float64_array);
  if (values.empty()) wrong(name, "a Float64Array that is not empty");
  return values;
}

std::vector<std::uint8_t> Fields::bytes(const char* name) const {
  if (!has(name)) return {};
  auto values = typed<std::uint8_t>(get(name), napi_uint8_array);
  if (values.empty()) wrong(name, "a Uint8Array that is not empty");
  return values;
}

int to_int(const Napi::Value& value, const char* name) {
  if (!value.IsNumber() || !is_int(value.As<Napi::Number>().DoubleValue()))
    refuse(std::string(name) + " must be a 32-bit integer.");
  return value.As<Napi::Number>().Int32Value();
}

CacheConfig read_config(const Napi::Value& value) {
  const Fields fields(value, "cache options");
  CacheConfig config;
  config.layers = fields.integer("layers");
  config.query_heads = fields.integer("queryHeads");
  config.kv_heads = fields.integer("kvHeads");
  config.head_dim = fields.integer("headDim");
  const Napi::Array schemes = fields.list("schemes");
  for (std::uint32_t i = 0; i < schemes.Length(); ++i) config.schemes.push_back(read_scheme(schemes.Get(i)));
  config.scheme_of_layer = fields.integers("schemeOfLayer");
  config.window_of_layer = fields.integers("windowOfLayer");
  config.rope.theta = fields.doubles("theta");
  config.rope.half_layout = fields.flag("halfLayout");
  const double budget = fields.number("budget");
  if (!(budget >= 0 && budget <= 9007199254740992.0))
    refuse("The memory budget must lie between 0 and 2^53 bytes.");
  config.budget_bytes = static_cast<std::size_t>(budget);
  config.softmax_scale = static_cast<float>(fields.number("softmaxScale"));
  config.softcap = static_cast<float>(fields.number("softcap"));
  return config;
}

namespace {

PageLayout layout_of(const CacheConfig& config, const LayerScheme& scheme) {
  return {scheme.k, scheme.v, config.head_dim};
}

/// Payload bits of a value: codes, scales and dense zero points; compact ones depend on the data.
double payload(const TensorLayout& tensor) { return bits_per_value(tensor); }

}  // namespace

Napi::Object write_estimate(Napi::Env env, const CacheConfig& config, std::int64_t tokens,
                            std::int64_t sequences) {
  const Estimate parts = estimate(config, tokens, sequences);
  double bits = 0, bytes_per_token = 0;
  for (int layer = 0; layer < config.layers; ++layer) {
    const PageLayout layout = layout_of(config, config.scheme(layer));
    bits += (payload(layout.k) + payload(layout.v)) / (2.0 * config.layers);
    bytes_per_token += static_cast<double>(layout.bytes()) * config.kv_heads / kPageTokens;
  }
  Napi::Object result = Napi::Object::New(env);
  const auto set = [&](const char* name, double number) { result.Set(name, number); };
  set("windowBytes", static_cast<double>(parts.window_bytes));
  set("codeBytes", static_cast<double>(parts.code_bytes));
  set("scaleBytes", static_cast<double>(parts.scale_bytes));
  set("zeroBytes", static_cast<double>(parts.zero_bytes));
  set("outlierBytes", static_cast<double>(parts.outlier_bytes));
  set("paddingBytes", static_cast<double>(parts.padding_bytes));
  set("fp16Bytes", static_cast<double>(parts.fp16_bytes));
  set("bitsPerValue", bits);
  set("bytesPerToken", bytes_per_token);
  return result;
}

Napi::Array write_plan(Napi::Env env, const CacheConfig& config, const Backend& backend) {
  Napi::Array plan = Napi::Array::New(env);
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerScheme& scheme = config.scheme(layer);
    const PageLayout layout = layout_of(config, scheme);
    Napi::Object row = Napi::Object::New(env);
    row.Set("scheme", config.scheme_of_layer[static_cast<std::size_t>(layer)]);
    row.Set("pageBytes", static_cast<double>(layout.bytes()));
    row.Set("windowBytes", static_cast<double>(config.window_bytes(scheme)));
    row.Set("ringTokens", scheme.ring_tokens());
    row.Set("keyBitsPerValue", payload(layout.k));
    row.Set("valueBitsPerValue", payload(layout.v));
    row.Set("path", backend.attention_path(scheme.k, scheme.v, config.head_dim));
    plan.Set(static_cast<std::uint32_t>(layer), row);
  }
  return plan;
}

Napi::Array write_supported_specs(Napi::Env env) {
  Napi::Array specs = Napi::Array::New(env);
  for (const int bits : {1, 2, 3, 4, 8, 16})
    for (std::size_t group = 0; group < kGroupNames.size(); ++group)
      for (std::size_t mode = 0; mode < kModeNames.size(); ++mode) {
        const TensorSpec spec{bits, static_cast<Group>(group), static_cast<Mode>(mode)};
        if (!is_supported(spec, false) && !is_supported(spec, true)) continue;
        Napi::Object row = Napi::Object::New(env);
        row.Set("bits", bits);
        row.Set("group", kGroupNames[group]);
        row.Set("mode", kModeNames[mode]);
        row.Set("key", is_supported(spec, false));
        row.Set("value", is_supported(spec, true));
        specs.Set(specs.Length(), row);
      }
  return specs;
}

}  // namespace innerkv
