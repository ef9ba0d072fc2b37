// The SIMD vocabulary in plain C++: sixteen lanes as an array. Defines what the other vocabularies must compute.
// Included by isa_scalar.cpp only, inside its namespace; see simd_avx2.h for the same names on real vectors.
//
//   load_partial and store_partial touch the first n values only (all 16 for larger n; missing lanes are 0);
//   fma(a, b, c) is a * b + c with one rounding; max(a, b) is a > b ? a : b, so a NaN in either gives b; reduce_add
//   adds lane i + 8 to lane i, then i + 4, i + 2, i + 1. Everything else is the plain IEEE operation per lane.
#pragma once

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};
struct Mask16 {
  bool v[16];
};
struct U8x64 {
  uint8_t v[64];
};

// How many rows of activations a matrix kernel keeps in registers.
inline constexpr int kQuantTile = 2;
inline constexpr int kFloatTile = 2;
inline constexpr int kAttentionTile = 2;

#define CARAVAN_LANES for (int i = 0; i < 16; ++i)

// Fused multiply-add. Without hardware for it: the product is exact in double, the sum is rounded to odd there (by its
// exact error, Knuth's TwoSum), and the second rounding, to float, is then right (Boldo & Melquiond 2008).
CARAVAN_INLINE float fma_lane(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  auto bits = std::bit_cast<int64_t>(sum);
  const int64_t inexact = (error > 0) | (error < 0);  // both false for NaN: an infinite sum stays as it is
  const int64_t step = (error > 0) == (sum > 0) ? 1 : -1;
  bits += (inexact & ~bits & 1) * step;
  return static_cast<float>(std::bit_cast<double>(bits));
#endif
}

CARAVAN_INLINE F32x16 splat(float x) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = x;
  return r;
}
CARAVAN_INLINE F32x16 zero() { return splat(0.0f); }
CARAVAN_INLINE F32x16 load(const float* p) {
  F32x16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
CARAVAN_INLINE F32x16 load_partial(const float* p, int64_t n) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = i < n ? p[i] : 0.0f;
  return r;
}
CARAVAN_INLINE void store(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
CARAVAN_INLINE void store_partial(float* p, F32x16 a, int64_t n) {
  for (int64_t i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
}
CARAVAN_INLINE uint16_t load_u16(const void* p, int i) {
  uint16_t x;
  std::memcpy(&x, static_cast<const char*>(p) + 2 * i, 2);
  return x;
}
CARAVAN_INLINE F32x16 load_f16(const void* p) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = tensor::f16_to_f32(load_u16(p, i));
  return r;
}
CARAVAN_INLINE F32x16 load_bf16(const void* p) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = tensor::bf16_to_f32(load_u16(p, i));
  return r;
}
CARAVAN_INLINE void store_f16(void* p, F32x16 a) {
  CARAVAN_LANES {
    const uint16_t half = tensor::f32_to_f16(a.v[i]);
    std::memcpy(static_cast<char*>(p) + 2 * i, &half, 2);
  }
}
CARAVAN_INLINE I32x16 load_i8(const int8_t* p) {
  I32x16 r;
  CARAVAN_LANES r.v[i] = p[i];
  return r;
}
CARAVAN_INLINE I32x16 load_u8(const uint8_t* p) {
  I32x16 r;
  CARAVAN_LANES r.v[i] = p[i];
  return r;
}
CARAVAN_INLINE void store_i8(int8_t* p, I32x16 a) { CARAVAN_LANES p[i] = static_cast<int8_t>(a.v[i]); }

CARAVAN_INLINE F32x16 add(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] += b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 sub(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] -= b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 mul(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] *= b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 div(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] /= b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 sqrt(F32x16 a) {
  CARAVAN_LANES a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
CARAVAN_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  CARAVAN_LANES a.v[i] = fma_lane(a.v[i], b.v[i], c.v[i]);
  return a;
}
CARAVAN_INLINE F32x16 max(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 min(F32x16 a, F32x16 b) {
  CARAVAN_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}

CARAVAN_INLINE I32x16 isplat(int32_t x) {
  I32x16 r;
  CARAVAN_LANES r.v[i] = x;
  return r;
}
CARAVAN_INLINE I32x16 iadd(I32x16 a, I32x16 b) {
  CARAVAN_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
  return a;
}
CARAVAN_INLINE I32x16 isub(I32x16 a, I32x16 b) {
  CARAVAN_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]));
  return a;
}
CARAVAN_INLINE I32x16 iand(I32x16 a, I32x16 b) {
  CARAVAN_LANES a.v[i] &= b.v[i];
  return a;
}
CARAVAN_INLINE I32x16 ior(I32x16 a, I32x16 b) {
  CARAVAN_LANES a.v[i] |= b.v[i];
  return a;
}
template <int kBits>
CARAVAN_INLINE I32x16 ishl(I32x16 a) {
  CARAVAN_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits);
  return a;
}
template <int kBits>
CARAVAN_INLINE I32x16 isar(I32x16 a) {
  CARAVAN_LANES a.v[i] >>= kBits;
  return a;
}
CARAVAN_INLINE I32x16 imax(I32x16 a, I32x16 b) {
  CARAVAN_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
CARAVAN_INLINE F32x16 to_f32(I32x16 a) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
CARAVAN_INLINE I32x16 bits(F32x16 a) { return std::bit_cast<I32x16>(a); }
CARAVAN_INLINE F32x16 as_f32(I32x16 a) { return std::bit_cast<F32x16>(a); }

CARAVAN_INLINE Mask16 less(F32x16 a, F32x16 b) {
  Mask16 r;
  CARAVAN_LANES r.v[i] = a.v[i] < b.v[i];
  return r;
}
CARAVAN_INLINE Mask16 equal(F32x16 a, F32x16 b) {
  Mask16 r;
  CARAVAN_LANES r.v[i] = a.v[i] == b.v[i];
  return r;
}
// Lanes begin <= i < end; any integers.
CARAVAN_INLINE Mask16 lanes(int64_t begin, int64_t end) {
  Mask16 r;
  CARAVAN_LANES r.v[i] = i >= begin && i < end;
  return r;
}
CARAVAN_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  CARAVAN_LANES yes.v[i] = m.v[i] ? yes.v[i] : no.v[i];
  return yes;
}
CARAVAN_INLINE uint32_t mask_bits(Mask16 m) {
  uint32_t r = 0;
  CARAVAN_LANES r |= static_cast<uint32_t>(m.v[i]) << i;
  return r;
}

CARAVAN_INLINE float reduce_add(F32x16 a) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  return a.v[0];
}
CARAVAN_INLINE float reduce_max(F32x16 a) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  return a.v[0];
}
CARAVAN_INLINE int32_t ireduce_max(I32x16 a) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  return a.v[0];
}

// (x1, x0, x3, x2, ...).
CARAVAN_INLINE F32x16 swap_pairs(F32x16 a) {
  F32x16 r;
  CARAVAN_LANES r.v[i] = a.v[i ^ 1];
  return r;
}

CARAVAN_INLINE U8x64 load_u8x64(const void* p) {
  U8x64 r;
  std::memcpy(r.v, p, 64);
  return r;
}
CARAVAN_INLINE U8x64 low_nibbles(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] &= 15;
  return a;
}
CARAVAN_INLINE U8x64 high_nibbles(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
  return a;
}
// (bits 2t and 2t + 1) << 4.
template <int t>
CARAVAN_INLINE U8x64 bit_pair(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] >> (2 * t) & 3) << 4);
  return a;
}
// Bit t << 4.
template <int t>
CARAVAN_INLINE U8x64 single_bit(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] >> t & 1) << 4);
  return a;
}
CARAVAN_INLINE U8x64 bitwise_or(U8x64 a, U8x64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}

// Integer dot products of 16 rows with one activation row.
//   DotSmall: weights 0..63 stored with an offset (0, 8, 16 or 32) that the result subtracts; half: which 16 of the
//   block's 32 k (offset 32 only). DotSigned: weights -128..127, over 32 k or the given half of them. add takes one
//   group: 64 weight bytes and 4 activation bytes.
struct DotSmall {
  I32x16 sum;
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  if constexpr (kOffset == 8 || kOffset == 16) return {isplat(-kOffset * a.sum)};
  if constexpr (kOffset == 32) return {isplat(-32 * a.half_sum[half])};
  return {isplat(0)};
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  CARAVAN_LANES {
    const uint8_t* row = w.v + 4 * i;
    dot.sum.v[i] += row[0] * a[0] + row[1] * a[1] + row[2] * a[2] + row[3] * a[3];
  }
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  return dot.sum;
}
// Scales of 16 rows prepared for dot_end_scaled, which multiplies each row's sum.
struct DotScale {
  I32x16 scale;
};
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) { return {load_i8(p)}; }
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock&, int) {
  CARAVAN_LANES dot.sum.v[i] *= s.scale.v[i];
  return dot.sum;
}

struct SignedWeights {
  int8_t v[64];
};
CARAVAN_INLINE SignedWeights load_signed(const int8_t* p) {
  SignedWeights r;
  std::memcpy(r.v, p, 64);
  return r;
}
// Sixteen signed values that four-bit codes choose from.
struct CodeTable {
  int8_t v[16];
};
CARAVAN_INLINE CodeTable load_codes(const int8_t* p) {
  CodeTable r;
  std::memcpy(r.v, p, 16);
  return r;
}
// The values of codes 0..15.
CARAVAN_INLINE SignedWeights look_up(CodeTable table, U8x64 codes) {
  SignedWeights r;
  for (int i = 0; i < 64; ++i) r.v[i] = table.v[codes.v[i]];
  return r;
}
struct DotSigned {
  I32x16 sum;
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&) { return {isplat(0)}; }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&, int /*half*/) { return {isplat(0)}; }
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  CARAVAN_LANES {
    const int8_t* row = w.v + 4 * i;
    dot.sum.v[i] += row[0] * a[0] + row[1] * a[1] + row[2] * a[2] + row[3] * a[3];
  }
}
CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { return dot.sum; }

#undef CARAVAN_LANES
