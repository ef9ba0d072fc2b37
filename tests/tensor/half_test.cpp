// Conversions between f32 and the 16-bit floats, against definitions written with doubles.
#include "tensor/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace caravan::tensor {
namespace {

// The value of binary16 bits, from its definition.
double f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  double magnitude;
  if (exponent == 31)
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    magnitude = std::ldexp(mantissa, -24);
  else
    magnitude = std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// x rounded to the nearest multiple of the last place of binary16 at its magnitude, ties to even.
double round_to_f16(double x) {
  if (x == 0) return x;
  const int exponent = std::max(std::ilogb(x), -14);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, 10 - exponent)), exponent - 10);
  return std::fabs(rounded) > 65504 ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

// Floats of every exponent with random mantissas and signs.
std::vector<float> random_floats() {
  std::mt19937 random(1);
  std::vector<float> values;
  for (uint32_t exponent = 0; exponent < 255; ++exponent)
    for (int i = 0; i < 400; ++i) values.push_back(from_bits(exponent << 23 | (random() & 0x807fffff)));
  return values;
}

TEST(Half, WidensEveryF16Exactly) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const double expected = f16_value(half);
    const float found = f16_to_f32(half);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(found)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(found), expected) << bits;
      ASSERT_EQ(std::signbit(found), (bits & 0x8000) != 0) << bits;
    }
  }
}

TEST(Half, ReturnsEveryF16Unchanged) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const uint16_t back = f32_to_f16(f16_to_f32(half));
    const bool is_nan = (bits & 0x7fff) > 0x7c00;
    ASSERT_EQ(back, is_nan ? half | 0x200 : half) << bits;  // a NaN becomes quiet
  }
}

TEST(Half, RoundsFloatsToTheNearestEvenF16) {
  for (const float x : random_floats()) {
    const uint16_t half = f32_to_f16(x);
    ASSERT_EQ(f16_value(half), round_to_f16(x)) << x;
    ASSERT_EQ((half & 0x8000) != 0, std::signbit(x)) << x;
  }
  // Exactly between two neighbours, and at the border to infinity and to zero.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const double low = f16_value(static_cast<uint16_t>(bits));
    const double high = bits == 0x7bff ? 65536.0 : f16_value(static_cast<uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(f32_to_f16(middle), bits + (bits & 1)) << bits;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), bits) << bits;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 1e9f)), bits + 1) << bits;
  }
}

TEST(Half, KeepsInfinityAndNan) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(f32_to_f16(kInfinity), 0x7c00);
  EXPECT_EQ(f32_to_f16(-kInfinity), 0xfc00);
  EXPECT_EQ(f32_to_f16(from_bits(0x7f800001)) & 0x7e00, 0x7e00) << "a signalling NaN stays a NaN";
  EXPECT_EQ(f32_to_bf16(kInfinity), 0x7f80);
  EXPECT_EQ(f32_to_bf16(from_bits(0xff800001)), 0xffc0);
}

TEST(Bf16, ReturnsEveryValueUnchanged) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto value = static_cast<uint16_t>(bits);
    const bool is_nan = (bits & 0x7fff) > 0x7f80;
    ASSERT_EQ(f32_to_bf16(bf16_to_f32(value)), is_nan ? value | 0x40 : value) << bits;
  }
}

TEST(Bf16, RoundsFloatsToTheNearestEven) {
  for (const float x : random_floats()) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t down = bits >> 16, remainder = bits & 0xffff;
    const bool up = remainder > 0x8000 || (remainder == 0x8000 && down % 2 == 1);
    ASSERT_EQ(f32_to_bf16(x), down + up) << x;
  }
}

}  // namespace
}  // namespace caravan::tensor
