// Q4_0: 32 nibbles around 8 and a binary16 scale.
#include <algorithm>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/extreme.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

constexpr int kHalf = BlockQ4_0::kLength / 2;

// x * inverse + 8 rounded, within 0..15; NaN gives 0.
uint8_t to_nibble(float x, float inverse) {
  const float shifted = x * inverse + 8.5f;
  if (!(shifted > 0)) return 0;
  return static_cast<uint8_t>(std::min(shifted, 15.0f));
}

}  // namespace

void dequantize_q4_0(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ4_0::kLength; ++b, values += BlockQ4_0::kLength) {
    BlockQ4_0 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d);
    for (int j = 0; j < kHalf; ++j) {
      values[j] = static_cast<float>((block.qs[j] & 15) - 8) * d;
      values[j + kHalf] = static_cast<float>((block.qs[j] >> 4) - 8) * d;
    }
  }
}

void quantize_q4_0(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ4_0::kLength; ++b, values += BlockQ4_0::kLength) {
    const float d = extreme_of(values, BlockQ4_0::kLength) / -8.0f;
    const float inverse = d != 0 ? 1.0f / d : 0.0f;
    BlockQ4_0 block;
    block.d = f32_to_f16(d);
    for (int j = 0; j < kHalf; ++j)
      block.qs[j] = static_cast<uint8_t>(to_nibble(values[j], inverse) | to_nibble(values[j + kHalf], inverse) << 4);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace caravan::tensor
