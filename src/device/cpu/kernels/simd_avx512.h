// The SIMD vocabulary on AVX-512 (F, BW, DQ, VL): sixteen lanes are one register. With CARAVAN_VNNI the 8-bit dot
// products use vpdpbusd. Included by isa_avx512.cpp and isa_avx512_vnni.cpp only, inside their namespace and target
// region. What each name computes: simd_scalar.h.
#pragma once

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};
struct Mask16 {
  __mmask16 m;
};
struct U8x64 {
  __m512i v;
};

// Thirty-two registers: one sum per row and one dot product per row, and room for weights.
inline constexpr int kQuantTile = 8;
inline constexpr int kFloatTile = 12;
inline constexpr int kAttentionTile = 8;

CARAVAN_INLINE F32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
CARAVAN_INLINE F32x16 zero() { return {_mm512_setzero_ps()}; }
CARAVAN_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
CARAVAN_INLINE uint32_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 16 ? 0xffff : (1u << n) - 1; }
CARAVAN_INLINE Mask16 lanes(int64_t begin, int64_t end) {
  return {static_cast<__mmask16>(low_bits(end) & ~low_bits(begin))};
}
CARAVAN_INLINE F32x16 load_partial(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(0, n).m, p)}; }
CARAVAN_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
CARAVAN_INLINE void store_partial(float* p, F32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(0, n).m, a.v); }
CARAVAN_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
CARAVAN_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
CARAVAN_INLINE F32x16 load_f16(const void* p) { return {_mm512_cvtph_ps(load_256(p))}; }
CARAVAN_INLINE F32x16 load_bf16(const void* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16))};
}
CARAVAN_INLINE void store_f16(void* p, F32x16 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
CARAVAN_INLINE I32x16 load_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(load_128(p))}; }
CARAVAN_INLINE I32x16 load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(load_128(p))}; }
CARAVAN_INLINE void store_i8(int8_t* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

CARAVAN_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
CARAVAN_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
CARAVAN_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
CARAVAN_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
CARAVAN_INLINE F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
CARAVAN_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
CARAVAN_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
CARAVAN_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }

CARAVAN_INLINE I32x16 isplat(int32_t x) { return {_mm512_set1_epi32(x)}; }
CARAVAN_INLINE I32x16 iadd(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
CARAVAN_INLINE I32x16 isub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
CARAVAN_INLINE I32x16 iand(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
CARAVAN_INLINE I32x16 ior(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
CARAVAN_INLINE I32x16 ishl(I32x16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
CARAVAN_INLINE I32x16 isar(I32x16 a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
CARAVAN_INLINE I32x16 imax(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
CARAVAN_INLINE F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
CARAVAN_INLINE I32x16 bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
CARAVAN_INLINE F32x16 as_f32(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

CARAVAN_INLINE Mask16 less(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
CARAVAN_INLINE Mask16 equal(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
CARAVAN_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
CARAVAN_INLINE uint32_t mask_bits(Mask16 m) { return m.m; }

CARAVAN_INLINE float reduce_add(F32x16 a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
CARAVAN_INLINE float reduce_max(F32x16 a) {
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
CARAVAN_INLINE int32_t ireduce_max(I32x16 a) {
  const __m256i x = _mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti32x8_epi32(a.v, 1));
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

CARAVAN_INLINE F32x16 swap_pairs(F32x16 a) { return {_mm512_permute_ps(a.v, 0xb1)}; }

CARAVAN_INLINE U8x64 load_u8x64(const void* p) { return {_mm512_loadu_si512(p)}; }
CARAVAN_INLINE __m512i and_bytes(__m512i a, int byte) {
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(byte)));
}
CARAVAN_INLINE U8x64 low_nibbles(U8x64 a) { return {and_bytes(a.v, 15)}; }
CARAVAN_INLINE U8x64 high_nibbles(U8x64 a) { return {and_bytes(_mm512_srli_epi16(a.v, 4), 15)}; }
template <int t>
CARAVAN_INLINE U8x64 bit_pair(U8x64 a) {
  if constexpr (t < 2) return {and_bytes(_mm512_slli_epi16(a.v, 4 - 2 * t), 0x30)};
  if constexpr (t == 2) return {and_bytes(a.v, 0x30)};
  return {and_bytes(_mm512_srli_epi16(a.v, 2), 0x30)};
}
template <int t>
CARAVAN_INLINE U8x64 single_bit(U8x64 a) {
  const __m512i bit = and_bytes(a.v, 1 << t);
  if constexpr (t < 4) return {_mm512_slli_epi16(bit, 4 - t)};
  if constexpr (t == 4) return {bit};
  return {_mm512_srli_epi16(bit, t > 4 ? t - 4 : 0)};
}
CARAVAN_INLINE U8x64 bitwise_or(U8x64 a, U8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }

CARAVAN_INLINE __m512i broadcast_4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

#if defined(CARAVAN_VNNI)

// vpdpbusd sums four unsigned times signed products into 32 bits.
struct DotSmall {
  __m512i v;
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  if constexpr (kOffset == 8 || kOffset == 16) return {_mm512_set1_epi32(-kOffset * a.sum)};
  if constexpr (kOffset == 32) return {_mm512_set1_epi32(-32 * a.half_sum[half])};
  return {_mm512_setzero_si512()};
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  dot.v = _mm512_dpbusd_epi32(dot.v, w.v, broadcast_4(a));
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  return {dot.v};
}
struct DotScale {
  __m512i v;
};
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) { return {load_i8(p).v}; }
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock&, int) {
  return {_mm512_mullo_epi32(dot.v, s.v)};
}

// Signed weights become unsigned by adding 128, which the start value takes back.
struct SignedWeights {
  __m512i v;
};
CARAVAN_INLINE SignedWeights signed_weights(__m512i w) {
  return {_mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)))};
}
struct DotSigned {
  __m512i v;
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a) { return {_mm512_set1_epi32(-128 * a.sum)}; }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a, int half) {
  return {_mm512_set1_epi32(-128 * a.half_sum[half])};
}
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  dot.v = _mm512_dpbusd_epi32(dot.v, w.v, broadcast_4(a));
}
CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { return {dot.v}; }

#else

// As in simd_avx2.h, where the bounds are explained.
struct DotSmall {
  __m512i v;
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  if constexpr (kOffset == 8) return {broadcast_4(a.minus_8_sum)};
  if constexpr (kOffset == 16) return {_mm512_slli_epi16(broadcast_4(a.minus_8_sum), 1)};
  if constexpr (kOffset == 32) return {broadcast_4(a.minus_32_sum + 2 * half)};
  return {_mm512_setzero_si512()};
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  dot.v = _mm512_add_epi16(dot.v, _mm512_maddubs_epi16(w.v, broadcast_4(a)));
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  return {_mm512_madd_epi16(dot.v, _mm512_set1_epi16(1))};
}
struct DotScale {
  __m512i v;  // pairs of 16-bit scales
};
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) {
  const __m512i scale = load_i8(p).v;
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, scale, _mm512_slli_epi32(scale, 16))};
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock&, int) {
  return {_mm512_madd_epi16(dot.v, s.v)};
}

struct SignedWeights {
  __m512i abs;
  __mmask64 negative;
};
CARAVAN_INLINE SignedWeights signed_weights(__m512i w) { return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)}; }
struct DotSigned {
  I32x16 sum;
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&) { return {isplat(0)}; }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&, int /*half*/) { return {isplat(0)}; }
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  const __m512i x = broadcast_4(a);
  const __m512i signed_x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
  const __m512i products = _mm512_maddubs_epi16(w.abs, signed_x);
  dot.sum = iadd(dot.sum, {_mm512_madd_epi16(products, _mm512_set1_epi16(1))});
}
CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { return dot.sum; }

#endif

CARAVAN_INLINE SignedWeights load_signed(const int8_t* p) { return signed_weights(_mm512_loadu_si512(p)); }
struct CodeTable {
  __m512i v;  // four times
};
CARAVAN_INLINE CodeTable load_codes(const int8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
CARAVAN_INLINE SignedWeights look_up(CodeTable table, U8x64 codes) {
  return signed_weights(_mm512_shuffle_epi8(table.v, codes.v));
}
