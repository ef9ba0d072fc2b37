// Q8_0: 32 signed bytes and a binary16 scale.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"

namespace caravan::tensor {

void dequantize_q8_0(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ8_0::kLength; ++b) {
    BlockQ8_0 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < BlockQ8_0::kLength; ++i) *values++ = static_cast<float>(block.qs[i]) * d;
  }
}

void quantize_q8_0(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ8_0::kLength; ++b, values += BlockQ8_0::kLength) {
    float largest = 0;
    for (int i = 0; i < BlockQ8_0::kLength; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float d = largest / 127.0f;
    const float inverse = d > 0 ? 1.0f / d : 0.0f;
    BlockQ8_0 block;
    block.d = f32_to_f16(d);
    for (int i = 0; i < BlockQ8_0::kLength; ++i) {
      float q = std::round(values[i] * inverse);
      // Also catches NaN, and the overflow of 1/d for denormal d.
      if (!(q > -127.0f)) q = -127.0f;
      block.qs[i] = static_cast<int8_t>(std::min(q, 127.0f));
    }
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace caravan::tensor
