// Q4_1 and Q5_1: 32 levels of four or five bits above a minimum, binary16 scale and minimum.
#include <algorithm>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

constexpr int kLength = 32, kHalf = 16;

// x rounded, within 0..max; NaN gives 0.
uint32_t to_level(float x, float max) {
  const float shifted = x + 0.5f;
  if (!(shifted > 0)) return 0;
  return static_cast<uint32_t>(std::min(shifted, max));
}

// Fills d and m of block and the levels of its 32 values.
template <typename Block>
void quantize_range(const float* x, float max_level, Block& block, uint32_t* levels) {
  const auto [lowest, highest] = std::minmax_element(x, x + kLength);
  const float d = (*highest - *lowest) / max_level;
  const float inverse = d != 0 ? 1.0f / d : 0.0f;
  block.d = f32_to_f16(d);
  block.m = f32_to_f16(*lowest);
  for (int i = 0; i < kLength; ++i) levels[i] = to_level((x[i] - *lowest) * inverse, max_level);
}

}  // namespace

void dequantize_q4_1(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / kLength; ++b, values += kLength) {
    BlockQ4_1 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
    for (int j = 0; j < kHalf; ++j) {
      values[j] = static_cast<float>(block.qs[j] & 15) * d + m;
      values[j + kHalf] = static_cast<float>(block.qs[j] >> 4) * d + m;
    }
  }
}

void quantize_q4_1(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / kLength; ++b) {
    BlockQ4_1 block;
    uint32_t levels[kLength];
    quantize_range(values + b * kLength, 15.0f, block, levels);
    for (int j = 0; j < kHalf; ++j) block.qs[j] = static_cast<uint8_t>(levels[j] | levels[j + kHalf] << 4);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

void dequantize_q5_1(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / kLength; ++b, values += kLength) {
    BlockQ5_1 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    uint32_t high;
    std::memcpy(&high, block.qh, sizeof high);
    const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
    for (int j = 0; j < kHalf; ++j) {
      values[j] = static_cast<float>((block.qs[j] & 15) | (high >> j & 1) << 4) * d + m;
      values[j + kHalf] = static_cast<float>(block.qs[j] >> 4 | (high >> (j + kHalf) & 1) << 4) * d + m;
    }
  }
}

void quantize_q5_1(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / kLength; ++b) {
    BlockQ5_1 block;
    uint32_t levels[kLength], high = 0;
    quantize_range(values + b * kLength, 31.0f, block, levels);
    for (int j = 0; j < kHalf; ++j) {
      block.qs[j] = static_cast<uint8_t>((levels[j] & 15) | (levels[j + kHalf] & 15) << 4);
      high |= (levels[j] >> 4) << j | (levels[j + kHalf] >> 4) << (j + kHalf);
    }
    std::memcpy(block.qh, &high, sizeof high);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace caravan::tensor
