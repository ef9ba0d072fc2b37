// Dequantising random blocks of every quantised type, value by value from the definition in docs/gguf.md: written for
// one value at a time and in double precision, unlike the code under test.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "base/sha256.h"
#include "tensor/dtype.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

using Bytes = std::vector<uint8_t>;

double half_at(const Bytes& block, size_t offset) {
  return f16_to_f32(static_cast<uint16_t>(block[offset] | block[offset + 1] << 8));
}
int nibble(uint8_t byte, bool high) { return high ? byte >> 4 : byte & 15; }
// Value i of 32 nibbles from offset on, in half-block order; the fifth bit from 4 bytes at high_offset, if any.
int level_of_32(const Bytes& block, size_t offset, int i, int high_offset = -1) {
  int level = nibble(block[offset + static_cast<size_t>(i % 16)], i >= 16);
  if (high_offset >= 0) level += (block[static_cast<size_t>(high_offset + i / 8)] >> (i % 8) & 1) * 16;
  return level;
}

constexpr int kIq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

double e2m1(int code) {
  const double magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return magnitudes[code & 7] * (code >= 8 ? -1 : 1);
}

double affine_k_value(const Bytes& block, int i, bool has_fifth_bit) {
  const int j = i / 32, l = i % 32;
  const uint8_t* s = block.data() + 4;
  const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) + (s[j - 4] >> 6) * 16;
  const int minimum = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) + (s[j] >> 6) * 16;
  const size_t nibbles = has_fifth_bit ? 48 : 16;
  int level = nibble(block[nibbles + static_cast<size_t>(j / 2 * 32 + l)], j % 2 == 1);
  if (has_fifth_bit) level += (block[16 + static_cast<size_t>(l)] >> j & 1) * 16;
  return half_at(block, 0) * scale * level - half_at(block, 2) * minimum;
}

double q6_k_value(const Bytes& block, int i) {
  const int half = i / 128, t = i % 128 / 32, l = i % 32;
  const int low = nibble(block[static_cast<size_t>(64 * half + 32 * (t % 2) + l)], t >= 2);
  const int high = block[static_cast<size_t>(128 + 32 * half + l)] >> (2 * t) & 3;
  const auto scale = static_cast<int8_t>(block[static_cast<size_t>(192 + 8 * half + 2 * t + l / 16)]);
  return half_at(block, 208) * scale * (low + 16 * high - 32);
}

double value_of(DType type, const Bytes& block, int i) {
  switch (type) {
    case DType::q8_0:
      return half_at(block, 0) * static_cast<int8_t>(block[static_cast<size_t>(2 + i)]);
    case DType::q4_0:
      return half_at(block, 0) * (level_of_32(block, 2, i) - 8);
    case DType::q4_1:
      return half_at(block, 0) * level_of_32(block, 4, i) + half_at(block, 2);
    case DType::q5_0:
      return half_at(block, 0) * (level_of_32(block, 6, i, 2) - 16);
    case DType::q5_1:
      return half_at(block, 0) * level_of_32(block, 8, i, 4) + half_at(block, 2);
    case DType::q4_k:
      return affine_k_value(block, i, false);
    case DType::q5_k:
      return affine_k_value(block, i, true);
    case DType::q6_k:
      return q6_k_value(block, i);
    case DType::q2_k: {
      const int j = i / 16, scale = block[static_cast<size_t>(j)];
      const int q = block[static_cast<size_t>(16 + i / 128 * 32 + i % 32)] >> (i % 128 / 32 * 2) & 3;
      return half_at(block, 80) * (scale & 15) * q - half_at(block, 82) * (scale >> 4);
    }
    case DType::q3_k: {
      const auto j = static_cast<size_t>(i / 16), l = static_cast<size_t>(i % 32);
      const int low = nibble(block[96 + j % 8], j >= 8), high = block[104 + j % 4] >> (2 * (j / 4)) & 3;
      const int q = block[32 + static_cast<size_t>(i / 128 * 32) + l] >> (i % 128 / 32 * 2) & 3;
      return half_at(block, 108) * (low + 16 * high - 32) * (q - (block[l] >> (i / 32) & 1 ? 0 : 4));
    }
    case DType::iq4_nl:
      return half_at(block, 0) * kIq4[level_of_32(block, 2, i)];
    case DType::iq4_xs: {
      const int j = i / 32, high = block[2] | block[3] << 8;
      const int scale = nibble(block[static_cast<size_t>(4 + j / 2)], j % 2 == 1) + (high >> (2 * j) & 3) * 16;
      return half_at(block, 0) * (scale - 32) * kIq4[level_of_32(block, static_cast<size_t>(8 + 16 * j), i % 32)];
    }
    case DType::tq1_0: {
      // A byte b stands for the fraction b / 256; its digit k is the k-th of the fraction's base-3 expansion.
      const int first = i < 160 ? 0 : (i < 240 ? 160 : 240), n_bytes = i < 160 ? 32 : (i < 240 ? 16 : 4);
      const int byte = first / 5 + (i - first) % n_bytes, k = (i - first) / n_bytes;
      const double shifted = block[static_cast<size_t>(byte)] / 256.0 * std::pow(3.0, k);
      return half_at(block, 52) * (std::floor((shifted - std::floor(shifted)) * 3) - 1);
    }
    case DType::tq2_0:
      return half_at(block, 64) * ((block[static_cast<size_t>(i / 128 * 32 + i % 32)] >> (i % 128 / 32 * 2) & 3) - 1);
    case DType::q1_0:
      return half_at(block, 0) * ((block[static_cast<size_t>(2 + i / 8)] >> (i % 8) & 1) * 2 - 1);
    case DType::q2_0:
      return half_at(block, 0) * ((block[static_cast<size_t>(2 + i / 4)] >> (i % 4 * 2) & 3) - 1);
    case DType::nvfp4: {
      const int j = i % 16, bits = block[static_cast<size_t>(i / 16)], exponent = bits >> 3 & 15;
      const double scale = exponent == 0 ? (bits & 7) / 512.0 : std::ldexp(1 + (bits & 7) / 8.0, exponent - 7);
      return (bits == 0x7f ? 0 : scale) * e2m1(nibble(block[static_cast<size_t>(4 + i / 16 * 8 + j % 8)], j >= 8));
    }
    case DType::mxfp4:
      return std::ldexp(e2m1(level_of_32(block, 1, i)), block[0] - 127);
    default:
      ADD_FAILURE() << "no definition for " << dtype_name(type);
      return 0;
  }
}

// Where the binary16 numbers of a type's block are.
std::vector<size_t> half_offsets(DType type) {
  switch (type) {
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
    case DType::bf16:
    case DType::mxfp4:
    case DType::nvfp4:
    case DType::iq1_m:
      return {};
    default:
      return {0};
  }
}

// Random bytes with sensible scales: binary16 numbers between 2^-8 and 2 in magnitude.
Bytes random_block(const DTypeInfo& info, std::mt19937& random) {
  Bytes block(info.block_bytes);
  for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
  for (const size_t offset : half_offsets(info.type)) block[offset + 1] = static_cast<uint8_t>(0x1c + random() % 0x20);
  if (info.type == DType::mxfp4) block[0] = static_cast<uint8_t>(117 + random() % 20);
  if (info.type == DType::nvfp4)
    for (size_t s = 0; s < 4; ++s) block[s] &= 0x7f;
  return block;
}

// Types whose values come from codebooks: only the kit knows them independently of the code under test.
bool has_codebook(DType type) {
  switch (type) {
    case DType::iq1_s:
    case DType::iq1_m:
    case DType::iq2_xxs:
    case DType::iq2_xs:
    case DType::iq2_s:
    case DType::iq3_xxs:
    case DType::iq3_s:
      return true;
    default:
      return false;
  }
}

TEST(Dequantize, FollowsTheDefinitionForRandomBlocks) {
  std::mt19937 random(11);
  int n_types = 0;
  for (const DTypeInfo& info : all_dtypes()) {
    if (info.dequantize == nullptr || info.block_length == 1 || has_codebook(info.type)) continue;
    ++n_types;
    for (int round = 0; round < 50; ++round) {
      const Bytes block = random_block(info, random);
      std::vector<float> found(info.block_length);
      info.dequantize(reinterpret_cast<const std::byte*>(block.data()), found.data(), info.block_length);
      for (int i = 0; i < static_cast<int>(info.block_length); ++i) {
        const double expected = value_of(info.type, block, i);
        // Four roundings to f32 at most, of terms below 2 * 128 * 63.
        ASSERT_NEAR(found[static_cast<size_t>(i)], expected, 1e-6 * std::fabs(expected) + 2e-3)
            << info.name << " value " << i;
      }
    }
  }
  EXPECT_EQ(n_types, 18);
}

// The kit confirmed these values when the digests were taken. They cover the codebooks where the kit is absent.
TEST(Dequantize, FindsTheSamePointsInTheCodebooks) {
  const std::pair<DType, const char*> expected[] = {
      {DType::iq1_s, "1c3dfd8d2d01b0a9e6b06b00d4a364f942161af6d01839d83cbc8139bf46041e"},
      {DType::iq1_m, "ba401d4cd5bcbeb6cd5527b19fd6388655e3bae94369b96791412060f7b58577"},
      {DType::iq2_xxs, "ce8e5bba780b33df82f30e0e3082dc315f6d68c9c8a7a759ef2b8931d5097d68"},
      {DType::iq2_xs, "fc3fc1cd3943a2a3e94a60962e128bdca93b517029dff076988d05dfbd7a761f"},
      {DType::iq2_s, "b0876c405b2f33d7c44721502706cd88b7266526066cda00e2b09b224da603fd"},
      {DType::iq3_xxs, "b7cdfcc61044b29453afce6de44ee2f09c679b54aa6ae06fb0a4eb6e4f24ea55"},
      {DType::iq3_s, "7edbf55dfb8bb6e73e3746a55cb87a3816a93e13d8e997af95bef3dcd3627fc4"}};
  for (const auto& [type, digest] : expected) {
    const DTypeInfo& info = dtype_info(type);
    std::mt19937 random(13);
    std::vector<uint8_t> bytes;
    for (int b = 0; b < 100; ++b) {
      Bytes block = random_block(info, random);
      if (type == DType::iq1_m) block[55] = static_cast<uint8_t>((block[55] & 15) | 0x20);  // a finite scale
      std::vector<float> values(info.block_length);
      info.dequantize(reinterpret_cast<const std::byte*>(block.data()), values.data(), info.block_length);
      bytes.resize(bytes.size() + values.size() * sizeof(float));
      std::memcpy(bytes.data() + bytes.size() - values.size() * sizeof(float), values.data(),
                  values.size() * sizeof(float));
    }
    EXPECT_EQ(sha256(std::as_bytes(std::span(bytes))).hex(), digest) << info.name;
  }
}

TEST(Dequantize, ReadsBlocksAtAnyAddress) {
  std::mt19937 random(12);
  for (const DTypeInfo& info : all_dtypes()) {
    if (info.dequantize == nullptr) continue;
    const Bytes block = random_block(info, random);
    Bytes shifted(1);
    shifted.insert(shifted.end(), block.begin(), block.end());
    std::vector<float> expected(info.block_length), found(info.block_length);
    info.dequantize(reinterpret_cast<const std::byte*>(block.data()), expected.data(), info.block_length);
    info.dequantize(reinterpret_cast<const std::byte*>(shifted.data()) + 1, found.data(), info.block_length);
    EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0) << info.name;
  }
}

}  // namespace
}  // namespace caravan::tensor
