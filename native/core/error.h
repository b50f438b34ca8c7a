// Native failures. The addon turns each into a KvError with the code ERR_INNERKV_<NAME>; nothing else is
// thrown on purpose.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace innerkv {

enum class ErrorCode {
  kInvalidArgument,
  kNotFinite,
  kOutOfMemory,
  kUnsupported,
  kDisposed,
  kCorrupt,
  kBasisMismatch,
  kAborted,
  kInternal,
};

constexpr const char* error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "ERR_INNERKV_INVALID_ARGUMENT";
    case ErrorCode::kNotFinite:
      return "ERR_INNERKV_NOT_FINITE";
    case ErrorCode::kOutOfMemory:
      return "ERR_INNERKV_OUT_OF_MEMORY";
    case ErrorCode::kUnsupported:
      return "ERR_INNERKV_UNSUPPORTED";
    case ErrorCode::kDisposed:
      return "ERR_INNERKV_DISPOSED";
    case ErrorCode::kCorrupt:
      return "ERR_INNERKV_CORRUPT";
    case ErrorCode::kBasisMismatch:
      return "ERR_INNERKV_BASIS_MISMATCH";
    case ErrorCode::kAborted:
      return "ERR_INNERKV_ABORTED";
    case ErrorCode::kInternal:
      break;
  }
  return "ERR_INNERKV_INTERNAL";
}

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw Error(ErrorCode::kInvalidArgument, message);
}

}  // namespace innerkv
