// The type table, and look-ups in it. Sizes: docs/gguf.md.
#include "tensor/dtype.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "tensor/conversions.h"

namespace caravan::tensor {
namespace {

constexpr DTypeInfo kTypes[] = {
    // type, name, values per block, bytes per block, conversions
    {DType::f32, "F32", 1, 4, dequantize_f32, quantize_f32},
    {DType::f16, "F16", 1, 2, dequantize_f16, quantize_f16},
    {DType::q4_0, "Q4_0", 32, 18, dequantize_q4_0, quantize_q4_0},
    {DType::q4_1, "Q4_1", 32, 20, dequantize_q4_1, quantize_q4_1},
    {DType::q5_0, "Q5_0", 32, 22, dequantize_q5_0, quantize_q5_0},
    {DType::q5_1, "Q5_1", 32, 24, dequantize_q5_1, quantize_q5_1},
    {DType::q8_0, "Q8_0", 32, 34, dequantize_q8_0, quantize_q8_0},
    {DType::q2_k, "Q2_K", 256, 84, dequantize_q2_k, quantize_q2_k},
    {DType::q3_k, "Q3_K", 256, 110, dequantize_q3_k, quantize_q3_k},
    {DType::q4_k, "Q4_K", 256, 144, dequantize_q4_k, quantize_q4_k},
    {DType::q5_k, "Q5_K", 256, 176, dequantize_q5_k, quantize_q5_k},
    {DType::q6_k, "Q6_K", 256, 210, dequantize_q6_k, quantize_q6_k},
    {DType::iq2_xxs, "IQ2_XXS", 256, 66, dequantize_iq2_xxs, nullptr},
    {DType::iq2_xs, "IQ2_XS", 256, 74, dequantize_iq2_xs, nullptr},
    {DType::iq3_xxs, "IQ3_XXS", 256, 98, dequantize_iq3_xxs, nullptr},
    {DType::iq1_s, "IQ1_S", 256, 50, dequantize_iq1_s, nullptr},
    {DType::iq4_nl, "IQ4_NL", 32, 18, dequantize_iq4_nl, quantize_iq4_nl},
    {DType::iq3_s, "IQ3_S", 256, 110, dequantize_iq3_s, nullptr},
    {DType::iq2_s, "IQ2_S", 256, 82, dequantize_iq2_s, nullptr},
    {DType::iq4_xs, "IQ4_XS", 256, 136, dequantize_iq4_xs, quantize_iq4_xs},
    {DType::i8, "I8", 1, 1, nullptr, nullptr},
    {DType::i16, "I16", 1, 2, nullptr, nullptr},
    {DType::i32, "I32", 1, 4, nullptr, nullptr},
    {DType::i64, "I64", 1, 8, nullptr, nullptr},
    {DType::f64, "F64", 1, 8, nullptr, nullptr},
    {DType::iq1_m, "IQ1_M", 256, 56, dequantize_iq1_m, nullptr},
    {DType::bf16, "BF16", 1, 2, dequantize_bf16, quantize_bf16},
    {DType::tq1_0, "TQ1_0", 256, 54, dequantize_tq1_0, quantize_tq1_0},
    {DType::tq2_0, "TQ2_0", 256, 66, dequantize_tq2_0, quantize_tq2_0},
    {DType::mxfp4, "MXFP4", 32, 17, dequantize_mxfp4, quantize_mxfp4},
    {DType::nvfp4, "NVFP4", 64, 36, dequantize_nvfp4, nullptr},
    {DType::q1_0, "Q1_0", 128, 18, dequantize_q1_0, nullptr},
    {DType::q2_0, "Q2_0", 64, 18, dequantize_q2_0, nullptr},
};

bool equal_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

}  // namespace

const DTypeInfo* find_dtype(uint32_t gguf_type_number) {
  for (const DTypeInfo& info : kTypes)
    if (static_cast<uint32_t>(info.type) == gguf_type_number) return &info;
  return nullptr;
}

const DTypeInfo& dtype_info(DType type) {
  const DTypeInfo* info = find_dtype(static_cast<uint32_t>(type));
  CARAVAN_ASSERT(info != nullptr, "every enumerator has a row, and numbers from outside go through find_dtype");
  return *info;
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeInfo& info : kTypes)
    if (equal_ignoring_case(info.name, name)) return info.type;
  return std::nullopt;
}

std::span<const DTypeInfo> all_dtypes() { return kTypes; }

uint64_t checked_size_bytes(const DTypeInfo& type, const Shape& ne, std::string_view where) {
  uint64_t n = 1;
  for (size_t i = 0; i < ne.size(); ++i) {
    if (ne[i] < 1) throw FormatError(fmt::format("{}: dimension {} is {}, expected at least 1", where, i, ne[i]));
    n = checked_multiply(n, static_cast<uint64_t>(ne[i]), fmt::format("{}: shape", where));
  }
  if (!std::in_range<int64_t>(n)) throw FormatError(fmt::format("{}: {} elements, expected fewer than 2^63", where, n));
  if (static_cast<uint64_t>(ne[0]) % type.block_length != 0)
    throw FormatError(fmt::format("{}: rows of {} values, expected a multiple of {} for type {}", where, ne[0],
                                  type.block_length, type.name));
  return checked_multiply(n / type.block_length, type.block_bytes, fmt::format("{}: size", where));
}

}  // namespace caravan::tensor
