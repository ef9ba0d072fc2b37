// Shared by the kernel tests: seeded numbers, rows at odd addresses, exact comparison, the instruction sets to walk.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "device/cpu/kernels/kernels.h"
#include "tensor/dtype.h"

namespace caravan::device::cpu::testing {

inline constexpr uint64_t kSeed = 20240607;

// Normally distributed values with the given deviation.
inline std::vector<float> random_row(int64_t n, uint64_t stream, float deviation = 1.0f) {
  std::mt19937_64 engine(kSeed + stream);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = normal(engine);
  return values;
}

// Floats that start 4 bytes past a 64-byte boundary, so that every vector load is misaligned.
class MisalignedRow {
 public:
  explicit MisalignedRow(int64_t n) : storage_(static_cast<size_t>(n) + 32) {}
  explicit MisalignedRow(const std::vector<float>& values) : MisalignedRow(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + ((64 - address % 64) % 64) / 4 + 1;
  }

 private:
  std::vector<float> storage_;
};

// Bytes aligned to 64.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t n) : storage_(n + 64) {}
  std::byte* data() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + (64 - address % 64) % 64;
  }

 private:
  std::vector<std::byte> storage_;
};

// Equal bit for bit; any NaN equals any other.
inline ::testing::AssertionResult same_bits(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]))
      return ::testing::AssertionFailure()
             << "value " << i << " of " << n << ": " << a[i] << " and " << b[i] << " differ (seed " << kSeed << ")";
  }
  return ::testing::AssertionSuccess();
}

// Where a type's blocks hold binary16 scales and minimums; floats, MXFP4, NVFP4 and IQ1_M have none in one piece.
inline std::vector<size_t> half_offsets(tensor::DType dtype) {
  using tensor::DType;
  switch (dtype) {
    case DType::q4_1:
    case DType::q5_1:
    case DType::q4_k:
    case DType::q5_k:
      return {0, 2};
    case DType::q2_k:
      return {80, 82};
    case DType::q3_k:
      return {108};
    case DType::q6_k:
      return {208};
    case DType::tq1_0:
      return {52};
    case DType::tq2_0:
      return {64};
    case DType::f32:
    case DType::f16:
    case DType::bf16:
    case DType::mxfp4:
    case DType::nvfp4:
    case DType::iq1_m:
      return {};
    default:
      return {0};
  }
}

// Makes blocks of random bytes finite and small: the upper bytes of scales, and of floats themselves, are set.
inline void tame_scales(tensor::DType dtype, std::vector<std::byte>& rows) {
  using tensor::DType;
  constexpr std::byte kSmall{0x2c};  // of a binary16: 0.06 and a little
  const tensor::DTypeInfo& info = tensor::dtype_info(dtype);
  for (size_t at = 0; at < rows.size(); at += info.block_bytes) {
    for (const size_t offset : half_offsets(dtype)) rows[at + offset + 1] = kSmall;
    if (info.block_length == 1) rows[at + info.block_bytes - 1] = kSmall;
    if (dtype == DType::mxfp4) rows[at] = std::byte{120};
    if (dtype == DType::nvfp4)
      for (size_t i = 0; i < 4; ++i) rows[at + i] &= std::byte{0x3f};
    if (dtype == DType::iq1_m) {  // four nibbles, the lowest first: 0x2c00
      const std::byte nibbles[] = {std::byte{0}, std::byte{0}, std::byte{0xc0}, std::byte{0x20}};
      for (size_t k = 0; k < 4; ++k) rows[at + 49 + 2 * k] = (rows[at + 49 + 2 * k] & std::byte{15}) | nibbles[k];
    }
  }
}

inline const Kernels& scalar() { return kernels_for(Isa::scalar); }

// Every instruction set of this processor, as a test parameter.
class EveryIsa : public ::testing::TestWithParam<Isa> {
 protected:
  const Kernels& kernels() const { return kernels_for(GetParam()); }
};
inline std::string isa_test_name(const ::testing::TestParamInfo<Isa>& info) {
  return std::string(isa_name(info.param));
}

}  // namespace caravan::device::cpu::testing
