// The type table, and conversions of every supported type against the conformance kit.
#include "tensor/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>

#include "base/file.h"
#include "support/kit.h"

namespace caravan::tensor {
namespace {

constexpr int64_t kKitValues = 4096;  // 4 rows of 1024

std::vector<float> read_floats(const std::filesystem::path& path) {
  const auto bytes = read_file(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// The kit's file name of a type: "q4_0", "q4_K".
std::string kit_name(DType type) {
  std::string name;
  for (const char c : dtype_name(type)) name += c == 'K' ? c : static_cast<char>(std::tolower(c));
  return name;
}

TEST(DType, HasOneRowPerEnumeratorWithUniqueNames) {
  std::set<std::string_view> names;
  for (const DTypeInfo& info : all_dtypes()) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name;
    EXPECT_EQ(find_dtype(static_cast<uint32_t>(info.type)), &info);
    EXPECT_GT(info.block_length, 0U);
    EXPECT_GT(info.block_bytes, 0U);
  }
  EXPECT_EQ(names.size(), 33U);
}

TEST(DType, RefusesNumbersThatGgufDoesNotUseForWeights) {
  for (const uint32_t number : {4U, 5U, 9U, 15U, 31U, 32U, 33U, 36U, 37U, 38U, 43U, 0xffffffffU})
    EXPECT_EQ(find_dtype(number), nullptr) << number;
}

TEST(DType, IsFoundByNameInAnyCase) {
  EXPECT_EQ(dtype_from_name("q4_k"), DType::q4_k);
  EXPECT_EQ(dtype_from_name("Bf16"), DType::bf16);
  EXPECT_EQ(dtype_from_name("Q4_K_M"), std::nullopt);
  EXPECT_EQ(dtype_from_name(""), std::nullopt);
}

TEST(DType, CountsBytesOfRows) {
  EXPECT_EQ(row_bytes(DType::f32, 3), 12U);
  EXPECT_EQ(row_bytes(DType::q4_0, 64), 36U);
  EXPECT_EQ(row_bytes(DType::q6_k, 1024), 840U);
}

// The products and sums are rounded one by one, in the order of the kit's reference: equal bit for bit.
TEST(Dequantize, MatchesTheKitForEverySupportedType) {
  CARAVAN_REQUIRE_KIT(kit);
  for (const DType type : {DType::q4_0,    DType::q4_1,   DType::q5_0,  DType::q5_1,    DType::q8_0,  DType::q2_k,
                           DType::q3_k,    DType::q4_k,   DType::q5_k,  DType::q6_k,    DType::iq1_s, DType::iq1_m,
                           DType::iq2_xxs, DType::iq2_xs, DType::iq2_s, DType::iq3_xxs, DType::iq3_s, DType::iq4_nl,
                           DType::iq4_xs,  DType::tq1_0,  DType::tq2_0, DType::mxfp4,   DType::nvfp4, DType::q1_0}) {
    const DTypeInfo& info = dtype_info(type);
    ASSERT_TRUE(can_dequantize(type)) << info.name;
    const auto blocks = read_file(kit / "quant" / (kit_name(type) + ".blocks"));
    const auto expected = read_floats(kit / "quant" / (kit_name(type) + ".f32"));
    ASSERT_EQ(blocks.size(), row_bytes(type, kKitValues)) << info.name;
    ASSERT_EQ(expected.size(), static_cast<size_t>(kKitValues)) << info.name;
    std::vector<float> found(expected.size());
    info.dequantize(blocks.data(), found.data(), kKitValues);
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(found[i], expected[i]) << info.name << " value " << i;
  }
}

TEST(Quantize, ReproducesTheKitsBlocksWhereTheAlgorithmIsFixed) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto input = read_floats(kit / "quant" / "input.f32");
  for (const DType type :
       {DType::q8_0, DType::q4_0, DType::q5_0, DType::q4_1, DType::q5_1, DType::mxfp4, DType::tq1_0, DType::tq2_0}) {
    const DTypeInfo& info = dtype_info(type);
    const auto expected = read_file(kit / "quant" / (kit_name(type) + ".blocks"));
    std::vector<std::byte> found(row_bytes(type, kKitValues));
    info.quantize(input.data(), found.data(), kKitValues);
    EXPECT_EQ(found, expected) << info.name;
  }
}

}  // namespace
}  // namespace caravan::tensor
