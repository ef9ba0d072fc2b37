// The conversions that the type table points to: one pair per supported type, scalar, identical on every processor.
//   blocks: n values in the type's format (no alignment needed);  values: n f32;  n: a multiple of the block length.
// Quantisers take finite values; what a block cannot hold is clamped. Block formats: docs/gguf.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace caravan::tensor {

void dequantize_f32(const std::byte* blocks, float* values, int64_t n);
void quantize_f32(const float* values, std::byte* blocks, int64_t n);

void dequantize_f16(const std::byte* blocks, float* values, int64_t n);
// Rounds to nearest even.
void quantize_f16(const float* values, std::byte* blocks, int64_t n);

void dequantize_bf16(const std::byte* blocks, float* values, int64_t n);
// Rounds to nearest even.
void quantize_bf16(const float* values, std::byte* blocks, int64_t n);

void dequantize_q8_0(const std::byte* blocks, float* values, int64_t n);
// d = max|x| / 127, q = x / d rounded half away from zero; the stored d is rounded to f16, the division uses the f32.
void quantize_q8_0(const float* values, std::byte* blocks, int64_t n);

void dequantize_q4_0(const std::byte* blocks, float* values, int64_t n);
// d = (the value of largest magnitude) / -8, so that it maps to q = 0 exactly; q = x / d + 8 rounded, at most 15.
void quantize_q4_0(const float* values, std::byte* blocks, int64_t n);

void dequantize_q4_1(const std::byte* blocks, float* values, int64_t n);
// m = the smallest value, d = (largest - smallest) / 15, q = (x - m) / d rounded.
void quantize_q4_1(const float* values, std::byte* blocks, int64_t n);

void dequantize_q5_1(const std::byte* blocks, float* values, int64_t n);
// As Q4_1, with d = (largest - smallest) / 31.
void quantize_q5_1(const float* values, std::byte* blocks, int64_t n);

void dequantize_q5_0(const std::byte* blocks, float* values, int64_t n);
// As Q4_0, with d = (the value of largest magnitude) / -16 and 32 levels.
void quantize_q5_0(const float* values, std::byte* blocks, int64_t n);

void dequantize_q4_k(const std::byte* blocks, float* values, int64_t n);
// Weighted least squares over scale and minimum per sub-block; see scale_search.h.
void quantize_q4_k(const float* values, std::byte* blocks, int64_t n);

void dequantize_q5_k(const std::byte* blocks, float* values, int64_t n);
// As Q4_K, with 32 levels.
void quantize_q5_k(const float* values, std::byte* blocks, int64_t n);

void dequantize_q6_k(const std::byte* blocks, float* values, int64_t n);
// Weighted least squares over the scale per sub-block; see scale_search.h.
void quantize_q6_k(const float* values, std::byte* blocks, int64_t n);

void dequantize_q2_k(const std::byte* blocks, float* values, int64_t n);
// As Q4_K, with 4 levels and sub-blocks of 16.
void quantize_q2_k(const float* values, std::byte* blocks, int64_t n);

void dequantize_q3_k(const std::byte* blocks, float* values, int64_t n);
// As Q6_K, with 8 levels.
void quantize_q3_k(const float* values, std::byte* blocks, int64_t n);

void dequantize_iq4_nl(const std::byte* blocks, float* values, int64_t n);
// Weighted least squares over the scale; see scale_search.h.
void quantize_iq4_nl(const float* values, std::byte* blocks, int64_t n);

void dequantize_iq4_xs(const std::byte* blocks, float* values, int64_t n);
// As IQ4_NL per sub-block, with scales rounded as those of Q6_K.
void quantize_iq4_xs(const float* values, std::byte* blocks, int64_t n);

void dequantize_iq1_s(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq1_m(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq2_xxs(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq2_xs(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq2_s(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq3_xxs(const std::byte* blocks, float* values, int64_t n);
void dequantize_iq3_s(const std::byte* blocks, float* values, int64_t n);

void dequantize_tq1_0(const std::byte* blocks, float* values, int64_t n);
// d = max|x|, q = x / d rounded half away from zero.
void quantize_tq1_0(const float* values, std::byte* blocks, int64_t n);

void dequantize_tq2_0(const std::byte* blocks, float* values, int64_t n);
// As TQ1_0.
void quantize_tq2_0(const float* values, std::byte* blocks, int64_t n);

void dequantize_q1_0(const std::byte* blocks, float* values, int64_t n);
void dequantize_q2_0(const std::byte* blocks, float* values, int64_t n);
void dequantize_nvfp4(const std::byte* blocks, float* values, int64_t n);

void dequantize_mxfp4(const std::byte* blocks, float* values, int64_t n);
// e = floor(log2(max|x|)) - 2 + 127; each value gets the nearest code, of two equally near the one nearer to zero.
void quantize_mxfp4(const float* values, std::byte* blocks, int64_t n);

}  // namespace caravan::tensor
