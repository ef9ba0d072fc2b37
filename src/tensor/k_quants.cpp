// The K-quants: super-blocks of 256 values whose sub-blocks have small integer scales.
//
// How we quantise. Each sub-block is fitted alone: for a few step sizes around (range / levels) its values are assigned
// to levels, and weighted least squares gives the best scale (and minimum) for that assignment; the smallest weighted
// error wins. The scales of all sub-blocks are then rounded to the super-block's small integers, where the neighbours
// of the nearest integer are tried, too, and values are assigned to levels once more with exactly the scales stored.
// Every sum runs in index order, so the bytes are the same on every machine.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/blocks.h"
#include "tensor/conversions.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

constexpr int kAffineSubBlock = 32, kQ6SubBlock = 16;
constexpr int kAffineSubBlocks = 256 / kAffineSubBlock, kQ6SubBlocks = BlockQ6K::kLength / kQ6SubBlock;

// The level nearest to x, within 0..max, kept as a float; NaN gives 0.
inline float nearest_level(float x, float max) {
  const float shifted = x + 0.5f;
  const float clamped = shifted > 0 ? std::min(shifted, max) : 0.0f;
  return static_cast<float>(static_cast<int>(clamped));
}

// term(0) + ... + term(n - 1) in eight interleaved partial sums: a fixed order that compilers can still vectorise.
template <int n, typename Term>
inline float sum(Term term) {
  static_assert(n % 8 == 0);
  float lanes[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += term(i + l);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// What an error at each value costs: its square plus the mean square, so that large weights, which move a matrix
// product most, are met best and small ones still count.
template <int n>
void error_weights(const float* x, float* weights) {
  const float mean = sum<n>([&](int i) { return x[i] * x[i]; }) / n;
  for (int i = 0; i < n; ++i) weights[i] = x[i] * x[i] + mean;
}

// --- Q4_K, Q5_K: x ~ scale * q - minimum, q in 0..max_level (15 or 31), scale and minimum not negative ---

struct AffineFit {
  float scale = 0, minimum = 0;
};

// Assigns levels for this scale and minimum.
void assign_affine(const float* x, AffineFit fit, float max_level, float* levels) {
  const float inverse = fit.scale > 0 ? 1.0f / fit.scale : 0.0f;
  for (int i = 0; i < kAffineSubBlock; ++i) levels[i] = nearest_level((x[i] + fit.minimum) * inverse, max_level);
}

// The weighted square error of the values that these levels stand for.
float affine_error(const float* x, const float* weights, AffineFit fit, const float* levels) {
  return sum<kAffineSubBlock>([&](int i) {
    const float difference = fit.scale * levels[i] - fit.minimum - x[i];
    return weights[i] * difference * difference;
  });
}

// The scale and minimum with the least weighted square error for the given levels; a minimum that would be negative is
// zero (the format cannot store it).
AffineFit least_squares_affine(const float* x, const float* weights, const float* levels) {
  const float sum_w = sum<kAffineSubBlock>([&](int i) { return weights[i]; });
  const float sum_q = sum<kAffineSubBlock>([&](int i) { return weights[i] * levels[i]; });
  const float sum_qq = sum<kAffineSubBlock>([&](int i) { return weights[i] * levels[i] * levels[i]; });
  const float sum_x = sum<kAffineSubBlock>([&](int i) { return weights[i] * x[i]; });
  const float sum_qx = sum<kAffineSubBlock>([&](int i) { return weights[i] * levels[i] * x[i]; });
  const float determinant = sum_w * sum_qq - sum_q * sum_q;
  if (determinant > 0) {
    const float minimum = (sum_q * sum_qx - sum_qq * sum_x) / determinant;
    if (minimum >= 0) return {std::max((sum_w * sum_qx - sum_q * sum_x) / determinant, 0.0f), minimum};
  }
  return {sum_qq > 0 ? std::max(sum_qx / sum_qq, 0.0f) : 0.0f, 0.0f};
}

AffineFit fit_affine(const float* x, const float* weights, float max_level) {
  const auto [lowest, highest] = std::minmax_element(x, x + kAffineSubBlock);
  const float base = std::min(*lowest, 0.0f), range = *highest - base;
  AffineFit best{0, -base};
  if (!(range > 0)) return best;  // all values equal and not positive: the minimum alone holds them
  float levels[kAffineSubBlock];
  best.scale = range / max_level;
  assign_affine(x, best, max_level, levels);
  float best_error = affine_error(x, weights, best, levels);
  for (int step = 0; step <= 10; ++step) {
    assign_affine(x, {range / (max_level - 1.0f + 0.2f * static_cast<float>(step)), -base}, max_level, levels);
    const AffineFit fit = least_squares_affine(x, weights, levels);
    const float error = affine_error(x, weights, fit, levels);
    if (error < best_error) {
      best_error = error;
      best = fit;
    }
  }
  return best;
}

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

// The 6-bit integers near fit with the least error when values are assigned with d and dmin; levels are those of it.
ScaleMin round_affine(const float* x, const float* weights, AffineFit fit, float d, float dmin, float max_level,
                      float* levels) {
  const float scale = d > 0 ? nearest_level(fit.scale / d, 63.0f) : 0;
  const float minimum = dmin > 0 ? nearest_level(fit.minimum / dmin, 63.0f) : 0;
  ScaleMin best{static_cast<uint8_t>(scale), static_cast<uint8_t>(minimum)};
  assign_affine(x, {d * scale, dmin * minimum}, max_level, levels);
  float best_error = affine_error(x, weights, {d * scale, dmin * minimum}, levels);
  for (float s = std::max(scale - 1, 0.0f); s <= std::min(scale + 1, 63.0f); ++s)
    for (float m = std::max(minimum - 1, 0.0f); m <= std::min(minimum + 1, 63.0f); ++m) {
      float candidate[kAffineSubBlock];
      assign_affine(x, {d * s, dmin * m}, max_level, candidate);
      const float error = affine_error(x, weights, {d * s, dmin * m}, candidate);
      if (error >= best_error) continue;
      best_error = error;
      best = {static_cast<uint8_t>(s), static_cast<uint8_t>(m)};
      std::copy(candidate, candidate + kAffineSubBlock, levels);
    }
  return best;
}

// Quantises a super-block: fills d, dmin and scales of block, and levels with its 256 values' levels.
template <typename Block>
void quantize_affine(const float* x, float max_level, Block& block, float* levels) {
  float weights[256];
  AffineFit fits[kAffineSubBlocks];
  float largest_scale = 0, largest_minimum = 0;
  for (int j = 0; j < kAffineSubBlocks; ++j) {
    const int first = j * kAffineSubBlock;
    error_weights<kAffineSubBlock>(x + first, weights + first);
    fits[j] = fit_affine(x + first, weights + first, max_level);
    largest_scale = std::max(largest_scale, fits[j].scale);
    largest_minimum = std::max(largest_minimum, fits[j].minimum);
  }
  block.d = f32_to_f16(largest_scale / 63.0f);
  block.dmin = f32_to_f16(largest_minimum / 63.0f);
  const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
  for (int j = 0; j < kAffineSubBlocks; ++j) {
    const int first = j * kAffineSubBlock;
    pack_scale_min(block.scales, j,
                   round_affine(x + first, weights + first, fits[j], d, dmin, max_level, levels + first));
  }
}

BlockQ4K quantize_block_q4_k(const float* x) {
  BlockQ4K block{};
  float levels[BlockQ4K::kLength];
  quantize_affine(x, 15.0f, block, levels);
  for (int i = 0; i < BlockQ4K::kLength; ++i) {
    const int j = i / kAffineSubBlock;
    uint8_t& pair = block.qs[j / 2 * 32 + i % 32];
    pair = static_cast<uint8_t>(pair | static_cast<int>(levels[i]) << (j % 2 * 4));
  }
  return block;
}

BlockQ5K quantize_block_q5_k(const float* x) {
  BlockQ5K block{};
  float levels[BlockQ5K::kLength];
  quantize_affine(x, 31.0f, block, levels);
  for (int i = 0; i < BlockQ5K::kLength; ++i) {
    const int j = i / kAffineSubBlock, level = static_cast<int>(levels[i]);
    uint8_t& pair = block.qs[j / 2 * 32 + i % 32];
    pair = static_cast<uint8_t>(pair | (level & 15) << (j % 2 * 4));
    block.qh[i % 32] = static_cast<uint8_t>(block.qh[i % 32] | (level >> 4) << j);
  }
  return block;
}

// --- Q6_K: x ~ scale * (level - 32), level in 0..63, scale of either sign ---

// Assigns levels for this scale.
void assign_symmetric(const float* x, float scale, float* levels) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kQ6SubBlock; ++i) levels[i] = nearest_level(x[i] * inverse + 32.0f, 63.0f);
}

// The weighted square error of the values that these levels stand for.
float symmetric_error(const float* x, const float* weights, float scale, const float* levels) {
  return sum<kQ6SubBlock>([&](int i) {
    const float difference = scale * (levels[i] - 32) - x[i];
    return weights[i] * difference * difference;
  });
}

// The scale with the least weighted square error for the given levels.
float least_squares_scale(const float* x, const float* weights, const float* levels) {
  const float sum_qq = sum<kQ6SubBlock>([&](int i) { return weights[i] * (levels[i] - 32) * (levels[i] - 32); });
  const float sum_qx = sum<kQ6SubBlock>([&](int i) { return weights[i] * (levels[i] - 32) * x[i]; });
  return sum_qq > 0 ? sum_qx / sum_qq : 0.0f;
}

float fit_symmetric(const float* x, const float* weights) {
  float extreme = 0;
  for (int i = 0; i < kQ6SubBlock; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  if (extreme == 0) return 0;
  float levels[kQ6SubBlock];
  // The side with one more level goes to the value of largest magnitude.
  float best = extreme / -32.0f;
  assign_symmetric(x, best, levels);
  float best_error = symmetric_error(x, weights, best, levels);
  for (int step = -4; step <= 4; ++step) {
    assign_symmetric(x, extreme / -(32.0f + 0.2f * static_cast<float>(step)), levels);
    const float scale = least_squares_scale(x, weights, levels);
    const float error = symmetric_error(x, weights, scale, levels);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

// The 8-bit integer near scale / d with the least error when values are assigned with d; levels are those of it.
int8_t round_symmetric(const float* x, const float* weights, float scale, float d, float* levels) {
  const float nearest = d != 0 ? nearest_level(scale / d + 128.0f, 255.0f) - 128.0f : 0.0f;
  float best = nearest;
  assign_symmetric(x, d * nearest, levels);
  float best_error = symmetric_error(x, weights, d * nearest, levels);
  for (float s = std::max(nearest - 1, -128.0f); s <= std::min(nearest + 1, 127.0f); ++s) {
    float candidate[kQ6SubBlock];
    assign_symmetric(x, d * s, candidate);
    const float error = symmetric_error(x, weights, d * s, candidate);
    if (error >= best_error) continue;
    best_error = error;
    best = s;
    std::copy(candidate, candidate + kQ6SubBlock, levels);
  }
  return static_cast<int8_t>(best);
}

BlockQ6K quantize_block_q6_k(const float* x) {
  float weights[BlockQ6K::kLength], scales[kQ6SubBlocks], extreme = 0;
  for (int j = 0; j < kQ6SubBlocks; ++j) {
    const int first = j * kQ6SubBlock;
    error_weights<kQ6SubBlock>(x + first, weights + first);
    scales[j] = fit_symmetric(x + first, weights + first);
    if (std::fabs(scales[j]) > std::fabs(extreme)) extreme = scales[j];
  }
  BlockQ6K block{};
  block.d = f32_to_f16(extreme / -128.0f);
  const float d = f16_to_f32(block.d);
  float levels[BlockQ6K::kLength];
  for (int j = 0; j < kQ6SubBlocks; ++j) {
    const int first = j * kQ6SubBlock;
    block.scales[j] = round_symmetric(x + first, weights + first, scales[j], d, levels + first);
  }
  // The inverse of the unpacking in dequantize_q6_k.
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < 4; ++t)
      for (int l = 0; l < 32; ++l) {
        const int level = static_cast<int>(levels[128 * half + 32 * t + l]);
        uint8_t& low = block.ql[64 * half + t % 2 * 32 + l];
        uint8_t& high = block.qh[32 * half + l];
        low = static_cast<uint8_t>(low | (level & 15) << (t / 2 * 4));
        high = static_cast<uint8_t>(high | (level >> 4) << (2 * t));
      }
  return block;
}

template <typename Block>
void quantize_blocks(const float* values, std::byte* blocks, int64_t n, Block (*quantize_block)(const float*)) {
  for (int64_t b = 0; b < n / Block::kLength; ++b) {
    const Block block = quantize_block(values + b * Block::kLength);
    std::memcpy(blocks + b * sizeof block, &block, sizeof block);
  }
}

}  // namespace

void quantize_q4_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q4_k);
}
void quantize_q5_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q5_k);
}
void quantize_q6_k(const float* values, std::byte* blocks, int64_t n) {
  quantize_blocks(values, blocks, n, quantize_block_q6_k);
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
