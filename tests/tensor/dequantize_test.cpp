// Dequantising random blocks of every quantised type, value by value from the definition in docs/gguf.md: written for
// one value at a time and in double precision, unlike the code under test.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

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
    case DType::mxfp4: {
      const double magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      const int code = level_of_32(block, 1, i);
      return std::ldexp(magnitudes[code & 7], block[0] - 127) * (code >= 8 ? -1 : 1);
    }
    default:
      ADD_FAILURE() << "no definition for " << dtype_name(type);
      return 0;
  }
}

// Random bytes with sensible binary16 numbers where the type has them: between 2^-8 and 2 in magnitude.
Bytes random_block(const DTypeInfo& info, std::mt19937& random) {
  Bytes block(info.block_bytes);
  for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
  const auto set_half = [&](size_t offset) { block[offset + 1] = static_cast<uint8_t>(0x1c + random() % 0x20); };
  if (info.type == DType::mxfp4)
    block[0] = static_cast<uint8_t>(117 + random() % 20);
  else
    set_half(info.type == DType::q6_k ? 208 : 0);
  if (info.type == DType::q4_1 || info.type == DType::q5_1 || info.type == DType::q4_k || info.type == DType::q5_k)
    set_half(2);
  return block;
}

TEST(Dequantize, FollowsTheDefinitionForRandomBlocks) {
  std::mt19937 random(11);
  int n_types = 0;
  for (const DTypeInfo& info : all_dtypes()) {
    if (info.dequantize == nullptr || info.block_length == 1) continue;
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
  EXPECT_GE(n_types, 8);
}

TEST(Dequantize, ReadsBlocksAtAnyAddress) {
  std::mt19937 random(12);
  for (const DTypeInfo& info : all_dtypes()) {
    if (info.dequantize == nullptr) continue;
    std::vector<float> values(512), aligned(512), shifted(512);
    for (float& x : values) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
    const size_t n_bytes = row_bytes(info.type, values.size());
    std::vector<std::byte> blocks(n_bytes), room(n_bytes + 1);
    info.quantize(values.data(), blocks.data(), 512);
    info.quantize(values.data(), room.data() + 1, 512);
    EXPECT_EQ(std::memcmp(blocks.data(), room.data() + 1, n_bytes), 0) << info.name;
    info.dequantize(blocks.data(), aligned.data(), 512);
    info.dequantize(room.data() + 1, shifted.data(), 512);
    EXPECT_EQ(aligned, shifted) << info.name;
  }
}

}  // namespace
}  // namespace caravan::tensor
