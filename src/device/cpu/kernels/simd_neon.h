// The SIMD vocabulary on 64-bit NEON: sixteen lanes are four 128-bit registers. With CARAVAN_DOTPROD the 8-bit dot
// products use sdot. Included by isa_neon*.cpp only, inside their namespace and target region. What each name computes:
// simd_scalar.h.
#pragma once

struct F32x16 {
  float32x4_t q[4];
};
struct I32x16 {
  int32x4_t q[4];
};
struct Mask16 {
  uint32x4_t q[4];  // all ones or all zeros per lane
};
struct U8x64 {
  uint8x16_t q[4];  // q[i]: rows 4i .. 4i + 3
};

// Thirty-two registers, four per row of sums.
inline constexpr int kQuantTile = 4;
inline constexpr int kFloatTile = 5;
inline constexpr int kAttentionTile = 5;

// Applies one intrinsic to each of the four registers.
#define CARAVAN_EACH(Type, expression)                 \
  do {                                                 \
    Type r;                                            \
    CARAVAN_UNROLL                                     \
    for (int i = 0; i < 4; ++i) r.q[i] = (expression); \
    return r;                                          \
  } while (false)

CARAVAN_INLINE F32x16 splat(float x) { CARAVAN_EACH(F32x16, vdupq_n_f32(x)); }
CARAVAN_INLINE F32x16 zero() { return splat(0.0f); }
CARAVAN_INLINE F32x16 load(const float* p) { CARAVAN_EACH(F32x16, vld1q_f32(p + 4 * i)); }
CARAVAN_INLINE void store(float* p, F32x16 a) {
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
CARAVAN_INLINE F32x16 load_partial(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  float lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
CARAVAN_INLINE void store_partial(float* p, F32x16 a, int64_t n) {
  if (n >= 16) return store(p, a);
  float lanes[16];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
CARAVAN_INLINE uint16x4_t load_u16x4(const void* p) {
  uint16x4_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
CARAVAN_INLINE F32x16 load_f16(const void* p) {
  const auto* bytes = static_cast<const char*>(p);
  CARAVAN_EACH(F32x16, vcvt_f32_f16(vreinterpret_f16_u16(load_u16x4(bytes + 8 * i))));
}
CARAVAN_INLINE F32x16 load_bf16(const void* p) {
  const auto* bytes = static_cast<const char*>(p);
  CARAVAN_EACH(F32x16, vreinterpretq_f32_u32(vshll_n_u16(load_u16x4(bytes + 8 * i), 16)));
}
CARAVAN_INLINE void store_f16(void* p, F32x16 a) {
  for (int i = 0; i < 4; ++i) {
    const float16x4_t half = vcvt_f16_f32(a.q[i]);
    std::memcpy(static_cast<char*>(p) + 8 * i, &half, 8);
  }
}
CARAVAN_INLINE I32x16 load_i8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t lo = vmovl_s8(vget_low_s8(x)), hi = vmovl_s8(vget_high_s8(x));
  return {{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
           vmovl_s16(vget_high_s16(hi))}};
}
CARAVAN_INLINE I32x16 load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t lo = vmovl_u8(vget_low_u8(x)), hi = vmovl_u8(vget_high_u8(x));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(lo))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(lo))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(hi))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(hi)))}};
}
CARAVAN_INLINE void store_i8(int8_t* p, I32x16 a) {
  const int16x8_t lo = vcombine_s16(vmovn_s32(a.q[0]), vmovn_s32(a.q[1]));
  const int16x8_t hi = vcombine_s16(vmovn_s32(a.q[2]), vmovn_s32(a.q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}

CARAVAN_INLINE F32x16 add(F32x16 a, F32x16 b) { CARAVAN_EACH(F32x16, vaddq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE F32x16 sub(F32x16 a, F32x16 b) { CARAVAN_EACH(F32x16, vsubq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE F32x16 mul(F32x16 a, F32x16 b) { CARAVAN_EACH(F32x16, vmulq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE F32x16 div(F32x16 a, F32x16 b) { CARAVAN_EACH(F32x16, vdivq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE F32x16 sqrt(F32x16 a) { CARAVAN_EACH(F32x16, vsqrtq_f32(a.q[i])); }
CARAVAN_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { CARAVAN_EACH(F32x16, vfmaq_f32(c.q[i], a.q[i], b.q[i])); }
// Comparison and choice: fmax and fmin treat NaN otherwise.
CARAVAN_INLINE F32x16 max(F32x16 a, F32x16 b) {
  CARAVAN_EACH(F32x16, vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
CARAVAN_INLINE F32x16 min(F32x16 a, F32x16 b) {
  CARAVAN_EACH(F32x16, vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}

CARAVAN_INLINE I32x16 isplat(int32_t x) { CARAVAN_EACH(I32x16, vdupq_n_s32(x)); }
CARAVAN_INLINE I32x16 iadd(I32x16 a, I32x16 b) { CARAVAN_EACH(I32x16, vaddq_s32(a.q[i], b.q[i])); }
CARAVAN_INLINE I32x16 isub(I32x16 a, I32x16 b) { CARAVAN_EACH(I32x16, vsubq_s32(a.q[i], b.q[i])); }
CARAVAN_INLINE I32x16 iand(I32x16 a, I32x16 b) { CARAVAN_EACH(I32x16, vandq_s32(a.q[i], b.q[i])); }
CARAVAN_INLINE I32x16 ior(I32x16 a, I32x16 b) { CARAVAN_EACH(I32x16, vorrq_s32(a.q[i], b.q[i])); }
template <int kBits>
CARAVAN_INLINE I32x16 ishl(I32x16 a) {
  CARAVAN_EACH(I32x16, vshlq_n_s32(a.q[i], kBits));
}
template <int kBits>
CARAVAN_INLINE I32x16 isar(I32x16 a) {
  CARAVAN_EACH(I32x16, vshrq_n_s32(a.q[i], kBits));
}
CARAVAN_INLINE I32x16 imax(I32x16 a, I32x16 b) { CARAVAN_EACH(I32x16, vmaxq_s32(a.q[i], b.q[i])); }
CARAVAN_INLINE F32x16 to_f32(I32x16 a) { CARAVAN_EACH(F32x16, vcvtq_f32_s32(a.q[i])); }
CARAVAN_INLINE I32x16 bits(F32x16 a) { CARAVAN_EACH(I32x16, vreinterpretq_s32_f32(a.q[i])); }
CARAVAN_INLINE F32x16 as_f32(I32x16 a) { CARAVAN_EACH(F32x16, vreinterpretq_f32_s32(a.q[i])); }

CARAVAN_INLINE Mask16 less(F32x16 a, F32x16 b) { CARAVAN_EACH(Mask16, vcltq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE Mask16 equal(F32x16 a, F32x16 b) { CARAVAN_EACH(Mask16, vceqq_f32(a.q[i], b.q[i])); }
CARAVAN_INLINE int32x4_t lane_numbers() {
  const int32_t numbers[4] = {0, 1, 2, 3};
  return vld1q_s32(numbers);
}
CARAVAN_INLINE Mask16 lanes(int64_t begin, int64_t end) {
  const int32_t first = static_cast<int32_t>(begin < 0 ? 0 : begin > 16 ? 16 : begin);
  const int32_t last = static_cast<int32_t>(end < 0 ? 0 : end > 16 ? 16 : end);
  const int32x4_t numbers = lane_numbers();
  CARAVAN_EACH(
      Mask16, vandq_u32(vcgeq_s32(numbers, vdupq_n_s32(first - 4 * i)), vcltq_s32(numbers, vdupq_n_s32(last - 4 * i))));
}
CARAVAN_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  CARAVAN_EACH(F32x16, vbslq_f32(m.q[i], yes.q[i], no.q[i]));
}
CARAVAN_INLINE uint32_t mask_bits(Mask16 m) {
  const uint32_t weights[4] = {1, 2, 4, 8};
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= vaddvq_u32(vandq_u32(m.q[i], vld1q_u32(weights))) << (4 * i);
  return r;
}

CARAVAN_INLINE float reduce_add(F32x16 a) {
  const float32x4_t x = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}
CARAVAN_INLINE float larger(float a, float b) { return a > b ? a : b; }
CARAVAN_INLINE float reduce_max(F32x16 a) {
  const float32x4_t even = vbslq_f32(vcgtq_f32(a.q[0], a.q[2]), a.q[0], a.q[2]);
  const float32x4_t odd = vbslq_f32(vcgtq_f32(a.q[1], a.q[3]), a.q[1], a.q[3]);
  const float32x4_t x = vbslq_f32(vcgtq_f32(even, odd), even, odd);
  return larger(larger(vgetq_lane_f32(x, 0), vgetq_lane_f32(x, 2)), larger(vgetq_lane_f32(x, 1), vgetq_lane_f32(x, 3)));
}
CARAVAN_INLINE int32_t ireduce_max(I32x16 a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[2]), vmaxq_s32(a.q[1], a.q[3])));
}

CARAVAN_INLINE F32x16 swap_pairs(F32x16 a) { CARAVAN_EACH(F32x16, vrev64q_f32(a.q[i])); }

CARAVAN_INLINE U8x64 load_u8x64(const void* p) {
  CARAVAN_EACH(U8x64, vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i));
}
CARAVAN_INLINE U8x64 low_nibbles(U8x64 a) { CARAVAN_EACH(U8x64, vandq_u8(a.q[i], vdupq_n_u8(15))); }
CARAVAN_INLINE U8x64 high_nibbles(U8x64 a) { CARAVAN_EACH(U8x64, vshrq_n_u8(a.q[i], 4)); }
template <int t>
CARAVAN_INLINE U8x64 bit_pair(U8x64 a) {
  if constexpr (t < 2) CARAVAN_EACH(U8x64, vandq_u8(vshlq_n_u8(a.q[i], 4 - 2 * t), vdupq_n_u8(0x30)));
  if constexpr (t == 2) CARAVAN_EACH(U8x64, vandq_u8(a.q[i], vdupq_n_u8(0x30)));
  CARAVAN_EACH(U8x64, vandq_u8(vshrq_n_u8(a.q[i], 2), vdupq_n_u8(0x30)));
}
template <int t>
CARAVAN_INLINE U8x64 single_bit(U8x64 a) {
  if constexpr (t < 4) CARAVAN_EACH(U8x64, vshlq_n_u8(vandq_u8(a.q[i], vdupq_n_u8(1 << t)), 4 - t));
  if constexpr (t == 4) CARAVAN_EACH(U8x64, vandq_u8(a.q[i], vdupq_n_u8(1 << t)));
  CARAVAN_EACH(U8x64, vshrq_n_u8(vandq_u8(a.q[i], vdupq_n_u8(1 << t)), t > 4 ? t - 4 : 1));
}
CARAVAN_INLINE U8x64 bitwise_or(U8x64 a, U8x64 b) { CARAVAN_EACH(U8x64, vorrq_u8(a.q[i], b.q[i])); }

CARAVAN_INLINE int8x16_t broadcast_4(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

// Row scales of 16 rows; the sums are multiplied as 32-bit integers.
struct DotScale {
  I32x16 scale;
};
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) { return {load_i8(p)}; }

struct SignedWeights {
  int8x16_t q[4];
};
CARAVAN_INLINE SignedWeights load_signed(const int8_t* p) { CARAVAN_EACH(SignedWeights, vld1q_s8(p + 16 * i)); }
struct CodeTable {
  int8x16_t v;
};
CARAVAN_INLINE CodeTable load_codes(const int8_t* p) { return {vld1q_s8(p)}; }
CARAVAN_INLINE SignedWeights look_up(CodeTable table, U8x64 codes) {
  CARAVAN_EACH(SignedWeights, vqtbl1q_s8(table.v, codes.q[i]));
}

#if defined(CARAVAN_DOTPROD)

// sdot sums four signed products into 32 bits; weights 0..63 are signed bytes as they are.
struct DotSmall {
  int32x4_t q[4];
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  const int32_t start = kOffset == 32 ? -32 * a.half_sum[half] : -kOffset * a.sum;
  CARAVAN_EACH(DotSmall, vdupq_n_s32(start));
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  const int8x16_t x = broadcast_4(a);
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) dot.q[i] = vdotq_s32(dot.q[i], vreinterpretq_s8_u8(w.q[i]), x);
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  CARAVAN_EACH(I32x16, dot.q[i]);
}

struct DotSigned {
  int32x4_t q[4];
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&) { CARAVAN_EACH(DotSigned, vdupq_n_s32(0)); }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a, int /*half*/) { return dot_signed_begin(a); }
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  const int8x16_t x = broadcast_4(a);
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) dot.q[i] = vdotq_s32(dot.q[i], w.q[i], x);
}
CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { CARAVAN_EACH(I32x16, dot.q[i]); }

#else

// Products are added per byte position in 16 bits: lane 4 * row + j sums at most 8 products of 31 * 127 or 4 of 63 *
// 127.
struct DotSmall {
  int16x8_t lo[4], hi[4];  // rows 4i, 4i + 1 and rows 4i + 2, 4i + 3
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock&, int) {
  DotSmall dot;
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) dot.lo[i] = dot.hi[i] = vdupq_n_s16(0);
  return dot;
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  const int8x16_t x = broadcast_4(a);
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int8x16_t weights = vreinterpretq_s8_u8(w.q[i]);
    dot.lo[i] = vmlal_s8(dot.lo[i], vget_low_s8(weights), vget_low_s8(x));
    dot.hi[i] = vmlal_high_s8(dot.hi[i], weights, x);
  }
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock& a, int half) {
  const int32x4_t start = vdupq_n_s32(kOffset == 32 ? -32 * a.half_sum[half] : -kOffset * a.sum);
  CARAVAN_EACH(I32x16, vaddq_s32(start, vpaddq_s32(vpaddlq_s16(dot.lo[i]), vpaddlq_s16(dot.hi[i]))));
}

// Two products of 128 * 127 fit 16 bits; they are added to 32 bits at once.
struct DotSigned {
  int32x4_t lo[4], hi[4];
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&) {
  DotSigned dot;
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) dot.lo[i] = dot.hi[i] = vdupq_n_s32(0);
  return dot;
}
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a, int /*half*/) { return dot_signed_begin(a); }
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  const int8x16_t x = broadcast_4(a);
  CARAVAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    dot.lo[i] = vpadalq_s16(dot.lo[i], vmull_s8(vget_low_s8(w.q[i]), vget_low_s8(x)));
    dot.hi[i] = vpadalq_s16(dot.hi[i], vmull_high_s8(w.q[i], x));
  }
}
CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { CARAVAN_EACH(I32x16, vpaddq_s32(dot.lo[i], dot.hi[i])); }

#endif

template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock& a, int half) {
  const I32x16 sum = dot_end<kOffset>(dot, a, half);
  CARAVAN_EACH(I32x16, vmulq_s32(sum.q[i], s.scale.q[i]));
}

#undef CARAVAN_EACH
