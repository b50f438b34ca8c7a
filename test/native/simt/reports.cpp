// Reports, for people: the kernel's name and the source line of an instruction, from the program's own debug
// information.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>

#include "simt/machine.h"

namespace simt {
namespace {

const char* name_of(Kind kind) {
  static constexpr const char* names[] = {"race",
                                          "uninitialised read",
                                          "out of bounds",
                                          "misaligned",
                                          "cp.async read early",
                                          "ld.global.nc of written memory",
                                          "barrier",
                                          "warp mask",
                                          "deadlock",
                                          "launch geometry",
                                          "copy of pinned memory"};
  return names[static_cast<int>(kind)];
}

struct Symbol {
  std::string function, place;  // "file:line"; empty where addr2line does not know
};

/// Of an address in this program.
const Symbol& symbol(const void* address) {
  static std::map<const void*, Symbol> known;
  const auto [entry, added] = known.try_emplace(address);
  Dl_info info;
  if (!added || !dladdr(address, &info)) return entry->second;
  const auto base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  char command[512];  // the offset, and for a program at a fixed address the address
  std::snprintf(command, sizeof command, "addr2line -f -C -s -e '%s' %#zx %#zx 2>/dev/null", info.dli_fname,
                at - base, at);
  if (FILE* output = popen(command, "r")) {
    char function[1024], place[1024];
    while (std::fgets(function, sizeof function, output) && std::fgets(place, sizeof place, output))
      if (entry->second.place.empty() && place[0] != '?')
        entry->second = {function, std::string(place, std::strcspn(place, " \n"))};
    pclose(output);
  }
  std::string& function = entry->second.function;
  for (const char* noise : {"(anonymous namespace)::", "void ", "innerkv::", "\n"})
    for (std::size_t i; (i = function.find(noise)) != std::string::npos;)
      function.erase(i, std::strlen(noise));
  function.erase(std::min(function.find('('), function.size()));
  return entry->second;
}

}  // namespace

std::string place(Where where) {
  std::string path = where.file;
  const std::size_t slash = path.rfind('/');
  if (slash != std::string::npos) path.erase(0, slash + 1);
  return where.line ? path + ":" + std::to_string(where.line) : path;
}

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

void fail(Kind kind, std::string text, Where where, const void* instruction) {
  const Aside aside;
  if (machine.running) {
    const uint3 thread = current_thread->index, block = current_grid.block;
    text +=
        "; thread " + triple(thread.x, thread.y, thread.z) + " of block " + triple(block.x, block.y, block.z);
  }
  machine.reports.push_back({kind, std::move(text), place(where)});
  machine.pending_address = instruction;
  if (!machine.running) return;
  machine.running = false;
  leave_for_main();  // and never back: nothing here is destroyed
}
void fail_here(Kind kind, const char* text, Where where) {
  fail_with(kind, where, [&] { return text; });
}

/// Who waits where, neighbours that agree in one line.
std::string deadlock_table() {
  std::string table = "no thread can run:";
  for (unsigned first = 0; first < machine.threads;) {
    const Fiber& fiber = machine.fibers[first];
    unsigned last = first;
    while (last + 1 < machine.threads) {
      const Fiber& other = machine.fibers[last + 1];
      if (other.state != fiber.state) break;
      if (fiber.state != State::kExited && (other.where.line != fiber.where.line ||
                                            other.mask != fiber.mask || other.waits_for != fiber.waits_for))
        break;
      ++last;
    }
    char line[256];
    if (fiber.state == State::kExited)
      std::snprintf(line, sizeof line, "\n  threads %u-%u: ended", first, last);
    else if (fiber.state == State::kBarrier)
      std::snprintf(line, sizeof line, "\n  threads %u-%u: __syncthreads at %s", first, last,
                    place(fiber.where).c_str());
    else
      std::snprintf(line, sizeof line, "\n  threads %u-%u: %s with mask %08x at %s", first, last,
                    fiber.waits_for, fiber.mask, place(fiber.where).c_str());
    table += line;
    first = last + 1;
  }
  return table + "\n ";
}

void describe_last_report() {
  Report& report = machine.reports.back();
  if (machine.pending_address)  // a return address: the call before it is meant
    report.where = symbol(static_cast<const char*>(machine.pending_address) - 1).place;
  const std::string& kernel = symbol(machine.kernel).function;
  if (!kernel.empty()) report.text += " of " + kernel;
}

std::vector<Report> take_reports(bool quiet) {
  if (!quiet)
    for (const Report& report : machine.reports)
      std::fprintf(stderr, "simt: %s: %s%s%s\n", name_of(report.kind), report.text.c_str(),
                   report.where.empty() ? "" : ", at ", report.where.c_str());
  return std::exchange(machine.reports, {});
}

}  // namespace simt
