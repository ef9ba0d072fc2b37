// The search behind the quantisers of the K-quants, IQ4_NL and IQ4_XS.
//
// Each sub-block is fitted alone: for a few step sizes around (range / levels) its values are assigned to levels, and
// weighted least squares gives the best scale (and minimum) for that assignment; the smallest weighted error wins. The
// scales of all sub-blocks are then rounded to the super-block's small integers, where the neighbours of the nearest
// integer are tried, too, and values are assigned to levels once more with exactly the scales stored.
// Every sum runs in a fixed order, so the bytes are the same on every machine. Levels are whole numbers kept as floats.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "tensor/blocks.h"
#include "tensor/extreme.h"

namespace caravan::tensor {

// The level nearest to x, within 0..max; NaN gives 0.
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

// Writes one block after the other.
template <typename Block>
void quantize_blocks(const float* values, std::byte* blocks, int64_t n, Block (*quantize_block)(const float*)) {
  for (int64_t b = 0; b < n / Block::kLength; ++b) {
    const Block block = quantize_block(values + b * Block::kLength);
    std::memcpy(blocks + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// --- Scale only: x ~ scale * level, the scale of either sign. Levels is a set of numbers:
//       float nearest(float x) const   the level nearest to x; some level for NaN

// Levels lowest, lowest + 1, ..., highest.
struct IntegerLevels {
  float lowest, highest;
  float nearest(float x) const { return nearest_level(x - lowest, highest - lowest) + lowest; }
};

template <int n, typename Levels>
void assign_levels(const float* x, float scale, const Levels& set, float* levels) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; ++i) levels[i] = set.nearest(x[i] * inverse);
}

// The weighted square error of the values that these levels stand for.
template <int n>
float scale_error(const float* x, const float* weights, float scale, const float* levels) {
  return sum<n>([&](int i) {
    const float difference = scale * levels[i] - x[i];
    return weights[i] * difference * difference;
  });
}

// The scale with the least weighted square error for the given levels.
template <int n>
float least_squares_scale(const float* x, const float* weights, const float* levels) {
  const float sum_qq = sum<n>([&](int i) { return weights[i] * levels[i] * levels[i]; });
  const float sum_qx = sum<n>([&](int i) { return weights[i] * levels[i] * x[i]; });
  return sum_qq > 0 ? sum_qx / sum_qq : 0.0f;
}

// Levels that the value of largest magnitude is tried at: centre - n_steps * step to centre + n_steps * step.
struct Anchor {
  float centre, step;
  int n_steps;
};

// The best scale for n values, 0 where all are zero. The first anchor's centre without least squares is tried first.
template <int n, typename Levels>
float fit_scale(const float* x, const float* weights, const Levels& set, std::span<const Anchor> anchors) {
  const float extreme = extreme_of(x, n);
  if (extreme == 0) return 0;
  float levels[n];
  float best = extreme / anchors[0].centre;
  assign_levels<n>(x, best, set, levels);
  float best_error = scale_error<n>(x, weights, best, levels);
  for (const Anchor& anchor : anchors)
    for (int k = -anchor.n_steps; k <= anchor.n_steps; ++k) {
      assign_levels<n>(x, extreme / (anchor.centre + anchor.step * static_cast<float>(k)), set, levels);
      const float scale = least_squares_scale<n>(x, weights, levels);
      const float error = scale_error<n>(x, weights, scale, levels);
      if (error >= best_error) continue;
      best_error = error;
      best = scale;
    }
  return best;
}

// The integer near scale / d, within range, with the least error when values are assigned with d; levels are those of
// it.
template <int n, typename Levels>
int round_scale(const float* x, const float* weights, float scale, float d, IntegerLevels range, const Levels& set,
                float* levels) {
  const float nearest = d != 0 ? range.nearest(scale / d) : 0.0f;
  float best = nearest;
  assign_levels<n>(x, d * nearest, set, levels);
  float best_error = scale_error<n>(x, weights, d * nearest, levels);
  for (float s = std::max(nearest - 1, range.lowest); s <= std::min(nearest + 1, range.highest); ++s) {
    float candidate[n];
    assign_levels<n>(x, d * s, set, candidate);
    const float error = scale_error<n>(x, weights, d * s, candidate);
    if (error >= best_error) continue;
    best_error = error;
    best = s;
    std::copy(candidate, candidate + n, levels);
  }
  return static_cast<int>(best);
}

// --- Scale and minimum: x ~ scale * q - minimum, q in 0..max_level, scale and minimum not negative.

struct AffineFit {
  float scale = 0, minimum = 0;
};

// Assigns levels for this scale and minimum.
template <int n>
void assign_affine(const float* x, AffineFit fit, float max_level, float* levels) {
  const float inverse = fit.scale > 0 ? 1.0f / fit.scale : 0.0f;
  for (int i = 0; i < n; ++i) levels[i] = nearest_level((x[i] + fit.minimum) * inverse, max_level);
}

// The weighted square error of the values that these levels stand for.
template <int n>
float affine_error(const float* x, const float* weights, AffineFit fit, const float* levels) {
  return sum<n>([&](int i) {
    const float difference = fit.scale * levels[i] - fit.minimum - x[i];
    return weights[i] * difference * difference;
  });
}

// The scale and minimum with the least weighted square error for the given levels; a minimum that would be negative is
// zero (the format cannot store it).
template <int n>
AffineFit least_squares_affine(const float* x, const float* weights, const float* levels) {
  const float sum_w = sum<n>([&](int i) { return weights[i]; });
  const float sum_q = sum<n>([&](int i) { return weights[i] * levels[i]; });
  const float sum_qq = sum<n>([&](int i) { return weights[i] * levels[i] * levels[i]; });
  const float sum_x = sum<n>([&](int i) { return weights[i] * x[i]; });
  const float sum_qx = sum<n>([&](int i) { return weights[i] * levels[i] * x[i]; });
  const float determinant = sum_w * sum_qq - sum_q * sum_q;
  if (determinant > 0) {
    const float minimum = (sum_q * sum_qx - sum_qq * sum_x) / determinant;
    if (minimum >= 0) return {std::max((sum_w * sum_qx - sum_q * sum_x) / determinant, 0.0f), minimum};
  }
  return {sum_qq > 0 ? std::max(sum_qx / sum_qq, 0.0f) : 0.0f, 0.0f};
}

// The best scale and minimum for n values.
template <int n>
AffineFit fit_affine(const float* x, const float* weights, float max_level) {
  const auto [lowest, highest] = std::minmax_element(x, x + n);
  const float base = std::min(*lowest, 0.0f), range = *highest - base;
  AffineFit best{0, -base};
  if (!(range > 0)) return best;  // all values equal and not positive: the minimum alone holds them
  float levels[n];
  best.scale = range / max_level;
  assign_affine<n>(x, best, max_level, levels);
  float best_error = affine_error<n>(x, weights, best, levels);
  for (int step = 0; step <= 10; ++step) {
    assign_affine<n>(x, {range / (max_level - 1.0f + 0.2f * static_cast<float>(step)), -base}, max_level, levels);
    const AffineFit fit = least_squares_affine<n>(x, weights, levels);
    const float error = affine_error<n>(x, weights, fit, levels);
    if (error < best_error) {
      best_error = error;
      best = fit;
    }
  }
  return best;
}

// The integers near fit, within 0..max_scale, with the least error when values are assigned with d and dmin; levels are
// those of it.
template <int n>
ScaleMin round_affine(const float* x, const float* weights, AffineFit fit, float d, float dmin, float max_scale,
                      float max_level, float* levels) {
  const float scale = d > 0 ? nearest_level(fit.scale / d, max_scale) : 0;
  const float minimum = dmin > 0 ? nearest_level(fit.minimum / dmin, max_scale) : 0;
  ScaleMin best{static_cast<uint8_t>(scale), static_cast<uint8_t>(minimum)};
  assign_affine<n>(x, {d * scale, dmin * minimum}, max_level, levels);
  float best_error = affine_error<n>(x, weights, {d * scale, dmin * minimum}, levels);
  for (float s = std::max(scale - 1, 0.0f); s <= std::min(scale + 1, max_scale); ++s)
    for (float m = std::max(minimum - 1, 0.0f); m <= std::min(minimum + 1, max_scale); ++m) {
      float candidate[n];
      assign_affine<n>(x, {d * s, dmin * m}, max_level, candidate);
      const float error = affine_error<n>(x, weights, {d * s, dmin * m}, candidate);
      if (error >= best_error) continue;
      best_error = error;
      best = {static_cast<uint8_t>(s), static_cast<uint8_t>(m)};
      std::copy(candidate, candidate + n, levels);
    }
  return best;
}

}  // namespace caravan::tensor
