// IQ4_NL, IQ4_XS: nibbles that choose from 16 unevenly spaced values. How they are quantised: scale_search.h.
#include <algorithm>
#include <array>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/extreme.h"
#include "tensor/half.h"
#include "tensor/integer_form.h"
#include "tensor/scale_search.h"

namespace caravan::tensor {
namespace {

constexpr int kSubBlock = 32, kHalf = 16, kSubBlocks = BlockIq4Xs::kLength / kSubBlock;

// The index of the value of kIq4Values nearest to each half of a whole number from -128 to 127.5, so that every
// midpoint between two values is the first entry of the upper one.
constexpr std::array<uint8_t, 512> kNearest = [] {
  std::array<uint8_t, 512> table{};
  for (int i = 0; i < 512; ++i) {
    int index = 0;
    while (index < 15 && i - 256 >= kIq4Values[index] + kIq4Values[index + 1]) ++index;
    table[static_cast<size_t>(i)] = static_cast<uint8_t>(index);
  }
  return table;
}();

// The index of the value nearest to x. NaN gives 0.
uint8_t nearest_index(float x) {
  const float doubled = 2 * x + 256;
  return kNearest[static_cast<size_t>(doubled > 0 ? std::min(doubled, 511.0f) : 0.0f)];
}

// The 16 values as levels for the search.
struct Iq4Levels {
  float nearest(float x) const { return static_cast<float>(kIq4Values[nearest_index(x)]); }
};

// The value of largest magnitude is tried near either end.
constexpr Anchor kAnchors[] = {{-127.0f, 1.5f, 5}, {113.0f, 2.0f, 3}};
constexpr IntegerLevels kXsScales{-32, 31};

// Stores 32 levels as nibbles in the order of Q4_0.
void pack_nibbles(const float* levels, uint8_t* qs) {
  for (int j = 0; j < kHalf; ++j)
    qs[j] = static_cast<uint8_t>(nearest_index(levels[j]) | nearest_index(levels[j + kHalf]) << 4);
}

void unpack_nibbles(const uint8_t* qs, int8_t* q) {
  for (int j = 0; j < kHalf; ++j) {
    q[j] = kIq4Values[qs[j] & 15];
    q[j + kHalf] = kIq4Values[qs[j] >> 4];
  }
}

IntegerForm<BlockIq4Nl> split_block(const BlockIq4Nl& block) {
  IntegerForm<BlockIq4Nl> form;
  form.scale[0] = form.scale[1] = f16_to_f32(block.d);
  unpack_nibbles(block.qs, form.q);
  return form;
}

IntegerForm<BlockIq4Xs> split_block(const BlockIq4Xs& block) {
  IntegerForm<BlockIq4Xs> form;
  const float d = f16_to_f32(block.d);
  for (int j = 0; j < kSubBlocks; ++j) {
    const int scale = (block.scales_l[j / 2] >> (j % 2 * 4) & 15) | (block.scales_h >> (2 * j) & 3) << 4;
    form.scale[2 * j] = form.scale[2 * j + 1] = d * static_cast<float>(scale - 32);
    unpack_nibbles(block.qs + j * kHalf, form.q + j * kSubBlock);
  }
  return form;
}

BlockIq4Nl quantize_block_iq4_nl(const float* x) {
  BlockIq4Nl block{};
  float weights[kSubBlock], levels[kSubBlock];
  error_weights<kSubBlock>(x, weights);
  block.d = f32_to_f16(fit_scale<kSubBlock>(x, weights, Iq4Levels{}, kAnchors));
  assign_levels<kSubBlock>(x, f16_to_f32(block.d), Iq4Levels{}, levels);
  pack_nibbles(levels, block.qs);
  return block;
}

BlockIq4Xs quantize_block_iq4_xs(const float* x) {
  BlockIq4Xs block{};
  float weights[BlockIq4Xs::kLength], fits[kSubBlocks];
  for (int j = 0; j < kSubBlocks; ++j) {
    const int first = j * kSubBlock;
    error_weights<kSubBlock>(x + first, weights + first);
    fits[j] = fit_scale<kSubBlock>(x + first, weights + first, Iq4Levels{}, kAnchors);
  }
  block.d = f32_to_f16(extreme_of(fits, kSubBlocks) / kXsScales.lowest);
  const float d = f16_to_f32(block.d);
  for (int j = 0; j < kSubBlocks; ++j) {
    float levels[kSubBlock];
    const int first = j * kSubBlock;
    const int scale =
        round_scale<kSubBlock>(x + first, weights + first, fits[j], d, kXsScales, Iq4Levels{}, levels) + 32;
    block.scales_l[j / 2] = static_cast<uint8_t>(block.scales_l[j / 2] | (scale & 15) << (j % 2 * 4));
    block.scales_h = static_cast<uint16_t>(block.scales_h | (scale >> 4) << (2 * j));
    pack_nibbles(levels, block.qs + j * kHalf);
  }
  return block;
}

}  // namespace

void quantize_iq4_nl(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_iq4_nl);
}
void quantize_iq4_xs(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_iq4_xs);
}

void dequantize_iq4_nl(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq4Nl, split_block>(blocks, values, n);
}

void dequantize_iq4_xs(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockIq4Xs, split_block>(blocks, values, n);
}

}  // namespace caravan::tensor
