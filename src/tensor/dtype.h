// The element types of tensors: one row per type in dtype.cpp's table, with the numbers GGUF gives them.
// Adding a type is a file that converts it and a row in the table; everything works through dequantise from then on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace caravan::tensor {

// Values are GGUF's type numbers (docs/gguf.md).
enum class DType : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  iq2_xxs = 16,
  iq2_xs = 17,
  iq3_xxs = 18,
  iq1_s = 19,
  iq4_nl = 20,
  iq3_s = 21,
  iq2_s = 22,
  iq4_xs = 23,
  i8 = 24,
  i16 = 25,
  i32 = 26,
  i64 = 27,
  f64 = 28,
  iq1_m = 29,
  bf16 = 30,
  tq1_0 = 34,
  tq2_0 = 35,
  mxfp4 = 39,
  nvfp4 = 40,
  q1_0 = 41,
  q2_0 = 42,
};

// One row of the type table. Sizes are known for every type GGUF defines; conversions only for those supported.
struct DTypeInfo {
  DType type;
  std::string_view name;  // as users write it: "Q4_K"
  uint32_t block_length;  // values per block; a row's length is a multiple of it
  uint32_t block_bytes;   // bytes per block
  // Converts n values (a multiple of block_length) to f32, exactly as the format defines; nullptr: not supported.
  void (*dequantize)(const std::byte* blocks, float* values, int64_t n);
  // Converts n f32 values to blocks; nullptr: not supported.
  void (*quantize)(const float* values, std::byte* blocks, int64_t n);
};

// The row of a type, or nullopt for a number that GGUF does not define.
const DTypeInfo* find_dtype(uint32_t gguf_type_number);
// The row of a known type.
const DTypeInfo& dtype_info(DType type);
// The type with that name, case-insensitively, or nullopt.
std::optional<DType> dtype_from_name(std::string_view name);
// All rows, for tests and listings.
std::span<const DTypeInfo> all_dtypes();

inline std::string_view dtype_name(DType type) { return dtype_info(type).name; }
// True when values of this type can be converted to f32, and therefore computed with.
inline bool can_dequantize(DType type) { return dtype_info(type).dequantize != nullptr; }

// Bytes of n values (n a multiple of the block length).
inline uint64_t row_bytes(DType type, uint64_t n) {
  const DTypeInfo& info = dtype_info(type);
  return n / info.block_length * info.block_bytes;
}

// A shape in GGUF order: ne[0] is the contiguous dimension; unused dimensions are 1.
using Shape = std::array<int64_t, 4>;
inline int64_t n_elements(const Shape& ne) { return ne[0] * ne[1] * ne[2] * ne[3]; }

// Bytes of a tensor of that type and shape, for shapes from outside: throws FormatError, beginning with where, for a
// dimension below 1, a row that is no multiple of the block length, 2^63 elements or more, or a size beyond 64 bits.
uint64_t checked_size_bytes(const DTypeInfo& type, const Shape& ne, std::string_view where);

}  // namespace caravan::tensor
