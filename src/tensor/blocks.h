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

// 32 E2M1 floats and a power of two: value = 2^(e - 127) * q, in the order of Q4_0.
struct BlockMxfp4 {
  static constexpr int kLength = 32;
  uint8_t e;
  uint8_t qs[16];
};
static_assert(sizeof(BlockMxfp4) == 17);

// The 6-bit scale and minimum of one sub-block of Q4_K (and Q5_K).
struct ScaleMin {
  uint8_t scale, minimum;
};

// Unpacks those of sub-block j (0..7) from the 12 packed bytes.
inline ScaleMin unpack_scale_min(const uint8_t* scales, int j) {
  if (j < 4) return {static_cast<uint8_t>(scales[j] & 63), static_cast<uint8_t>(scales[j + 4] & 63)};
  return {static_cast<uint8_t>((scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4),
          static_cast<uint8_t>((scales[j + 4] >> 4) | (scales[j] >> 6) << 4)};
}

}  // namespace caravan::tensor
