// The SIMD vocabulary on AVX2, FMA and F16C: sixteen lanes are two 256-bit registers (lanes 0..7 in lo, 8..15 in hi);
// with CARAVAN_VNNI, dot products by vpdpbusd. Included by isa_avx2.cpp and isa_avx_vnni.cpp, inside their namespaces
// and target regions. What each name computes: simd_scalar.h.
#pragma once

struct F32x16 {
  __m256 lo, hi;
};
struct I32x16 {
  __m256i lo, hi;
};
struct Mask16 {
  __m256 lo, hi;  // all ones or all zeros per lane
};
struct U8x64 {
  __m256i lo, hi;
};

// Sixteen registers: two per row of sums, and room for weights and a broadcast.
inline constexpr int kQuantTile = 4;
inline constexpr int kFloatTile = 6;
inline constexpr int kAttentionTile = 5;

CARAVAN_INLINE F32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
CARAVAN_INLINE F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
CARAVAN_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
CARAVAN_INLINE __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
CARAVAN_INLINE Mask16 lanes(int64_t begin, int64_t end) {
  const int first = static_cast<int>(begin < 0 ? 0 : begin > 16 ? 16 : begin);
  const int last = static_cast<int>(end < 0 ? 0 : end > 16 ? 16 : end);
  const __m256i b = _mm256_set1_epi32(first - 1), e = _mm256_set1_epi32(last);
  const __m256i lo = lane_numbers(), hi = _mm256_add_epi32(lo, _mm256_set1_epi32(8));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(lo, b), _mm256_cmpgt_epi32(e, lo))),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(hi, b), _mm256_cmpgt_epi32(e, hi)))};
}
CARAVAN_INLINE F32x16 load_partial(const float* p, int64_t n) {
  const Mask16 m = lanes(0, n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi))};
}
CARAVAN_INLINE void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
CARAVAN_INLINE void store_partial(float* p, F32x16 a, int64_t n) {
  const Mask16 m = lanes(0, n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), a.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), a.hi);
}
CARAVAN_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
CARAVAN_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
CARAVAN_INLINE F32x16 load_f16(const void* p) {
  const auto* bytes = static_cast<const char*>(p);
  return {_mm256_cvtph_ps(load_128(bytes)), _mm256_cvtph_ps(load_128(bytes + 16))};
}
CARAVAN_INLINE F32x16 load_bf16(const void* p) {
  const auto* bytes = static_cast<const char*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(bytes)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(bytes + 16)), 16))};
}
CARAVAN_INLINE void store_f16(void* p, F32x16 a) {
  auto* out = static_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
CARAVAN_INLINE I32x16 load_i8(const int8_t* p) {
  const __m128i x = load_128(p);
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
CARAVAN_INLINE I32x16 load_u8(const uint8_t* p) {
  const __m128i x = load_128(p);
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
CARAVAN_INLINE void store_i8(int8_t* p, I32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

CARAVAN_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
CARAVAN_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
CARAVAN_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

CARAVAN_INLINE I32x16 isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
CARAVAN_INLINE I32x16 iadd(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
CARAVAN_INLINE I32x16 isub(I32x16 a, I32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
CARAVAN_INLINE I32x16 iand(I32x16 a, I32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
CARAVAN_INLINE I32x16 ior(I32x16 a, I32x16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int kBits>
CARAVAN_INLINE I32x16 ishl(I32x16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
CARAVAN_INLINE I32x16 isar(I32x16 a) {
  return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}
CARAVAN_INLINE I32x16 imax(I32x16 a, I32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
CARAVAN_INLINE F32x16 to_f32(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
CARAVAN_INLINE I32x16 bits(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
CARAVAN_INLINE F32x16 as_f32(I32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

CARAVAN_INLINE Mask16 less(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
CARAVAN_INLINE Mask16 equal(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
CARAVAN_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
CARAVAN_INLINE uint32_t mask_bits(Mask16 m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}

CARAVAN_INLINE float reduce_add(F32x16 a) {
  const __m256 x = _mm256_add_ps(a.lo, a.hi);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
CARAVAN_INLINE float reduce_max(F32x16 a) {
  const __m256 x = _mm256_max_ps(a.lo, a.hi);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
CARAVAN_INLINE int32_t ireduce_max(I32x16 a) {
  const __m256i x = _mm256_max_epi32(a.lo, a.hi);
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

CARAVAN_INLINE F32x16 swap_pairs(F32x16 a) { return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)}; }

CARAVAN_INLINE U8x64 load_u8x64(const void* p) {
  const auto* bytes = static_cast<const char*>(p);
  return {load_256(bytes), load_256(bytes + 32)};
}
CARAVAN_INLINE __m256i and_bytes(__m256i a, int byte) {
  return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(byte)));
}
CARAVAN_INLINE U8x64 low_nibbles(U8x64 a) { return {and_bytes(a.lo, 15), and_bytes(a.hi, 15)}; }
CARAVAN_INLINE U8x64 high_nibbles(U8x64 a) {
  return {and_bytes(_mm256_srli_epi16(a.lo, 4), 15), and_bytes(_mm256_srli_epi16(a.hi, 4), 15)};
}
template <int t>
CARAVAN_INLINE __m256i bit_pair_256(__m256i a) {
  if constexpr (t < 2) return and_bytes(_mm256_slli_epi16(a, 4 - 2 * t), 0x30);
  if constexpr (t == 2) return and_bytes(a, 0x30);
  return and_bytes(_mm256_srli_epi16(a, 2), 0x30);
}
template <int t>
CARAVAN_INLINE U8x64 bit_pair(U8x64 a) {
  return {bit_pair_256<t>(a.lo), bit_pair_256<t>(a.hi)};
}
template <int t>
CARAVAN_INLINE __m256i single_bit_256(__m256i a) {
  const __m256i bit = and_bytes(a, 1 << t);
  if constexpr (t < 4) return _mm256_slli_epi16(bit, 4 - t);
  if constexpr (t == 4) return bit;
  return _mm256_srli_epi16(bit, t > 4 ? t - 4 : 0);
}
template <int t>
CARAVAN_INLINE U8x64 single_bit(U8x64 a) {
  return {single_bit_256<t>(a.lo), single_bit_256<t>(a.hi)};
}
CARAVAN_INLINE U8x64 bitwise_or(U8x64 a, U8x64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }

CARAVAN_INLINE __m256i broadcast_4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}

#if defined(CARAVAN_VNNI)

// acc + the products of four unsigned weights and four activations in each of eight lanes.
CARAVAN_INLINE __m256i dpbusd(__m256i acc, __m256i w, __m256i a) {
#if defined(CARAVAN_VNNI_OF_AVX512)
  return _mm256_dpbusd_epi32(acc, w, a);
#else
  return _mm256_dpbusd_avx_epi32(acc, w, a);
#endif
}

// Small weights: the accumulator starts at minus the offset times the activations' sum.
struct DotSmall {
  I32x16 sum;
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  if constexpr (kOffset == 0) return {isplat(0)};
  return {isplat(-kOffset * (kOffset == 32 ? a.half_sum[half] : a.sum))};
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  const __m256i x = broadcast_4(a);
  dot.sum = {dpbusd(dot.sum.lo, w.lo, x), dpbusd(dot.sum.hi, w.hi, x)};
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  return dot.sum;
}
struct DotScale {
  I32x16 v;
};
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) { return {load_i8(p)}; }
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock&, int) {
  return {_mm256_mullo_epi32(dot.sum.lo, s.v.lo), _mm256_mullo_epi32(dot.sum.hi, s.v.hi)};
}

// Signed weights become unsigned by adding 128, which the start value takes back.
struct SignedWeights {
  __m256i lo, hi;
};
CARAVAN_INLINE SignedWeights signed_weights(__m256i lo, __m256i hi) {
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  return {_mm256_xor_si256(lo, top), _mm256_xor_si256(hi, top)};
}
struct DotSigned {
  I32x16 sum;
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a) { return {isplat(-128 * a.sum)}; }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock& a, int half) {
  return {isplat(-128 * a.half_sum[half])};
}
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  const __m256i x = broadcast_4(a);
  dot.sum = {dpbusd(dot.sum.lo, w.lo, x), dpbusd(dot.sum.hi, w.hi, x)};
}

#else

// Small weights: maddubs gives 16-bit sums of two products, and 16-bit additions suffice for a whole block, because the
// accumulator starts at minus the offset times the activations: the final value is a sum of 16 terms of at most
// 8 * 127 (Q4_0), 15 * 127 (Q4_K) or 16 * 127 (five bits), or of 8 terms of at most 32 * 127 (half a Q6_K block), below
// 32768 each time.
struct DotSmall {
  __m256i lo, hi;
};
template <int kOffset>
CARAVAN_INLINE DotSmall dot_begin(const ActivationBlock& a, int half) {
  if constexpr (kOffset == 0) return {_mm256_setzero_si256(), _mm256_setzero_si256()};
  __m256i start = kOffset == 32 ? broadcast_4(a.minus_32_sum + 2 * half) : broadcast_4(a.minus_8_sum);
  if constexpr (kOffset == 16) start = _mm256_slli_epi16(start, 1);
  return {start, start};
}
CARAVAN_INLINE void dot_add(DotSmall& dot, U8x64 w, const int8_t* a) {
  const __m256i x = broadcast_4(a);
  dot.lo = _mm256_add_epi16(dot.lo, _mm256_maddubs_epi16(w.lo, x));
  dot.hi = _mm256_add_epi16(dot.hi, _mm256_maddubs_epi16(w.hi, x));
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end(DotSmall dot, const ActivationBlock&, int) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(dot.lo, one), _mm256_madd_epi16(dot.hi, one)};
}
// Row scales as pairs of 16-bit values: the final madd multiplies by them for free.
struct DotScale {
  __m256i lo, hi;
};
CARAVAN_INLINE __m256i scale_pairs(__m256i scale) {
  return _mm256_blend_epi16(scale, _mm256_slli_epi32(scale, 16), 0xaa);
}
CARAVAN_INLINE DotScale load_dot_scale(const int8_t* p) {
  const I32x16 scale = load_i8(p);
  return {scale_pairs(scale.lo), scale_pairs(scale.hi)};
}
template <int kOffset>
CARAVAN_INLINE I32x16 dot_end_scaled(DotSmall dot, DotScale s, const ActivationBlock&, int) {
  return {_mm256_madd_epi16(dot.lo, s.lo), _mm256_madd_epi16(dot.hi, s.hi)};
}

// Signed weights: |w| times the activation with w's sign. Two products reach 2 * 128 * 127 = 32512; a third would not
// fit.
struct SignedWeights {
  __m256i lo, hi, abs_lo, abs_hi;
};
CARAVAN_INLINE SignedWeights signed_weights(__m256i lo, __m256i hi) {
  return {lo, hi, _mm256_abs_epi8(lo), _mm256_abs_epi8(hi)};
}
struct DotSigned {
  I32x16 sum;
};
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&) { return {isplat(0)}; }
CARAVAN_INLINE DotSigned dot_signed_begin(const ActivationBlock&, int /*half*/) { return {isplat(0)}; }
CARAVAN_INLINE void dot_add(DotSigned& dot, SignedWeights w, const int8_t* a) {
  const __m256i x = broadcast_4(a), one = _mm256_set1_epi16(1);
  const __m256i lo = _mm256_maddubs_epi16(w.abs_lo, _mm256_sign_epi8(x, w.lo));
  const __m256i hi = _mm256_maddubs_epi16(w.abs_hi, _mm256_sign_epi8(x, w.hi));
  dot.sum = iadd(dot.sum, {_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, one)});
}

#endif

CARAVAN_INLINE I32x16 dot_end(DotSigned dot) { return dot.sum; }
CARAVAN_INLINE SignedWeights load_signed(const int8_t* p) { return signed_weights(load_256(p), load_256(p + 32)); }
struct CodeTable {
  __m256i v;  // twice
};
CARAVAN_INLINE CodeTable load_codes(const int8_t* p) { return {_mm256_broadcastsi128_si256(load_128(p))}; }
CARAVAN_INLINE SignedWeights look_up(CodeTable table, U8x64 codes) {
  return signed_weights(_mm256_shuffle_epi8(table.v, codes.lo), _mm256_shuffle_epi8(table.v, codes.hi));
}
