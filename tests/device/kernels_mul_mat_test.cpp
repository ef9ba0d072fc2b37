// Matrix products: every instruction set, type, row count and shape gives the scalar kernels' bits, and those are close
// to the dequantised weights times the activations in double.
#include <algorithm>

#include "kernels_support.h"
#include "tensor/half.h"

namespace caravan::device::cpu::testing {

#if defined(__x86_64__)
const Kernels& avx_vnni_kernels_of_avx512();  // avx_vnni_of_avx512.cpp
#endif

namespace {

using tensor::DType;

constexpr DType kTypes[] = {DType::f32,   DType::f16,     DType::bf16,   DType::q4_0,    DType::q4_1,   DType::q5_0,
                            DType::q5_1,  DType::q8_0,    DType::q2_k,   DType::q3_k,    DType::q4_k,   DType::q5_k,
                            DType::q6_k,  DType::iq1_s,   DType::iq1_m,  DType::iq2_xxs, DType::iq2_xs, DType::iq2_s,
                            DType::iq3_s, DType::iq3_xxs, DType::iq4_nl, DType::iq4_xs,  DType::tq1_0,  DType::tq2_0,
                            DType::q1_0,  DType::q2_0,    DType::mxfp4,  DType::nvfp4};

// GGUF rows of a random matrix, their exact values, and the packed form.
struct Weights {
  DType dtype;
  int64_t n_in, n_out;
  std::vector<float> values;
  AlignedBytes packed;
  PackedMatrix matrix() { return {dtype, n_in, n_out, packed.data()}; }
};

Weights make_weights(DType dtype, int64_t n_in, int64_t n_out) {
  const tensor::DTypeInfo& info = tensor::dtype_info(dtype);
  const auto row_bytes = tensor::row_bytes(dtype, static_cast<uint64_t>(n_in));
  Weights w{dtype, n_in, n_out, std::vector<float>(static_cast<size_t>(n_in * n_out)),
            AlignedBytes(packed_bytes(dtype, n_in, n_out))};
  std::vector<std::byte> rows(row_bytes * static_cast<size_t>(n_out));
  for (int64_t j = 0; j < n_out; ++j) {
    const auto row = random_row(n_in, static_cast<uint64_t>(j) + 1000);
    std::byte* bytes = rows.data() + static_cast<size_t>(j) * row_bytes;
    if (info.quantize != nullptr) info.quantize(row.data(), bytes, n_in);
  }
  if (info.quantize == nullptr) {
    std::mt19937_64 random(kSeed);
    for (std::byte& byte : rows) byte = static_cast<std::byte>(random());
    tame_scales(dtype, rows);
  }
  for (int64_t j = 0; j < n_out; ++j) {
    const std::byte* bytes = rows.data() + static_cast<size_t>(j) * row_bytes;
    info.dequantize(bytes, w.values.data() + j * n_in, n_in);
  }
  for (int64_t j = 0; j < n_out; j += 32)  // in two-panel pieces, as a loader streams them
    pack(dtype, n_in, rows.data() + static_cast<size_t>(j) * row_bytes, j, std::min<int64_t>(32, n_out - j),
         w.packed.data());
  return w;
}

// Activation rows in the form that the weights want.
struct Activations {
  AlignedBytes bytes;
  size_t stride;
  const void* data() { return bytes.data(); }
};
Activations make_activations(const Kernels& kernels, DType dtype, const std::vector<float>& x, int64_t n_in,
                             int64_t n_rows) {
  const ActivationKind kind = activation_kind(dtype);
  const size_t stride = activation_row_bytes(kind, n_in);
  Activations a{AlignedBytes(stride * static_cast<size_t>(n_rows)), stride};
  for (int64_t row = 0; row < n_rows; ++row) {
    std::byte* out = a.bytes.data() + static_cast<size_t>(row) * stride;
    if (kind == ActivationKind::f32)
      std::memcpy(out, x.data() + row * n_in, stride);
    else
      kernels.quantize_row(x.data() + row * n_in, n_in, reinterpret_cast<ActivationBlock*>(out));
  }
  return a;
}

std::vector<float> product(const Kernels& kernels, Weights& w, const std::vector<float>& x, int64_t n_rows) {
  Activations a = make_activations(kernels, w.dtype, x, w.n_in, n_rows);
  std::vector<float> out(static_cast<size_t>(n_rows * w.n_out), -1.0f);
  kernels.mul_mat(w.matrix(), 0, w.matrix().n_panels(), a.data(), a.stride, n_rows, out.data(), w.n_out);
  return out;
}

class KernelsMulMat : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsMulMat, ::testing::ValuesIn(supported_isas()), isa_test_name);

void expect_scalar_bits(const Kernels& kernels) {
  for (const DType dtype : kTypes) {
    const int64_t block = tensor::dtype_info(dtype).block_length;
    for (const int64_t n_in :
         block == 1 ? std::vector<int64_t>{1, 63, 64, 65, 172, 300} : std::vector{block, 3 * block})
      for (const int64_t n_out : {1, 16, 40}) {
        Weights w = make_weights(dtype, n_in, n_out);
        for (const int64_t n_rows : {1, 2, 3, 7, 13, 27}) {
          const auto x = random_row(n_in * n_rows, 7);
          const auto expected = product(scalar(), w, x, n_rows), actual = product(kernels, w, x, n_rows);
          ASSERT_TRUE(same_bits(actual.data(), expected.data(), n_rows * n_out))
              << tensor::dtype_name(dtype) << " n_in " << n_in << " n_out " << n_out << " rows " << n_rows;
        }
      }
  }
}

TEST_P(KernelsMulMat, MatchesScalarForEveryTypeShapeAndRowCount) { expect_scalar_bits(kernels()); }

#if defined(__x86_64__)
TEST(KernelsAvxVnni, MatchesScalarInTheEncodingOfAvx512) {
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vl"))
    GTEST_SKIP() << "needs a processor with AVX-512 VNNI";
  expect_scalar_bits(avx_vnni_kernels_of_avx512());
}
#endif

TEST_P(KernelsMulMat, GivesTheSameBitsForOneRowAndMany) {
  for (const DType dtype : kTypes) {
    const int64_t n_in = 512, n_out = 32, n_rows = 29;
    Weights w = make_weights(dtype, n_in, n_out);
    const auto x = random_row(n_in * n_rows, 8);
    const auto many = product(kernels(), w, x, n_rows);
    for (int64_t row = 0; row < n_rows; ++row) {
      const std::vector<float> one_x(x.begin() + row * n_in, x.begin() + (row + 1) * n_in);
      const auto one = product(kernels(), w, one_x, 1);
      ASSERT_TRUE(same_bits(one.data(), many.data() + row * n_out, n_out)) << tensor::dtype_name(dtype) << row;
    }
  }
}

TEST_P(KernelsMulMat, WritesOnlyThePanelsAskedFor) {
  Weights w = make_weights(DType::q4_0, 64, 40);
  const auto x = random_row(64 * 5, 9);
  const auto whole = product(kernels(), w, x, 5);
  Activations a = make_activations(kernels(), w.dtype, x, w.n_in, 5);
  std::vector<float> out(5 * 50, 123.0f);
  kernels().mul_mat(w.matrix(), 1, 3, a.data(), a.stride, 5, out.data(), 50);
  for (int64_t row = 0; row < 5; ++row) {
    EXPECT_EQ(out[static_cast<size_t>(row * 50 + 15)], 123.0f);
    EXPECT_TRUE(same_bits(out.data() + row * 50 + 16, whole.data() + row * 40 + 16, 24));
    EXPECT_EQ(out[static_cast<size_t>(row * 50 + 40)], 123.0f);
  }
}

TEST_P(KernelsMulMat, KeepsExtremeQuantisedValuesExact) {
  // Every weight and activation at the end of its range: where narrow integer accumulators would overflow.
  for (const DType dtype : {DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0, DType::q5_1, DType::q2_k, DType::q3_k,
                            DType::q4_k, DType::q5_k, DType::q6_k}) {
    const int64_t n_in = 256, n_out = 16;
    Weights w{dtype, n_in, n_out, {}, AlignedBytes(packed_bytes(dtype, n_in, n_out))};
    const auto row_bytes = tensor::row_bytes(dtype, 256);
    for (const unsigned fill : {0x00u, 0xffu, 0x80u, 0x7fu}) {
      std::vector<std::byte> rows(row_bytes * 16, static_cast<std::byte>(fill));
      const uint16_t one = 0x3c00;
      const uint32_t block_bytes = tensor::dtype_info(dtype).block_bytes;
      for (size_t at = 0; at < rows.size(); at += block_bytes)
        for (const size_t offset : half_offsets(dtype)) std::memcpy(&rows[at + offset], &one, 2);
      pack(dtype, n_in, rows.data(), 0, n_out, w.packed.data());
      std::vector<float> exact(static_cast<size_t>(n_in));
      tensor::dtype_info(dtype).dequantize(rows.data(), exact.data(), n_in);
      for (const float sign : {1.0f, -1.0f}) {
        std::vector<float> x(static_cast<size_t>(n_in), 127.0f * sign);
        double expected = 0;
        for (const float value : exact) expected += 127.0 * sign * value;
        const auto out = product(kernels(), w, x, 1);
        for (const float value : out) ASSERT_EQ(value, static_cast<float>(expected)) << tensor::dtype_name(dtype);
      }
    }
  }
}

TEST(KernelsMulMatScalar, IsCloseToDequantisedWeightsInDouble) {
  for (const DType dtype : kTypes) {
    const int64_t n_in = 768, n_out = 24;
    Weights w = make_weights(dtype, n_in, n_out);
    const auto x = random_row(n_in, 10);
    const auto out = product(scalar(), w, x, 1);
    double largest = 0;
    for (const float value : x) largest = std::max(largest, std::abs(static_cast<double>(value)));
    // Each int8 activation is off by at most half a step of max / 127, uniformly: the errors add up like a random walk
    // over sum(w^2); six deviations. Floats: one rounding of half an ulp per step of at most chunk length.
    for (int64_t j = 0; j < n_out; ++j) {
      double expected = 0, squares = 0, magnitudes = 0;
      for (int64_t k = 0; k < n_in; ++k) {
        const double weight = w.values[static_cast<size_t>(j * n_in + k)];
        expected += weight * x[static_cast<size_t>(k)];
        squares += weight * weight;
        magnitudes += std::abs(weight * x[static_cast<size_t>(k)]);
      }
      const double rounding = magnitudes * 80 * 6e-8;
      const double quantisation =
          activation_kind(dtype) == ActivationKind::q8 ? 6 * std::sqrt(squares / 12) * largest / 127 : 0.0;
      ASSERT_NEAR(out[static_cast<size_t>(j)], expected, rounding + quantisation) << tensor::dtype_name(dtype);
    }
  }
}

class KernelsQuantizeRow : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsQuantizeRow, ::testing::ValuesIn(supported_isas()), isa_test_name);

TEST_P(KernelsQuantizeRow, MatchesScalarAndItsOwnSums) {
  auto x = random_row(32 * 40, 11);
  std::fill(x.begin() + 32, x.begin() + 64, 0.0f);
  x[70] = std::numeric_limits<float>::infinity();
  x[100] = std::numeric_limits<float>::quiet_NaN();
  for (size_t i = 128; i < 160; ++i) x[i] *= 1e-38f;
  for (size_t i = 160; i < 192; ++i) x[i] = i % 2 == 0 ? 3e38f : -3e38f;
  for (size_t i = 192; i < 224; ++i) x[i] = (static_cast<float>(i) - 192.0f) * 0.5f;  // ties
  x[223] = 127.0f;
  MisalignedRow row(x);
  std::vector<ActivationBlock> expected(40), actual(40);
  scalar().quantize_row(x.data(), 32 * 40, expected.data());
  kernels().quantize_row(row.data(), 32 * 40, actual.data());
  for (size_t b = 0; b < 40; ++b) {
    const ActivationBlock &e = expected[b], &a = actual[b];
    ASSERT_EQ(std::memcmp(a.q, e.q, 32), 0) << b;
    ASSERT_TRUE(same_bits(&a.d, &e.d, 1) && same_bits(&a.d_sum, &e.d_sum, 1)) << b;
    int32_t sum = 0;
    for (const int8_t q : a.q) sum += q;
    ASSERT_EQ(a.sum, sum);
    ASSERT_EQ(a.half_sum[0] + a.half_sum[1], sum);
    ASSERT_EQ(a.minus_8_sum[0] + a.minus_8_sum[1], -8 * sum);
    ASSERT_EQ(a.minus_32_sum[0] + a.minus_32_sum[1], -32 * a.half_sum[0]);
    ASSERT_EQ(a.minus_32_sum[2] + a.minus_32_sum[3], -32 * a.half_sum[1]);
  }
  EXPECT_EQ(actual[1].d, 0.0f);
  EXPECT_TRUE(std::isnan(actual[2].d) && std::isnan(actual[3].d));
  EXPECT_EQ(actual[6].q[1], 0);  // 0.5 goes to the even neighbour
  EXPECT_EQ(actual[6].q[3], 2);  // 1.5 too
}

TEST_P(KernelsQuantizeRow, StaysWithinHalfAStep) {
  const auto x = random_row(32 * 16, 12);
  std::vector<ActivationBlock> blocks(16);
  kernels().quantize_row(x.data(), 32 * 16, blocks.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const ActivationBlock& block = blocks[i / 32];
    ASSERT_NEAR(x[i], block.d * static_cast<float>(block.q[i % 32]), block.d * 0.5001f);
  }
}

TEST(KernelsPack, FillsMissingRowsWithZeros) {
  for (const DType dtype : kTypes) {
    Weights w = make_weights(dtype, 256, 3);
    PackedMatrix all_rows = w.matrix();
    all_rows.n_out = 16;
    const auto x = random_row(256, 13);
    Activations a = make_activations(scalar(), dtype, x, 256, 1);
    float out[16];
    scalar().mul_mat(all_rows, 0, 1, a.data(), a.stride, 1, out, 16);
    for (int j = 3; j < 16; ++j) ASSERT_EQ(out[j], 0.0f) << tensor::dtype_name(dtype);
  }
}

TEST(KernelsPack, TakesNotMuchMoreThanTheFile) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0,
                            DType::q5_1, DType::q4_k, DType::q5_k, DType::q6_k}) {
    const auto file = static_cast<double>(tensor::row_bytes(dtype, 4096) * 4096);
    EXPECT_LE(static_cast<double>(packed_bytes(dtype, 4096, 4096)), 1.03 * file) << tensor::dtype_name(dtype);
  }
}

}  // namespace
}  // namespace caravan::device::cpu::testing
