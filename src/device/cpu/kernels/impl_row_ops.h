// Operations on one row: activations, norms, softmax, rotary position, int8 quantisation, choosing the largest.
// Included by isa_*.cpp inside their target regions.
#pragma once

// Applies op.lanes(x) or op.lanes(x, y) to n values.
template <typename Op>
CARAVAN_INLINE void map(const float* x, int64_t n, float* out, Op op) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, op.lanes(load(x + i)));
  if (i < n) store_partial(out + i, op.lanes(load_partial(x + i, n - i)), n - i);
}
template <typename Op>
CARAVAN_INLINE void map(const float* x, const float* y, int64_t n, float* out, Op op) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, op.lanes(load(x + i), load(y + i)));
  if (i < n) store_partial(out + i, op.lanes(load_partial(x + i, n - i), load_partial(y + i, n - i)), n - i);
}

#define CARAVAN_ROW_OP_1(name, expression)                             \
  struct name##_op {                                                   \
    CARAVAN_INLINE F32x16 lanes(F32x16 x) const { return expression; } \
  };                                                                   \
  void row_##name(const float* x, int64_t n, float* out) { map(x, n, out, name##_op{}); }
#define CARAVAN_ROW_OP_2(name, expression)                                       \
  struct name##_op {                                                             \
    CARAVAN_INLINE F32x16 lanes(F32x16 x, F32x16 y) const { return expression; } \
  };                                                                             \
  void row_##name(const float* x, const float* y, int64_t n, float* out) { map(x, y, n, out, name##_op{}); }

CARAVAN_ROW_OP_1(silu, silu(x))
CARAVAN_ROW_OP_1(gelu, gelu(x))
CARAVAN_ROW_OP_1(gelu_erf, gelu_erf(x))
CARAVAN_ROW_OP_1(gelu_quick, gelu_quick(x))
CARAVAN_ROW_OP_1(relu, max(zero(), x))
CARAVAN_ROW_OP_1(sigmoid, sigmoid(x))
CARAVAN_ROW_OP_1(tanh, tanh(x))
CARAVAN_ROW_OP_1(exp, exp(x))
CARAVAN_ROW_OP_2(add, add(x, y))
CARAVAN_ROW_OP_2(sub, sub(x, y))
CARAVAN_ROW_OP_2(mul, mul(x, y))
CARAVAN_ROW_OP_2(div, div(x, y))
CARAVAN_ROW_OP_2(silu_mul, mul(silu(x), y))
CARAVAN_ROW_OP_2(gelu_mul, mul(gelu(x), y))
#undef CARAVAN_ROW_OP_1
#undef CARAVAN_ROW_OP_2

struct ScaleOp {
  F32x16 s;
  CARAVAN_INLINE F32x16 lanes(F32x16 x) const { return mul(x, s); }
};
void row_scale(const float* x, float s, int64_t n, float* out) { map(x, n, out, ScaleOp{splat(s)}); }

struct AddScaledOp {
  F32x16 s;
  CARAVAN_INLINE F32x16 lanes(F32x16 x, F32x16 y) const { return fma(x, s, y); }
};
void row_add_scaled(const float* x, float s, int64_t n, float* out) { map(x, out, n, out, AddScaledOp{splat(s)}); }

CARAVAN_INLINE F32x16 softcap(F32x16 x, float c) { return mul(splat(c), tanh(div(x, splat(c)))); }
struct SoftcapOp {
  float c;
  CARAVAN_INLINE F32x16 lanes(F32x16 x) const { return softcap(x, c); }
};
void row_softcap(const float* x, float c, int64_t n, float* out) { map(x, n, out, SoftcapOp{c}); }

float row_sum(const float* x, int64_t n) {
  F32x16 sum = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = add(sum, load(x + i));
  if (i < n) sum = add(sum, load_partial(x + i, n - i));
  return reduce_add(sum);
}

float row_dot(const float* x, const float* y, int64_t n) {
  F32x16 sum = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = fma(load(x + i), load(y + i), sum);
  if (i < n) sum = fma(load_partial(x + i, n - i), load_partial(y + i, n - i), sum);
  return reduce_add(sum);
}

// The largest value; NaN is never larger; -inf for none.
CARAVAN_INLINE float row_max(const float* x, int64_t n) {
  F32x16 largest = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) largest = max(load(x + i), largest);
  if (i < n) largest = max(select(lanes(0, n - i), load_partial(x + i, n - i), largest), largest);
  return reduce_max(largest);
}

void rms_norm(const float* x, const float* w, int64_t n, float eps, float* out) {
  const float mean_square = row_dot(x, x, n) / static_cast<float>(n);
  const ScaleOp scale{splat(1.0f / __builtin_sqrtf(mean_square + eps))};
  map(x, n, out, scale);
  if (w != nullptr) row_mul(out, w, n, out);
}

void l2_norm(const float* x, int64_t n, float eps, float* out) {
  const float length = __builtin_sqrtf(row_dot(x, x, n));
  row_scale(x, 1.0f / (length > eps ? length : eps), n, out);
}

struct CenterOp {
  F32x16 mean, scale;
  CARAVAN_INLINE F32x16 lanes(F32x16 x) const { return mul(sub(x, mean), scale); }
};
void layer_norm(const float* x, const float* w, const float* b, int64_t n, float eps, float* out) {
  const float mean = row_sum(x, n) / static_cast<float>(n);
  F32x16 squares = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const Mask16 inside = lanes(0, n - i);
    const F32x16 centered = select(inside, sub(load_partial(x + i, n - i), splat(mean)), zero());
    squares = fma(centered, centered, squares);
  }
  const float variance = reduce_add(squares) / static_cast<float>(n);
  map(x, n, out, CenterOp{splat(mean), splat(1.0f / __builtin_sqrtf(variance + eps))});
  if (w != nullptr) row_mul(out, w, n, out);
  if (b != nullptr) row_add(out, b, n, out);
}

void softmax(const float* x, int64_t n, float* out) {
  const F32x16 largest = splat(row_max(x, n));
  F32x16 sum = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 e = select(lanes(0, n - i), exp(sub(load_partial(x + i, n - i), largest)), zero());
    store_partial(out + i, e, n - i);
    sum = add(sum, e);
  }
  row_scale(out, 1.0f / reduce_add(sum), n, out);
}

// (a, b) becomes (a c - b s, b c + a s) = (fma(-s, b, a c), fma(s, a, b c)), in both pairings.
CARAVAN_INLINE void rope_head_neox(const float* x, int64_t n_pairs, const float* cosines, const float* sines,
                                   float* out) {
  for (int64_t i = 0; i < n_pairs; i += 16) {
    const int64_t n = n_pairs - i;
    const F32x16 a = load_partial(x + i, n), b = load_partial(x + n_pairs + i, n);
    const F32x16 c = load_partial(cosines + i, n), s = load_partial(sines + i, n);
    store_partial(out + i, fma(neg(s), b, mul(a, c)), n);
    store_partial(out + n_pairs + i, fma(s, a, mul(b, c)), n);
  }
}

// Eight neighbouring pairs of every head: lanes hold a0 b0 a1 b1 ..., so the partner is the neighbouring lane.
CARAVAN_INLINE void rope_pairs_normal(const float* x, int64_t n_head, int64_t head_dim, int64_t n_pairs,
                                      const float* cosines, const float* sines, float* out) {
  float c16[16] = {}, s16[16] = {};
  for (int64_t i = 0; i < n_pairs; ++i) {
    c16[2 * i] = c16[2 * i + 1] = cosines[i];
    s16[2 * i] = -sines[i];
    s16[2 * i + 1] = sines[i];
  }
  const F32x16 c = load(c16), s = load(s16);
  for (int64_t h = 0; h < n_head; ++h) {
    const F32x16 v = load_partial(x + h * head_dim, 2 * n_pairs);
    store_partial(out + h * head_dim, fma(s, swap_pairs(v), mul(v, c)), 2 * n_pairs);
  }
}

void rope(RopePairing pairing, const float* x, int64_t n_head, int64_t head_dim, int64_t n_rot, const float* cosines,
          const float* sines, float* out) {
  const int64_t n_pairs = n_rot / 2;
  if (pairing == RopePairing::neox) {
    for (int64_t h = 0; h < n_head; ++h) rope_head_neox(x + h * head_dim, n_pairs, cosines, sines, out + h * head_dim);
  } else {
    for (int64_t i = 0; i < n_pairs; i += 8)
      rope_pairs_normal(x + 2 * i, n_head, head_dim, n_pairs - i < 8 ? n_pairs - i : 8, cosines + i, sines + i,
                        out + 2 * i);
  }
  if (out != x && n_rot < head_dim)
    for (int64_t h = 0; h < n_head; ++h)
      std::memcpy(out + h * head_dim + n_rot, x + h * head_dim + n_rot,
                  static_cast<size_t>(head_dim - n_rot) * sizeof(float));
}

// max|x| of two vectors as bits: integer order equals float order for magnitudes, and NaN is above infinity.
CARAVAN_INLINE int32_t magnitude_bits(F32x16 a, F32x16 b) {
  const I32x16 mask = isplat(0x7fffffff);
  return ireduce_max(imax(iand(bits(a), mask), iand(bits(b), mask)));
}

// The scale of a block with that largest magnitude, and its inverse: q = round(x * inverse), x is about d * q.
// Below 2^-100 everything becomes zero, as 127 / max would overflow; not finite: d is NaN, q zero.
struct BlockScale {
  float d, inverse;
};
CARAVAN_INLINE BlockScale block_scale(int32_t largest_bits) {
  const float largest = std::bit_cast<float>(largest_bits);
  if (largest_bits >= 0x7f800000) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (largest < 0x1p-100f) return {0.0f, 0.0f};
  return {largest / 127.0f, 127.0f / largest};
}
CARAVAN_INLINE void quantize_16(F32x16 x, BlockScale s, int8_t* q) {
  if (s.inverse == 0.0f)
    std::memset(q, 0, 16);
  else
    store_i8(q, round_to_i32(mul(x, splat(s.inverse))));
}

// Sums of the 32 quantised values in the forms that the dot products start from.
CARAVAN_INLINE void sum_block(ActivationBlock& block) {
  int32_t lane[2][2] = {};  // [half of the block][k % 4 in {2, 3}]
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 16; ++i) lane[half][i / 2 % 2] += block.q[16 * half + i];
  for (int half = 0; half < 2; ++half) {
    block.half_sum[half] = lane[half][0] + lane[half][1];
    for (int pair = 0; pair < 2; ++pair)
      block.minus_32_sum[2 * half + pair] = static_cast<int16_t>(-32 * lane[half][pair]);
  }
  for (int pair = 0; pair < 2; ++pair)
    block.minus_8_sum[pair] = static_cast<int16_t>(-8 * (lane[0][pair] + lane[1][pair]));
  block.sum = block.half_sum[0] + block.half_sum[1];
  block.d_sum = block.d * static_cast<float>(block.sum);
}

void quantize_row(const float* x, int64_t n_in, ActivationBlock* out) {
  for (int64_t b = 0; b < n_in / 32; ++b) {
    const F32x16 lo = load(x + 32 * b), hi = load(x + 32 * b + 16);
    const BlockScale scale = block_scale(magnitude_bits(lo, hi));
    ActivationBlock& block = out[b];
    block.d = scale.d;
    quantize_16(lo, scale, block.q);
    quantize_16(hi, scale, block.q + 16);
    sum_block(block);
  }
}

int32_t argmax(const float* logits, int64_t n) {
  const F32x16 largest = splat(row_max(logits, n));
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t hits = mask_bits(equal(load_partial(logits + i, n - i), largest));
    if (n - i < 16) hits &= (1u << (n - i)) - 1;
    if (hits != 0) return static_cast<int32_t>(i + std::countr_zero(hits));
  }
  return 0;  // nothing but NaN
}

float log_sum_exp(const float* x, int64_t n) {
  const float largest = row_max(x, n);
  if (largest - largest != 0) return largest;  // an infinity
  F32x16 sum = zero();
  for (int64_t i = 0; i < n; i += 16)
    sum = add(sum, select(lanes(0, n - i), exp(sub(load_partial(x + i, n - i), splat(largest))), zero()));
  float result[16];
  store(result, log(splat(reduce_add(sum))));
  return largest + result[0];
}

// Inserts into the first count of at most k candidates, kept in order; equals stay behind those already there.
CARAVAN_INLINE int32_t insert_candidate(Candidate* out, int32_t count, int32_t k, Candidate c) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (out[middle].logit < c.logit)
      high = middle;
    else
      low = middle + 1;
  }
  const int32_t kept = count < k ? count : k - 1;
  std::memmove(out + low + 1, out + low, static_cast<size_t>(kept - low) * sizeof(Candidate));
  out[low] = c;
  return kept + 1;
}

void top_k(const float* logits, int64_t n, int32_t k, Candidate* out) {
  const float lowest = -std::numeric_limits<float>::infinity();
  int32_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t hits = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    if (count == k) hits &= mask_bits(less(splat(out[k - 1].logit), load_partial(logits + i, n - i)));
    for (; hits != 0; hits &= hits - 1) {
      const int64_t id = i + std::countr_zero(hits);
      const float logit = logits[id] == logits[id] ? logits[id] : lowest;  // NaN counts as lowest
      if (count < k || logit > out[k - 1].logit)
        count = insert_candidate(out, count, k, {static_cast<int32_t>(id), logit});
    }
  }
}
