// Q5_0: 32 values of five bits around 16 and a binary16 scale.
#include <algorithm>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/extreme.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

constexpr int kHalf = BlockQ5_0::kLength / 2;

// x * inverse + 16 rounded, within 0..31; NaN gives 0.
uint32_t to_five_bits(float x, float inverse) {
  const float shifted = x * inverse + 16.5f;
  if (!(shifted > 0)) return 0;
  return static_cast<uint32_t>(std::min(shifted, 31.0f));
}

}  // namespace

void dequantize_q5_0(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ5_0::kLength; ++b, values += BlockQ5_0::kLength) {
    BlockQ5_0 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    uint32_t high;
    std::memcpy(&high, block.qh, sizeof high);
    const float d = f16_to_f32(block.d);
    for (int j = 0; j < kHalf; ++j) {
      const auto first = static_cast<int>((block.qs[j] & 15) | (high >> j & 1) << 4);
      const auto second = static_cast<int>(block.qs[j] >> 4 | (high >> (j + kHalf) & 1) << 4);
      values[j] = static_cast<float>(first - 16) * d;
      values[j + kHalf] = static_cast<float>(second - 16) * d;
    }
  }
}

void quantize_q5_0(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ5_0::kLength; ++b, values += BlockQ5_0::kLength) {
    const float d = extreme_of(values, BlockQ5_0::kLength) / -16.0f;
    const float inverse = d != 0 ? 1.0f / d : 0.0f;
    BlockQ5_0 block;
    block.d = f32_to_f16(d);
    uint32_t high = 0;
    for (int j = 0; j < kHalf; ++j) {
      const uint32_t first = to_five_bits(values[j], inverse), second = to_five_bits(values[j + kHalf], inverse);
      block.qs[j] = static_cast<uint8_t>((first & 15) | (second & 15) << 4);
      high |= (first >> 4) << j | (second >> 4) << (j + kHalf);
    }
    std::memcpy(block.qh, &high, sizeof high);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace caravan::tensor
