// Quantisers: their error beside the kit's own blocks, their bytes on every machine, and blocks at the edges.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/file.h"
#include "base/sha256.h"
#include "support/kit.h"
#include "tensor/dtype.h"

namespace caravan::tensor {
namespace {

constexpr DType kBlockTypes[] = {DType::q8_0,   DType::q4_0,   DType::q5_0,  DType::q4_1,  DType::q5_1,
                                 DType::q2_k,   DType::q3_k,   DType::q4_k,  DType::q5_k,  DType::q6_k,
                                 DType::iq4_nl, DType::iq4_xs, DType::tq1_0, DType::tq2_0, DType::mxfp4};

// How much further apart a type's levels are than those of the types of four bits or more with even steps.
float coarseness(DType type) {
  switch (type) {
    case DType::q2_k:
    case DType::q3_k:
    case DType::iq4_nl:
    case DType::iq4_xs:
      return 2;
    case DType::mxfp4:
      return 3;
    case DType::tq1_0:
    case DType::tq2_0:
      return 8;
    default:
      return 1;
  }
}

std::vector<float> read_floats(const std::filesystem::path& path) {
  const auto bytes = read_file(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

std::vector<std::byte> quantize(DType type, const std::vector<float>& values) {
  std::vector<std::byte> blocks(row_bytes(type, values.size()));
  dtype_info(type).quantize(values.data(), blocks.data(), static_cast<int64_t>(values.size()));
  return blocks;
}

std::vector<float> quantize_and_back(DType type, const std::vector<float>& values) {
  std::vector<float> back(values.size());
  dtype_info(type).dequantize(quantize(type, values).data(), back.data(), static_cast<int64_t>(values.size()));
  return back;
}

double rmse(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(double{a[i]} - double{b[i]}, 2);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

// Sums of uniform integers: bell-shaped, and the same bits from every standard library.
std::vector<float> seeded_values(size_t n) {
  std::mt19937 random(42);
  std::vector<float> values(n);
  for (float& x : values) {
    int sum = 0;
    for (int k = 0; k < 4; ++k) sum += static_cast<int>(random() % 2048) - 1024;
    x = static_cast<float>(sum) * 0x1p-12f;
  }
  return values;
}

TEST(Quantize, LosesNoMoreThanTheKitsBlocks) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto input = read_floats(kit / "quant/input.f32");
  const std::pair<DType, const char*> types[] = {
      {DType::q8_0, "q8_0"}, {DType::q4_0, "q4_0"}, {DType::q5_0, "q5_0"},     {DType::q4_1, "q4_1"},
      {DType::q5_1, "q5_1"}, {DType::q4_k, "q4_K"}, {DType::q5_k, "q5_K"},     {DType::q6_k, "q6_K"},
      {DType::q2_k, "q2_K"}, {DType::q3_k, "q3_K"}, {DType::iq4_nl, "iq4_nl"}, {DType::iq4_xs, "iq4_xs"}};
  for (const auto& [type, name] : types) {
    const double expected = rmse(input, read_floats(kit / "quant" / (std::string(name) + ".f32")));
    const double found = rmse(input, quantize_and_back(type, input));
    EXPECT_LE(found, expected * 1.01) << name << ": " << found / expected;
    EXPECT_GE(found, expected * 0.9) << name << ": too good to be true";
  }
}

// The error of round-to-nearest with L levels over a normal distribution's range in a block, roughly; what matters is
// that a broken scale, sign or nibble order gives an error of the order of the values themselves.
TEST(Quantize, StaysCloseToTheValues) {
  const auto values = seeded_values(256 * 16);
  double square = 0;
  for (const float x : values) square += double{x} * double{x};
  const double size = std::sqrt(square / static_cast<double>(values.size()));
  EXPECT_LT(rmse(values, quantize_and_back(DType::q8_0, values)), 0.007 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q6_k, values)), 0.02 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q4_k, values)), 0.08 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q5_k, values)), 0.04 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q5_0, values)), 0.05 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q4_0, values)), 0.1 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q4_1, values)), 0.1 * size);
  EXPECT_LT(rmse(values, quantize_and_back(DType::q5_1, values)), 0.05 * size);
}

// One digest per type: other compilers, instruction sets or thread counts must not change a byte.
TEST(Quantize, GivesTheSameBytesOnEveryMachine) {
  const auto values = seeded_values(256 * 16);
  const std::pair<DType, const char*> expected[] = {
      {DType::q8_0, "88a76c0a3ed7a1f0abc45c828a3155e4aac59dd7f76ed1c1581a8a48368ccc1e"},
      {DType::q4_0, "4f7e0c9768b7d89e96b243842a2dcea0e418750128aa0d7b6132ecefc9592e23"},
      {DType::q4_k, "64a74493c07980d582c96bcbbabd98285b3f0a3d97e83d8110e918e503ebd4f7"},
      {DType::q5_0, "a436d32832f1f94e15e5e8426ca905021b88956e0430d553ab793ceee6449edc"},
      {DType::q5_k, "83b6820b3bda08e61884945b8f2ccefbb3644498073d47c37556edc3f9e472e7"},
      {DType::q2_k, "c74b0bf8d5c6a855b1e94db9ed6e4ae28a79c079af28d749fcc0ea65f166de67"},
      {DType::q3_k, "ca9df528990613038c8664ea0a6bbcb365220c7d5b793770a7905b9b1fca4f52"},
      {DType::iq4_nl, "299030175c89c5bca8c8d972c3b279fc024c6fa5321aaaf3548b8ce38ebc2c71"},
      {DType::iq4_xs, "e5e435b2a8274a15aeb0fe906590a0b49054904381a1acf60684602e82672807"},
      {DType::mxfp4, "a130635bc051db3578b4cf993a2ea02394ac5c54da18a09229dbd00d985b4d1c"},
      {DType::tq1_0, "7d024fec2d3b81e9accd98298baee0e11303346a229e0a490f5af5cb7627c07d"},
      {DType::tq2_0, "4e5513044ac1f7ab846a6a279b1c5b2e33a4910244f784f43a797a8790c40db4"},
      {DType::q6_k, "54d6f5023e598ac61263297138ad03b015b1fa1b7336fbfde897c767a9f9793d"}};
  for (const auto& [type, digest] : expected)
    EXPECT_EQ(sha256(quantize(type, values)).hex(), digest) << dtype_name(type);
}

TEST(Quantize, TreatsEachBlockAlone) {
  const auto values = seeded_values(1024);
  for (const DType type : kBlockTypes) {
    const auto whole = quantize(type, values);
    const size_t n = dtype_info(type).block_length, n_bytes = dtype_info(type).block_bytes;
    for (size_t b = 0; b < values.size() / n; ++b) {
      const std::vector<float> one(values.begin() + static_cast<ptrdiff_t>(b * n),
                                   values.begin() + static_cast<ptrdiff_t>((b + 1) * n));
      const auto bytes = quantize(type, one);
      ASSERT_EQ(std::memcmp(bytes.data(), whole.data() + b * n_bytes, n_bytes), 0) << dtype_name(type) << " " << b;
    }
  }
}

TEST(Quantize, KeepsZeroAndConstantBlocks) {
  for (const DType type : kBlockTypes) {
    for (const float x : quantize_and_back(type, std::vector<float>(256, 0.0f))) ASSERT_EQ(x, 0.0f) << dtype_name(type);
    for (const float constant : {0.75f, -0.75f})
      for (const float x : quantize_and_back(type, std::vector<float>(256, constant)))
        ASSERT_NEAR(x, constant, 0.005) << dtype_name(type);
  }
}

TEST(Quantize, HoldsOneSpikeAmongZeros) {
  for (const DType type : kBlockTypes)
    for (const float spike : {3.0f, -3.0f})
      for (const size_t position : {size_t{0}, size_t{31}, size_t{100}, size_t{255}}) {
        std::vector<float> values(256, 0.0f);
        values[position] = spike;
        const auto back = quantize_and_back(type, values);
        for (size_t i = 0; i < values.size(); ++i)
          ASSERT_NEAR(back[i], values[i], 0.02 * coarseness(type))
              << dtype_name(type) << " spike at " << position << ", value " << i;
      }
}

TEST(Quantize, HoldsValuesOfOneSignAndOfVeryDifferentSubBlocks) {
  for (const DType type : kBlockTypes) {
    std::vector<float> values(256);
    for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0f + static_cast<float>(i % 32) / 31.0f;
    const double positive = rmse(values, quantize_and_back(type, values));
    for (float& x : values) x = -x;
    const double negative = rmse(values, quantize_and_back(type, values));
    EXPECT_LT(positive, 0.1 * coarseness(type)) << dtype_name(type);
    EXPECT_LT(negative, 0.1 * coarseness(type)) << dtype_name(type);
    for (size_t i = 0; i < values.size(); ++i) values[i] *= i < 128 ? 0.01f : 100.0f;
    const auto back = quantize_and_back(type, values);
    for (size_t i = 128; i < values.size(); ++i)
      ASSERT_NEAR(back[i], values[i], 15 * coarseness(type)) << dtype_name(type);
  }
}

TEST(Quantize, SurvivesValuesThatNoBlockCanHold) {
  constexpr float kMax = std::numeric_limits<float>::max(), kTiny = std::numeric_limits<float>::denorm_min();
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  for (const DTypeInfo& info : all_dtypes()) {
    if (info.quantize == nullptr) continue;
    for (const float extreme : {kMax, -kMax, kTiny, -kTiny, kInfinity, -kInfinity, kNan}) {
      std::vector<float> values = seeded_values(256);
      values[7] = extreme;
      EXPECT_EQ(quantize_and_back(info.type, values).size(), values.size());
      EXPECT_EQ(quantize_and_back(info.type, std::vector<float>(256, extreme)).size(), values.size());
    }
  }
}

TEST(Quantize, CopiesF32AndRoundsTheSixteenBitFloats) {
  const auto values = seeded_values(64);
  EXPECT_EQ(quantize_and_back(DType::f32, values), values);
  EXPECT_LT(rmse(values, quantize_and_back(DType::f16, values)), 0x1p-11);
  EXPECT_LT(rmse(values, quantize_and_back(DType::bf16, values)), 0x1p-8);
}

}  // namespace
}  // namespace caravan::tensor
