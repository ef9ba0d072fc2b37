// The IQ types with codebooks: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S. They are only dequantised; IQ4_NL
// and IQ4_XS, which have no codebook, are in iq4.cpp. Formats: docs/gguf.md.
#include <bit>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"
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
void emit_signed(const Point8& point, uint8_t signs, float scale, float* values) {
  for (int j = 0; j < 8; ++j) {
    const float magnitude = scale * static_cast<float>(point[static_cast<size_t>(j)]);
    values[j] = signs >> j & 1 ? -magnitude : magnitude;
  }
}

void emit_signed(const Point4& low, const Point4& high, uint8_t signs, float scale, float* values) {
  Point8 point;
  std::memcpy(point.data(), low.data(), 4);
  std::memcpy(point.data() + 4, high.data(), 4);
  emit_signed(point, signs, scale, values);
}

// IQ1 has no signs but an eighth added to (or taken from) each value.
void emit_offset(const Point8& point, bool negative, float scale, float* values) {
  const float offset = negative ? -0.125f : 0.125f;
  for (size_t j = 0; j < 8; ++j) values[j] = scale * (static_cast<float>(point[j]) + offset);
}

// Calls dequantize_block(block, values) for each block of n values.
template <typename Block, typename Function>
void for_each_block(const std::byte* blocks, float* values, int64_t n, Function dequantize_block) {
  for (int64_t b = 0; b < n / Block::kLength; ++b) {
    Block block;
    std::memcpy(&block, blocks + b * sizeof block, sizeof block);
    dequantize_block(block, values + b * Block::kLength);
  }
}

}  // namespace

void dequantize_iq2_xxs(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq2Xxs>(blocks, values, n, [](const BlockIq2Xxs& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i) {
      const uint8_t* indices = block.qs + 8 * i;
      const uint32_t word = load_u32(indices + 4);
      const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
      for (int l = 0; l < 4; ++l, out += 8)
        emit_signed(kIq2XxsCodebook[indices[l]], even_signs(word >> (7 * l) & 127), scale, out);
    }
  });
}

void dequantize_iq2_xs(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq2Xs>(blocks, values, n, [](const BlockIq2Xs& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i)
      for (int l = 0; l < 4; ++l, out += 8) {
        const float scale = d * (0.5f + static_cast<float>(block.scales[i] >> (l / 2 * 4) & 15)) * 0.25f;
        const uint32_t q = block.qs[4 * i + l];
        emit_signed(kIq2XsCodebook[q & 511], even_signs(q >> 9), scale, out);
      }
  });
}

void dequantize_iq2_s(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq2S>(blocks, values, n, [](const BlockIq2S& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i)
      for (int l = 0; l < 4; ++l, out += 8) {
        const float scale = d * (0.5f + static_cast<float>(block.scales[i] >> (l / 2 * 4) & 15)) * 0.25f;
        const auto index = static_cast<size_t>(block.qs[4 * i + l] | (block.qh[i] >> (2 * l) & 3) << 8);
        emit_signed(kIq2SCodebook[index], block.signs[4 * i + l], scale, out);
      }
  });
}

void dequantize_iq3_xxs(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq3Xxs>(blocks, values, n, [](const BlockIq3Xxs& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i) {
      const uint8_t* indices = block.qs + 8 * i;
      const uint32_t word = load_u32(block.scales_signs + 4 * i);
      const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
      for (int l = 0; l < 4; ++l, out += 8)
        emit_signed(kIq3XxsCodebook[indices[2 * l]], kIq3XxsCodebook[indices[2 * l + 1]],
                    even_signs(word >> (7 * l) & 127), scale, out);
    }
  });
}

void dequantize_iq3_s(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq3S>(blocks, values, n, [](const BlockIq3S& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i) {
      const float scale = d * static_cast<float>(1 + 2 * (block.scales[i / 2] >> (i % 2 * 4) & 15));
      const auto point = [&](int k) -> const Point4& {
        return kIq3SCodebook[static_cast<size_t>(block.qs[8 * i + k] | (block.qh[i] >> k & 1) << 8)];
      };
      for (int l = 0; l < 4; ++l, out += 8)
        emit_signed(point(2 * l), point(2 * l + 1), block.signs[4 * i + l], scale, out);
    }
  });
}

void dequantize_iq1_s(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq1S>(blocks, values, n, [](const BlockIq1S& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < kSubBlocks; ++i) {
      const float scale = d * static_cast<float>(2 * (block.qh[i] >> 12 & 7) + 1);
      for (int l = 0; l < 4; ++l, out += 8) {
        const auto index = static_cast<size_t>(block.qs[4 * i + l] | (block.qh[i] >> (3 * l) & 7) << 8);
        emit_offset(kIq1Codebook[index], block.qh[i] >> 15 != 0, scale, out);
      }
    }
  });
}

void dequantize_iq1_m(const std::byte* blocks, float* values, int64_t n) {
  for_each_block<BlockIq1M>(blocks, values, n, [](const BlockIq1M& block, float* out) {
    uint16_t d_bits = 0;
    for (int k = 0; k < 4; ++k) d_bits = static_cast<uint16_t>(d_bits | block.scales[k] >> 12 << (4 * k));
    const float d = f16_to_f32(d_bits);
    for (int i = 0; i < kSubBlocks; ++i)
      for (int l = 0; l < 4; ++l, out += 8) {
        const int shift = 6 * (i % 2) + 3 * (l / 2);
        const float scale = d * static_cast<float>(2 * (block.scales[i / 2] >> shift & 7) + 1);
        const int high = block.qh[2 * i + l / 2] >> (l % 2 * 4);
        const auto index = static_cast<size_t>(block.qs[4 * i + l] | (high & 7) << 8);
        emit_offset(kIq1Codebook[index], (high & 8) != 0, scale, out);
      }
  });
}

}  // namespace caravan::tensor
