// The measured limits are plausible: their order of magnitude, not their value, which depends on what else runs.
#include <gtest/gtest.h>

#include "device/cpu/limits.h"

namespace caravan::device::cpu {
namespace {

TEST(MachineLimits, AreOfAPlausibleMagnitude) {
  const MachineLimits limits = measure_limits(1);
  for (const double rate : {limits.read_bytes_per_s, limits.int8_ops_per_s, limits.f32_flop_per_s}) {
    EXPECT_GT(rate, 1e7);  // a loop that the compiler took out would be above the second bound
    EXPECT_LT(rate, 1e13);
  }
}

}  // namespace
}  // namespace caravan::device::cpu
