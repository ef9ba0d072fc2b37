// Types whose values are whole numbers times a scale: their blocks taken apart, for integer dot products and, put
// together again, for dequantisation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tensor/dtype.h"

namespace caravan::tensor {

// Values that share a scale in the integer form of every type; where a type has fewer scales, they are repeated.
inline constexpr int kIntegerGroup = 16;

// A block taken apart: value i = scale[i / 16] * q[i].
template <typename Block>
struct IntegerForm {
  int8_t q[Block::kLength];
  float scale[Block::kLength / kIntegerGroup];
};

// Takes n values (a multiple of the block length) apart: n whole numbers, n / 16 scales.
using IntegerSplit = void (*)(const std::byte* blocks, int8_t* q, float* scales, int64_t n);

// For IQ1, IQ2, IQ3, TQ, Q1_0 and Q2_0; nullptr for types that are computed with in a form of their own.
IntegerSplit integer_split(DType type);
// Whether all 32 values of each run of 32 share a scale in the type's integer form.
bool has_one_scale_per_32(DType type);

// Calls split(block) for each block of n values; the results of all together.
template <typename Block, IntegerForm<Block> (*split)(const Block&)>
void split_blocks(const std::byte* blocks, int8_t* q, float* scales, int64_t n) {
  for (int64_t b = 0; b < n / Block::kLength; ++b) {
    Block block;
    std::memcpy(&block, blocks + b * static_cast<int64_t>(sizeof block), sizeof block);
    const IntegerForm<Block> form = split(block);
    std::memcpy(q + b * Block::kLength, form.q, sizeof form.q);
    std::memcpy(scales + b * (Block::kLength / kIntegerGroup), form.scale, sizeof form.scale);
  }
}

// The values that the integer form stands for.
template <typename Block, IntegerForm<Block> (*split)(const Block&)>
void dequantize_integers(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t b = 0; b < n / Block::kLength; ++b) {
    Block block;
    std::memcpy(&block, blocks + b * static_cast<int64_t>(sizeof block), sizeof block);
    const IntegerForm<Block> form = split(block);
    for (int i = 0; i < Block::kLength; ++i) *values++ = form.scale[i / kIntegerGroup] * static_cast<float>(form.q[i]);
  }
}

// What the files of the types provide for integer_split().
void split_iq1_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq1_m(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq2_xxs(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq2_xs(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq2_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq3_xxs(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_iq3_s(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_tq1_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_tq2_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_q1_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n);
void split_q2_0(const std::byte* blocks, int8_t* q, float* scales, int64_t n);

}  // namespace caravan::tensor
