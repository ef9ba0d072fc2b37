// How fast a device multiplies by matrices, measured through its contract: what a planner's predictions rest on.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "device/device.h"
#include "tensor/dtype.h"

namespace caravan::stage {

// Speed of matrices of one type on a device.
struct MatrixRate {
  double bytes_per_s = 0;  // bytes of the file's type, streamed from memory for a single row
  double ops_per_s = 0;    // with many rows; a multiply and an add are two operations
  bool operator==(const MatrixRate&) const = default;
};

// How long a layer takes on a device, by the number of rows: measured points, ascending.
struct LayerTimes {
  std::vector<uint32_t> n_rows;
  std::vector<double> seconds;
  bool operator==(const LayerTimes&) const = default;

  // Between points and past the last one on straight lines; there is at least one point, and the first is for one row.
  double operator()(double rows) const;
};

// What a device measured of itself.
struct DeviceProfile {
  std::map<tensor::DType, MatrixRate> matrices;
  double cache_bytes_per_s = 0;  // keys and values read by attention
  double step_seconds = 0;       // cost of a step however small: its stage's thread is woken, and wakes another
  // Of the kinds of layers of a model, by their numbers, where they were measured.
  std::map<uint32_t, LayerTimes> layers;
  bool operator==(const DeviceProfile&) const = default;

  // The rate of a type; of the slowest one known for a type that was not measured.
  MatrixRate rate(tensor::DType type) const;
};

// Between a server and a device.
struct LinkProfile {
  double latency_seconds = 0;  // one way
  double bytes_per_s = 1e12;
  bool operator==(const LinkProfile&) const = default;
};

// The median time of a run, of at least so many and for at least so long; before: what is done before each, if
// anything.
double median_seconds(size_t least_runs, std::chrono::milliseconds least_time, const std::function<void()>& run,
                      const std::function<void()>& before = nullptr);

// Memory that a measurement takes on the device; less where less is given, for figures that caches flatter.
inline constexpr uint64_t kProfileBytes = uint64_t{160} << 20;

// Measures the types that are missing in profile and adds them; a third of a second each. most_bytes: device memory it
// may take. Nothing else should compute meanwhile. Throws ResourceError when the device has not even a few MiB.
void measure_profile(device::Device& device, std::span<const tensor::DType> types, uint64_t most_bytes,
                     DeviceProfile& profile);

}  // namespace caravan::stage
