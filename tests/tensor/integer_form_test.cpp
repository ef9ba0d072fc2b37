// Types taken apart into whole numbers and scales.
#include "tensor/integer_form.h"

#include <gtest/gtest.h>

#include <bit>
#include <random>
#include <vector>

namespace caravan::tensor {
namespace {

TEST(IntegerForm, PutTogetherGivesTheDequantisedBits) {
  std::mt19937_64 random(5);
  int n_types = 0;
  for (const DTypeInfo& info : all_dtypes()) {
    const IntegerSplit split = integer_split(info.type);
    if (split == nullptr) continue;
    ++n_types;
    const int64_t n = 64 * int64_t{info.block_length};
    std::vector<std::byte> blocks(row_bytes(info.type, static_cast<uint64_t>(n)));
    for (std::byte& byte : blocks) byte = static_cast<std::byte>(random());
    std::vector<float> expected(static_cast<size_t>(n)), scales(static_cast<size_t>(n / kIntegerGroup));
    std::vector<int8_t> q(static_cast<size_t>(n));
    info.dequantize(blocks.data(), expected.data(), n);
    split(blocks.data(), q.data(), scales.data(), n);
    for (size_t i = 0; i < q.size(); ++i) {
      const float value = scales[i / kIntegerGroup] * static_cast<float>(q[i]);
      ASSERT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(expected[i])) << info.name << " value " << i;
    }
    if (!has_one_scale_per_32(info.type)) continue;
    for (size_t i = 0; i < scales.size(); i += 2)
      ASSERT_EQ(std::bit_cast<uint32_t>(scales[i]), std::bit_cast<uint32_t>(scales[i + 1])) << info.name;
  }
  EXPECT_EQ(n_types, 11);
}

}  // namespace
}  // namespace caravan::tensor
