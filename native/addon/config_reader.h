// Plain JavaScript objects, as lib/config.ts makes them, to and from the structs of the core.
#pragma once

#include <napi.h>

#include <string>

#include "../core/cache.h"

namespace innerkv {

/// Fields of an object, each refused by name when it is missing or of another type.
class Fields {
 public:
  explicit Fields(const Napi::Value& object, std::string what);

  Napi::Value get(const char* name) const;
  bool has(const char* name) const { return !get(name).IsUndefined() && !get(name).IsNull(); }
  int integer(const char* name) const;
  double number(const char* name) const;
  bool flag(const char* name) const;
  std::string text(const char* name) const;
  Napi::Array list(const char* name) const;
  std::vector<int> integers(const char* name) const;
  std::vector<float> ratios(const char* name) const;
  /// A typed array; empty when undefined.
  std::vector<float> floats(const char* name) const;
  std::vector<double> doubles(const char* name) const;
  std::vector<std::uint8_t> bytes(const char* name) const;

 private:
  [[noreturn]] void wrong(const char* name, const char* expected) const;
  Napi::Object object_;
  std::string what_;
};

/// Converts one argument to a 32-bit integer, or refuses it by name.
int to_int(const Napi::Value& value, const char* name);

CacheConfig read_config(const Napi::Value& value);

/// Bytes by part; see lib/estimate.ts.
Napi::Object write_estimate(Napi::Env env, const CacheConfig& config, std::int64_t tokens,
                            std::int64_t sequences);

/// What each layer costs and how it is computed; see lib/cache.ts.
Napi::Array write_plan(Napi::Env env, const CacheConfig& config, const Backend& backend);

/// Every combination of bits, group and mode that keys or values may have.
Napi::Array write_supported_specs(Napi::Env env);

}  // namespace innerkv
