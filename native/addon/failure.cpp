#include "failure.h"

#include <new>

#include "../core/tensor.h"
#include "instance.h"

namespace innerkv {

void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

Failure describe(std::exception_ptr exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Refusal& refusal) {
    return refusal.failure();
  } catch (const NotFinite& error) {
    return {error_code_name(error.code()),
            error.what(),
            {{"tensor", error.tensor()},
             {"token", static_cast<double>(error.token())},
             {"head", static_cast<double>(error.head())},
             {"channel", static_cast<double>(error.channel())},
             {"value", static_cast<double>(error.value())}}};
  } catch (const Error& error) {
    return {error_code_name(error.code()), error.what()};
  } catch (const std::bad_alloc&) {
    return {error_code_name(ErrorCode::kOutOfMemory), "The process is out of memory."};
  } catch (const std::exception& error) {
    return {error_code_name(ErrorCode::kInternal), std::string("Internal error: ") + error.what()};
  } catch (...) {
    return {error_code_name(ErrorCode::kInternal), "Internal error of an unknown kind."};
  }
}

Napi::Value to_error(Napi::Env env, const Failure& failure) {
  Napi::Object details = Napi::Object::New(env);
  for (const auto& [name, value] : failure.details) {
    if (const double* number = std::get_if<double>(&value))
      details.Set(name, *number);
    else
      details.Set(name, std::get<std::string>(value));
  }
  const Napi::FunctionReference& make_error = Instance::of(env).make_error;
  if (!make_error.IsEmpty())
    return make_error.Call(
        {Napi::String::New(env, failure.code), Napi::String::New(env, failure.message), details});
  Napi::Error plain = Napi::Error::New(env, failure.message);
  plain.Set("code", failure.code);
  return plain.Value();
}

}  // namespace innerkv
