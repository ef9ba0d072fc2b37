// Types of one or two bits: TQ1_0 and TQ2_0 (-1, 0, 1), Q1_0 (-1, 1), Q2_0 (-1, 0, 1, 2), each times a binary16 scale.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"
#include "tensor/integer_form.h"

namespace caravan::tensor {
namespace {

constexpr int kPowersOf3[] = {1, 3, 9, 27, 81};

// TQ1_0 packs base-3 digits as the binary fraction of a byte: this is digit number n, 0 to 2, counted from the highest.
int digit(uint8_t byte, int n) { return (byte * kPowersOf3[n] & 255) * 3 >> 8; }

// The byte with these five digits, the highest first.
uint8_t pack_digits(const int digits[5]) {
  int number = 0;
  for (int n = 0; n < 5; ++n) number = 3 * number + digits[n];
  return static_cast<uint8_t>((number * 256 + 242) / 243);  // rounded up, so that digit() finds each of them
}

float largest_magnitude(const float* x, int n) {
  float largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// x * inverse rounded half away from zero, within -1..1, plus one; NaN gives 0.
int ternary(float x, float inverse) {
  const float scaled = x * inverse;
  return scaled >= 0.5f ? 2 : (scaled > -0.5f ? 1 : 0);
}

// The three runs of bytes of TQ1_0: value first + k * n_bytes + m is digit k of byte m of the run.
struct DigitGroup {
  int first, n_bytes, n_digits;
};
constexpr DigitGroup kDigitGroups[] = {{0, 32, 5}, {160, 16, 5}, {240, 4, 4}};

// All values of these types share one scale.
template <typename Block>
IntegerForm<Block> with_scale(uint16_t d) {
  IntegerForm<Block> form;
  std::fill(std::begin(form.scale), std::end(form.scale), f16_to_f32(d));
  return form;
}

IntegerForm<BlockTq1_0> split_block(const BlockTq1_0& block) {
  auto form = with_scale<BlockTq1_0>(block.d);
  const uint8_t* const groups[] = {block.qs, block.qs + 32, block.qh};
  int8_t* q = form.q;
  for (int g = 0; g < 3; ++g)
    for (int k = 0; k < kDigitGroups[g].n_digits; ++k)
      for (int m = 0; m < kDigitGroups[g].n_bytes; ++m) *q++ = static_cast<int8_t>(digit(groups[g][m], k) - 1);
  return form;
}

IntegerForm<BlockTq2_0> split_block(const BlockTq2_0& block) {
  auto form = with_scale<BlockTq2_0>(block.d);
  int8_t* q = form.q;
  for (int g = 0; g < 2; ++g)
    for (int l = 0; l < 4; ++l)
      for (int m = 0; m < 32; ++m) *q++ = static_cast<int8_t>((block.qs[32 * g + m] >> (2 * l) & 3) - 1);
  return form;
}

IntegerForm<BlockQ1_0> split_block(const BlockQ1_0& block) {
  auto form = with_scale<BlockQ1_0>(block.d);
  for (int i = 0; i < BlockQ1_0::kLength; ++i) form.q[i] = block.qs[i / 8] >> (i % 8) & 1 ? 1 : -1;
  return form;
}

IntegerForm<BlockQ2_0> split_block(const BlockQ2_0& block) {
  auto form = with_scale<BlockQ2_0>(block.d);
  for (int i = 0; i < BlockQ2_0::kLength; ++i)
    form.q[i] = static_cast<int8_t>((block.qs[i / 4] >> (i % 4 * 2) & 3) - 1);
  return form;
}

}  // namespace

void split_tq1_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockTq1_0, split_block>(blocks, q, scales, n);
}
void dequantize_tq1_0(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockTq1_0, split_block>(blocks, values, n);
}

void split_tq2_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockTq2_0, split_block>(blocks, q, scales, n);
}
void dequantize_tq2_0(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockTq2_0, split_block>(blocks, values, n);
}

void split_q1_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockQ1_0, split_block>(blocks, q, scales, n);
}
void dequantize_q1_0(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockQ1_0, split_block>(blocks, values, n);
}

void split_q2_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  split_blocks<BlockQ2_0, split_block>(blocks, q, scales, n);
}
void dequantize_q2_0(const std::byte* blocks, float* values, int64_t n) {
  dequantize_integers<BlockQ2_0, split_block>(blocks, values, n);
}

void quantize_tq1_0(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / BlockTq1_0::kLength; ++b, values += BlockTq1_0::kLength) {
    const float d = largest_magnitude(values, BlockTq1_0::kLength);
    const float inverse = d > 0 ? 1.0f / d : 0.0f;
    BlockTq1_0 block;
    block.d = f32_to_f16(d);
    uint8_t* const groups[] = {block.qs, block.qs + 32, block.qh};
    for (int g = 0; g < 3; ++g)
      for (int m = 0; m < kDigitGroups[g].n_bytes; ++m) {
        int digits[5] = {};
        for (int k = 0; k < kDigitGroups[g].n_digits; ++k)
          digits[k] = ternary(values[kDigitGroups[g].first + k * kDigitGroups[g].n_bytes + m], inverse);
        groups[g][m] = pack_digits(digits);
      }
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

void quantize_tq2_0(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t b = 0; b < n / BlockTq2_0::kLength; ++b, values += BlockTq2_0::kLength) {
    const float d = largest_magnitude(values, BlockTq2_0::kLength);
    const float inverse = d > 0 ? 1.0f / d : 0.0f;
    BlockTq2_0 block{};
    block.d = f32_to_f16(d);
    for (int i = 0; i < BlockTq2_0::kLength; ++i) {
      uint8_t& byte = block.qs[i / 128 * 32 + i % 32];
      byte = static_cast<uint8_t>(byte | ternary(values[i], inverse) << (i % 128 / 32 * 2));
    }
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace caravan::tensor
