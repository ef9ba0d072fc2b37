// Elementary functions on sixteen lanes, from the vocabulary's operations only: the same bits everywhere.
// Included by isa_*.cpp inside their target regions. Polynomials interpolate at Chebyshev nodes of the stated interval.
#pragma once

// The integer nearest to x (ties to even), as a float; |x| < 2^22. Adding 1.5 * 2^23 leaves no bits for a fraction.
inline constexpr float kRoundMagic = 12582912.0f;
CARAVAN_INLINE F32x16 round_even(F32x16 x) { return sub(add(x, splat(kRoundMagic)), splat(kRoundMagic)); }
// The same as an integer.
CARAVAN_INLINE I32x16 round_to_i32(F32x16 x) {
  return isub(bits(add(x, splat(kRoundMagic))), isplat(std::bit_cast<int32_t>(kRoundMagic)));
}
CARAVAN_INLINE F32x16 neg(F32x16 x) { return as_f32(isub(bits(x), isplat(std::numeric_limits<int32_t>::min()))); }
CARAVAN_INLINE F32x16 abs(F32x16 x) { return as_f32(iand(bits(x), isplat(0x7fffffff))); }
CARAVAN_INLINE F32x16 copy_sign(F32x16 magnitude, F32x16 sign) {
  return as_f32(ior(bits(magnitude), iand(bits(sign), isplat(std::numeric_limits<int32_t>::min()))));
}
// 2^n for integers -126 <= n <= 127.
CARAVAN_INLINE F32x16 power_of_two(I32x16 n) { return as_f32(ishl<23>(iadd(n, isplat(127)))); }

// e^x, within 2 ulp; inf and NaN as usual, subnormal results included.
// x = n ln 2 + r with |r| <= ln(2) / 2; ln 2 in two parts, so that r is exact to the last place.
CARAVAN_INLINE F32x16 exp(F32x16 x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));  // both results are already 0 and infinity there; NaN passes
  const F32x16 scaled = mul(x, splat(1.44269504f));
  const F32x16 n = round_even(scaled);
  F32x16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F32x16 p = splat(1.39261775e-3f);  // (e^r - 1 - r) / r^2 on |r| < 0.34658
  p = fma(p, r, splat(8.36317418e-3f));
  p = fma(p, r, splat(4.16665547e-2f));
  p = fma(p, r, splat(1.66665770e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(mul(r, r), p, r);
  p = add(p, splat(1.0f));
  const I32x16 exponent = round_to_i32(scaled), half = isar<1>(exponent);  // in two steps: 2^128 and 2^-149 are needed
  return mul(mul(p, power_of_two(half)), power_of_two(isub(exponent, half)));
}

// Natural logarithm of positive normal x, within 2 ulp (near 1: absolute 1e-7). x = m 2^e, m in [sqrt(1/2), sqrt 2).
CARAVAN_INLINE F32x16 log(F32x16 x) {
  const I32x16 offset = isplat(0x3f3504f3);  // sqrt(1/2)
  const I32x16 shifted = isub(bits(x), offset);
  const F32x16 e = to_f32(isar<23>(shifted));
  const F32x16 f = sub(as_f32(iadd(iand(shifted, isplat(0x007fffff)), offset)), splat(1.0f));
  F32x16 p = splat(0.0697161147f);  // (log(1 + f) - f + f^2 / 2) / f^3
  p = fma(p, f, splat(-0.1147973385f));
  p = fma(p, f, splat(0.1168541992f));
  p = fma(p, f, splat(-0.1242568733f));
  p = fma(p, f, splat(0.1424905765f));
  p = fma(p, f, splat(-0.1666780232f));
  p = fma(p, f, splat(0.2000071575f));
  p = fma(p, f, splat(-0.2499999696f));
  p = fma(p, f, splat(0.3333333118f));
  const F32x16 square = mul(f, f);
  F32x16 r = mul(mul(p, f), square);
  r = fma(e, splat(-2.12194440e-4f), r);
  r = fma(square, splat(-0.5f), r);
  r = add(r, f);
  return fma(e, splat(0.693359375f), r);
}

// Hyperbolic tangent, within 3 ulp: an odd polynomial near zero, elsewhere 1 - 2 / (e^2|x| + 1).
CARAVAN_INLINE F32x16 tanh(F32x16 x) {
  const F32x16 a = abs(x), z = mul(x, x);
  F32x16 p = splat(-6.09671416e-3f);  // (tanh(x) / x - 1) / x^2 in x^2, |x| < 0.625
  p = fma(p, z, splat(2.09971790e-2f));
  p = fma(p, z, splat(-5.38509096e-2f));
  p = fma(p, z, splat(1.33327698e-1f));
  p = fma(p, z, splat(-3.33333289e-1f));
  const F32x16 small = fma(mul(p, z), x, x);
  const F32x16 e = exp(add(a, a));
  const F32x16 large = sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
  return select(less(a, splat(0.625f)), small, copy_sign(large, x));
}

// Error function, absolute error below 2e-7: x P(x^2) near zero, elsewhere 1 - exp(polynomial for log erfc).
CARAVAN_INLINE F32x16 erf(F32x16 x) {
  const F32x16 a = min(splat(4.0f), abs(x)), z = mul(x, x);
  F32x16 p = splat(8.36726748e-5f);  // erf(x) / x - 1 in x^2, |x| < 0.925
  p = fma(p, z, splat(-8.14242600e-4f));
  p = fma(p, z, splat(5.20104927e-3f));
  p = fma(p, z, splat(-2.68594256e-2f));
  p = fma(p, z, splat(1.12836965e-1f));
  p = fma(p, z, splat(-3.76126338e-1f));
  p = fma(p, z, splat(1.28379167e-1f));
  const F32x16 small = fma(p, x, x);
  F32x16 t = splat(1.64356965e-6f);  // log(erfc(x)), 0.92 <= x <= 4
  t = fma(t, a, splat(-4.61779128e-5f));
  t = fma(t, a, splat(5.97743472e-4f));
  t = fma(t, a, splat(-4.76357525e-3f));
  t = fma(t, a, splat(2.64310176e-2f));
  t = fma(t, a, splat(-1.10094481e-1f));
  t = fma(t, a, splat(-6.31814517e-1f));
  t = fma(t, a, splat(-1.13023762f));
  t = fma(t, a, splat(3.20441531e-4f));
  const F32x16 large = sub(splat(1.0f), exp(t));
  return select(less(a, splat(0.92f)), small, copy_sign(large, x));
}

// 1 / (1 + e^-x), and the activations built from it.
CARAVAN_INLINE F32x16 sigmoid(F32x16 x) { return div(splat(1.0f), add(splat(1.0f), exp(neg(x)))); }
CARAVAN_INLINE F32x16 silu(F32x16 x) { return div(x, add(splat(1.0f), exp(neg(x)))); }
// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) is x / (1 + e^-2u).
CARAVAN_INLINE F32x16 gelu(F32x16 x) {
  const F32x16 cubic = fma(mul(x, x), splat(0.044715f), splat(1.0f));
  return div(x, add(splat(1.0f), exp(mul(mul(x, splat(-1.59576912f)), cubic))));
}
CARAVAN_INLINE F32x16 gelu_quick(F32x16 x) { return div(x, add(splat(1.0f), exp(mul(x, splat(-1.702f))))); }
CARAVAN_INLINE F32x16 gelu_erf(F32x16 x) {
  return mul(mul(x, splat(0.5f)), add(splat(1.0f), erf(mul(x, splat(0.70710678f)))));
}
