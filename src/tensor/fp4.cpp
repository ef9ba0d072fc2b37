// The four-bit float types: MXFP4 (blocks of 32 with a power of two) and NVFP4 (sub-blocks of 16 with an eight-bit
// float). Sources: OCP Microscaling Formats 1.0 (E2M1 elements, E8M0 scales); docs/gguf.md. NVFP4 is only dequantised;
// the scale of a whole NVFP4 tensor is another tensor of the model and not applied here.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/integer_form.h"

namespace caravan::tensor {
namespace {

// 2^(e - 127) / 2, down to the subnormals for e = 0 and 1.
float half_e8m0(uint8_t e) { return std::ldexp(1.0f, int{e} - 128); }

// Half an unsigned float of four exponent and three mantissa bits; 0x7f, which would be NaN, counts as zero; the
// highest bit is not used.
float half_ue4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (bits == 0x7f) return 0;
  if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), -10);
  return std::ldexp(static_cast<float>(8 + mantissa), exponent - 11);
}

// The code whose value is nearest to x, both doubled; of two equally near the one nearer to zero. NaN gives 0.
uint8_t nearest_e2m1(float x) {
  const float magnitude = std::fabs(x);
  uint8_t code = 0;
  while (code < 7 && magnitude > static_cast<float>(kTwiceE2m1[code] + kTwiceE2m1[code + 1]) / 2) ++code;
  return static_cast<uint8_t>(code | (x < 0 && code != 0 ? 8 : 0));
}

IntegerForm<BlockNvfp4> split_block(const BlockNvfp4& block) {
  IntegerForm<BlockNvfp4> form;
  for (int s = 0; s < 4; ++s) {
    form.scale[s] = half_ue4m3(block.scales[s]);
    for (int j = 0; j < 8; ++j) {
      form.q[16 * s + j] = kTwiceE2m1[block.qs[8 * s + j] & 15];
      form.q[16 * s + j + 8] = kTwiceE2m1[block.qs[8 * s + j] >> 4];
    }
  }
  return form;
}

}  // namespace

void dequantize_mxfp4(const std::byte* blocks, float* values, int64_t n) {
  constexpr int kHalf = BlockMxfp4::kLength / 2;
  for (int64_t b = 0; b < n / BlockMxfp4::kLength; ++b, values += BlockMxfp4::kLength) {
    BlockMxfp4 block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = half_e8m0(block.e);
    for (int j = 0; j < kHalf; ++j) {
      values[j] = static_cast<float>(kTwiceE2m1[block.qs[j] & 15]) * d;
      values[j + kHalf] = static_cast<float>(kTwiceE2m1[block.qs[j] >> 4]) * d;
    }
  }
}

void quantize_mxfp4(const float* values, std::byte* blocks, int64_t n) {
  constexpr int kHalf = BlockMxfp4::kLength / 2;
  constexpr float kMax = std::numeric_limits<float>::max();
  for (int64_t b = 0; b < n / BlockMxfp4::kLength; ++b, values += BlockMxfp4::kLength) {
    float largest = 0;
    for (int i = 0; i < BlockMxfp4::kLength; ++i) largest = std::max(largest, std::fabs(values[i]));
    BlockMxfp4 block;
    block.e = 0;
    // The largest code stands for 6 = 1.5 * 2^2; 1 is the least exponent whose inverse is finite.
    if (largest > 0) block.e = static_cast<uint8_t>(std::clamp(std::ilogb(std::min(largest, kMax)) + 125, 1, 254));
    const float inverse = largest > 0 ? 1.0f / half_e8m0(block.e) : 0.0f;
    for (int j = 0; j < kHalf; ++j)
      block.qs[j] =
          static_cast<uint8_t>(nearest_e2m1(values[j] * inverse) | nearest_e2m1(values[j + kHalf] * inverse) << 4);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

void dequantize_nvfp4(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockNvfp4, split_block>(blocks, values, n);
}

}  // namespace caravan::tensor
