// What tests see and set of the emulated device.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace simt {

/// Allocations of device and pinned memory that still succeed.
extern int allocations_left;

/// How many makings, changes and launches of graphs succeed before one is refused; negative: all do.
extern int graphs_refused;

/// Copied from the device to the host, and the other way.
extern std::size_t bytes_to_host, bytes_to_device;

/// Waits and orders between streams as they happened.
extern std::vector<std::string> device_log;

}  // namespace simt
