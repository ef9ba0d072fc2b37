// Row operations: every instruction set gives the scalar kernels' bits at every length, and those are close to libm in
// double.
#include <algorithm>
#include <functional>
#include <limits>

#include "kernels_support.h"

namespace caravan::device::cpu::testing {
namespace {

constexpr int64_t kLengths[] = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 65, 288};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

class KernelsRowOps : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsRowOps, ::testing::ValuesIn(supported_isas()), isa_test_name);

// Calls op(kernels, x, y, n, out) with the scalar table and the tested one on misaligned rows, and compares; nothing
// may be written past the end. Then again in place.
using RowOp = std::function<void(const Kernels&, const float* x, const float* y, int64_t n, float* out)>;
void expect_same(const Kernels& kernels, const char* name, const RowOp& op, float deviation = 3.0f) {
  for (const int64_t n : kLengths) {
    const auto x = random_row(n, 1, deviation), y = random_row(n, 2);
    MisalignedRow x_row(x), y_row(y), out(std::vector<float>(static_cast<size_t>(n) + 1, 77.0f));
    std::vector<float> expected(y);
    std::copy(y.begin(), y.end(), out.data());
    op(scalar(), x.data(), y.data(), n, expected.data());
    op(kernels, x_row.data(), y_row.data(), n, out.data());
    ASSERT_TRUE(same_bits(out.data(), expected.data(), n)) << name << " n " << n;
    ASSERT_EQ(out.data()[n], 77.0f) << name << " wrote past n " << n;
    std::vector<float> in_place_expected(x);
    op(scalar(), in_place_expected.data(), y.data(), n, in_place_expected.data());
    op(kernels, x_row.data(), y_row.data(), n, x_row.data());
    ASSERT_TRUE(same_bits(x_row.data(), in_place_expected.data(), n)) << name << " in place, n " << n;
  }
}

TEST_P(KernelsRowOps, MatchScalarForEveryLength) {
  const Kernels& k = kernels();
  expect_same(k, "rms_norm", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.rms_norm(x, y, n, 1e-5f, o); });
  expect_same(k, "rms_norm, no w",
              [](auto& t, auto* x, auto*, auto n, auto* o) { t.rms_norm(x, nullptr, n, 1e-5f, o); });
  expect_same(k, "layer_norm", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.layer_norm(x, y, y, n, 1e-5f, o); });
  expect_same(k, "l2_norm", [](auto& t, auto* x, auto*, auto n, auto* o) { t.l2_norm(x, n, 1e-6f, o); });
  expect_same(k, "add", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.add(x, y, n, o); });
  expect_same(k, "sub", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.sub(x, y, n, o); });
  expect_same(k, "mul", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.mul(x, y, n, o); });
  expect_same(k, "div", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.div(x, y, n, o); });
  expect_same(k, "scale", [](auto& t, auto* x, auto*, auto n, auto* o) { t.scale(x, 0.37f, n, o); });
  expect_same(k, "add_scaled", [](auto& t, auto* x, auto*, auto n, auto* o) { t.add_scaled(x, 0.37f, n, o); });
  expect_same(k, "silu", [](auto& t, auto* x, auto*, auto n, auto* o) { t.silu(x, n, o); });
  expect_same(k, "gelu", [](auto& t, auto* x, auto*, auto n, auto* o) { t.gelu(x, n, o); });
  expect_same(k, "gelu_erf", [](auto& t, auto* x, auto*, auto n, auto* o) { t.gelu_erf(x, n, o); });
  expect_same(k, "gelu_quick", [](auto& t, auto* x, auto*, auto n, auto* o) { t.gelu_quick(x, n, o); });
  expect_same(k, "relu", [](auto& t, auto* x, auto*, auto n, auto* o) { t.relu(x, n, o); });
  expect_same(k, "sigmoid", [](auto& t, auto* x, auto*, auto n, auto* o) { t.sigmoid(x, n, o); });
  expect_same(k, "tanh", [](auto& t, auto* x, auto*, auto n, auto* o) { t.tanh(x, n, o); });
  expect_same(k, "exp", [](auto& t, auto* x, auto*, auto n, auto* o) { t.exp(x, n, o); }, 50.0f);
  expect_same(k, "softcap", [](auto& t, auto* x, auto*, auto n, auto* o) { t.softcap(x, 5.0f, n, o); }, 10.0f);
  expect_same(k, "silu_mul", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.silu_mul(x, y, n, o); });
  expect_same(k, "gelu_mul", [](auto& t, auto* x, auto* y, auto n, auto* o) { t.gelu_mul(x, y, n, o); });
  expect_same(k, "softmax", [](auto& t, auto* x, auto*, auto n, auto* o) { t.softmax(x, n, o); });
  for (const int64_t n : kLengths) {
    MisalignedRow x(random_row(n, 3)), y(random_row(n, 4));
    const float actual[3] = {k.sum(x.data(), n), k.dot(x.data(), y.data(), n), k.log_sum_exp(x.data(), n)};
    const float expected[3] = {scalar().sum(x.data(), n), scalar().dot(x.data(), y.data(), n),
                               scalar().log_sum_exp(x.data(), n)};
    ASSERT_TRUE(same_bits(actual, expected, 3)) << n;
  }
}

TEST_P(KernelsRowOps, MatchScalarOnExtremeValues) {
  const std::vector<float> x{0.0f,   -0.0f, kInfinity, -kInfinity, std::nanf(""), 1e-45f,  -1e-45f, 1e-39f,  3e38f,
                             -3e38f, 88.7f, 88.73f,    -87.4f,     -103.9f,       -104.1f, 0.625f,  -0.625f, 0.92f,
                             -0.92f, 5.0f,  -5.0f,     1e-20f,     12345.0f,      -20.0f,  -100.0f};
  const auto n = static_cast<int64_t>(x.size());
  std::vector<float> expected(x.size()), actual(x.size());
  for (const auto op : {&Kernels::exp, &Kernels::tanh, &Kernels::silu, &Kernels::gelu, &Kernels::gelu_erf,
                        &Kernels::sigmoid, &Kernels::relu, &Kernels::gelu_quick}) {
    (scalar().*op)(x.data(), n, expected.data());
    (kernels().*op)(x.data(), n, actual.data());
    ASSERT_TRUE(same_bits(actual.data(), expected.data(), n));
  }
  kernels().exp(x.data(), n, actual.data());
  EXPECT_EQ(actual[2], kInfinity);
  EXPECT_EQ(actual[3], 0.0f);
  EXPECT_TRUE(std::isnan(actual[4]));
}

TEST_P(KernelsRowOps, RopeMatchesScalarInBothPairings) {
  for (const auto pairing : {RopePairing::normal, RopePairing::neox})
    for (const int64_t head_dim : {8, 24, 64, 80})
      for (const int64_t n_rot : {head_dim, head_dim / 2, static_cast<int64_t>(6)}) {
        MisalignedRow x(random_row(3 * head_dim, 5)), c(random_row(n_rot / 2, 6)), s(random_row(n_rot / 2, 7));
        std::vector<float> expected(static_cast<size_t>(3 * head_dim)), actual(expected);
        scalar().rope(pairing, x.data(), 3, head_dim, n_rot, c.data(), s.data(), expected.data());
        kernels().rope(pairing, x.data(), 3, head_dim, n_rot, c.data(), s.data(), actual.data());
        ASSERT_TRUE(same_bits(actual.data(), expected.data(), 3 * head_dim)) << head_dim << " " << n_rot;
        kernels().rope(pairing, x.data(), 3, head_dim, n_rot, c.data(), s.data(), x.data());
        ASSERT_TRUE(same_bits(x.data(), expected.data(), 3 * head_dim)) << "in place";
      }
}

TEST(KernelsRowOpsScalar, RopeRotatesPairs) {
  const auto x = random_row(2 * 10, 8);
  const float angle[3] = {0.3f, 1.1f, -2.0f};
  float c[3], s[3];
  for (int i = 0; i < 3; ++i) c[i] = std::cos(angle[i]), s[i] = std::sin(angle[i]);
  for (const auto pairing : {RopePairing::normal, RopePairing::neox}) {
    std::vector<float> out(20);
    scalar().rope(pairing, x.data(), 2, 10, 6, c, s, out.data());
    for (size_t h = 0; h < 2; ++h) {
      for (size_t i = 0; i < 3; ++i) {
        const size_t first = h * 10 + (pairing == RopePairing::normal ? 2 * i : i);
        const size_t second = h * 10 + (pairing == RopePairing::normal ? 2 * i + 1 : i + 3);
        EXPECT_NEAR(out[first], x[first] * c[i] - x[second] * s[i], 1e-6);
        EXPECT_NEAR(out[second], x[first] * s[i] + x[second] * c[i], 1e-6);
      }
      for (size_t i = 6; i < 10; ++i) EXPECT_EQ(out[h * 10 + i], x[h * 10 + i]);
    }
  }
}

// Largest error of f against reference over a dense grid, relative to the reference plus absolute_part.
double largest_error(void (*f)(const float*, int64_t, float*), double (*reference)(double), double from, double to,
                     double absolute_part) {
  constexpr int64_t kCount = 200000;
  std::vector<float> x(kCount), y(kCount);
  for (int64_t i = 0; i < kCount; ++i)
    x[static_cast<size_t>(i)] = static_cast<float>(from + (to - from) * static_cast<double>(i) / kCount);
  f(x.data(), kCount, y.data());
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = reference(x[i]);
    worst = std::max(worst, std::abs(y[i] - expected) / (std::abs(expected) + absolute_part));
  }
  return worst;
}

// One ulp is at most 1.2e-7 relative. The absolute part stands for cancellation near zeros of the function and, for
// exp, for results below the normal range.
TEST(KernelsRowOpsScalar, ElementaryFunctionsAreWithinAFewUlpOfLibm) {
  const Kernels& k = scalar();
  EXPECT_LT(largest_error(k.exp, [](double x) { return std::exp(x); }, -104, 88.72, 1e-37), 2.4e-7);
  EXPECT_LT(largest_error(k.exp, [](double x) { return std::exp(x); }, -1, 1, 0), 1.8e-7);
  EXPECT_LT(largest_error(k.tanh, [](double x) { return std::tanh(x); }, -12, 12, 0), 3.6e-7);
  EXPECT_LT(largest_error(k.sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, -80, 80, 0), 3.6e-7);
  EXPECT_LT(largest_error(k.silu, [](double x) { return x / (1 + std::exp(-x)); }, -80, 80, 0), 3.6e-7);
  const auto gelu = [](double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  EXPECT_LT(largest_error(k.gelu, gelu, -4, 10, 1e-3), 1e-6);
  const auto gelu_erf = [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); };
  EXPECT_LT(largest_error(k.gelu_erf, gelu_erf, -8, 8, 1.0), 5e-7);
}

TEST(KernelsRowOpsScalar, NormsMatchTheirDefinitions) {
  const int64_t n = 300;
  const auto x = random_row(n, 9, 2.0f), w = random_row(n, 10), b = random_row(n, 11);
  double sum = 0, squares = 0;
  for (const float v : x) sum += v, squares += static_cast<double>(v) * v;
  const double mean = sum / n, variance = squares / n - mean * mean;
  std::vector<float> out(static_cast<size_t>(n));
  scalar().rms_norm(x.data(), w.data(), n, 1e-5f, out.data());
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], x[i] / std::sqrt(squares / n + 1e-5) * w[i], 3e-6);
  scalar().layer_norm(x.data(), w.data(), b.data(), n, 1e-5f, out.data());
  for (size_t i = 0; i < out.size(); ++i)
    ASSERT_NEAR(out[i], (x[i] - mean) / std::sqrt(variance + 1e-5) * w[i] + b[i], 3e-6);
  scalar().softmax(x.data(), n, out.data());
  double total = 0;
  for (const float v : x) total += std::exp(static_cast<double>(v));
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], std::exp(static_cast<double>(x[i])) / total, 1e-7);
  EXPECT_NEAR(scalar().log_sum_exp(x.data(), n), std::log(total), 1e-6);
}

TEST(KernelsRowOpsScalar, LogSumExpOfLargeAndInfiniteValues) {
  const std::vector<float> large{1e30f, 1e30f}, lower{-kInfinity, 2.5f}, upper{kInfinity, 2.5f}, none{-kInfinity};
  EXPECT_FLOAT_EQ(scalar().log_sum_exp(large.data(), 2), 1e30f);
  EXPECT_FLOAT_EQ(scalar().log_sum_exp(lower.data(), 2), 2.5f);
  EXPECT_EQ(scalar().log_sum_exp(upper.data(), 2), kInfinity);
  EXPECT_EQ(scalar().log_sum_exp(none.data(), 1), -kInfinity);
  const auto many = random_row(128256, 12);
  long double sum = 0;
  for (const float x : many) sum += std::exp(static_cast<long double>(x));
  EXPECT_NEAR(scalar().log_sum_exp(many.data(), 128256), static_cast<double>(std::log(sum)), 2e-6 * 12);
}

TEST(KernelsRowOpsScalar, SoftmaxGivesMaskedEntriesNothing) {
  const float x[5] = {1.0f, -kInfinity, 2.0f, -kInfinity, 1.5f};
  float out[5];
  scalar().softmax(x, 5, out);
  EXPECT_EQ(out[1], 0.0f);
  EXPECT_EQ(out[3], 0.0f);
  EXPECT_NEAR(out[0] + out[2] + out[4], 1.0f, 1e-6);
}

class KernelsTopK : public EveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isas, KernelsTopK, ::testing::ValuesIn(supported_isas()), isa_test_name);

TEST_P(KernelsTopK, OrdersByLogitThenById) {
  for (const int64_t n : {1, 5, 16, 17, 100, 1003}) {
    auto logits = random_row(n, 20);
    for (float& x : logits) x = std::round(x * 4);  // many ties
    std::vector<int32_t> order(static_cast<size_t>(n));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    });
    MisalignedRow row(logits);
    ASSERT_EQ(kernels().argmax(row.data(), n), order[0]);
    for (const int64_t k : {int64_t{1}, std::min<int64_t>(n, 40), n}) {
      std::vector<Candidate> out(static_cast<size_t>(k));
      kernels().top_k(row.data(), n, static_cast<int32_t>(k), out.data());
      for (size_t i = 0; i < out.size(); ++i) {
        ASSERT_EQ(out[i].id, order[i]) << "n " << n << " k " << k << " place " << i;
        ASSERT_EQ(out[i].logit, logits[static_cast<size_t>(order[i])]);
      }
    }
  }
}

TEST_P(KernelsTopK, RanksNanLast) {
  std::vector<float> logits(20, std::nanf(""));
  EXPECT_EQ(kernels().argmax(logits.data(), 20), 0);
  logits[7] = -5.0f;
  logits[18] = 3.0f;
  EXPECT_EQ(kernels().argmax(logits.data(), 20), 18);
  Candidate out[3];
  kernels().top_k(logits.data(), 20, 3, out);
  EXPECT_EQ(out[0].id, 18);
  EXPECT_EQ(out[1].id, 7);
  EXPECT_EQ(out[2].id, 0);
}

}  // namespace
}  // namespace caravan::device::cpu::testing
