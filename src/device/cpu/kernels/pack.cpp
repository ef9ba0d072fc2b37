// Repacks GGUF weight rows into the panels of layout.h. Runs once per weight at load; the same on every processor.
#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "device/cpu/kernels/layout.h"
#include "tensor/dtype.h"
#include "tensor/half.h"
#include "tensor/integer_form.h"

namespace caravan::device::cpu {
namespace {

using tensor::DType;

// One panel being packed: pointers to its 16 rows; missing ones point to nothing and leave zeros.
struct PanelRows {
  const std::byte* row[kPanelRows];
  int n_rows;
};

uint8_t byte_at(const std::byte* p, size_t i) { return std::to_integer<uint8_t>(p[i]); }

void copy_f16(const std::byte* from, uint16_t* to) { std::memcpy(to, from, 2); }

// Interleaves 16 rows of 32 bytes in groups of four k.
void interleave(const uint8_t rows[16][32], uint8_t out[8][64]) {
  for (int g = 0; g < 8; ++g)
    for (int r = 0; r < 16; ++r) std::memcpy(&out[g][4 * r], &rows[r][4 * g], 4);
}

// Group j goes to the low nibbles, group j + 4 to the high ones.
void merge_nibbles(const uint8_t groups[8][64], uint8_t out[4][64]) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 64; ++i) out[j][i] = static_cast<uint8_t>((groups[j][i] & 15) | (groups[j + 4][i] & 15) << 4);
}

// Five-bit values (0..31): nibbles, and a bit plane per group.
void split_five_bits(const uint8_t values[16][32], FiveBits& out) {
  uint8_t groups[8][64];
  interleave(values, groups);
  merge_nibbles(groups, out.low);
  for (int i = 0; i < 64; ++i) {
    unsigned high = 0;
    for (int g = 0; g < 8; ++g) high |= unsigned{groups[g][i]} >> 4 << g;
    out.high[i] = static_cast<uint8_t>(high);
  }
}

void pack_panel_q8_0(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedQ8_0 block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 34;  // f16 d, int8 q[32]
      copy_f16(source, &block.d[r]);
      std::memcpy(values[r], source + 2, 32);
    }
    uint8_t groups[8][64];
    interleave(values, groups);
    std::memcpy(block.q, groups, sizeof block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// Value i of 16 bytes of nibbles in the low half of byte i, value i + 16 in the high half.
void unpack_nibbles(const std::byte* q, uint8_t values[32]) {
  for (size_t i = 0; i < 16; ++i) {
    values[i] = byte_at(q, i) & 15;
    values[i + 16] = byte_at(q, i) >> 4;
  }
}

// Interleaves and stores 32 nibbles per row.
void pack_nibbles(const uint8_t values[16][32], uint8_t out[4][64]) {
  uint8_t groups[8][64];
  interleave(values, groups);
  merge_nibbles(groups, out);
}

void pack_panel_iq4_nl(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedCodes block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 18;  // f16 d, 16 bytes of nibbles
      copy_f16(source, &block.d[r]);
      unpack_nibbles(source + 2, values[r]);
    }
    pack_nibbles(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_iq4_xs(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedIq4Xs block{};
    uint8_t values[8][16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 136;  // f16 d, high scale bits u16, low ones[4], q[128]
      copy_f16(source, &block.d[r]);
      for (size_t s = 0; s < 8; ++s) {
        const int low = byte_at(source, 4 + s / 2) >> (s % 2 * 4) & 15, high = byte_at(source, 2 + s / 4);
        block.sub[s].scale[r] = static_cast<int8_t>((low | (high >> (s % 4 * 2) & 3) << 4) - 32);
        unpack_nibbles(source + 8 + 16 * s, values[s][r]);
      }
    }
    for (size_t s = 0; s < 8; ++s) pack_nibbles(values[s], block.sub[s].q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_mxfp4(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  const tensor::DTypeInfo& info = tensor::dtype_info(DType::mxfp4);
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedCodes block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 17;  // exponent, 16 bytes of nibbles
      // What code 1 stands for is the scale of the integers. A power of two, so bf16 holds it.
      std::byte unit[17] = {source[0], std::byte{1}};
      float decoded[32];
      info.dequantize(unit, decoded, 32);
      block.d[r] = static_cast<uint16_t>(std::bit_cast<uint32_t>(decoded[0]) >> 16);
      unpack_nibbles(source + 1, values[r]);
    }
    pack_nibbles(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_nvfp4(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  const tensor::DTypeInfo& info = tensor::dtype_info(DType::nvfp4);
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedHalfCodes block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      // Blocks of 64: scales[4], then per 16 values 8 bytes of nibbles, value i low, value i + 8 high.
      const std::byte* source = rows.row[r] + b / 2 * 36;
      for (size_t half = 0; half < 2; ++half) {
        const size_t part = static_cast<size_t>(b % 2) * 2 + half;
        // What code 1 stands for is the scale of the integers: a whole number of 2^-10, below 2^8.
        std::byte unit[36] = {source[part]};
        unit[4] = std::byte{1};
        float decoded[64];
        info.dequantize(unit, decoded, 64);
        block.d[half][r] = tensor::f32_to_f16(decoded[0]);
        for (size_t i = 0; i < 8; ++i) {
          values[r][16 * half + i] = byte_at(source, 4 + 8 * part + i) & 15;
          values[r][16 * half + i + 8] = byte_at(source, 4 + 8 * part + i) >> 4;
        }
      }
    }
    pack_nibbles(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_q4_0(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedQ4_0 block{};
    uint8_t values[16][32];
    std::memset(values, 8, sizeof values);
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 18;  // f16 d, 16 bytes of nibbles
      copy_f16(source, &block.d[r]);
      unpack_nibbles(source + 2, values[r]);
    }
    pack_nibbles(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_q4_1(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedQ4_1 block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 20;  // f16 d, f16 m, 16 bytes of nibbles
      copy_f16(source, &block.d[r]);
      copy_f16(source + 2, &block.m[r]);
      unpack_nibbles(source + 4, values[r]);
    }
    pack_nibbles(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// Nibbles as above and a word whose bit i is the fifth bit of value i.
void unpack_five_bits(const std::byte* word, const std::byte* q, uint8_t values[32]) {
  uint32_t high;
  std::memcpy(&high, word, sizeof high);
  unpack_nibbles(q, values);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<uint8_t>(values[i] | (high >> i & 1) << 4);
}

void pack_panel_q5_0(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedQ5_0 block{};
    uint8_t values[16][32];
    std::memset(values, 16, sizeof values);
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 22;  // f16 d, fifth bits, 16 bytes of nibbles
      copy_f16(source, &block.d[r]);
      unpack_five_bits(source + 2, source + 6, values[r]);
    }
    split_five_bits(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_q5_1(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    PackedQ5_1 block{};
    uint8_t values[16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 24;  // f16 d, f16 m, fifth bits, 16 bytes of nibbles
      copy_f16(source, &block.d[r]);
      copy_f16(source + 2, &block.m[r]);
      unpack_five_bits(source + 4, source + 8, values[r]);
    }
    split_five_bits(values, block.q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// Unpacks the eight 6-bit scales and mins of a K-block from its 12 bytes (docs/gguf.md).
void unpack_k_scales(const std::byte* s, uint8_t scale[8], uint8_t min[8]) {
  for (size_t j = 0; j < 4; ++j) {
    scale[j] = byte_at(s, j) & 63;
    min[j] = byte_at(s, j + 4) & 63;
    scale[j + 4] = static_cast<uint8_t>((byte_at(s, j + 8) & 15) | (byte_at(s, j) >> 6) << 4);
    min[j + 4] = static_cast<uint8_t>(byte_at(s, j + 8) >> 4 | (byte_at(s, j + 4) >> 6) << 4);
  }
}

void pack_panel_q4_k(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedQ4_K block{};
    uint8_t values[8][16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 144;  // f16 d, f16 dmin, scales[12], q[128]
      copy_f16(source, &block.d[r]);
      copy_f16(source + 2, &block.d_min[r]);
      uint8_t scale[8], min[8];
      unpack_k_scales(source + 4, scale, min);
      for (size_t s = 0; s < 8; ++s) {
        block.sub[s].scale[r] = scale[s];
        block.sub[s].min[r] = min[s];
        const std::byte* q = source + 16 + s / 2 * 32;  // sub-blocks 2i and 2i + 1 share 32 bytes
        for (size_t i = 0; i < 32; ++i) values[s][r][i] = s % 2 == 0 ? byte_at(q, i) & 15 : byte_at(q, i) >> 4;
      }
    }
    for (size_t s = 0; s < 8; ++s) pack_nibbles(values[s], block.sub[s].q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_q5_k(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedQ5_K block{};
    uint8_t values[8][16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 176;  // f16 d, f16 dmin, scales[12], high[32], q[128]
      copy_f16(source, &block.d[r]);
      copy_f16(source + 2, &block.d_min[r]);
      uint8_t scale[8], min[8];
      unpack_k_scales(source + 4, scale, min);
      for (size_t s = 0; s < 8; ++s) {
        block.sub[s].scale[r] = scale[s];
        block.sub[s].min[r] = min[s];
        const std::byte* q = source + 48 + s / 2 * 32;  // sub-blocks 2i and 2i + 1 share 32 bytes
        for (size_t i = 0; i < 32; ++i) {
          const int low = s % 2 == 0 ? byte_at(q, i) & 15 : byte_at(q, i) >> 4;
          values[s][r][i] = static_cast<uint8_t>(low | (byte_at(source + 16, i) >> s & 1) << 4);
        }
      }
    }
    for (size_t s = 0; s < 8; ++s) split_five_bits(values[s], block.sub[s].q);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

void pack_panel_q2_k(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedQ2_K block{};
    uint8_t values[8][16][32] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 84;  // scales[16], q[64], f16 d, f16 dmin
      copy_f16(source + 80, &block.d[r]);
      copy_f16(source + 82, &block.d_min[r]);
      for (size_t s = 0; s < 8; ++s)
        for (size_t i = 0; i < 32; ++i) {
          const uint8_t scale_min = byte_at(source, 2 * s + i / 16);
          if (i % 16 == 0) block.sub[s].min[i / 16][r] = scale_min >> 4;
          const int level = byte_at(source + 16 + s / 4 * 32, i) >> (s % 4 * 2) & 3;
          values[s][r][i] = static_cast<uint8_t>(level * (scale_min & 15));
        }
    }
    for (size_t s = 0; s < 8; ++s) {
      uint8_t groups[8][64];
      interleave(values[s], groups);
      std::memcpy(block.sub[s].q, groups, sizeof groups);
    }
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// The 256 six-bit values (0..63, 32 stands for zero) of one Q6_K block, in order.
void unpack_q6_k(const std::byte* source, uint8_t values[256]) {
  for (size_t half = 0; half < 2; ++half) {
    const std::byte* low = source + 64 * half;
    const std::byte* high = source + 128 + 32 * half;
    uint8_t* out = values + 128 * half;
    for (size_t i = 0; i < 32; ++i) {
      const uint8_t h = byte_at(high, i), l0 = byte_at(low, i), l1 = byte_at(low, i + 32);
      out[i] = static_cast<uint8_t>((l0 & 15) | (h & 3) << 4);
      out[i + 32] = static_cast<uint8_t>((l1 & 15) | (h >> 2 & 3) << 4);
      out[i + 64] = static_cast<uint8_t>(l0 >> 4 | (h >> 4 & 3) << 4);
      out[i + 96] = static_cast<uint8_t>(l1 >> 4 | (h >> 6 & 3) << 4);
    }
  }
}

// Stores six-bit values of a block: nibbles, and pairs of bits per four groups.
void split_six_bits(const uint8_t values[8][16][32], PackedQ6_K& block) {
  for (size_t s = 0; s < 8; ++s) {
    uint8_t groups[8][64];
    interleave(values[s], groups);
    merge_nibbles(groups, block.sub[s].low);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 64; ++i)
        (h == 0 ? block.sub[s].high_0 : block.sub[s].high_1)[i] =
            static_cast<uint8_t>(groups[4 * h][i] >> 4 | (groups[4 * h + 1][i] >> 4) << 2 |
                                 (groups[4 * h + 2][i] >> 4) << 4 | (groups[4 * h + 3][i] >> 4) << 6);
  }
}

void pack_panel_q6_k(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedQ6_K block{};
    uint8_t values[8][16][32];
    std::memset(values, 32, sizeof values);
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 210;  // low[128], high[64], scales[16], f16 d
      copy_f16(source + 208, &block.d[r]);
      uint8_t row_values[256];
      unpack_q6_k(source, row_values);
      for (size_t s = 0; s < 8; ++s) {
        std::memcpy(&block.sub[s].scale[0][r], source + 192 + 2 * s, 1);
        std::memcpy(&block.sub[s].scale[1][r], source + 193 + 2 * s, 1);
        std::memcpy(values[s][r], row_values + 32 * s, 32);
      }
    }
    split_six_bits(values, block);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// Q3_K has the sub-blocks of Q6_K: its three-bit values around 4 become six-bit ones around 32.
void pack_panel_q3_k(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  for (int64_t b = 0; b < n_in / 256; ++b) {
    PackedQ6_K block{};
    uint8_t values[8][16][32];
    std::memset(values, 32, sizeof values);
    for (int r = 0; r < rows.n_rows; ++r) {
      const std::byte* source = rows.row[r] + b * 110;  // high[32], q[64], scales[12], f16 d
      copy_f16(source + 108, &block.d[r]);
      for (size_t j = 0; j < 16; ++j) {
        const int low = byte_at(source + 96, j % 8) >> (j / 8 * 4) & 15;
        const int scale = low | (byte_at(source + 104, j % 4) >> (j / 4 * 2) & 3) << 4;
        block.sub[j / 2].scale[j % 2][r] = static_cast<int8_t>(scale - 32);
      }
      for (size_t s = 0; s < 8; ++s)
        for (size_t i = 0; i < 32; ++i) {
          const int low = byte_at(source + 32 + s / 4 * 32, i) >> (s % 4 * 2) & 3;
          values[s][r][i] = static_cast<uint8_t>(28 + (low | (byte_at(source, i) >> s & 1) << 2));
        }
    }
    split_six_bits(values, block);
    std::memcpy(panel + b * static_cast<int64_t>(sizeof block), &block, sizeof block);
  }
}

// Types of whole numbers times scales, of which Block keeps one per 32 values or one per 16.
template <typename Block>
void pack_panel_integers(DType dtype, const PanelRows& rows, int64_t n_in, std::byte* panel) {
  const tensor::IntegerSplit split = tensor::integer_split(dtype);
  const auto n = static_cast<size_t>(n_in), n_scales = n / tensor::kIntegerGroup;
  std::vector<int8_t> q(n * kPanelRows);
  std::vector<float> scales(n_scales * kPanelRows);
  for (int r = 0; r < rows.n_rows; ++r)
    split(rows.row[r], q.data() + static_cast<size_t>(r) * n, scales.data() + static_cast<size_t>(r) * n_scales, n_in);
  for (size_t b = 0; b < n / 32; ++b) {
    Block block{};
    uint8_t values[16][32] = {};
    for (size_t r = 0; r < kPanelRows; ++r) {
      std::memcpy(values[r], q.data() + r * n + 32 * b, 32);
      const float* scale = scales.data() + r * n_scales + 2 * b;
      if constexpr (std::is_same_v<Block, PackedHalfIntegers>) {
        block.d[0][r] = scale[0];
        block.d[1][r] = scale[1];
      } else {
        block.d[r] = scale[0];
      }
    }
    uint8_t groups[8][64];
    interleave(values, groups);
    std::memcpy(block.q, groups, sizeof block.q);
    std::memcpy(panel + b * sizeof block, &block, sizeof block);
  }
}

// Interleaves rows of floats: out[k][row].
template <typename Float>
void pack_panel_float(const PanelRows& rows, int64_t n_in, std::byte* panel) {
  constexpr int64_t kTile = 64;  // values of each row read at a time, so that every cache line is used whole
  for (int64_t k0 = 0; k0 < n_in; k0 += kTile) {
    const int64_t n = std::min(kTile, n_in - k0);
    Float in[kTile], out[kTile][kPanelRows] = {};
    for (int r = 0; r < rows.n_rows; ++r) {
      std::memcpy(in, rows.row[r] + k0 * static_cast<int64_t>(sizeof(Float)), static_cast<size_t>(n) * sizeof(Float));
      for (int64_t k = 0; k < n; ++k) out[k][r] = in[k];
    }
    std::memcpy(panel + k0 * kPanelRows * static_cast<int64_t>(sizeof(Float)), out,
                static_cast<size_t>(n * kPanelRows) * sizeof(Float));
  }
}

// Any other type: rows become f32 first.
void pack_panel_dequantised(DType dtype, const PanelRows& rows, int64_t n_in, std::byte* panel) {
  const tensor::DTypeInfo& info = tensor::dtype_info(dtype);
  CARAVAN_ASSERT(info.dequantize != nullptr, "a weight type that cannot be dequantised is refused at load");
  std::vector<float> values(static_cast<size_t>(n_in) * kPanelRows);
  PanelRows dequantised{{}, rows.n_rows};
  for (int r = 0; r < rows.n_rows; ++r) {
    float* row = values.data() + r * n_in;
    info.dequantize(rows.row[r], row, n_in);
    dequantised.row[r] = reinterpret_cast<const std::byte*>(row);
  }
  pack_panel_float<uint32_t>({dequantised}, n_in, panel);
}

void pack_panel(DType dtype, const PanelRows& rows, int64_t n_in, std::byte* panel) {
  switch (panel_form(dtype)) {
    case PanelForm::f32:
      if (dtype == DType::f32) return pack_panel_float<uint32_t>(rows, n_in, panel);
      return pack_panel_dequantised(dtype, rows, n_in, panel);
    case PanelForm::f16:
    case PanelForm::bf16:
      return pack_panel_float<uint16_t>(rows, n_in, panel);
    case PanelForm::q8_0:
      return pack_panel_q8_0(rows, n_in, panel);
    case PanelForm::iq4_nl:
      return pack_panel_iq4_nl(rows, n_in, panel);
    case PanelForm::iq4_xs:
      return pack_panel_iq4_xs(rows, n_in, panel);
    case PanelForm::mxfp4:
      return pack_panel_mxfp4(rows, n_in, panel);
    case PanelForm::nvfp4:
      return pack_panel_nvfp4(rows, n_in, panel);
    case PanelForm::integers:
      return pack_panel_integers<PackedIntegers>(dtype, rows, n_in, panel);
    case PanelForm::half_integers:
      return pack_panel_integers<PackedHalfIntegers>(dtype, rows, n_in, panel);
    case PanelForm::q4_0:
      return pack_panel_q4_0(rows, n_in, panel);
    case PanelForm::q4_1:
      return pack_panel_q4_1(rows, n_in, panel);
    case PanelForm::q5_0:
      return pack_panel_q5_0(rows, n_in, panel);
    case PanelForm::q5_1:
      return pack_panel_q5_1(rows, n_in, panel);
    case PanelForm::q2_k:
      return pack_panel_q2_k(rows, n_in, panel);
    case PanelForm::q4_k:
      return pack_panel_q4_k(rows, n_in, panel);
    case PanelForm::q5_k:
      return pack_panel_q5_k(rows, n_in, panel);
    case PanelForm::q6_k:
      return dtype == DType::q3_k ? pack_panel_q3_k(rows, n_in, panel) : pack_panel_q6_k(rows, n_in, panel);
  }
}

}  // namespace

PanelForm panel_form(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return PanelForm::f16;
    case DType::bf16:
      return PanelForm::bf16;
    case DType::q8_0:
      return PanelForm::q8_0;
    case DType::iq4_nl:
      return PanelForm::iq4_nl;
    case DType::iq4_xs:
      return PanelForm::iq4_xs;
    case DType::mxfp4:
      return PanelForm::mxfp4;
    case DType::nvfp4:
      return PanelForm::nvfp4;
    case DType::q4_0:
      return PanelForm::q4_0;
    case DType::q4_1:
      return PanelForm::q4_1;
    case DType::q5_0:
      return PanelForm::q5_0;
    case DType::q5_1:
      return PanelForm::q5_1;
    case DType::q2_k:
      return PanelForm::q2_k;
    case DType::q4_k:
      return PanelForm::q4_k;
    case DType::q5_k:
      return PanelForm::q5_k;
    case DType::q3_k:
    case DType::q6_k:
      return PanelForm::q6_k;
    default:
      if (tensor::integer_split(dtype) == nullptr) return PanelForm::f32;
      return tensor::has_one_scale_per_32(dtype) ? PanelForm::integers : PanelForm::half_integers;
  }
}

ActivationKind activation_kind(DType weight_dtype) {
  switch (panel_form(weight_dtype)) {
    case PanelForm::f32:
    case PanelForm::f16:
    case PanelForm::bf16:
      return ActivationKind::f32;
    default:
      return ActivationKind::q8;
  }
}

size_t packed_panel_bytes(DType dtype, int64_t n_in) {
  const auto n = static_cast<size_t>(n_in);
  switch (panel_form(dtype)) {
    case PanelForm::f32:
      return n * kPanelRows * sizeof(float);
    case PanelForm::f16:
    case PanelForm::bf16:
      return n * kPanelRows * 2;
    case PanelForm::q8_0:
      return n / 32 * sizeof(PackedQ8_0);
    case PanelForm::iq4_nl:
    case PanelForm::mxfp4:
      return n / 32 * sizeof(PackedCodes);
    case PanelForm::iq4_xs:
      return n / 256 * sizeof(PackedIq4Xs);
    case PanelForm::nvfp4:
      return n / 32 * sizeof(PackedHalfCodes);
    case PanelForm::integers:
      return n / 32 * sizeof(PackedIntegers);
    case PanelForm::half_integers:
      return n / 32 * sizeof(PackedHalfIntegers);
    case PanelForm::q4_0:
      return n / 32 * sizeof(PackedQ4_0);
    case PanelForm::q4_1:
      return n / 32 * sizeof(PackedQ4_1);
    case PanelForm::q5_0:
      return n / 32 * sizeof(PackedQ5_0);
    case PanelForm::q5_1:
      return n / 32 * sizeof(PackedQ5_1);
    case PanelForm::q2_k:
      return n / 256 * sizeof(PackedQ2_K);
    case PanelForm::q4_k:
      return n / 256 * sizeof(PackedQ4_K);
    case PanelForm::q5_k:
      return n / 256 * sizeof(PackedQ5_K);
    case PanelForm::q6_k:
      return n / 256 * sizeof(PackedQ6_K);
  }
  return 0;
}

size_t packed_bytes(DType dtype, int64_t n_in, int64_t n_out) {
  return static_cast<size_t>((n_out + kPanelRows - 1) / kPanelRows) * packed_panel_bytes(dtype, n_in);
}

void pack(DType dtype, int64_t n_in, const std::byte* rows, int64_t row_begin, int64_t n_rows, std::byte* packed) {
  CARAVAN_ASSERT(row_begin % kPanelRows == 0, "packing starts at a panel");
  const auto row_bytes = static_cast<int64_t>(tensor::row_bytes(dtype, static_cast<uint64_t>(n_in)));
  const auto panel_bytes = static_cast<int64_t>(packed_panel_bytes(dtype, n_in));
  for (int64_t first = 0; first < n_rows; first += kPanelRows) {
    PanelRows panel{{}, static_cast<int>(std::min(kPanelRows, n_rows - first))};
    for (int r = 0; r < panel.n_rows; ++r) panel.row[r] = rows + (first + r) * row_bytes;
    pack_panel(dtype, panel, n_in, packed + (row_begin + first) / kPanelRows * panel_bytes);
  }
}

size_t kv_block_bytes(const KvLayout& layout) {
  return static_cast<size_t>(layout.n_head_kv * kv_offsets(layout).head_bytes);
}

}  // namespace caravan::device::cpu
