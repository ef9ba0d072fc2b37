// Q2_K, Q4_K, Q5_K: super-blocks of 256 values whose sub-blocks have a small integer scale and minimum. How they are
// quantised: scale_search.h.
#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"
#include "tensor/scale_search.h"

namespace caravan::tensor {
namespace {

// Puts the 6-bit scale and minimum of sub-block j where unpack_scale_min() finds them.
void pack_scale_min(uint8_t* scales, int j, ScaleMin value) {
  if (j < 4) {
    scales[j] = static_cast<uint8_t>(scales[j] | value.scale);
    scales[j + 4] = static_cast<uint8_t>(scales[j + 4] | value.minimum);
  } else {
    scales[j + 4] = static_cast<uint8_t>((value.scale & 15) | (value.minimum & 15) << 4);
    scales[j - 4] = static_cast<uint8_t>(scales[j - 4] | (value.scale >> 4) << 6);
    scales[j] = static_cast<uint8_t>(scales[j] | (value.minimum >> 4) << 6);
  }
}

// Quantises a super-block: fills d and dmin of block, and levels with its 256 values' levels; pack(j, scale and
// minimum) stores those of sub-block j, which are at most max_scale.
template <int length, typename Block, typename Pack>
void quantize_affine(const float* x, float max_level, float max_scale, Block& block, float* levels, Pack pack) {
  constexpr int kSubBlocks = 256 / length;
  float weights[256];
  AffineFit fits[kSubBlocks];
  float largest_scale = 0, largest_minimum = 0;
  for (int j = 0; j < kSubBlocks; ++j) {
    const int first = j * length;
    error_weights<length>(x + first, weights + first);
    fits[j] = fit_affine<length>(x + first, weights + first, max_level);
    largest_scale = std::max(largest_scale, fits[j].scale);
    largest_minimum = std::max(largest_minimum, fits[j].minimum);
  }
  block.d = f32_to_f16(largest_scale / max_scale);
  block.dmin = f32_to_f16(largest_minimum / max_scale);
  const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
  for (int j = 0; j < kSubBlocks; ++j) {
    const int first = j * length;
    pack(j, round_affine<length>(x + first, weights + first, fits[j], d, dmin, max_scale, max_level, levels + first));
  }
}

BlockQ2K quantize_block_q2_k(const float* x) {
  BlockQ2K block{};
  float levels[BlockQ2K::kLength];
  quantize_affine<16>(x, 3.0f, 15.0f, block, levels, [&](int j, ScaleMin value) {
    block.scales[j] = static_cast<uint8_t>(value.scale | value.minimum << 4);
  });
  for (int i = 0; i < BlockQ2K::kLength; ++i) {
    uint8_t& four = block.qs[i / 128 * 32 + i % 32];
    four = static_cast<uint8_t>(four | static_cast<int>(levels[i]) << (i % 128 / 32 * 2));
  }
  return block;
}

BlockQ4K quantize_block_q4_k(const float* x) {
  BlockQ4K block{};
  float levels[BlockQ4K::kLength];
  quantize_affine<32>(x, 15.0f, 63.0f, block, levels,
                      [&](int j, ScaleMin value) { pack_scale_min(block.scales, j, value); });
  for (int i = 0; i < BlockQ4K::kLength; ++i) {
    const int j = i / 32;
    uint8_t& pair = block.qs[j / 2 * 32 + i % 32];
    pair = static_cast<uint8_t>(pair | static_cast<int>(levels[i]) << (j % 2 * 4));
  }
  return block;
}

BlockQ5K quantize_block_q5_k(const float* x) {
  BlockQ5K block{};
  float levels[BlockQ5K::kLength];
  quantize_affine<32>(x, 31.0f, 63.0f, block, levels,
                      [&](int j, ScaleMin value) { pack_scale_min(block.scales, j, value); });
  for (int i = 0; i < BlockQ5K::kLength; ++i) {
    const int j = i / 32, level = static_cast<int>(levels[i]);
    uint8_t& pair = block.qs[j / 2 * 32 + i % 32];
    pair = static_cast<uint8_t>(pair | (level & 15) << (j % 2 * 4));
    block.qh[i % 32] = static_cast<uint8_t>(block.qh[i % 32] | (level >> 4) << j);
  }
  return block;
}

}  // namespace

void quantize_q2_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q2_k);
}
void quantize_q4_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q4_k);
}
void quantize_q5_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q5_k);
}

void dequantize_q2_k(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ2K::kLength; ++b) {
    BlockQ2K block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int j = 0; j < 16; ++j) {
      const float scale = d * static_cast<float>(block.scales[j] & 15);
      const float minimum = dmin * static_cast<float>(block.scales[j] >> 4);
      const uint8_t* qs = block.qs + j / 8 * 32 + j % 2 * 16;
      const int shift = j % 8 / 2 * 2;
      for (int l = 0; l < 16; ++l) *values++ = scale * static_cast<float>(qs[l] >> shift & 3) - minimum;
    }
  }
}

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

void dequantize_q5_k(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / BlockQ5K::kLength; ++b) {
    BlockQ5K block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int j = 0; j < 8; ++j) {
      const ScaleMin sm = unpack_scale_min(block.scales, j);
      const float scale = d * sm.scale, minimum = dmin * sm.minimum;
      const uint8_t* qs = block.qs + j / 2 * 32;
      const int shift = j % 2 * 4;
      for (int l = 0; l < 32; ++l)
        *values++ = scale * static_cast<float>((qs[l] >> shift & 15) | (block.qh[l] >> j & 1) << 4) - minimum;
    }
  }
}

}  // namespace caravan::tensor
