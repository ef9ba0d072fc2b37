// The KV cache and attention: rounding through the cache, closeness to softmax in double, and the same bits on every
// instruction set and for every way of cutting the work.
#include <algorithm>
#include <limits>

#include "kernels_support.h"

namespace caravan::device::cpu::testing {
namespace {

using tensor::DType;

struct Shape {
  int64_t n_head, n_head_kv, head_dim_k, head_dim_v, block_tokens;
};
constexpr Shape kShapes[] = {
    {4, 2, 8, 8, 16}, {6, 2, 40, 40, 32}, {8, 1, 64, 64, 64}, {2, 2, 80, 48, 256}, {5, 1, 136, 24, 512}};

// A sequence of n_tokens in a cache whose physical blocks are in reverse order with gaps.
struct Cache {
  KvLayout keys, values;
  std::vector<int32_t> blocks;
  AlignedBytes key_bytes, value_bytes;

  Cache(const Shape& s, DType dtype, int64_t n_tokens)
      : keys{KvKind::keys, dtype, s.block_tokens, s.n_head_kv, s.head_dim_k},
        values{KvKind::values, dtype, s.block_tokens, s.n_head_kv, s.head_dim_v},
        blocks(static_cast<size_t>((n_tokens + s.block_tokens - 1) / s.block_tokens) + 3, -1),
        key_bytes(kv_block_bytes(keys) * blocks.size() * 2),
        value_bytes(kv_block_bytes(values) * blocks.size() * 2) {
    for (size_t i = 0; i + 3 < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(2 * (blocks.size() - i) - 1);
  }
  void fill(const Kernels& kernels, int64_t n_tokens) {
    for (int64_t t = 0; t < n_tokens; ++t) {
      const auto k = random_row(keys.n_head_kv * keys.head_dim, static_cast<uint64_t>(2 * t));
      const auto v = random_row(values.n_head_kv * values.head_dim, static_cast<uint64_t>(2 * t + 1));
      kernels.kv_store(keys, key_bytes.data(), blocks.data(), t, k.data());
      kernels.kv_store(values, value_bytes.data(), blocks.data(), t, v.data());
    }
  }
};

// Rows of queries with their visible ranges: causal, some with a window, one that sees nothing.
struct Queries {
  Shape shape;
  int64_t n_rows;
  std::vector<float> q, sinks;
  std::vector<int32_t> from, to;

  Queries(const Shape& s, int64_t n_tokens, int64_t rows)
      : shape(s), n_rows(rows), q(random_row(rows * s.n_head * s.head_dim_k, 99)), sinks(random_row(s.n_head, 98)) {
    for (int64_t r = 0; r < rows; ++r) {
      to.push_back(static_cast<int32_t>(n_tokens - rows + r + 1));
      from.push_back(r % 3 == 1 ? std::max(0, to.back() - 300) : 0);
    }
    if (rows > 4) from[4] = to[4];
  }
  AttentionArgs args(Cache& cache, float* out, bool with_extras) const {
    return {.q = q.data(),
            .q_stride = shape.n_head * shape.head_dim_k,
            .out = out,
            .out_stride = shape.n_head * shape.head_dim_v,
            .n_head = shape.n_head,
            .keys = cache.keys,
            .values = cache.values,
            .key_cache = cache.key_bytes.data(),
            .value_cache = cache.value_bytes.data(),
            .blocks = cache.blocks.data(),
            .visible_from = from.data(),
            .visible_to = to.data(),
            .scale = 0.2f,
            .softcap = with_extras ? 2.0f : 0.0f,
            .sinks = with_extras ? sinks.data() : nullptr};
  }
};

enum class Extras { none, softcap_and_sinks };

// Runs rows in pieces of rows_at_once.
std::vector<float> attend(const Kernels& kernels, const Queries& queries, Cache& cache, int64_t rows_at_once,
                          Extras extras) {
  std::vector<float> out(static_cast<size_t>(queries.n_rows * queries.shape.n_head * queries.shape.head_dim_v), 55.0f);
  AlignedBytes scratch(attention_scratch_bytes(queries.shape.head_dim_k, queries.shape.head_dim_v));
  const AttentionArgs args = queries.args(cache, out.data(), extras == Extras::softcap_and_sinks);
  for (int64_t row = 0; row < queries.n_rows; row += rows_at_once)
    for (int64_t head = 0; head < queries.shape.n_head_kv; ++head)
      kernels.attention(args, row, std::min(row + rows_at_once, queries.n_rows), head, scratch.data());
  return out;
}

class KernelsAttention : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsAttention, ::testing::ValuesIn(supported_isas()), isa_test_name);

TEST_P(KernelsAttention, StoresWhatScalarStores) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : {DType::f32, DType::f16, DType::q8_0}) {
      Cache expected(shape, dtype, 40), actual(shape, dtype, 40);
      expected.fill(scalar(), 40);
      actual.fill(kernels(), 40);
      const size_t n_blocks = expected.blocks.size() * 2;
      ASSERT_EQ(
          std::memcmp(actual.key_bytes.data(), expected.key_bytes.data(), kv_block_bytes(expected.keys) * n_blocks), 0);
      ASSERT_EQ(std::memcmp(actual.value_bytes.data(), expected.value_bytes.data(),
                            kv_block_bytes(expected.values) * n_blocks),
                0);
    }
}

TEST_P(KernelsAttention, LoadsWhatWasStoredRoundedToTheCacheType) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : {DType::f32, DType::f16, DType::q8_0})
      for (const KvKind kind : {KvKind::keys, KvKind::values}) {
        Cache cache(shape, dtype, 33);
        const KvLayout& layout = kind == KvKind::keys ? cache.keys : cache.values;
        std::byte* bytes = kind == KvKind::keys ? cache.key_bytes.data() : cache.value_bytes.data();
        const int64_t n = layout.n_head_kv * layout.head_dim;
        for (int64_t t = 0; t < 33; ++t)
          kernels().kv_store(layout, bytes, cache.blocks.data(), t, random_row(n, static_cast<uint64_t>(t)).data());
        for (int64_t t = 0; t < 33; ++t) {
          const auto x = random_row(n, static_cast<uint64_t>(t));
          std::vector<float> back(static_cast<size_t>(n));
          kernels().kv_load(layout, bytes, cache.blocks.data(), t, back.data());
          for (size_t i = 0; i < back.size(); ++i) {
            const double step = dtype == DType::f32 ? 0 : dtype == DType::f16 ? std::abs(x[i]) / 2048 : 5.0 / 127;
            ASSERT_NEAR(back[i], x[i], step);
          }
        }
      }
}

TEST_P(KernelsAttention, MatchesScalarBitForBitHoweverRowsAreCut) {
  const int64_t n_tokens = 601, n_rows = 11;
  for (const Shape& shape : kShapes)
    for (const DType dtype : {DType::f32, DType::f16, DType::q8_0})
      for (const Extras extras : {Extras::none, Extras::softcap_and_sinks}) {
        if (extras != Extras::none && dtype != DType::f16) continue;  // they come after the cache's type has been read
        Cache cache(shape, dtype, n_tokens);
        cache.fill(kernels(), n_tokens);
        const Queries queries(shape, n_tokens, n_rows);
        const auto expected = attend(scalar(), queries, cache, n_rows, extras);
        for (const int64_t rows_at_once : {int64_t{1}, int64_t{3}, n_rows}) {
          const auto actual = attend(kernels(), queries, cache, rows_at_once, extras);
          ASSERT_TRUE(same_bits(actual.data(), expected.data(), static_cast<int64_t>(expected.size())))
              << "head_dim " << shape.head_dim_k << " rows at once " << rows_at_once;
        }
      }
}

TEST_P(KernelsAttention, IgnoresNonFiniteValuesOfTokensNotVisible) {
  const Shape shape{4, 1, 32, 32, 32};
  const int64_t n_tokens = 50, n_rows = 9;
  Cache clean(shape, DType::f32, n_tokens), dirty(shape, DType::f32, n_tokens);
  clean.fill(kernels(), n_tokens);
  dirty.fill(kernels(), n_tokens);
  const std::vector<float> nan_row(32, std::numeric_limits<float>::quiet_NaN());
  dirty.fill(kernels(), n_tokens);
  kernels().kv_store(dirty.keys, dirty.key_bytes.data(), dirty.blocks.data(), n_tokens - 1, nan_row.data());
  kernels().kv_store(dirty.values, dirty.value_bytes.data(), dirty.blocks.data(), n_tokens - 1, nan_row.data());
  const Queries queries(shape, n_tokens, n_rows);  // only the last row sees the last token
  const auto expected = attend(kernels(), queries, clean, n_rows, Extras::none);
  const auto actual = attend(kernels(), queries, dirty, n_rows, Extras::none);
  const int64_t row = shape.n_head * shape.head_dim_v;
  EXPECT_TRUE(same_bits(actual.data(), expected.data(), (n_rows - 1) * row));
  EXPECT_TRUE(std::isnan(actual[static_cast<size_t>((n_rows - 1) * row)]));
}

// softmax(scale q k + extras) v in double over the rounded cache.
std::vector<double> reference(const Queries& queries, Cache& cache, int64_t n_tokens, Extras extras) {
  const Shape& s = queries.shape;
  std::vector<std::vector<float>> k, v;
  for (int64_t t = 0; t < n_tokens; ++t) {
    k.emplace_back(static_cast<size_t>(s.n_head_kv * s.head_dim_k));
    v.emplace_back(static_cast<size_t>(s.n_head_kv * s.head_dim_v));
    scalar().kv_load(cache.keys, cache.key_bytes.data(), cache.blocks.data(), t, k.back().data());
    scalar().kv_load(cache.values, cache.value_bytes.data(), cache.blocks.data(), t, v.back().data());
  }
  std::vector<double> out;
  for (int64_t row = 0; row < queries.n_rows; ++row)
    for (int64_t h = 0; h < s.n_head; ++h) {
      const int64_t kv = h / (s.n_head / s.n_head_kv);
      const float* q = queries.q.data() + (row * s.n_head + h) * s.head_dim_k;
      const auto from = queries.from[static_cast<size_t>(row)], to = queries.to[static_cast<size_t>(row)];
      std::vector<double> sum(static_cast<size_t>(s.head_dim_v));
      double total = extras == Extras::none || from >= to
                         ? 0
                         : std::exp(static_cast<double>(queries.sinks[static_cast<size_t>(h)]));
      for (int64_t t = from; t < to; ++t) {
        double score = 0;
        for (int64_t d = 0; d < s.head_dim_k; ++d)
          score += static_cast<double>(q[d]) * k[static_cast<size_t>(t)][static_cast<size_t>(kv * s.head_dim_k + d)];
        score *= static_cast<double>(0.2f);
        if (extras == Extras::softcap_and_sinks) score = 2 * std::tanh(score / 2);
        const double weight = std::exp(score);
        total += weight;
        for (size_t d = 0; d < sum.size(); ++d)
          sum[d] += weight * v[static_cast<size_t>(t)][static_cast<size_t>(kv * s.head_dim_v) + d];
      }
      for (const double x : sum) out.push_back(total > 0 ? x / total : 0);
    }
  return out;
}

TEST(KernelsAttentionScalar, IsCloseToSoftmaxInDouble) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : {DType::f32, DType::f16, DType::q8_0})
      for (const int64_t n_tokens : {11, 256, 300})
        for (const Extras extras : {Extras::none, Extras::softcap_and_sinks}) {
          Cache cache(shape, dtype, n_tokens);
          cache.fill(scalar(), n_tokens);
          const Queries queries(shape, n_tokens, 6);
          const auto expected = reference(queries, cache, n_tokens, extras);
          const auto actual = attend(scalar(), queries, cache, 6, extras);
          // Scores are sums of head_dim products near 1: absolute errors of some 1e-6, which exp makes relative ones of
          // the weights; values are near 1.
          for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5) << i;
        }
}

TEST_P(KernelsAttention, DenseMatchesTheCachedFormAndTheScalarOne) {
  const Shape shape{6, 2, 40, 40, 512};
  const int64_t n = 300;
  const auto k = random_row(n * 80, 31), v = random_row(n * 80, 32);
  Cache cache(shape, DType::f32, n);
  for (int64_t t = 0; t < n; ++t) {
    kernels().kv_store(cache.keys, cache.key_bytes.data(), cache.blocks.data(), t, k.data() + t * 80);
    kernels().kv_store(cache.values, cache.value_bytes.data(), cache.blocks.data(), t, v.data() + t * 80);
  }
  Queries queries(shape, n, 30);
  std::fill(queries.from.begin(), queries.from.end(), 0);
  std::fill(queries.to.begin(), queries.to.end(), static_cast<int32_t>(n));
  const auto expected = attend(scalar(), queries, cache, 30, Extras::none);
  std::vector<float> actual(expected.size());
  AlignedBytes scratch(attention_dense_scratch_bytes(n, 40, 40));
  const DenseAttentionArgs args{.q = queries.q.data(),
                                .q_stride = 240,
                                .k = k.data(),
                                .k_stride = 80,
                                .v = v.data(),
                                .v_stride = 80,
                                .out = actual.data(),
                                .out_stride = 240,
                                .n_head = 6,
                                .n_head_kv = 2,
                                .head_dim_k = 40,
                                .head_dim_v = 40,
                                .n_kv = n,
                                .visible_from = queries.from.data(),
                                .visible_to = queries.to.data(),
                                .scale = 0.2f,
                                .softcap = 0,
                                .sinks = nullptr};
  for (int64_t head = 0; head < 2; ++head) {
    kernels().attention_dense(args, 0, 13, head, scratch.data());
    kernels().attention_dense(args, 13, 30, head, scratch.data());
  }
  EXPECT_TRUE(same_bits(actual.data(), expected.data(), static_cast<int64_t>(expected.size())));
}

}  // namespace
}  // namespace caravan::device::cpu::testing
