// Memory layout of the quantised blocks that we compute with, byte for byte as GGUF stores them (docs/gguf.md).
// Fields are bytes and 16-bit words, so a block may lie at any even address; d and m hold binary16 bits
// (tensor/half.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace caravan::tensor {

// 32 signed bytes and one scale: value i = qs[i] * d.
struct BlockQ8_0 {
  static constexpr int kLength = 32;
  uint16_t d;
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// 32 nibbles around 8: the low nibble of byte j is value j, the high one value j + 16; value = (q - 8) * d.
struct BlockQ4_0 {
  static constexpr int kLength = 32;
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// 32 nibbles above a minimum: value = q * d + m, in the order of Q4_0.
struct BlockQ4_1 {
  static constexpr int kLength = 32;
  uint16_t d, m;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// 32 values of five bits above a minimum: value = q * d + m, in the order of Q5_0.
struct BlockQ5_1 {
  static constexpr int kLength = 32;
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

// 32 values of five bits around 16: nibbles as in Q4_0, the fifth bit of value i is bit i of qh (little-endian).
struct BlockQ5_0 {
  static constexpr int kLength = 32;
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

// 8 sub-blocks of 32 nibbles with 6-bit scales and minimums: value = d * scale * q - dmin * minimum.
// Bytes qs[32k .. 32k+31] hold sub-block 2k in their low and 2k + 1 in their high nibbles.
struct BlockQ4K {
  static constexpr int kLength = 256;
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4K) == 144);

// Q4_K with a fifth bit: bit j of qh[l] adds 16 to value l of sub-block j.
struct BlockQ5K {
  static constexpr int kLength = 256;
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5K) == 176);

// 16 sub-blocks of 16 six-bit values around 32 with 8-bit scales: value = d * scale * (q - 32).
// Each half of 128 values uses 64 bytes of ql (low four bits) and 32 of qh (high two bits), see dequantize_q6_k.
struct BlockQ6K {
  static constexpr int kLength = 256;
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6K) == 210);

// 16 sub-blocks of 16 two-bit values with 4-bit scales and minimums (low and high nibble of a byte):
// value = d * scale * q - dmin * minimum. Each half of 128 values uses 32 bytes of qs: bits 2s and 2s + 1 of byte l are
// value 32s + l.
struct BlockQ2K {
  static constexpr int kLength = 256;
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d, dmin;
};
static_assert(sizeof(BlockQ2K) == 84);

// 16 sub-blocks of 16 three-bit values around 4 with 6-bit scales around 32: value = d * (scale - 32) * (q - 4). The
// low two bits lie as in Q2_K; bit 4h + s of hmask[l] is the third one of value 32s + l of half h.
struct BlockQ3K {
  static constexpr int kLength = 256;
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};
static_assert(sizeof(BlockQ3K) == 110);

// 32 nibbles that choose from the 16 values of kIq4Values: value = d * kIq4Values[q], in the order of Q4_0.
struct BlockIq4Nl {
  static constexpr int kLength = 32;
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockIq4Nl) == 18);

// 8 sub-blocks of 32 nibbles as in IQ4_NL with 6-bit scales around 32: value = d * (scale - 32) * kIq4Values[q]. The
// scale of sub-block j has its low four bits in nibble j of scales_l, the high two in bits 2j and 2j + 1 of scales_h.
struct BlockIq4Xs {
  static constexpr int kLength = 256;
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};
static_assert(sizeof(BlockIq4Xs) == 136);

// The codebook types (iq_quants.cpp): per sub-block of 32 values a scale, per 8 values a point of a codebook
// (iq_codebooks.h; per 4 values in IQ3) and, but for IQ1, signs.
struct BlockIq2Xxs {
  static constexpr int kLength = 256;
  uint16_t d;
  uint8_t qs[64];  // per sub-block 4 indices, then a word of 4 x 7 sign bits and a 4-bit scale
};
static_assert(sizeof(BlockIq2Xxs) == 66);

struct BlockIq2Xs {
  static constexpr int kLength = 256;
  uint16_t d;
  uint16_t qs[32];    // per 8 values a 9-bit index and 7 sign bits
  uint8_t scales[8];  // per sub-block a nibble for each half
};
static_assert(sizeof(BlockIq2Xs) == 74);

struct BlockIq2S {
  static constexpr int kLength = 256;
  uint16_t d;
  uint8_t qs[32];     // low 8 bits of the indices
  uint8_t signs[32];  // bit j negates value j
  uint8_t qh[8];      // per sub-block the high two bits of its four indices
  uint8_t scales[8];  // per sub-block a nibble for each half
};
static_assert(sizeof(BlockIq2S) == 82);

struct BlockIq3Xxs {
  static constexpr int kLength = 256;
  uint16_t d;
  uint8_t qs[64];            // indices
  uint8_t scales_signs[32];  // per sub-block a word of 4 x 7 sign bits and a 4-bit scale
};
static_assert(sizeof(BlockIq3Xxs) == 98);

struct BlockIq3S {
  static constexpr int kLength = 256;
  uint16_t d;
  uint8_t qs[64];     // low 8 bits of the indices
  uint8_t qh[8];      // per sub-block the ninth bits of its eight indices
  uint8_t signs[32];  // bit j negates value j
  uint8_t scales[4];  // a nibble per sub-block
};
static_assert(sizeof(BlockIq3S) == 110);

struct BlockIq1S {
  static constexpr int kLength = 256;
  uint16_t d;
  uint8_t qs[32];  // low 8 bits of the indices
  uint16_t qh[8];  // per sub-block the high three bits of its four indices, a 3-bit scale, the sign of the offset
};
static_assert(sizeof(BlockIq1S) == 50);

struct BlockIq1M {
  static constexpr int kLength = 256;
  uint8_t qs[32];      // low 8 bits of the indices
  uint8_t qh[16];      // per 8 values the high three bits of the index and the sign of the offset
  uint16_t scales[4];  // per 16 values a 3-bit scale, 4 in a word; the words' high nibbles are a binary16
};
static_assert(sizeof(BlockIq1M) == 56);

// 256 values of -1, 0 or 1: value = (q - 1) * d, five (in qh four) base-3 digits in a byte.
struct BlockTq1_0 {
  static constexpr int kLength = 256;
  uint8_t qs[48];
  uint8_t qh[4];
  uint16_t d;
};
static_assert(sizeof(BlockTq1_0) == 54);

// 256 values of -1, 0 or 1: value = (q - 1) * d. Bits 2l and 2l + 1 of byte 32g + m are value 128g + 32l + m.
struct BlockTq2_0 {
  static constexpr int kLength = 256;
  uint8_t qs[64];
  uint16_t d;
};
static_assert(sizeof(BlockTq2_0) == 66);

// 128 bits: value = d or -d.
struct BlockQ1_0 {
  static constexpr int kLength = 128;
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ1_0) == 18);

// 64 pairs of bits: value = (q - 1) * d, four consecutive values in a byte.
struct BlockQ2_0 {
  static constexpr int kLength = 64;
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ2_0) == 18);

// 32 E2M1 floats and a power of two: value = 2^(e - 127) * q, in the order of Q4_0.
struct BlockMxfp4 {
  static constexpr int kLength = 32;
  uint8_t e;
  uint8_t qs[16];
};
static_assert(sizeof(BlockMxfp4) == 17);

// 4 sub-blocks of 16 E2M1 floats with an unsigned E4M3 float each: value = scale * q. Byte 8s + j holds values 16s + j
// (low nibble) and 16s + j + 8.
struct BlockNvfp4 {
  static constexpr int kLength = 64;
  uint8_t scales[4];
  uint8_t qs[32];
};
static_assert(sizeof(BlockNvfp4) == 36);

// What the nibbles of IQ4_NL and IQ4_XS stand for.
inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Twice the values of the sixteen E2M1 floats of MXFP4 and NVFP4: whole numbers. Scales are halved to make up for it.
inline constexpr int8_t kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The scale and minimum of one sub-block of Q4_K and Q5_K (6 bits each) or Q2_K (4 bits each).
struct ScaleMin {
  uint8_t scale, minimum;
};

// Unpacks those of sub-block j (0..7) of Q4_K and Q5_K from the 12 packed bytes.
inline ScaleMin unpack_scale_min(const uint8_t* scales, int j) {
  if (j < 4) return {static_cast<uint8_t>(scales[j] & 63), static_cast<uint8_t>(scales[j + 4] & 63)};
  return {static_cast<uint8_t>((scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4),
          static_cast<uint8_t>((scales[j + 4] >> 4) | (scales[j] >> 6) << 4)};
}

}  // namespace caravan::tensor
