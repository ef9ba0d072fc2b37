// The IQ types with codebooks: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S. They are only dequantised; IQ4_NL
// and IQ4_XS, which have no codebook, are in iq4.cpp. Formats: docs/gguf.md.
#include <bit>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"
#include "tensor/integer_form.h"
#include "tensor/iq_codebooks.h"

namespace caravan::tensor {
namespace {

constexpr int kSubBlock = 32, kSubBlocks = 256 / kSubBlock;

uint32_t load_u32(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Seven stored signs and an eighth that makes the number of minus signs even.
uint8_t even_signs(uint32_t seven_bits) {
  return static_cast<uint8_t>(seven_bits | static_cast<uint32_t>(std::popcount(seven_bits) & 1) << 7);
}

// Bit j of signs negates value j.
void put_signed(const Point8& point, uint8_t signs, int8_t* q) {
  for (size_t j = 0; j < 8; ++j) q[j] = static_cast<int8_t>(signs >> j & 1 ? -point[j] : point[j]);
}

void put_signed(const Point4& low, const Point4& high, uint8_t signs, int8_t* q) {
  Point8 point;
  std::memcpy(point.data(), low.data(), 4);
  std::memcpy(point.data() + 4, high.data(), 4);
  put_signed(point, signs, q);
}

// IQ1 has no signs but an eighth added to (or taken from) each value: all are counted in eighths.
void put_offset(const Point8& point, bool negative, int8_t* q) {
  for (size_t j = 0; j < 8; ++j) q[j] = static_cast<int8_t>(8 * point[j] + (negative ? -1 : 1));
}

IntegerForm<BlockIq2Xxs> split_block(const BlockIq2Xxs& block) {
  IntegerForm<BlockIq2Xxs> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    const uint8_t* indices = block.qs + 8 * i;
    const uint32_t word = load_u32(indices + 4);
    form.scale[2 * i] = form.scale[2 * i + 1] = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
    for (int l = 0; l < 4; ++l)
      put_signed(kIq2XxsCodebook[indices[l]], even_signs(word >> (7 * l) & 127), form.q + kSubBlock * i + 8 * l);
  }
  return form;
}

// The scale of half of a sub-block of IQ2_XS and IQ2_S: a nibble of scales.
float iq2_scale(float d, uint8_t scales, int half) {
  return d * (0.5f + static_cast<float>(scales >> (4 * half) & 15)) * 0.25f;
}

IntegerForm<BlockIq2Xs> split_block(const BlockIq2Xs& block) {
  IntegerForm<BlockIq2Xs> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    for (int half = 0; half < 2; ++half) form.scale[2 * i + half] = iq2_scale(d, block.scales[i], half);
    for (int l = 0; l < 4; ++l) {
      const uint32_t q = block.qs[4 * i + l];
      put_signed(kIq2XsCodebook[q & 511], even_signs(q >> 9), form.q + kSubBlock * i + 8 * l);
    }
  }
  return form;
}

IntegerForm<BlockIq2S> split_block(const BlockIq2S& block) {
  IntegerForm<BlockIq2S> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    for (int half = 0; half < 2; ++half) form.scale[2 * i + half] = iq2_scale(d, block.scales[i], half);
    for (int l = 0; l < 4; ++l) {
      const auto index = static_cast<size_t>(block.qs[4 * i + l] | (block.qh[i] >> (2 * l) & 3) << 8);
      put_signed(kIq2SCodebook[index], block.signs[4 * i + l], form.q + kSubBlock * i + 8 * l);
    }
  }
  return form;
}

IntegerForm<BlockIq3Xxs> split_block(const BlockIq3Xxs& block) {
  IntegerForm<BlockIq3Xxs> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    const uint8_t* indices = block.qs + 8 * i;
    const uint32_t word = load_u32(block.scales_signs + 4 * i);
    form.scale[2 * i] = form.scale[2 * i + 1] = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
    for (int l = 0; l < 4; ++l)
      put_signed(kIq3XxsCodebook[indices[2 * l]], kIq3XxsCodebook[indices[2 * l + 1]],
                 even_signs(word >> (7 * l) & 127), form.q + kSubBlock * i + 8 * l);
  }
  return form;
}

IntegerForm<BlockIq3S> split_block(const BlockIq3S& block) {
  IntegerForm<BlockIq3S> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    const int scale = block.scales[i / 2] >> (i % 2 * 4) & 15;
    form.scale[2 * i] = form.scale[2 * i + 1] = d * static_cast<float>(1 + 2 * scale);
    const auto point = [&](int k) -> const Point4& {
      return kIq3SCodebook[static_cast<size_t>(block.qs[8 * i + k] | (block.qh[i] >> k & 1) << 8)];
    };
    for (int l = 0; l < 4; ++l)
      put_signed(point(2 * l), point(2 * l + 1), block.signs[4 * i + l], form.q + kSubBlock * i + 8 * l);
  }
  return form;
}

IntegerForm<BlockIq1S> split_block(const BlockIq1S& block) {
  IntegerForm<BlockIq1S> form;
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kSubBlocks; ++i) {
    form.scale[2 * i] = form.scale[2 * i + 1] = d * static_cast<float>(2 * (block.qh[i] >> 12 & 7) + 1) / 8;
    for (int l = 0; l < 4; ++l) {
      const auto index = static_cast<size_t>(block.qs[4 * i + l] | (block.qh[i] >> (3 * l) & 7) << 8);
      put_offset(kIq1Codebook[index], block.qh[i] >> 15 != 0, form.q + kSubBlock * i + 8 * l);
    }
  }
  return form;
}

IntegerForm<BlockIq1M> split_block(const BlockIq1M& block) {
  IntegerForm<BlockIq1M> form;
  uint16_t d_bits = 0;
  for (int k = 0; k < 4; ++k) d_bits = static_cast<uint16_t>(d_bits | block.scales[k] >> 12 << (4 * k));
  const float d = f16_to_f32(d_bits);
  for (int i = 0; i < kSubBlocks; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int scale = block.scales[i / 2] >> (6 * (i % 2) + 3 * half) & 7;
      form.scale[2 * i + half] = d * static_cast<float>(2 * scale + 1) / 8;
    }
    for (int l = 0; l < 4; ++l) {
      const int high = block.qh[2 * i + l / 2] >> (l % 2 * 4);
      const auto index = static_cast<size_t>(block.qs[4 * i + l] | (high & 7) << 8);
      put_offset(kIq1Codebook[index], (high & 8) != 0, form.q + kSubBlock * i + 8 * l);
    }
  }
  return form;
}

}  // namespace

void split_iq2_xxs(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq2Xxs, split_block>(blocks, q, scales, n);
}
void dequantize_iq2_xxs(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq2Xxs, split_block>(blocks, values, n);
}

void split_iq2_xs(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq2Xs, split_block>(blocks, q, scales, n);
}
void dequantize_iq2_xs(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq2Xs, split_block>(blocks, values, n);
}

void split_iq2_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq2S, split_block>(blocks, q, scales, n);
}
void dequantize_iq2_s(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq2S, split_block>(blocks, values, n);
}

void split_iq3_xxs(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq3Xxs, split_block>(blocks, q, scales, n);
}
void dequantize_iq3_xxs(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq3Xxs, split_block>(blocks, values, n);
}

void split_iq3_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq3S, split_block>(blocks, q, scales, n);
}
void dequantize_iq3_s(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq3S, split_block>(blocks, values, n);
}

void split_iq1_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq1S, split_block>(blocks, q, scales, n);
}
void dequantize_iq1_s(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq1S, split_block>(blocks, values, n);
}

void split_iq1_m(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockIq1M, split_block>(blocks, q, scales, n);
}
void dequantize_iq1_m(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq1M, split_block>(blocks, values, n);
}

}  // namespace caravan::tensor
