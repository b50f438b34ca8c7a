// Failures on their way to JavaScript: every C++ exception becomes a KvError with a code; none crosses the
// border raw.
#pragma once

#include <napi.h>

#include <exception>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "../core/error.h"

namespace innerkv {

/// What KvError is made of.
struct Failure {
  using Detail = std::pair<const char*, std::variant<double, std::string>>;
  std::string code, message;
  std::vector<Detail> details = {};
};

/// A failure with details, or with a code that only the addon knows.
class Refusal : public std::exception {
 public:
  explicit Refusal(Failure failure) : failure_(std::move(failure)) {}
  const Failure& failure() const { return failure_; }
  const char* what() const noexcept override { return failure_.message.c_str(); }

 private:
  Failure failure_;
};

[[noreturn]] void refuse(const std::string& message);  // ERR_INNERKV_INVALID_ARGUMENT

Failure describe(std::exception_ptr exception);

/// The KvError of a failure, made by the factory that lib/binding.ts registered.
Napi::Value to_error(Napi::Env env, const Failure& failure);

/// Runs `body`, the whole of a callback, and turns whatever it throws into a JavaScript exception.
template <class Body>
auto guarded(Napi::Env env, Body&& body) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    throw Napi::Error(env, to_error(env, describe(std::current_exception())));
  }
}

}  // namespace innerkv
