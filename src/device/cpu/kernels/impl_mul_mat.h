// Matrix products of packed panels with activation rows. Included by isa_*.cpp inside their target regions.
//
// A family says how one panel (16 output rows) meets R activation rows: run<R>(panel, n_in, rows, sums). The driver
// below cuts the work so that a group of panels stays in the second-level cache while all rows pass by in tiles of R.
// An output's bits depend on its own weights and activation row only, so the cut changes nothing.
#pragma once

template <int R>
struct ActivationRows {
  const void* row[R];
};

// acc += dot * (d_w * d_a), the step that every quantised type ends a block with.
CARAVAN_INLINE F32x16 add_block(I32x16 dot, F32x16 d, float d_activation, F32x16 acc) {
  return fma(to_f32(dot), mul(d, splat(d_activation)), acc);
}

template <int R>
CARAVAN_INLINE const ActivationBlock& block_of(const ActivationRows<R>& rows, int r, int64_t b) {
  return static_cast<const ActivationBlock*>(rows.row[r])[b];
}

// Asks for the kBytes of weights that lie 8 KiB behind p, into the second-level cache, which can wait for more of them
// at once than the first, and into the first for those close behind p. One row outruns nothing: the processor fetches
// ahead of it by itself. With several rows a block takes longer to compute than that reaches.
template <int R, size_t kBytes>
CARAVAN_INLINE void fetch_ahead(const void* p) {
  constexpr size_t kFar = 8192, kNear = 768;
  if constexpr (R >= 4) {
    CARAVAN_UNROLL
    for (size_t line = 0; line < kBytes; line += 64) {
      __builtin_prefetch(static_cast<const char*>(p) + kFar + line, 0, 2);
      __builtin_prefetch(static_cast<const char*>(p) + kNear + line, 0, 3);
    }
  }
}

// One 64-byte row of nibbles: k-groups j (low) and j + 4 (high).
template <int R>
CARAVAN_INLINE void dot_add_nibbles(DotSmall (&dot)[R], const uint8_t* packed, int j, const ActivationRows<R>& rows,
                                    int64_t b) {
  const U8x64 raw = load_u8x64(packed);
  const U8x64 low = low_nibbles(raw);
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot_add(dot[r], low, block_of(rows, r, b).q + 4 * j);
  const U8x64 high = high_nibbles(raw);
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot_add(dot[r], high, block_of(rows, r, b).q + 4 * (j + 4));
}

struct FamilyQ4_0 {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ4_0*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedQ4_0)>(blocks + b);
      DotSmall dot[R];
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot_begin<8>(block_of(rows, r, b), 0);
      CARAVAN_UNROLL
      for (int j = 0; j < 4; ++j) dot_add_nibbles(dot, blocks[b].q[j], j, rows, b);
      const F32x16 d = load_f16(blocks[b].d);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const ActivationBlock& a = block_of(rows, r, b);
        acc[r] = add_block(dot_end<8>(dot[r], a, 0), d, a.d, acc[r]);
      }
    }
  }
};

struct FamilyQ4_K {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ4_K*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      const PackedQ4_K& block = blocks[b / 8];
      const PackedQ4_K::Sub& sub = block.sub[b % 8];
      fetch_ahead<R, sizeof(sub)>(&sub);
      DotSmall dot[R];
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot_begin<0>(block_of(rows, r, b), 0);
      CARAVAN_UNROLL
      for (int j = 0; j < 4; ++j) dot_add_nibbles(dot, sub.q[j], j, rows, b);
      const F32x16 d = mul(load_f16(block.d), to_f32(load_u8(sub.scale)));
      const F32x16 minus_min = neg(mul(load_f16(block.d_min), to_f32(load_u8(sub.min))));
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const ActivationBlock& a = block_of(rows, r, b);
        acc[r] = add_block(dot_end<0>(dot[r], a, 0), d, a.d, acc[r]);
        acc[r] = fma(minus_min, splat(a.d_sum), acc[r]);
      }
    }
  }
};

struct FamilyQ4_1 {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ4_1*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedQ4_1)>(blocks + b);
      DotSmall dot[R];
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot_begin<0>(block_of(rows, r, b), 0);
      CARAVAN_UNROLL
      for (int j = 0; j < 4; ++j) dot_add_nibbles(dot, blocks[b].q[j], j, rows, b);
      const F32x16 d = load_f16(blocks[b].d), m = load_f16(blocks[b].m);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const ActivationBlock& a = block_of(rows, r, b);
        acc[r] = add_block(dot_end<0>(dot[r], a, 0), d, a.d, acc[r]);
        acc[r] = fma(m, splat(a.d_sum), acc[r]);
      }
    }
  }
};

// The k-groups j and j + 4 of five-bit weights.
template <int j, int R>
CARAVAN_INLINE void dot_add_five_bits(DotSmall (&dot)[R], const FiveBits& q, U8x64 high, const ActivationRows<R>& rows,
                                      int64_t b) {
  const U8x64 raw = load_u8x64(q.low[j]);
  const U8x64 first = bitwise_or(low_nibbles(raw), single_bit<j>(high));
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot_add(dot[r], first, block_of(rows, r, b).q + 4 * j);
  const U8x64 second = bitwise_or(high_nibbles(raw), single_bit<j + 4>(high));
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot_add(dot[r], second, block_of(rows, r, b).q + 4 * (j + 4));
}

// Dot products with q - 16 of a block of 32 k: offset 16 keeps the sums within 16 bits.
template <int R>
CARAVAN_INLINE void dot_five_bits(DotSmall (&dot)[R], const FiveBits& q, const ActivationRows<R>& rows, int64_t b) {
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot[r] = dot_begin<16>(block_of(rows, r, b), 0);
  const U8x64 high = load_u8x64(q.high);
  dot_add_five_bits<0>(dot, q, high, rows, b);
  dot_add_five_bits<1>(dot, q, high, rows, b);
  dot_add_five_bits<2>(dot, q, high, rows, b);
  dot_add_five_bits<3>(dot, q, high, rows, b);
}

struct FamilyQ5_0 {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ5_0*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedQ5_0)>(blocks + b);
      DotSmall dot[R];
      dot_five_bits(dot, blocks[b].q, rows, b);
      const F32x16 d = load_f16(blocks[b].d);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const ActivationBlock& a = block_of(rows, r, b);
        acc[r] = add_block(dot_end<16>(dot[r], a, 0), d, a.d, acc[r]);
      }
    }
  }
};

// acc += dot(q - 16) * scale * d_a + (16 * scale + minimum) * (d_a * sum of a), of a block whose weights are
// scale * q + minimum.
template <int R>
CARAVAN_INLINE void add_five_bits(const DotSmall (&dot)[R], F32x16 scale, F32x16 minimum, const ActivationRows<R>& rows,
                                  int64_t b, F32x16 (&acc)[R]) {
  const F32x16 middle = fma(scale, splat(16.0f), minimum);
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) {
    const ActivationBlock& a = block_of(rows, r, b);
    acc[r] = add_block(dot_end<16>(dot[r], a, 0), scale, a.d, acc[r]);
    acc[r] = fma(middle, splat(a.d_sum), acc[r]);
  }
}

struct FamilyQ5_1 {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ5_1*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedQ5_1)>(blocks + b);
      DotSmall dot[R];
      dot_five_bits(dot, blocks[b].q, rows, b);
      add_five_bits(dot, load_f16(blocks[b].d), load_f16(blocks[b].m), rows, b, acc);
    }
  }
};

struct FamilyQ5_K {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ5_K*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      const PackedQ5_K& block = blocks[b / 8];
      const PackedQ5_K::Sub& sub = block.sub[b % 8];
      fetch_ahead<R, sizeof(sub)>(&sub);
      DotSmall dot[R];
      dot_five_bits(dot, sub.q, rows, b);
      const F32x16 scale = mul(load_f16(block.d), to_f32(load_u8(sub.scale)));
      const F32x16 minus_min = neg(mul(load_f16(block.d_min), to_f32(load_u8(sub.min))));
      add_five_bits(dot, scale, minus_min, rows, b, acc);
    }
  }
};

struct FamilyQ6_K {
  static constexpr int kTile = kQuantTile;

  // Weights of k-group 4 * kHalf + t: low nibbles hold the first half of the block, high nibbles the second.
  template <int kHalf, int t>
  static CARAVAN_INLINE U8x64 group(const PackedQ6_K::Sub& sub) {
    const U8x64 raw = load_u8x64(sub.low[t]);
    const U8x64 low = kHalf == 0 ? low_nibbles(raw) : high_nibbles(raw);
    return bitwise_or(low, bit_pair<t>(load_u8x64(kHalf == 0 ? sub.high_0 : sub.high_1)));
  }
  template <int kHalf, int t, int R>
  static CARAVAN_INLINE void add_group(const PackedQ6_K::Sub& sub, DotSmall (&dot)[R], const ActivationRows<R>& rows,
                                       int64_t b) {
    const U8x64 w = group<kHalf, t>(sub);
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) dot_add(dot[r], w, block_of(rows, r, b).q + 16 * kHalf + 4 * t);
  }
  // Scaled integer sums of one half: at most 16 * 32 * 127 * 128, so that two fit a float's 24 bits exactly.
  template <int kHalf, int R>
  static CARAVAN_INLINE void half(const PackedQ6_K::Sub& sub, const ActivationRows<R>& rows, int64_t b,
                                  I32x16 (&sum)[R]) {
    DotSmall dot[R];
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) dot[r] = dot_begin<32>(block_of(rows, r, b), kHalf);
    add_group<kHalf, 0>(sub, dot, rows, b);
    add_group<kHalf, 1>(sub, dot, rows, b);
    add_group<kHalf, 2>(sub, dot, rows, b);
    add_group<kHalf, 3>(sub, dot, rows, b);
    const DotScale scale = load_dot_scale(sub.scale[kHalf]);
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) {
      const I32x16 scaled = dot_end_scaled<32>(dot[r], scale, block_of(rows, r, b), kHalf);
      sum[r] = kHalf == 0 ? scaled : iadd(sum[r], scaled);
    }
  }
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ6_K*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      const PackedQ6_K::Sub& sub = blocks[b / 8].sub[b % 8];
      fetch_ahead<R, sizeof(sub)>(&sub);
      I32x16 sum[R];
      half<0>(sub, rows, b, sum);
      half<1>(sub, rows, b, sum);
      const F32x16 d = load_f16(blocks[b / 8].d);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = add_block(sum[r], d, block_of(rows, r, b).d, acc[r]);
    }
  }
};

// How 16 stored floats become f32.
struct DecodeF32 {
  static constexpr int64_t kBytes = 64;
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct DecodeF16 {
  static constexpr int64_t kBytes = 32;
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) { return load_f16(p); }
};
struct DecodeBF16 {
  static constexpr int64_t kBytes = 32;
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) { return load_bf16(p); }
};

// Four groups of 16 rows' signed bytes: groups first .. first + 3.
template <int R>
CARAVAN_INLINE void dot_add_signed(DotSigned (&dot)[R], const int8_t (*q)[64], int first, const ActivationRows<R>& rows,
                                   int64_t b) {
  CARAVAN_UNROLL
  for (int g = first; g < first + 4; ++g) {
    const SignedWeights w = load_signed(q[g]);
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) dot_add(dot[r], w, block_of(rows, r, b).q + 4 * g);
  }
}

// Blocks of 32 signed bytes per row. Block is PackedQ8_0 or PackedIntegers, Scale loads its 16 scales.
template <typename Block, typename Scale>
struct FamilyInt8 {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const Block*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(Block)>(blocks + b);
      DotSigned dot[R];
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot_signed_begin(block_of(rows, r, b));
      dot_add_signed(dot, blocks[b].q, 0, rows, b);
      dot_add_signed(dot, blocks[b].q, 4, rows, b);
      const F32x16 d = Scale::load16(reinterpret_cast<const std::byte*>(blocks[b].d));
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = add_block(dot_end(dot[r]), d, block_of(rows, r, b).d, acc[r]);
    }
  }
};

// Groups of 32 codes' values: those of the low nibbles (the first 16 k) or of the high ones.
template <bool kHigh, int R>
CARAVAN_INLINE void dot_add_codes(DotSigned (&dot)[R], CodeTable table, const uint8_t (*q)[64],
                                  const ActivationRows<R>& rows, int64_t b) {
  CARAVAN_UNROLL
  for (int j = 0; j < 4; ++j) {
    const U8x64 raw = load_u8x64(q[j]);
    const SignedWeights w = look_up(table, kHigh ? high_nibbles(raw) : low_nibbles(raw));
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) dot_add(dot[r], w, block_of(rows, r, b).q + 4 * (kHigh ? j + 4 : j));
  }
}

// Dot products with a block of 32 codes.
template <int R>
CARAVAN_INLINE void dot_codes(DotSigned (&dot)[R], CodeTable table, const uint8_t (*q)[64],
                              const ActivationRows<R>& rows, int64_t b) {
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) dot[r] = dot_signed_begin(block_of(rows, r, b));
  dot_add_codes<false>(dot, table, q, rows, b);
  dot_add_codes<true>(dot, table, q, rows, b);
}

// Codes of the table kCodes with a scale per 32.
template <const int8_t (&kCodes)[16], typename Scale>
struct FamilyCodes {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedCodes*>(panel);
    const CodeTable table = load_codes(kCodes);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedCodes)>(blocks + b);
      DotSigned dot[R];
      dot_codes(dot, table, blocks[b].q, rows, b);
      const F32x16 d = Scale::load16(reinterpret_cast<const std::byte*>(blocks[b].d));
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = add_block(dot_end(dot[r]), d, block_of(rows, r, b).d, acc[r]);
    }
  }
};

struct FamilyIq4Xs {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedIq4Xs*>(panel);
    const CodeTable table = load_codes(tensor::kIq4Values);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      const PackedIq4Xs::Sub& sub = blocks[b / 8].sub[b % 8];
      fetch_ahead<R, sizeof(sub)>(&sub);
      DotSigned dot[R];
      dot_codes(dot, table, sub.q, rows, b);
      const F32x16 d = mul(load_f16(blocks[b / 8].d), to_f32(load_i8(sub.scale)));
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = add_block(dot_end(dot[r]), d, block_of(rows, r, b).d, acc[r]);
    }
  }
};

struct FamilyNvfp4 {
  static constexpr int kTile = kQuantTile;
  template <bool kHigh, int R>
  static CARAVAN_INLINE void half(const PackedHalfCodes& block, CodeTable table, const ActivationRows<R>& rows,
                                  int64_t b, F32x16 (&acc)[R]) {
    DotSigned dot[R];
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) dot[r] = dot_signed_begin(block_of(rows, r, b), kHigh);
    dot_add_codes<kHigh>(dot, table, block.q, rows, b);
    const F32x16 d = load_f16(block.d[kHigh]);
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = add_block(dot_end(dot[r]), d, block_of(rows, r, b).d, acc[r]);
  }
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedHalfCodes*>(panel);
    const CodeTable table = load_codes(tensor::kTwiceE2m1);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedHalfCodes)>(blocks + b);
      half<false>(blocks[b], table, rows, b, acc);
      half<true>(blocks[b], table, rows, b, acc);
    }
  }
};

// Signed bytes with a scale for either half of 32.
struct FamilyHalfIntegers {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedHalfIntegers*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      fetch_ahead<R, sizeof(PackedHalfIntegers)>(blocks + b);
      for (int half = 0; half < 2; ++half) {
        DotSigned dot[R];
        CARAVAN_UNROLL
        for (int r = 0; r < R; ++r) dot[r] = dot_signed_begin(block_of(rows, r, b), half);
        dot_add_signed(dot, blocks[b].q, 4 * half, rows, b);
        const F32x16 d = load(blocks[b].d[half]);
        CARAVAN_UNROLL
        for (int r = 0; r < R; ++r) acc[r] = add_block(dot_end(dot[r]), d, block_of(rows, r, b).d, acc[r]);
      }
    }
  }
};

// Signed bytes with a scale for all and a minimum for either half of 32.
struct FamilyQ2_K {
  static constexpr int kTile = kQuantTile;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto* blocks = reinterpret_cast<const PackedQ2_K*>(panel);
    for (int64_t b = 0; b < n_in / 32; ++b) {
      const PackedQ2_K& block = blocks[b / 8];
      const PackedQ2_K::Sub& sub = block.sub[b % 8];
      fetch_ahead<R, sizeof(sub)>(&sub);
      DotSigned dot[R];
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot_signed_begin(block_of(rows, r, b));
      dot_add_signed(dot, sub.q, 0, rows, b);
      dot_add_signed(dot, sub.q, 4, rows, b);
      const F32x16 d = load_f16(block.d), minus_d_min = neg(load_f16(block.d_min));
      const F32x16 min_0 = mul(minus_d_min, to_f32(load_u8(sub.min[0])));
      const F32x16 min_1 = mul(minus_d_min, to_f32(load_u8(sub.min[1])));
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const ActivationBlock& a = block_of(rows, r, b);
        acc[r] = add_block(dot_end(dot[r]), d, a.d, acc[r]);
        acc[r] = fma(min_0, splat(a.d * static_cast<float>(a.half_sum[0])), acc[r]);
        acc[r] = fma(min_1, splat(a.d * static_cast<float>(a.half_sum[1])), acc[r]);
      }
    }
  }
};

// acc[r] += the products of `length` float weights from w on, as Decode reads them, with x(r, 0), x(r, 1), ...
template <typename Decode, int R, typename Activation>
CARAVAN_INLINE void add_float_chunks(const std::byte* w, int64_t length, Activation x, F32x16 (&acc)[R]) {
  for (int64_t begin = 0; begin < length; begin += kFloatChunk) {
    const int64_t end = begin + kFloatChunk < length ? begin + kFloatChunk : length;
    F32x16 part[R];
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) part[r] = zero();
    CARAVAN_UNROLL_4
    for (int64_t k = begin; k < end; ++k) {
      const F32x16 weights = Decode::load16(w + k * Decode::kBytes);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) part[r] = fma(weights, splat(x(r, k)), part[r]);
    }
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = add(acc[r], part[r]);
  }
}

// Few rows of float weights. Their sums wait for each other, but no longer than weights take to come from memory.
template <typename Decode>
struct FamilyFloat {
  static constexpr int kTile = kFloatTile < 8 ? 4 : 8;
  template <int R>
  static void run(const std::byte* panel, int64_t n_in, const ActivationRows<R>& rows, F32x16 (&acc)[R]) {
    const auto x = [&](int r, int64_t k) {
      if (r == 0) fetch_ahead<R, Decode::kBytes>(panel + k * Decode::kBytes);
      return static_cast<const float*>(rows.row[r])[k];
    };
    add_float_chunks<Decode>(panel, n_in, x, acc);
  }
};

// What one call works on; rows are counted from the first activation row.
struct MulMatCall {
  const PackedMatrix& w;
  int64_t panel_bytes;
  const char* activations;
  size_t activation_stride;
  float* out;
  int64_t out_stride;
};

template <typename Family, int R>
CARAVAN_INLINE void mul_mat_tile(const MulMatCall& call, int64_t panel, int64_t row) {
  ActivationRows<R> rows;
  for (int r = 0; r < R; ++r) rows.row[r] = call.activations + static_cast<size_t>(row + r) * call.activation_stride;
  F32x16 acc[R];
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = zero();
  Family::template run<R>(call.w.data + panel * call.panel_bytes, call.w.n_in, rows, acc);
  const int64_t n = call.w.n_out - panel * kPanelRows;
  float* out = call.out + row * call.out_stride + panel * kPanelRows;
  for (int r = 0; r < R; ++r) {
    if (n >= kPanelRows)
      store(out + r * call.out_stride, acc[r]);
    else
      store_partial(out + r * call.out_stride, acc[r], n);
  }
}

template <typename Family, int R>
void mul_mat_panels(const MulMatCall& call, int64_t panel_begin, int64_t panel_end, int64_t row) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) mul_mat_tile<Family, R>(call, panel, row);
}

inline constexpr int64_t kGroupBytes = 256 * 1024;  // what stays in the second-level cache while all rows pass by

template <typename Family>
void mul_mat_family(const MulMatCall& call, int64_t panel_begin, int64_t panel_end, int64_t n_rows) {
  constexpr int kTile = Family::kTile;
  const int64_t fitting = kGroupBytes / call.panel_bytes;
  const int64_t group = fitting < 1 ? 1 : fitting;
  for (int64_t begin = panel_begin; begin < panel_end; begin += group) {
    const int64_t end = begin + group < panel_end ? begin + group : panel_end;
    int64_t row = 0;
    for (; row + kTile <= n_rows; row += kTile) mul_mat_panels<Family, kTile>(call, begin, end, row);
    for (; kTile > 4 && row + 4 <= n_rows; row += 4) mul_mat_panels<Family, 4>(call, begin, end, row);
    for (; row + 2 <= n_rows; row += 2) mul_mat_panels<Family, 2>(call, begin, end, row);
    for (; row < n_rows; ++row) mul_mat_panels<Family, 1>(call, begin, end, row);
  }
}

// Many rows of float weights: tiles of rows are copied side by side, a few chunks at a time, so that they stay in the
// first-level cache and all are addressed from one register.
inline constexpr int64_t kFloatBlock = 4 * kFloatChunk;
inline constexpr int64_t kFloatRowStride = kFloatBlock + 16;  // rows at a multiple of 4 KiB would share cache sets

// out[rows of the tile][rows of the panel] += the products of `length` values from k; from the first ones they are set.
template <typename Decode, int R>
CARAVAN_INLINE void float_tile(const MulMatCall& call, int64_t panel, int64_t row, int64_t k, int64_t length,
                               const float* x) {
  const std::byte* w = call.w.data + panel * call.panel_bytes + k * Decode::kBytes;
  const int64_t n = call.w.n_out - panel * kPanelRows;
  float* out = call.out + row * call.out_stride + panel * kPanelRows;
  F32x16 acc[R];
  for (int r = 0; r < R; ++r) {
    if (k == 0)
      acc[r] = zero();
    else
      acc[r] = n >= kPanelRows ? load(out + r * call.out_stride) : load_partial(out + r * call.out_stride, n);
  }
  add_float_chunks<Decode>(w, length, [&](int r, int64_t i) { return x[r * kFloatRowStride + i]; }, acc);
  for (int r = 0; r < R; ++r) {
    if (n >= kPanelRows)
      store(out + r * call.out_stride, acc[r]);
    else
      store_partial(out + r * call.out_stride, acc[r], n);
  }
}

template <typename Decode, int R>
void float_panels(const MulMatCall& call, int64_t panel_begin, int64_t panel_end, int64_t row, int64_t k,
                  int64_t length) {
  alignas(64) float x[R * kFloatRowStride];
  for (int64_t r = 0; r < R; ++r)
    std::memcpy(x + r * kFloatRowStride,
                call.activations + static_cast<size_t>(row + r) * call.activation_stride + k * sizeof(float),
                static_cast<size_t>(length) * sizeof(float));
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) float_tile<Decode, R>(call, panel, row, k, length, x);
}

template <typename Decode>
void mul_mat_float(const MulMatCall& call, int64_t panel_begin, int64_t panel_end, int64_t n_rows) {
  if (n_rows < 2 * kFloatTile) return mul_mat_family<FamilyFloat<Decode>>(call, panel_begin, panel_end, n_rows);
  constexpr int64_t kGroup = kGroupBytes / (kFloatBlock * Decode::kBytes);
  for (int64_t begin = panel_begin; begin < panel_end; begin += kGroup) {
    const int64_t end = begin + kGroup < panel_end ? begin + kGroup : panel_end;
    for (int64_t k = 0; k < call.w.n_in; k += kFloatBlock) {
      const int64_t length = call.w.n_in - k < kFloatBlock ? call.w.n_in - k : kFloatBlock;
      int64_t row = 0;
      for (; row + kFloatTile <= n_rows; row += kFloatTile)
        float_panels<Decode, kFloatTile>(call, begin, end, row, k, length);
      for (; kFloatTile > 4 && row + 4 <= n_rows; row += 4) float_panels<Decode, 4>(call, begin, end, row, k, length);
      for (; row + 2 <= n_rows; row += 2) float_panels<Decode, 2>(call, begin, end, row, k, length);
      for (; row < n_rows; ++row) float_panels<Decode, 1>(call, begin, end, row, k, length);
    }
  }
}

void mul_mat(const PackedMatrix& w, int64_t panel_begin, int64_t panel_end, const void* activations,
             size_t activation_stride, int64_t n_rows, float* out, int64_t out_stride) {
  const MulMatCall call{w,
                        static_cast<int64_t>(packed_panel_bytes(w.dtype, w.n_in)),
                        static_cast<const char*>(activations),
                        activation_stride,
                        out,
                        out_stride};
  switch (panel_form(w.dtype)) {
    case PanelForm::q8_0:
      return mul_mat_family<FamilyInt8<PackedQ8_0, DecodeF16>>(call, panel_begin, panel_end, n_rows);
    case PanelForm::integers:
      return mul_mat_family<FamilyInt8<PackedIntegers, DecodeF32>>(call, panel_begin, panel_end, n_rows);
    case PanelForm::half_integers:
      return mul_mat_family<FamilyHalfIntegers>(call, panel_begin, panel_end, n_rows);
    case PanelForm::iq4_nl:
      return mul_mat_family<FamilyCodes<tensor::kIq4Values, DecodeF16>>(call, panel_begin, panel_end, n_rows);
    case PanelForm::iq4_xs:
      return mul_mat_family<FamilyIq4Xs>(call, panel_begin, panel_end, n_rows);
    case PanelForm::mxfp4:
      return mul_mat_family<FamilyCodes<tensor::kTwiceE2m1, DecodeBF16>>(call, panel_begin, panel_end, n_rows);
    case PanelForm::nvfp4:
      return mul_mat_family<FamilyNvfp4>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q4_0:
      return mul_mat_family<FamilyQ4_0>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q4_1:
      return mul_mat_family<FamilyQ4_1>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q5_0:
      return mul_mat_family<FamilyQ5_0>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q5_1:
      return mul_mat_family<FamilyQ5_1>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q2_k:
      return mul_mat_family<FamilyQ2_K>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q4_k:
      return mul_mat_family<FamilyQ4_K>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q5_k:
      return mul_mat_family<FamilyQ5_K>(call, panel_begin, panel_end, n_rows);
    case PanelForm::q6_k:
      return mul_mat_family<FamilyQ6_K>(call, panel_begin, panel_end, n_rows);
    case PanelForm::f16:
      return mul_mat_float<DecodeF16>(call, panel_begin, panel_end, n_rows);
    case PanelForm::bf16:
      return mul_mat_float<DecodeBF16>(call, panel_begin, panel_end, n_rows);
    case PanelForm::f32:
      return mul_mat_float<DecodeF32>(call, panel_begin, panel_end, n_rows);
  }
}
