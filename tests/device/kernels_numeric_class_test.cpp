// The bits of kNumericClass: recorded once on x86-64, they must come out on every architecture and instruction set.
// Where a change of arithmetic is intended, the class's name changes with the number below.
#include "kernels_support.h"

namespace caravan::device::cpu::testing {
namespace {

using tensor::DType;

// A fixed sequence of floats in [-4, 4), made of integers so that no library function takes part.
class Sequence {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 40) - (1 << 23)) * 0x1p-21f;
  }
  std::vector<float> row(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& x : values) x = next();
    return values;
  }

 private:
  uint64_t state_ = 1;
};

// FNV-1a over the bytes of n floats.
void hash_floats(uint64_t& hash, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<uint32_t>(x[i]);
    for (int shift = 0; shift < 32; shift += 8) hash = (hash ^ (bits >> shift & 0xff)) * 0x100000001b3u;
  }
}

void hash_products(const Kernels& kernels, uint64_t& hash) {
  constexpr int64_t kIn = 512, kOut = 16, kRows = 3;
  for (const DType dtype :
       {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::mxfp4, DType::q4_0, DType::q4_1, DType::q5_0,
        DType::q5_1, DType::q2_k, DType::q3_k, DType::q4_k, DType::q5_k, DType::q6_k, DType::iq4_xs, DType::iq2_s}) {
    Sequence sequence;
    std::vector<std::byte> rows(tensor::row_bytes(dtype, kIn) * kOut);
    for (std::byte& b : rows) b = static_cast<std::byte>(static_cast<int>(sequence.next() * 32) & 0xff);
    tame_scales(dtype, rows);
    AlignedBytes packed(packed_bytes(dtype, kIn, kOut));
    pack(dtype, kIn, rows.data(), 0, kOut, packed.data());
    const auto x = sequence.row(kIn * kRows);
    const size_t stride = activation_row_bytes(activation_kind(dtype), kIn);
    AlignedBytes activations(stride * kRows);
    for (int64_t row = 0; row < kRows; ++row) {
      std::byte* to = activations.data() + static_cast<size_t>(row) * stride;
      if (activation_kind(dtype) == ActivationKind::q8)
        kernels.quantize_row(x.data() + row * kIn, kIn, reinterpret_cast<ActivationBlock*>(to));
      else
        std::memcpy(to, x.data() + row * kIn, stride);
    }
    float out[kRows * kOut];
    kernels.mul_mat({dtype, kIn, kOut, packed.data()}, 0, 1, activations.data(), stride, kRows, out, kOut);
    hash_floats(hash, out, kRows * kOut);
  }
}

void hash_row_ops(const Kernels& kernels, uint64_t& hash) {
  constexpr int64_t kCount = 1001;
  Sequence sequence;
  const auto x = sequence.row(kCount), y = sequence.row(kCount);
  std::vector<float> out(x.size());
  for (const auto op : {&Kernels::exp, &Kernels::tanh, &Kernels::silu, &Kernels::gelu, &Kernels::gelu_erf,
                        &Kernels::gelu_quick, &Kernels::sigmoid, &Kernels::softmax}) {
    (kernels.*op)(x.data(), kCount, out.data());
    hash_floats(hash, out.data(), kCount);
  }
  kernels.rms_norm(x.data(), y.data(), kCount, 1e-5f, out.data());
  hash_floats(hash, out.data(), kCount);
  kernels.layer_norm(x.data(), y.data(), x.data(), kCount, 1e-5f, out.data());
  hash_floats(hash, out.data(), kCount);
  kernels.rope(RopePairing::normal, x.data(), 10, 100, 90, y.data(), y.data() + 45, out.data());
  hash_floats(hash, out.data(), 1000);
  const float sums[] = {kernels.sum(x.data(), kCount), kernels.dot(x.data(), y.data(), kCount),
                        kernels.log_sum_exp(x.data(), kCount)};
  hash_floats(hash, sums, 3);
}

void hash_attention(const Kernels& kernels, uint64_t& hash) {
  constexpr int64_t kTokens = 300, kRows = 7, kHeads = 4, kHeadsKv = 2, kDim = 48;
  for (const DType dtype : {DType::f32, DType::f16, DType::q8_0}) {
    Sequence sequence;
    const KvLayout keys{KvKind::keys, dtype, 64, kHeadsKv, kDim}, values{KvKind::values, dtype, 64, kHeadsKv, kDim};
    const int32_t blocks[] = {4, 2, 0, 1, 3};
    AlignedBytes key_cache(5 * kv_block_bytes(keys)), value_cache(5 * kv_block_bytes(values));
    for (int64_t t = 0; t < kTokens; ++t) {
      kernels.kv_store(keys, key_cache.data(), blocks, t, sequence.row(kHeadsKv * kDim).data());
      kernels.kv_store(values, value_cache.data(), blocks, t, sequence.row(kHeadsKv * kDim).data());
    }
    const auto q = sequence.row(kRows * kHeads * kDim);
    std::vector<float> out(q.size());
    std::vector<int32_t> from(kRows, 3), to;
    for (int32_t row = 0; row < kRows; ++row) to.push_back(kTokens - kRows + row + 1);
    AlignedBytes scratch(attention_scratch_bytes(kDim, kDim));
    const AttentionArgs args{.q = q.data(),
                             .q_stride = kHeads * kDim,
                             .out = out.data(),
                             .out_stride = kHeads * kDim,
                             .n_head = kHeads,
                             .keys = keys,
                             .values = values,
                             .key_cache = key_cache.data(),
                             .value_cache = value_cache.data(),
                             .blocks = blocks,
                             .visible_from = from.data(),
                             .visible_to = to.data(),
                             .scale = 0.05f,
                             .softcap = 30.0f,
                             .sinks = q.data()};
    for (int64_t head = 0; head < kHeadsKv; ++head) kernels.attention(args, 0, kRows, head, scratch.data());
    hash_floats(hash, out.data(), static_cast<int64_t>(out.size()));
  }
}

class KernelsNumericClass : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsNumericClass, ::testing::ValuesIn(supported_isas()), isa_test_name);

TEST_P(KernelsNumericClass, GivesTheRecordedBits) {
  uint64_t products = 0xcbf29ce484222325u, row_ops = products, attention = products;
  hash_products(kernels(), products);
  hash_row_ops(kernels(), row_ops);
  hash_attention(kernels(), attention);
  ASSERT_STREQ(kNumericClass, "cpu-fma16-2");
  EXPECT_EQ(products, 17796620812951200001u);
  EXPECT_EQ(row_ops, 13112073029284854191u);
  EXPECT_EQ(attention, 8058086181391172053u);
}

}  // namespace
}  // namespace caravan::device::cpu::testing
