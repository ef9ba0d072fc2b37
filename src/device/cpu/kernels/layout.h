// The bytes of packed weights and of KV blocks: what pack.cpp writes and the kernels read. Little-endian, like GGUF.
// Sixteen rows lie side by side in groups of 4 consecutive k: byte 4 * row + i of such a 64-byte group is w[row][k +
// i], so that one 8-bit dot-product instruction gives a partial sum per row. What a block holds stands in the order in
// which kernels first read it: processors fetch ahead of a sequential stream, and of nothing else as well.
#pragma once

#include <cstdint>

#include "device/cpu/kernels/kernels.h"

namespace caravan::device::cpu {

// 32 k of 16 rows each. Group g holds k = 4g .. 4g + 3.
struct PackedQ8_0 {
  uint16_t d[16];   // f16 scale per row
  int8_t q[8][64];  // groups 0..7
};
static_assert(sizeof(PackedQ8_0) == 16 * 34);

// 32 k of 16 rows each, laid out as PackedQ8_0, of types that are whole numbers times a scale (tensor/integer_form.h).
struct PackedIntegers {
  float d[16];
  int8_t q[8][64];
};
static_assert(sizeof(PackedIntegers) == 16 * 36);

// The same with a scale per 16 k: groups 0..3 use d[0], groups 4..7 d[1].
struct PackedHalfIntegers {
  float d[2][16];
  int8_t q[8][64];
};
static_assert(sizeof(PackedHalfIntegers) == 16 * 40);

struct PackedQ4_0 {
  uint16_t d[16];
  uint8_t q[4][64];  // low nibbles: group j, high nibbles: group j + 4; weight = nibble - 8
};
static_assert(sizeof(PackedQ4_0) == 16 * 18);

struct PackedQ4_1 {
  uint16_t d[16];
  uint16_t m[16];
  uint8_t q[4][64];  // as PackedQ4_0; weight = d * nibble + m
};
static_assert(sizeof(PackedQ4_1) == 16 * 20);

// Four-bit codes that choose from sixteen signed values, 32 k of 16 rows each.
struct PackedCodes {
  uint16_t d[16];    // f16 (IQ4_NL) or bf16 (MXFP4, which holds every power of two of the type)
  uint8_t q[4][64];  // as PackedQ4_0
};
static_assert(sizeof(PackedCodes) == 16 * 18);

// The same with a scale per 16 k (NVFP4): low nibbles use d[0], high nibbles d[1].
struct PackedHalfCodes {
  uint16_t d[2][16];  // f16, which holds every scale of the type
  uint8_t q[4][64];
};
static_assert(sizeof(PackedHalfCodes) == 16 * 20);

// 256 k of 16 rows of codes: y = d * scale * value.
struct PackedIq4Xs {
  uint16_t d[16];
  struct Sub {  // 32 k
    int8_t scale[16];
    uint8_t q[4][64];
  } sub[8];
};
static_assert(sizeof(PackedIq4Xs) == 32 + 8 * 272);

// Five-bit weights of 32 k.
struct FiveBits {
  uint8_t high[64];    // bit g belongs to group g
  uint8_t low[4][64];  // low four bits as PackedQ4_0
};

struct PackedQ5_0 {
  uint16_t d[16];
  FiveBits q;  // weight = d * (q - 16)
};
static_assert(sizeof(PackedQ5_0) == 16 * 22);

struct PackedQ5_1 {
  uint16_t d[16];
  uint16_t m[16];
  FiveBits q;  // weight = d * q + m
};
static_assert(sizeof(PackedQ5_1) == 16 * 24);

// 256 k of 16 rows: y = d * scale * q - d_min * min.
struct PackedQ4_K {
  uint16_t d[16];
  uint16_t d_min[16];
  struct Sub {  // 32 k
    uint8_t scale[16];
    uint8_t min[16];
    uint8_t q[4][64];  // as PackedQ4_0
  } sub[8];
};
static_assert(sizeof(PackedQ4_K) == 64 + 8 * 288);

// 256 k of 16 rows: y = d * scale * q - d_min * min.
struct PackedQ5_K {
  uint16_t d[16];
  uint16_t d_min[16];
  struct Sub {  // 32 k
    uint8_t scale[16];
    uint8_t min[16];
    FiveBits q;
  } sub[8];
};
static_assert(sizeof(PackedQ5_K) == 64 + 8 * 352);

// 256 k of 16 rows: y = d * q - d_min * min, where q is the two-bit weight times its scale.
struct PackedQ2_K {
  uint16_t d[16];
  uint16_t d_min[16];
  struct Sub {  // 32 k: groups 0..3 use min[0], groups 4..7 min[1]
    uint8_t min[2][16];
    int8_t q[8][64];  // 0..45
  } sub[8];
};
static_assert(sizeof(PackedQ2_K) == 64 + 8 * 544);

// 256 k of 16 rows: y = d * scale * (q - 32), one scale per 16 k. Q3_K has this form, too, with q from 28 to 35.
struct PackedQ6_K {
  uint16_t d[16];
  struct Sub {  // 32 k: groups 0..3 use scale[0], groups 4..7 scale[1]
    int8_t scale[2][16];
    uint8_t high_0[64];  // upper two bits of groups 0..3: bits 2t belong to group t
    uint8_t low[4][64];  // low four bits as PackedQ4_0
    uint8_t high_1[64];  // upper two bits of groups 4..7
  } sub[8];
};
static_assert(sizeof(PackedQ6_K) == 16 * 210);

// The forms that weights are packed in, and the form of each type.
enum class PanelForm : uint8_t {
  f32,
  f16,
  bf16,
  q8_0,
  integers,
  half_integers,
  iq4_nl,
  iq4_xs,
  mxfp4,
  nvfp4,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q2_k,
  q4_k,
  q5_k,
  q6_k,
};
PanelForm panel_form(tensor::DType dtype);

// Values per partial sum of a float dot product.
inline constexpr int64_t kFloatChunk = 64;

// Values of head_dim that share one scale in a q8_0 cache.
inline constexpr int64_t kKvScaleGroup = 32;
inline constexpr int64_t kKvTokenGroup = 16;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where things lie inside one KV block. Offsets in bytes from the block's start for a head; see kv_block_bytes().
struct KvOffsets {
  int64_t value_bytes;   // per element
  int64_t row_length;    // keys: head_dim; values: head_dim rounded up to 16
  int64_t scale_groups;  // q8_0: ceil(head_dim / 32), else 0
  int64_t scale_bytes;   // keys: of one token group; values: of the whole block and head
  int64_t group_bytes;   // keys: of one group of 16 tokens with its scales
  int64_t head_bytes;    // of one KV head in a block
};

inline KvOffsets kv_offsets(const KvLayout& layout) {
  KvOffsets o{};
  const bool quantised = layout.dtype == tensor::DType::q8_0;
  o.value_bytes = quantised ? 1 : layout.dtype == tensor::DType::f16 ? 2 : 4;
  o.scale_groups = quantised ? (layout.head_dim + kKvScaleGroup - 1) / kKvScaleGroup : 0;
  if (layout.kind == KvKind::keys) {
    o.row_length = layout.head_dim;
    o.scale_bytes = o.scale_groups * kKvTokenGroup * 2;
    o.group_bytes = o.scale_bytes + o.row_length * kKvTokenGroup * o.value_bytes;
    o.head_bytes = layout.block_tokens / kKvTokenGroup * o.group_bytes;
  } else {
    o.row_length = round_up(layout.head_dim, 16);
    o.scale_bytes = o.scale_groups * layout.block_tokens * 2;  // block_tokens is a multiple of 16
    o.head_bytes = o.scale_bytes + layout.block_tokens * o.row_length * o.value_bytes;
  }
  return o;
}

}  // namespace caravan::device::cpu
