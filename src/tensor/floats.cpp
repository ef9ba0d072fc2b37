// The float types: F32 is copied, F16 and BF16 are widened exactly and narrowed to nearest even (tensor/half.h).
#include <cstring>

#include "tensor/conversions.h"
#include "tensor/half.h"

namespace caravan::tensor {
namespace {

template <float (*widen)(uint16_t)>
void widen_all(const std::byte* blocks, float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, blocks + 2 * i, sizeof bits);
    values[i] = widen(bits);
  }
}

template <uint16_t (*narrow)(float)>
void narrow_all(const float* values, std::byte* blocks, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = narrow(values[i]);
    std::memcpy(blocks + 2 * i, &bits, sizeof bits);
  }
}

}  // namespace

void dequantize_f32(const std::byte* blocks, float* values, int64_t n) {
  std::memcpy(values, blocks, static_cast<size_t>(n) * sizeof(float));
}
void quantize_f32(const float* values, std::byte* blocks, int64_t n) {
  std::memcpy(blocks, values, static_cast<size_t>(n) * sizeof(float));
}

void dequantize_f16(const std::byte* blocks, float* values, int64_t n) { widen_all<f16_to_f32>(blocks, values, n); }
void quantize_f16(const float* values, std::byte* blocks, int64_t n) { narrow_all<f32_to_f16>(values, blocks, n); }

void dequantize_bf16(const std::byte* blocks, float* values, int64_t n) { widen_all<bf16_to_f32>(blocks, values, n); }
void quantize_bf16(const float* values, std::byte* blocks, int64_t n) { narrow_all<f32_to_bf16>(values, blocks, n); }

}  // namespace caravan::tensor
