// What a device measures of itself.
#include "stage/profile.h"

#include <gtest/gtest.h>

#include "base/cpu_features.h"
#include "device/cpu/cpu_device.h"

namespace caravan::stage {
namespace {

using tensor::DType;

TEST(Profile, MeasuresEachTypeOnce) {
  device::cpu::CpuDevice device(1, select_isa(), uint64_t{64} << 20);
  DeviceProfile profile;
  const DType types[] = {DType::q8_0, DType::f32, DType::iq2_xxs};
  measure_profile(device, types, 8 << 20, profile);
  for (const DType type : types) {
    EXPECT_GT(profile.rate(type).bytes_per_s, 1e6) << tensor::dtype_name(type);
    EXPECT_GT(profile.rate(type).ops_per_s, 1e6) << tensor::dtype_name(type);
  }
  EXPECT_GT(profile.step_seconds, 0);
  EXPECT_GE(profile.cache_bytes_per_s, profile.rate(DType::q8_0).bytes_per_s);
  const DeviceProfile before = profile;
  measure_profile(device, types, 8 << 20, profile);
  EXPECT_EQ(profile, before);
  EXPECT_EQ(device.info().memory_free, device.info().memory_total);
}

TEST(Profile, TakesTheSlowestKnownRateForAnUnknownType) {
  DeviceProfile profile;
  profile.matrices[DType::q8_0] = {10, 3};
  profile.matrices[DType::f16] = {4, 7};
  EXPECT_EQ(profile.rate(DType::q8_0), (MatrixRate{10, 3}));
  EXPECT_EQ(profile.rate(DType::q2_k), (MatrixRate{4, 3}));
}

}  // namespace
}  // namespace caravan::stage
