// The KV cache's storage and attention over it. Included by isa_*.cpp inside their target regions.
//
// Attention of one KV head: its query vectors (rows x query heads that share it) are taken in groups of 64; for each
// span of 256 positions and tile of a few vectors, scores, weights and the weighted sum of values are computed from
// nothing and then merged into the vector's state (largest score, sum of weights, weighted sum), in order of spans.
// Which vectors share a tile, a group or a call changes no bits: lanes and vectors never mix, and positions that a
// vector does not see are left out of its sums rather than multiplied by zero.
#pragma once

inline constexpr int kMaxAttentionTile = 8;
inline constexpr int64_t kAttentionGroup = 64;
static_assert(kAttentionTile <= kMaxAttentionTile);

// ---- Storage
// -----------------------------------------------------------------------------------------------------------

// Where one token of one KV head lies: its column in a group of keys or its row of values, and its first scale.
struct KvSlot {
  int64_t data;          // byte offset of value 0
  int64_t data_stride;   // bytes between values
  int64_t scale;         // byte offset of the first scale
  int64_t scale_stride;  // bytes between scales
};
CARAVAN_INLINE KvSlot kv_slot(const KvLayout& layout, const KvOffsets& o, const int32_t* blocks, int64_t position,
                              int64_t head) {
  const int64_t physical = blocks[position / layout.block_tokens], token = position % layout.block_tokens;
  const int64_t start = (physical * layout.n_head_kv + head) * o.head_bytes;
  if (layout.kind == KvKind::keys) {
    const int64_t group = start + token / kKvTokenGroup * o.group_bytes, column = token % kKvTokenGroup;
    return {group + o.scale_bytes + column * o.value_bytes, kKvTokenGroup * o.value_bytes, group + column * 2,
            kKvTokenGroup * 2};
  }
  return {start + o.scale_bytes + token * o.row_length * o.value_bytes, o.value_bytes, start + token * 2,
          layout.block_tokens * 2};
}

template <typename T>
CARAVAN_INLINE void put(std::byte* p, T value) {
  std::memcpy(p, &value, sizeof value);
}
template <typename T>
CARAVAN_INLINE T get(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

void kv_store_q8_0(const KvSlot& slot, std::byte* cache, const float* x, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 32) {
    const F32x16 lo = load_partial(x + i, head_dim - i), hi = load_partial(x + i + 16, head_dim - i - 16);
    const BlockScale scale = block_scale(magnitude_bits(lo, hi));
    int8_t q[32];
    quantize_16(lo, scale, q);
    quantize_16(hi, scale, q + 16);
    put(cache + slot.scale + i / 32 * slot.scale_stride, tensor::f32_to_f16(scale.d));
    for (int64_t j = 0; j < 32 && i + j < head_dim; ++j) put(cache + slot.data + (i + j) * slot.data_stride, q[j]);
  }
}

void kv_store(const KvLayout& layout, std::byte* cache, const int32_t* blocks, int64_t position, const float* row) {
  const KvOffsets offsets = kv_offsets(layout);
  for (int64_t head = 0; head < layout.n_head_kv; ++head) {
    const KvSlot slot = kv_slot(layout, offsets, blocks, position, head);
    const float* x = row + head * layout.head_dim;
    if (layout.dtype == tensor::DType::q8_0) {
      kv_store_q8_0(slot, cache, x, layout.head_dim);
    } else if (layout.dtype == tensor::DType::f16) {
      for (int64_t i = 0; i < layout.head_dim; i += 16) {
        uint16_t half[16];
        store_f16(half, load_partial(x + i, layout.head_dim - i));
        for (int64_t j = 0; j < 16 && i + j < layout.head_dim; ++j)
          put(cache + slot.data + (i + j) * slot.data_stride, half[j]);
      }
    } else {
      for (int64_t i = 0; i < layout.head_dim; ++i) put(cache + slot.data + i * slot.data_stride, x[i]);
    }
  }
}

void kv_load(const KvLayout& layout, const std::byte* cache, const int32_t* blocks, int64_t position, float* row) {
  const KvOffsets offsets = kv_offsets(layout);
  for (int64_t head = 0; head < layout.n_head_kv; ++head) {
    const KvSlot slot = kv_slot(layout, offsets, blocks, position, head);
    float* out = row + head * layout.head_dim;
    for (int64_t i = 0; i < layout.head_dim; ++i) {
      const std::byte* p = cache + slot.data + i * slot.data_stride;
      if (layout.dtype == tensor::DType::q8_0)
        out[i] = static_cast<float>(get<int8_t>(p)) *
                 tensor::f16_to_f32(get<uint16_t>(cache + slot.scale + i / 32 * slot.scale_stride));
      else
        out[i] = layout.dtype == tensor::DType::f16 ? tensor::f16_to_f32(get<uint16_t>(p)) : get<float>(p);
    }
  }
}

// ---- Tiles
// -------------------------------------------------------------------------------------------------------------

// The query vectors of one tile against one span. Positions are relative to the span's start.
struct AttentionTile {
  const float* q[kMaxAttentionTile];
  int64_t begin[kMaxAttentionTile];  // visible: [begin, end), within [0, 256]
  int64_t end[kMaxAttentionTile];
  float largest[kMaxAttentionTile];
  float weight_sum[kMaxAttentionTile];
  float* scores;  // [tile][256]: scores, then weights
  float* sums;    // [tile][padded head_dim_v]
  int64_t sums_stride;
  int64_t fetch_end;  // positions below are asked for ahead of their use: values while scores are computed, and then
                      // the next span's keys; 0: an earlier tile has done it
};

// One KV head of a sequence's cache.
struct KvHead {
  KvLayout layout;
  KvOffsets offsets;
  const std::byte* cache;
  const int32_t* blocks;
  int64_t head;

  CARAVAN_INLINE const std::byte* block_start(int64_t position) const {
    return cache + (blocks[position / layout.block_tokens] * layout.n_head_kv + head) * offsets.head_bytes;
  }
};

// Asks for the keys or values of 16 tokens from a multiple of 16. The processor's own fetching ends with a block.
CARAVAN_INLINE void fetch_tokens(const KvHead& head, int64_t position) {
  const int64_t token = position % head.layout.block_tokens;
  const bool keys = head.layout.kind == KvKind::keys;
  const int64_t bytes =
      keys ? head.offsets.group_bytes : kKvTokenGroup * head.offsets.row_length * head.offsets.value_bytes;
  const std::byte* p =
      head.block_start(position) + token / kKvTokenGroup * bytes + (keys ? 0 : head.offsets.scale_bytes);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Reading 16 neighbouring cached values as f32, before any scale.
struct ReadF32 {
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
  static constexpr int64_t kBytes = 4;
  static constexpr bool kScaled = false;
};
struct ReadF16 {
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) { return load_f16(p); }
  static constexpr int64_t kBytes = 2;
  static constexpr bool kScaled = false;
};
struct ReadQ8 {
  static CARAVAN_INLINE F32x16 load16(const std::byte* p) {
    return to_f32(load_i8(reinterpret_cast<const int8_t*>(p)));
  }
  static constexpr int64_t kBytes = 1;
  static constexpr bool kScaled = true;
};

// sum[g][r] = fma over d in [begin, end) of key[g][d][16 tokens] * q[r][d], starting from what is there.
template <typename Read, int R, int G>
CARAVAN_INLINE void add_key_products(const std::byte* const* keys, const float* const* q, int64_t begin, int64_t end,
                                     F32x16 (&sum)[G][R]) {
  for (int64_t d = begin; d < end; ++d) {
    CARAVAN_UNROLL
    for (int g = 0; g < G; ++g) {
      const F32x16 key = Read::load16(keys[g] + d * kKvTokenGroup * Read::kBytes);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) sum[g][r] = fma(key, splat(q[r][d]), sum[g][r]);
    }
  }
}

// q . k of R vectors and G groups of 16 tokens, over the rounded keys. q8_0: the sum of each 32 dimensions is scaled.
template <typename Read, int R, int G>
CARAVAN_INLINE void key_products(const std::byte* const* groups, const KvHead& k, const float* const* q,
                                 F32x16 (&sum)[G][R]) {
  const int64_t head_dim = k.layout.head_dim;
  const std::byte* keys[G];
  for (int g = 0; g < G; ++g) {
    keys[g] = groups[g] + k.offsets.scale_bytes;
    CARAVAN_UNROLL
    for (int r = 0; r < R; ++r) sum[g][r] = zero();
  }
  if constexpr (!Read::kScaled) {
    add_key_products<Read, R, G>(keys, q, 0, head_dim, sum);
  } else {
    for (int64_t begin = 0; begin < head_dim; begin += kKvScaleGroup) {
      F32x16 part[G][R];
      for (int g = 0; g < G; ++g)
        for (int r = 0; r < R; ++r) part[g][r] = zero();
      add_key_products<Read, R, G>(keys, q, begin, begin + kKvScaleGroup < head_dim ? begin + kKvScaleGroup : head_dim,
                                   part);
      for (int g = 0; g < G; ++g) {
        const F32x16 scale = load_f16(groups[g] + begin / kKvScaleGroup * kKvTokenGroup * 2);
        for (int r = 0; r < R; ++r) sum[g][r] = fma(part[g][r], scale, sum[g][r]);
      }
    }
  }
}

// Scores of tokens [16 * first, 16 * (first + G)) of the span, masked to each vector's visible range.
template <typename Read, int R, int G>
CARAVAN_INLINE void score_groups(const AttentionTile& tile, const KvHead& k, int64_t span, int64_t first, float scale,
                                 float cap, F32x16 (&largest)[R]) {
  const std::byte* groups[G];
  for (int g = 0; g < G; ++g) {
    const int64_t position = span * kAttentionSpan + (first + g) * kKvTokenGroup;
    groups[g] = k.block_start(position) + position % k.layout.block_tokens / kKvTokenGroup * k.offsets.group_bytes;
  }
  F32x16 sum[G][R];
  key_products<Read, R, G>(groups, k, tile.q, sum);
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < R; ++r) {
      F32x16 score = mul(sum[g][r], splat(scale));
      if (cap > 0) score = softcap(score, cap);
      const int64_t token = (first + g) * kKvTokenGroup;
      score = select(lanes(tile.begin[r] - token, tile.end[r] - token), score,
                     splat(-std::numeric_limits<float>::infinity()));
      store(tile.scores + r * kAttentionSpan + token, score);
      largest[r] = max(score, largest[r]);
    }
}

// Scores, their maximum, then weights exp(score - maximum) and their sum, for token groups [first, last) of the span.
template <typename Read, int R>
void weigh(AttentionTile& tile, const KvHead& k, const KvHead& v, int64_t span, int64_t first, int64_t last,
           float scale, float cap) {
  constexpr int kAtOnce = R == 1 ? 4 : R <= 3 ? 2 : 1;  // hides the latency of fma when there are few vectors
  F32x16 largest[R];
  for (int r = 0; r < R; ++r) largest[r] = splat(-std::numeric_limits<float>::infinity());
  int64_t g = first;
  for (; g + kAtOnce <= last; g += kAtOnce) {
    if (tile.fetch_end > 0)
      for (int64_t i = g; i < g + kAtOnce; ++i) fetch_tokens(v, span * kAttentionSpan + i * kKvTokenGroup);
    score_groups<Read, R, kAtOnce>(tile, k, span, g, scale, cap, largest);
  }
  for (; g < last; ++g) score_groups<Read, R, 1>(tile, k, span, g, scale, cap, largest);
  for (int r = 0; r < R; ++r) {
    if (tile.begin[r] >= tile.end[r]) continue;
    tile.largest[r] = reduce_max(largest[r]);
    const F32x16 offset = splat(tile.largest[r]);
    F32x16 total = zero();
    for (g = first; g < last; ++g) {
      float* scores = tile.scores + r * kAttentionSpan + g * kKvTokenGroup;
      const Mask16 visible = lanes(tile.begin[r] - g * kKvTokenGroup, tile.end[r] - g * kKvTokenGroup);
      const F32x16 weight = select(visible, exp(sub(load(scores), offset)), zero());
      store(scores, weight);
      total = add(total, weight);
    }
    tile.weight_sum[r] = reduce_add(total);
  }
}

// sums[r][16 * C dimensions from d] += weight * value over n_tokens tokens, in order.
template <typename Read, int R, int C>
CARAVAN_INLINE void add_value_columns(const std::byte* values, int64_t row_length, const float* const* weights,
                                      float* const* sums, int64_t n_tokens, int64_t d) {
  F32x16 acc[R][C];
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) {
    CARAVAN_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = load(sums[r] + d + 16 * c);
  }
  for (int64_t t = 0; t < n_tokens; ++t) {
    const std::byte* row = values + (t * row_length + d) * Read::kBytes;
    CARAVAN_UNROLL
    for (int c = 0; c < C; ++c) {
      const F32x16 value = Read::load16(row + 16 * c * Read::kBytes);
      CARAVAN_UNROLL
      for (int r = 0; r < R; ++r) acc[r][c] = fma(value, splat(weights[r][t]), acc[r][c]);
    }
  }
  CARAVAN_UNROLL
  for (int r = 0; r < R; ++r) {
    CARAVAN_UNROLL
    for (int c = 0; c < C; ++c) store(sums[r] + d + 16 * c, acc[r][c]);
  }
}

// scaled[r][t] = weights[r][t] * scale[t]: q8_0 values of one group of 32 dimensions are multiplied by these. Works in
// whole vectors: reads up to 15 scales and weights too many, which stay inside the block and the scratch.
template <int R>
CARAVAN_INLINE void scale_weights(const std::byte* scales, const float* const* weights, int64_t n_tokens,
                                  float (&scaled)[R][kAttentionSpan]) {
  for (int64_t t = 0; t < n_tokens; t += 16) {
    const F32x16 scale = load_f16(scales + t * 2);
    for (int r = 0; r < R; ++r) store_partial(scaled[r] + t, mul(load(weights[r] + t), scale), n_tokens - t);
  }
}

// Adds the values of tokens [begin, end) of the span to R vectors' sums; a token's values are contiguous in its block.
template <typename Read, int R>
void add_values(const AttentionTile& tile, int first_vector, const KvHead& k, const KvHead& v, int64_t span,
                int64_t begin, int64_t end) {
  constexpr int kColumns = R == 1 ? 4 : R <= 3 ? 2 : 1;
  while (begin < end) {
    const int64_t position = span * kAttentionSpan + begin, token = position % v.layout.block_tokens;
    const int64_t in_block = v.layout.block_tokens - token, n = end - begin < in_block ? end - begin : in_block;
    const std::byte* block = v.block_start(position);
    const std::byte* values = block + v.offsets.scale_bytes + token * v.offsets.row_length * Read::kBytes;
    [[maybe_unused]] const std::byte* scales = block + token * 2;
    for (int64_t next = round_up(position + kAttentionSpan, kKvTokenGroup);
         next < position + kAttentionSpan + n && next < tile.fetch_end; next += kKvTokenGroup)
      fetch_tokens(k, next);
    const float* weights[R];
    float* sums[R];
    for (int r = 0; r < R; ++r) {
      weights[r] = tile.scores + (first_vector + r) * kAttentionSpan + begin;
      sums[r] = tile.sums + (first_vector + r) * tile.sums_stride;
    }
    const int64_t row_length = v.offsets.row_length;
    if constexpr (Read::kScaled) {
      float scaled[R][kAttentionSpan];
      const float* scaled_weights[R];
      for (int r = 0; r < R; ++r) scaled_weights[r] = scaled[r];
      for (int64_t d = 0; d < row_length; d += kKvScaleGroup) {
        scale_weights<R>(scales + d / kKvScaleGroup * v.layout.block_tokens * 2, weights, n, scaled);
        if (d + kKvScaleGroup <= row_length)
          add_value_columns<Read, R, 2>(values, row_length, scaled_weights, sums, n, d);
        else
          add_value_columns<Read, R, 1>(values, row_length, scaled_weights, sums, n, d);
      }
    } else {
      int64_t d = 0;
      for (; d + 16 * kColumns <= row_length; d += 16 * kColumns)
        add_value_columns<Read, R, kColumns>(values, row_length, weights, sums, n, d);
      for (; d < row_length; d += 16) add_value_columns<Read, R, 1>(values, row_length, weights, sums, n, d);
    }
    begin += n;
  }
}

// Weighted sums of values: what all vectors see is added together; what only some see, before and after, one by one.
template <typename Read, int R>
void sum_values(const AttentionTile& tile, const KvHead& k, const KvHead& v, int64_t span) {
  int64_t common_begin = 0, common_end = kAttentionSpan;
  for (int r = 0; r < R; ++r) {
    if (tile.begin[r] > common_begin) common_begin = tile.begin[r];
    if (tile.end[r] < common_end) common_end = tile.end[r];
    float* sums = tile.sums + r * tile.sums_stride;
    for (int64_t d = 0; d < v.offsets.row_length; d += 16) store(sums + d, zero());
  }
  if (common_begin >= common_end) {
    for (int r = 0; r < R; ++r) add_values<Read, 1>(tile, r, k, v, span, tile.begin[r], tile.end[r]);
    return;
  }
  for (int r = 0; r < R; ++r) add_values<Read, 1>(tile, r, k, v, span, tile.begin[r], common_begin);
  add_values<Read, R>(tile, 0, k, v, span, common_begin, common_end);
  for (int r = 0; r < R; ++r) add_values<Read, 1>(tile, r, k, v, span, common_end, tile.end[r]);
}

template <int R>
void weigh_any(AttentionTile& tile, const KvHead& k, const KvHead& v, int64_t span, int64_t first, int64_t last,
               float scale, float cap) {
  switch (k.layout.dtype) {
    case tensor::DType::f16:
      return weigh<ReadF16, R>(tile, k, v, span, first, last, scale, cap);
    case tensor::DType::q8_0:
      return weigh<ReadQ8, R>(tile, k, v, span, first, last, scale, cap);
    default:
      return weigh<ReadF32, R>(tile, k, v, span, first, last, scale, cap);
  }
}
template <int R>
void sum_values_any(const AttentionTile& tile, const KvHead& k, const KvHead& v, int64_t span) {
  switch (v.layout.dtype) {
    case tensor::DType::f16:
      return sum_values<ReadF16, R>(tile, k, v, span);
    case tensor::DType::q8_0:
      return sum_values<ReadQ8, R>(tile, k, v, span);
    default:
      return sum_values<ReadF32, R>(tile, k, v, span);
  }
}

// ---- Vectors and their states
// ------------------------------------------------------------------------------------------

// Up to 64 query vectors of one KV head with their running softmax.
struct AttentionGroup {
  int64_t n;
  const float* q[kAttentionGroup];
  int64_t from[kAttentionGroup];
  int64_t to[kAttentionGroup];
  float largest[kAttentionGroup];
  float weight_sum[kAttentionGroup];
  bool empty[kAttentionGroup];
  float* sums;  // [n][sums_stride]
  int64_t sums_stride;
};

// state = state and tile, both rescaled to the larger of their maxima.
CARAVAN_INLINE void merge(AttentionGroup& group, int64_t i, const AttentionTile& tile, int r) {
  float* state = group.sums + i * group.sums_stride;
  const float* part = tile.sums + r * tile.sums_stride;
  if (group.empty[i]) {
    group.empty[i] = false;
    group.largest[i] = tile.largest[r];
    group.weight_sum[i] = tile.weight_sum[r];
    std::memcpy(state, part, static_cast<size_t>(group.sums_stride) * sizeof(float));
    return;
  }
  const float a = group.largest[i], b = tile.largest[r], largest = a > b ? a : b;
  float factors[16];
  store(factors, exp(select(lanes(0, 1), splat(a - largest), splat(b - largest))));
  group.largest[i] = largest;
  group.weight_sum[i] = group.weight_sum[i] * factors[0] + tile.weight_sum[r] * factors[1];
  for (int64_t d = 0; d < group.sums_stride; d += 16)
    store(state + d, fma(load(state + d), splat(factors[0]), mul(load(part + d), splat(factors[1]))));
}

// Vectors [first, first + R) of the group against one span.
template <int R>
void attend_tile(AttentionGroup& group, int64_t first, AttentionTile& tile, const KvHead& k, const KvHead& v,
                 int64_t span, float scale, float cap) {
  int64_t begin = kAttentionSpan, end = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t from = group.from[first + r] - span * kAttentionSpan,
                  to = group.to[first + r] - span * kAttentionSpan;
    tile.q[r] = group.q[first + r];
    tile.begin[r] = from < 0 ? 0 : from > kAttentionSpan ? kAttentionSpan : from;
    tile.end[r] = to < tile.begin[r] ? tile.begin[r] : to > kAttentionSpan ? kAttentionSpan : to;
    if (tile.begin[r] == tile.end[r]) continue;
    if (tile.begin[r] < begin) begin = tile.begin[r];
    if (tile.end[r] > end) end = tile.end[r];
  }
  if (begin >= end) return;
  weigh_any<R>(tile, k, v, span, begin / kKvTokenGroup, (end + kKvTokenGroup - 1) / kKvTokenGroup, scale, cap);
  sum_values_any<R>(tile, k, v, span);
  for (int r = 0; r < R; ++r)
    if (tile.begin[r] < tile.end[r]) merge(group, first + r, tile, r);
  tile.fetch_end = 0;
}

// Divides by the sum of weights, after the sink has had its share. Nothing visible: zeros.
CARAVAN_INLINE void finish_vector(const AttentionGroup& group, int64_t i, const float* sink, int64_t head_dim,
                                  float* out) {
  const float* state = group.sums + i * group.sums_stride;
  float factor = 0.0f;
  if (!group.empty[i]) {
    float largest = group.largest[i], total = group.weight_sum[i], rescale = 1.0f;
    if (sink != nullptr) {
      largest = *sink > largest ? *sink : largest;
      float factors[16];
      store(factors, exp(select(lanes(0, 1), splat(group.largest[i] - largest), splat(*sink - largest))));
      rescale = factors[0];
      total = total * factors[0] + factors[1];
    }
    factor = rescale / total;
  }
  for (int64_t d = 0; d < head_dim; d += 16) {
    const F32x16 value = group.empty[i] ? zero() : mul(load(state + d), splat(factor));
    store_partial(out + d, value, head_dim - d);
  }
}

// Rounded so that consecutive buffers stay aligned to 64 bytes.
struct AttentionScratch {
  float* group_sums;
  float* tile_sums;
  float* scores;
};
CARAVAN_INLINE AttentionScratch attention_scratch(void* scratch, int64_t sums_stride) {
  auto* p = static_cast<float*>(scratch);
  return {p, p + kAttentionGroup * sums_stride, p + (kAttentionGroup + kMaxAttentionTile) * sums_stride};
}

void attend_group(AttentionGroup& group, const AttentionScratch& scratch, const KvHead& k, const KvHead& v, float scale,
                  float cap) {
  int64_t from = std::numeric_limits<int64_t>::max(), to = 0;
  for (int64_t i = 0; i < group.n; ++i) {
    if (group.from[i] >= group.to[i]) continue;
    if (group.from[i] < from) from = group.from[i];
    if (group.to[i] > to) to = group.to[i];
  }
  AttentionTile tile{};
  tile.scores = scratch.scores;
  tile.sums = scratch.tile_sums;
  tile.sums_stride = group.sums_stride;
  for (int64_t span = from / kAttentionSpan; span * kAttentionSpan < to; ++span) {
    tile.fetch_end = to;
    int64_t i = 0;
    for (; i + kAttentionTile <= group.n; i += kAttentionTile)
      attend_tile<kAttentionTile>(group, i, tile, k, v, span, scale, cap);
    for (; kAttentionTile > 4 && i + 4 <= group.n; i += 4) attend_tile<4>(group, i, tile, k, v, span, scale, cap);
    for (; i + 2 <= group.n; i += 2) attend_tile<2>(group, i, tile, k, v, span, scale, cap);
    for (; i < group.n; ++i) attend_tile<1>(group, i, tile, k, v, span, scale, cap);
  }
}

void attention(const AttentionArgs& args, int64_t row_begin, int64_t row_end, int64_t kv_head, void* scratch) {
  const int64_t heads = args.n_head / args.keys.n_head_kv;  // query heads of this KV head
  const int64_t head_dim_k = args.keys.head_dim, head_dim_v = args.values.head_dim;
  const KvHead k{args.keys, kv_offsets(args.keys), args.key_cache, args.blocks, kv_head};
  const KvHead v{args.values, kv_offsets(args.values), args.value_cache, args.blocks, kv_head};
  const AttentionScratch buffers = attention_scratch(scratch, v.offsets.row_length);
  AttentionGroup group{};
  group.sums = buffers.group_sums;
  group.sums_stride = v.offsets.row_length;
  const int64_t n_vectors = (row_end - row_begin) * heads;
  for (int64_t first = 0; first < n_vectors; first += kAttentionGroup) {
    group.n = n_vectors - first < kAttentionGroup ? n_vectors - first : kAttentionGroup;
    for (int64_t i = 0; i < group.n; ++i) {
      const int64_t row = row_begin + (first + i) / heads, head = kv_head * heads + (first + i) % heads;
      group.q[i] = args.q + row * args.q_stride + head * head_dim_k;
      group.from[i] = args.visible_from[row];
      group.to[i] = args.visible_to[row];
      group.empty[i] = true;
    }
    attend_group(group, buffers, k, v, args.scale, args.softcap);
    for (int64_t i = 0; i < group.n; ++i) {
      const int64_t row = row_begin + (first + i) / heads, head = kv_head * heads + (first + i) % heads;
      finish_vector(group, i, args.sinks == nullptr ? nullptr : args.sinks + head, head_dim_v,
                    args.out + row * args.out_stride + head * head_dim_v);
    }
  }
}

// Builds a one-head, one-block f32 cache in scratch and attends to it.
void attention_dense(const DenseAttentionArgs& dense, int64_t row_begin, int64_t row_end, int64_t kv_head,
                     void* scratch) {
  const int64_t block_tokens = round_up(dense.n_kv, kKvTokenGroup), heads = dense.n_head / dense.n_head_kv;
  const KvLayout keys{KvKind::keys, tensor::DType::f32, block_tokens, 1, dense.head_dim_k};
  const KvLayout values{KvKind::values, tensor::DType::f32, block_tokens, 1, dense.head_dim_v};
  auto* key_cache = static_cast<std::byte*>(scratch);
  std::byte* value_cache = key_cache + round_up(kv_offsets(keys).head_bytes, 64);
  std::byte* rest = value_cache + round_up(kv_offsets(values).head_bytes, 64);
  std::memset(scratch, 0, static_cast<size_t>(rest - key_cache));
  const int32_t block = 0;
  for (int64_t t = 0; t < dense.n_kv; ++t) {
    kv_store(keys, key_cache, &block, t, dense.k + t * dense.k_stride + kv_head * dense.head_dim_k);
    kv_store(values, value_cache, &block, t, dense.v + t * dense.v_stride + kv_head * dense.head_dim_v);
  }
  const AttentionArgs args{.q = dense.q + kv_head * heads * dense.head_dim_k,
                           .q_stride = dense.q_stride,
                           .out = dense.out + kv_head * heads * dense.head_dim_v,
                           .out_stride = dense.out_stride,
                           .n_head = heads,
                           .keys = keys,
                           .values = values,
                           .key_cache = key_cache,
                           .value_cache = value_cache,
                           .blocks = &block,
                           .visible_from = dense.visible_from,
                           .visible_to = dense.visible_to,
                           .scale = dense.scale,
                           .softcap = dense.softcap,
                           .sinks = dense.sinks == nullptr ? nullptr : dense.sinks + kv_head * heads};
  attention(args, row_begin, row_end, 0, rest);
}
