// The K-quants: super-blocks of 256 values whose sub-blocks have small integer scales.
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"

namespace caravan::tensor {

void dequantize_q4_k(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ4K::kLength; ++b) {
    BlockQ4K block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int j = 0; j < 8; ++j) {
      const ScaleMin sm = unpack_scale_min(block.scales, j);
      const float scale = d * sm.scale, minimum = dmin * sm.minimum;
      const uint8_t* qs = block.qs + j / 2 * 32;
      const int shift = j % 2 * 4;
      for (int l = 0; l < 32; ++l) *values++ = scale * static_cast<float>(qs[l] >> shift & 15) - minimum;
    }
  }
}

void dequantize_q6_k(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ6K::kLength; ++b) {
    BlockQ6K block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d);
    for (int half = 0; half < 2; ++half, values += 128) {
      const uint8_t* ql = block.ql + half * 64;
      const uint8_t* qh = block.qh + half * 32;
      const int8_t* scales = block.scales + half * 8;
      // Quarter t holds values 32t .. 32t+31 of the half: its low bits are the low (t < 2) or high nibbles of 32 bytes
      // of ql, alternating between the first and the second 32; its high bits are bits 2t and 2t+1 of qh.
      for (int t = 0; t < 4; ++t)
        for (int l = 0; l < 32; ++l) {
          const int low = ql[t % 2 * 32 + l] >> (t / 2 * 4) & 15;
          const int high = qh[l] >> (2 * t) & 3;
          values[32 * t + l] = d * scales[2 * t + l / 16] * static_cast<float>((low | high << 4) - 32);
        }
    }
  }
}

}  // namespace caravan::tensor
