#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../core/error.h"

namespace innerkv {

Mapping::Mapping(const std::string& path) {
  const auto refused = [&](const char* what) {
    return Error(ErrorCode::kInvalidArgument,
                 "'" + path + "' cannot be " + what + ": " + std::strerror(errno) + ".");
  };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw refused("opened");
  struct stat facts;
  if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode) || facts.st_size <= 0) {
    close(file);
    throw Error(ErrorCode::kInvalidArgument, "'" + path + "' is not a file with weights in it.");
  }
  bytes_ = static_cast<std::size_t>(facts.st_size);
  void* memory = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
  const int reason = errno;
  close(file);  // the mapping stays
  errno = reason;
  if (memory == MAP_FAILED) throw refused("mapped");
  data_ = static_cast<const std::uint8_t*>(memory);
}

Mapping::~Mapping() { munmap(const_cast<std::uint8_t*>(data_), bytes_); }

}  // namespace innerkv
