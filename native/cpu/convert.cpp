#include "convert.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "cpu_backend.h"

namespace innerkv {

namespace {

constexpr std::uint16_t kHalfExponent = 0x7c00, kBf16Exponent = 0x7f80;

bool all_finite(const std::uint16_t* bits, std::size_t count, std::uint16_t exponent) {
  unsigned bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= (bits[i] & exponent) == exponent;
  return bad == 0;
}

bool all_finite(const float* values, std::size_t count) {
  unsigned bad = 0;
  for (std::size_t i = 0; i < count; ++i)
    bad |= (std::bit_cast<std::uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u;
  return bad == 0;
}

float bf16_value(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

}  // namespace

bool all_finite(const void* numbers, Dtype dtype, std::size_t count) {
  if (dtype == Dtype::kF32) return all_finite(static_cast<const float*>(numbers), count);
  return all_finite(static_cast<const std::uint16_t*>(numbers), count,
                    dtype == Dtype::kF16 ? kHalfExponent : kBf16Exponent);
}

bool convert_to_halves(const Kernels& kernels, const void* from, Dtype dtype, std::size_t count,
                       std::uint16_t* to) {
  const auto* bits = static_cast<const std::uint16_t*>(from);
  switch (dtype) {
    case Dtype::kF16:
      std::copy_n(bits, count, to);
      return all_finite(bits, count, kHalfExponent);
    case Dtype::kF32:
      return kernels.float_to_half(static_cast<const float*>(from), to, count);
    case Dtype::kBf16:
      break;
  }
  constexpr std::size_t kRun = 1024;
  float run[kRun];
  for (std::size_t begin = 0; begin < count; begin += kRun) {
    const std::size_t some = std::min(kRun, count - begin);
    for (std::size_t i = 0; i < some; ++i) run[i] = bf16_value(bits[begin + i]);
    if (!kernels.float_to_half(run, to + begin, some)) return false;
  }
  return true;
}

bool convert_to_floats(const Kernels& kernels, const void* from, Dtype dtype, std::size_t count, float* to) {
  if (!all_finite(from, dtype, count)) return false;
  const auto* bits = static_cast<const std::uint16_t*>(from);
  switch (dtype) {
    case Dtype::kF32:
      std::copy_n(static_cast<const float*>(from), count, to);
      break;
    case Dtype::kF16:
      kernels.half_to_float(bits, to, count);
      break;
    case Dtype::kBf16:
      std::transform(bits, bits + count, to, bf16_value);
      break;
  }
  return true;
}

void CpuBackend::take(std::span<Intake> tensors) {
  std::size_t bytes = 0;
  const auto room = [](const Intake& t) {
    return t.dtype == t.as ? 0 : align_section(dtype_bytes(t.as) * t.count);
  };
  for (const Intake& t : tensors) bytes += room(t);
  if (taken_.size() < bytes) taken_ = std::vector<std::uint8_t>(bytes);
  std::uint8_t* next = taken_.data();
  for (Intake& t : tensors) {
    t.ready = t.dtype == t.as ? t.from : next;
    if (t.dtype == t.as)
      t.finite = all_finite(t.from, t.dtype, t.count);
    else if (t.as == Dtype::kF16)
      t.finite =
          convert_to_halves(kernels_, t.from, t.dtype, t.count, reinterpret_cast<std::uint16_t*>(next));
    else
      t.finite = convert_to_floats(kernels_, t.from, t.dtype, t.count, reinterpret_cast<float*>(next));
    next += room(t);
  }
}

/// Memory that is mapped for reading and writing is good; what it holds nobody can know.
std::string CpuBackend::objection(const void* memory, std::size_t bytes) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (!maps)
    return std::string("the system does not say what is mapped there (") + std::strerror(errno) + ")";
  std::uint64_t next = reinterpret_cast<std::uintptr_t>(memory);
  const std::uint64_t end = next + bytes;
  char line[512];
  bool whole = true;  // lines may be longer than the buffer
  while (next < end && std::fgets(line, sizeof line, maps)) {
    unsigned long long first = 0, last = 0;
    char rights[8] = "";
    if (whole && std::sscanf(line, "%llx-%llx %7s", &first, &last, rights) == 3 && first <= next &&
        next < last && rights[0] == 'r' && rights[1] == 'w')
      next = last;
    whole = std::strchr(line, '\n') != nullptr;
  }
  std::fclose(maps);
  return next >= end ? "" : "this process may not read and write there";
}

}  // namespace innerkv
