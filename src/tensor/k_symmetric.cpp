// Q3_K, Q6_K: super-blocks of 256 values whose sub-blocks of 16 have a small integer scale. How they are quantised:
// scale_search.h.
#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/extreme.h"
#include "tensor/half.h"
#include "tensor/scale_search.h"

namespace caravan::tensor {
namespace {

constexpr int kSubBlock = 16, kSubBlocks = 256 / kSubBlock;

// How a type's sub-blocks are quantised.
struct SymmetricFormat {
  IntegerLevels levels, scales;
  std::span<const Anchor> anchors;
};

// The side with one more level goes to the value of largest magnitude.
constexpr Anchor kQ3Anchors[] = {{-4.0f, -0.2f, 4}}, kQ6Anchors[] = {{-32.0f, -0.2f, 4}};
constexpr SymmetricFormat kQ3Format{{-4, 3}, {-32, 31}, kQ3Anchors}, kQ6Format{{-32, 31}, {-128, 127}, kQ6Anchors};

// Quantises a super-block: fills scales and levels, and returns the bits of d.
uint16_t quantize_symmetric(const float* x, const SymmetricFormat& format, int* scales, float* levels) {
  float weights[256], fits[kSubBlocks];
  for (int j = 0; j < kSubBlocks; ++j) {
    const int first = j * kSubBlock;
    error_weights<kSubBlock>(x + first, weights + first);
    fits[j] = fit_scale<kSubBlock>(x + first, weights + first, format.levels, format.anchors);
  }
  const uint16_t d_bits = f32_to_f16(extreme_of(fits, kSubBlocks) / format.scales.lowest);
  const float d = f16_to_f32(d_bits);
  for (int j = 0; j < kSubBlocks; ++j) {
    const int first = j * kSubBlock;
    scales[j] =
        round_scale<kSubBlock>(x + first, weights + first, fits[j], d, format.scales, format.levels, levels + first);
  }
  return d_bits;
}

// Sub-block j's 6-bit scale of Q3_K: its low four bits are a nibble of the first 8 bytes, the high two bits 2 (j div 4)
// and the next of one of the last four.
int unpack_q3_scale(const uint8_t* scales, int j) {
  return (scales[j % 8] >> (j / 8 * 4) & 15) | (scales[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
}

void pack_q3_scale(uint8_t* scales, int j, int value) {
  scales[j % 8] = static_cast<uint8_t>(scales[j % 8] | (value & 15) << (j / 8 * 4));
  scales[8 + j % 4] = static_cast<uint8_t>(scales[8 + j % 4] | (value >> 4) << (j / 4 * 2));
}

BlockQ3K quantize_block_q3_k(const float* x) {
  BlockQ3K block{};
  int scales[kSubBlocks];
  float levels[BlockQ3K::kLength];
  block.d = quantize_symmetric(x, kQ3Format, scales, levels);
  for (int j = 0; j < kSubBlocks; ++j) pack_q3_scale(block.scales, j, scales[j] + 32);
  for (int i = 0; i < BlockQ3K::kLength; ++i) {
    const int level = static_cast<int>(levels[i]) + 4, half = i / 128, s = i % 128 / 32, l = i % 32;
    uint8_t& four = block.qs[32 * half + l];
    four = static_cast<uint8_t>(four | (level & 3) << (2 * s));
    block.hmask[l] = static_cast<uint8_t>(block.hmask[l] | (level >> 2) << (4 * half + s));
  }
  return block;
}

BlockQ6K quantize_block_q6_k(const float* x) {
  BlockQ6K block{};
  int scales[kSubBlocks];
  float levels[BlockQ6K::kLength];
  block.d = quantize_symmetric(x, kQ6Format, scales, levels);
  for (int j = 0; j < kSubBlocks; ++j) block.scales[j] = static_cast<int8_t>(scales[j]);
  // The inverse of the unpacking in dequantize_q6_k.
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < 4; ++t)
      for (int l = 0; l < 32; ++l) {
        const int level = static_cast<int>(levels[128 * half + 32 * t + l]) + 32;
        uint8_t& low = block.ql[64 * half + t % 2 * 32 + l];
        uint8_t& high = block.qh[32 * half + l];
        low = static_cast<uint8_t>(low | (level & 15) << (t / 2 * 4));
        high = static_cast<uint8_t>(high | (level >> 4) << (2 * t));
      }
  return block;
}

}  // namespace

void quantize_q3_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q3_k);
}
void quantize_q6_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q6_k);
}

void dequantize_q3_k(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ3K::kLength; ++b) {
    BlockQ3K block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d);
    for (int j = 0; j < kSubBlocks; ++j) {
      const float scale = d * static_cast<float>(unpack_q3_scale(block.scales, j) - 32);
      const int half = j / 8, s = j % 8 / 2, first = j % 2 * 16;
      for (int l = first; l < first + kSubBlock; ++l) {
        const int low = block.qs[32 * half + l] >> (2 * s) & 3, high = block.hmask[l] >> (4 * half + s) & 1;
        *values++ = scale * static_cast<float>((low | high << 2) - 4);
      }
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
