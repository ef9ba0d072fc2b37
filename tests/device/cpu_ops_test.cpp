// Every op of the CPU device against a plain loop in double precision.
// Tolerances: element-wise kernels and norms are good to a few units in the last place of f32 (their exp, tanh and erf
// are polynomials within 4 ulp), hence 2e-6 relative plus 1e-6 absolute unless said otherwise.
#include <gtest/gtest.h>

#include <functional>
#include <numbers>
#include <numeric>

#include "base/error.h"
#include "device/cpu_harness.h"

namespace caravan::device::cpu::test {
namespace {

using graph::Activation;
using graph::RopePairing;
using graph::RopeParams;

using Doubles = std::vector<double>;

const graph::TensorMap kNoTensors;

void expect_close(const std::vector<float>& found, const Doubles& expected, double relative = 2e-6,
                  double absolute = 1e-6) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], absolute + relative * std::abs(expected[i])) << "element " << i;
}

// Runs build(b, hidden) on rows of x, with 1 thread and with 3 and more rows than threads or fewer; all must agree.
std::vector<float> run_unary(const std::function<ValueId(Builder&, ValueId)>& build, const std::vector<float>& x,
                             int64_t n_embd, const Model& model = {}) {
  Builder b(model.tensors);
  b.output("y", build(b, b.hidden(n_embd)));
  const Graph graph = b.finish();
  const auto one = compute(graph, model, hidden_batch(x, n_embd), 1)[0];
  EXPECT_EQ(one, compute(graph, model, hidden_batch(x, n_embd), 3)[0]);
  EXPECT_EQ(one, compute(graph, model, hidden_batch(x, n_embd), 7)[0]);
  return one;
}

Doubles map_values(const std::vector<float>& x, const std::function<double(double)>& f) {
  Doubles y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), [&](float value) { return f(value); });
  return y;
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}
double gelu_erf(double x) { return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2)); }

TEST(CpuUnary, MatchesDoublePrecisionForEveryFunction) {
  struct Case {
    std::string_view name;
    ValueId (Builder::*build)(ValueId);
    double (*reference)(double);
  };
  const Case cases[] = {
      {"silu", &Builder::silu, silu},
      {"gelu", &Builder::gelu, gelu},
      {"gelu_erf", &Builder::gelu_erf, gelu_erf},
      {"relu", &Builder::relu, [](double x) { return std::max(x, 0.0); }},
      {"tanh", &Builder::tanh, [](double x) { return std::tanh(x); }},
      {"sigmoid", &Builder::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }},
  };
  for (const Case& c : cases)
    for (const int64_t n : {1, 63, 64, 200}) {
      SCOPED_TRACE(c.name);
      const auto x = random_values(static_cast<size_t>(n * 2), static_cast<unsigned>(n), 3);
      expect_close(run_unary([&](Builder& b, ValueId v) { return (b.*c.build)(v); }, x, n), map_values(x, c.reference));
    }
}

TEST(CpuScale, MultipliesAndAdds) {
  const auto x = random_values(300, 1);
  expect_close(run_unary([](Builder& b, ValueId v) { return b.scale(v, 0.5F, 3); }, x, 100),
               map_values(x, [](double v) { return v * 0.5 + 3; }));
}

TEST(CpuClamp, BoundsBothSides) {
  const auto x = random_values(300, 2);
  expect_close(run_unary([](Builder& b, ValueId v) { return b.clamp(v, -0.5F, 0.25F); }, x, 100),
               map_values(x, [](double v) { return std::clamp(v, -0.5, 0.25); }));
}

TEST(CpuGated, MatchesDoublePrecisionForEveryActivation) {
  const auto x = random_values(5 * 200, 3, 2);
  const std::pair<Activation, double (*)(double)> cases[] = {
      {Activation::silu, silu},
      {Activation::gelu, gelu},
      {Activation::gelu_erf, gelu_erf},
      {Activation::relu, [](double v) { return std::max(v, 0.0); }}};
  for (const auto& [activation, reference] : cases) {
    const auto y = run_unary(
        [&](Builder& b, ValueId v) { return b.gated(b.slice(v, 0, 0, 100), b.slice(v, 0, 100, 100), activation); }, x,
        200);
    Doubles expected;
    for (size_t row = 0; row < 5; ++row)
      for (size_t i = 0; i < 100; ++i) expected.push_back(reference(x[row * 200 + i]) * x[row * 200 + 100 + i]);
    expect_close(y, expected, 4e-6);
  }
}

TEST(CpuBinary, RepeatsTheSecondOperandAlongEveryDimension) {
  Model model;
  model.add_random("row", DType::f32, {12, 1, 1, 1}, 4);
  model.add_random("third", DType::f32, {4, 1, 1, 1}, 5);
  model.add_random("scalar", DType::f32, {1, 1, 1, 1}, 6);
  model.add_random("heads", DType::f32, {1, 3, 1, 1}, 7);
  const auto x = random_values(12 * 5, 8);
  const auto& v = model.values;
  using Reference = std::function<double(double, size_t)>;
  const std::tuple<const char*, tensor::Shape, std::function<double(size_t)>> operands[] = {
      {"row", {12, 1, 1, 1}, [&](size_t i) { return v.at("row")[i % 12]; }},
      {"third", {4, 1, 1, 1}, [&](size_t i) { return v.at("third")[i % 4]; }},
      {"scalar", {1, 1, 1, 1}, [&](size_t) { return v.at("scalar")[0]; }},
      {"heads", {1, 3, 1, 1}, [&](size_t i) { return v.at("heads")[i % 12 / 4]; }},
  };
  for (const auto& [name, ne, operand] : operands) {
    const auto build = [&, &name = name, &ne = ne](auto member) {
      return [&, member](Builder& b, ValueId x_value) {
        const ValueId shaped = b.reshape(x_value, {4, 3, kRows});
        const ValueId weight = b.vector(name, ne);
        const bool flat = std::string_view(name) == "row";
        return (b.*member)(flat ? x_value : shaped, weight);
      };
    };
    SCOPED_TRACE(name);
    const std::pair<ValueId (Builder::*)(ValueId, ValueId), Reference> ops[] = {
        {&Builder::add, [&operand = operand](double a, size_t i) { return a + operand(i); }},
        {&Builder::mul, [&operand = operand](double a, size_t i) { return a * operand(i); }},
        {&Builder::div, [&operand = operand](double a, size_t i) { return a / operand(i); }},
    };
    for (const auto& [member, reference] : ops) {
      Doubles expected;
      for (size_t i = 0; i < x.size(); ++i) expected.push_back(reference(x[i], i));
      expect_close(run_unary(build(member), x, 12, model), expected);
    }
  }
}

TEST(CpuRmsNorm, DividesByTheRootMeanSquareAndScales) {
  Model model;
  model.add_random("w", DType::f32, {100, 1, 1, 1}, 9);
  const auto x = random_values(100 * 5, 10, 4);
  const auto y =
      run_unary([](Builder& b, ValueId v) { return b.rms_norm(v, b.vector("w", {100}), 1e-5F); }, x, 100, model);
  Doubles expected;
  for (size_t row = 0; row < 5; ++row) {
    double squares = 0;
    for (size_t i = 0; i < 100; ++i) squares += std::pow(double{x[row * 100 + i]}, 2);
    const double scale = 1 / std::sqrt(squares / 100 + 1e-5);
    for (size_t i = 0; i < 100; ++i) expected.push_back(x[row * 100 + i] * scale * model.values["w"][i]);
  }
  expect_close(y, expected);
}

TEST(CpuLayerNorm, SubtractsTheMeanAndScalesToUnitVariance) {
  Model model;
  model.add_random("w", DType::f32, {100, 1, 1, 1}, 11);
  model.add_random("b", DType::f32, {100, 1, 1, 1}, 12);
  const auto x = random_values(100 * 5, 13, 4);
  const auto y = run_unary(
      [](Builder& b, ValueId v) { return b.layer_norm(v, b.vector("w", {100}), b.vector("b", {100}), 1e-12F); }, x, 100,
      model);
  Doubles expected;
  for (size_t row = 0; row < 5; ++row) {
    const auto begin = x.begin() + static_cast<ptrdiff_t>(row * 100);
    const double mean = std::accumulate(begin, begin + 100, 0.0) / 100;
    double variance = 0;
    for (size_t i = 0; i < 100; ++i) variance += std::pow(begin[static_cast<ptrdiff_t>(i)] - mean, 2) / 100;
    for (size_t i = 0; i < 100; ++i)
      expected.push_back((x[row * 100 + i] - mean) / std::sqrt(variance + 1e-12) * model.values["w"][i] +
                         model.values["b"][i]);
  }
  expect_close(y, expected, 4e-6, 2e-6);
}

TEST(CpuSoftMax, ScalesMasksAndAddsSinks) {
  constexpr int64_t kN = 37, kM = 2, kHeads = 3;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Model model;
  std::vector<float> mask(kN * kM);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 5 == 0 ? -kInfinity : 0.1F * static_cast<float>(i % 3);
  model.add("mask", DType::f32, {kN, kM, 1, 1}, mask);
  model.add_random("sinks", DType::f32, {kHeads, 1, 1, 1}, 14);
  const auto x = random_values(kN * kM * kHeads * 2, 15, 3);
  for (const bool sinks : {false, true}) {
    const auto y = run_unary(
        [&](Builder& b, ValueId v) {
          return b.soft_max(b.reshape(v, {kN, kM, kHeads, kRows}), b.vector("mask", {kN, kM}), 0.5F,
                            sinks ? b.vector("sinks", {kHeads}) : graph::kNoValue);
        },
        x, kN * kM * kHeads, model);
    Doubles expected;
    for (size_t row = 0; row < x.size() / kN; ++row) {
      Doubles e;
      double sum = sinks ? std::exp(double{model.values["sinks"][row / kM % kHeads]}) : 0;
      for (size_t i = 0; i < kN; ++i) {
        e.push_back(std::exp(x[row * kN + i] * 0.5 + mask[row % kM * kN + i]));
        sum += e.back();
      }
      for (const double value : e) expected.push_back(value / sum);
    }
    expect_close(y, expected, 5e-6);
  }
}

TEST(CpuSoftMax, GivesZerosForARowThatIsMaskedEverywhere) {
  Model model;
  model.add("mask", DType::f32, {8, 1, 1, 1}, std::vector<float>(8, -std::numeric_limits<float>::infinity()));
  const auto y =
      run_unary([](Builder& b, ValueId v) { return b.soft_max(b.reshape(v, {8, 1, kRows}), b.vector("mask", {8})); },
                random_values(16, 16), 8, model);
  EXPECT_EQ(y, std::vector<float>(16, 0.0F));
}

TEST(CpuSumRows, AddsEveryRow) {
  const auto x = random_values(100 * 5, 17);
  const auto y = run_unary([](Builder& b, ValueId v) { return b.sum_rows(v); }, x, 100);
  Doubles expected;
  for (size_t row = 0; row < 5; ++row)
    expected.push_back(std::accumulate(x.begin() + static_cast<ptrdiff_t>(row * 100),
                                       x.begin() + static_cast<ptrdiff_t>(row * 100 + 100), 0.0));
  expect_close(y, expected, 1e-6, 1e-5);
}

TEST(CpuTopK, OrdersByValueThenByIndex) {
  Model model;
  model.add("ids", DType::f32, {1, 6, 1, 1}, {0, 1, 2, 3, 4, 5});
  const std::vector<float> x{1, 3, 2, 3, -1, 3, 0, 0, 0, 0, 0, 0};
  const auto indices = [&](const std::function<ValueId(Builder&, ValueId)>& sort) {
    return run_unary(
        [&](Builder& b, ValueId v) {
          // The indices as values: rows of a table of ids, the same for every row of the batch.
          const ValueId zeros = b.scale(v, 0);
          const ValueId table =
              b.reshape(b.add(b.reshape(zeros, {1, 6, kRows}), b.vector("ids", {1, 6})), {1, 6, kRows});
          return b.get_rows(table, sort(b, v));
        },
        x, 6, model);
  };
  EXPECT_EQ(indices([](Builder& b, ValueId v) { return b.top_k(v, 4); }), (std::vector<float>{1, 3, 5, 2, 0, 1, 2, 3}));
  EXPECT_EQ(indices([](Builder& b, ValueId v) { return b.argsort(v, graph::SortOrder::ascending); }),
            (std::vector<float>{4, 0, 2, 1, 3, 5, 0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(indices([](Builder& b, ValueId v) { return b.argsort(v, graph::SortOrder::descending); }),
            (std::vector<float>{1, 3, 5, 2, 0, 4, 0, 1, 2, 3, 4, 5}));
}

// ---- Rope ----------------------------------------------------------------------------------------------------------

// Angle and magnitude as the papers give them, written independently of the device's table.
struct RopeReference {
  RopeParams p;
  std::vector<float> factors;

  double ramp(int pair) const {
    const auto dimension = [&](double turns) {
      return p.n_rot * std::log(p.n_ctx_orig / (turns * 2 * std::numbers::pi)) / (2 * std::log(double{p.freq_base}));
    };
    const double low = std::max(0.0, std::floor(dimension(p.beta_fast)));
    const double high = std::min(p.n_rot - 1.0, std::ceil(dimension(p.beta_slow)));
    return 1 - std::min(1.0, std::max(0.0, (pair - low) / std::max(0.001, high - low)));
  }
  double angle(int position, int pair) const {
    double extrapolated = position * std::pow(double{p.freq_base}, -2.0 * pair / p.n_rot);
    if (!factors.empty()) extrapolated /= factors[static_cast<size_t>(pair)];
    const double interpolated = extrapolated * p.freq_scale;
    if (p.ext_factor == 0) return interpolated;
    const double mix = ramp(pair) * p.ext_factor;
    return interpolated * (1 - mix) + extrapolated * mix;
  }
  double magnitude(int position) const {
    double result = p.attn_factor;
    if (p.ext_factor != 0) result *= 1 + 0.1 * std::log(1 / double{p.freq_scale});
    if (p.temperature_scale == 0) return result;
    return result * (1 + p.temperature_scale * std::log(1.0 + position / p.temperature_length));
  }
};

TEST(CpuRope, RotatesPairsForEveryParameter) {
  constexpr int kHeadDim = 24, kHeads = 3, kRowsUsed = 5;
  Model model;
  model.add("factors", DType::f32, {8, 1, 1, 1}, {1, 1, 2, 2, 4, 4, 8, 8});
  const auto x = random_values(kHeadDim * kHeads * kRowsUsed, 18);
  std::vector<RopeParams> cases{
      {.n_rot = 16},
      {.n_rot = 24, .pairing = RopePairing::halves, .freq_base = 1e6F},
      {.n_rot = 16, .pairing = RopePairing::halves, .freq_scale = 0.25F},
      {.n_rot = 16, .freq_scale = 0.25F, .ext_factor = 1, .attn_factor = 1.5F, .n_ctx_orig = 64},
      {.n_rot = 24, .pairing = RopePairing::halves, .freq_scale = 0.1F, .ext_factor = 0.5F, .n_ctx_orig = 4096},
      {.n_rot = 24, .attn_factor = 0.5F, .temperature_scale = 0.1F, .temperature_length = 50},
  };
  for (const RopeParams& params : cases)
    for (const bool with_factors : {false, true}) {
      if (with_factors && params.n_rot != 16) continue;
      Builder b(model.tensors);
      const ValueId heads = b.reshape(b.hidden(kHeadDim * kHeads), {kHeadDim, kHeads, kRows});
      b.output("y", b.rope(heads, b.positions(), params, with_factors ? b.vector("factors", {8}) : graph::kNoValue));
      const Graph graph = b.finish();
      Batch batch = hidden_batch(x, kHeadDim * kHeads);
      batch.positions = {0, 1, 7, 100, 5000};
      const RopeReference reference{params, with_factors ? model.values["factors"] : std::vector<float>{}};
      Doubles expected(x.begin(), x.end());
      for (size_t row = 0; row < kRowsUsed; ++row)
        for (size_t head = 0; head < kHeads; ++head)
          for (int pair = 0; pair < params.n_rot / 2; ++pair) {
            const size_t base = (row * kHeads + head) * kHeadDim;
            const bool adjacent = params.pairing == RopePairing::adjacent;
            const size_t i = base + static_cast<size_t>(adjacent ? 2 * pair : pair);
            const size_t j = adjacent ? i + 1 : i + static_cast<size_t>(params.n_rot / 2);
            const double angle = reference.angle(batch.positions[row], pair);
            const double magnitude = reference.magnitude(batch.positions[row]);
            const double c = std::cos(angle) * magnitude, s = std::sin(angle) * magnitude;
            expected[i] = x[i] * c - x[j] * s;
            expected[j] = x[i] * s + x[j] * c;
          }
      const auto y = compute(graph, model, batch, 1)[0];
      expect_close(y, expected);
      EXPECT_EQ(y, compute(graph, model, batch, 3)[0]);
      EXPECT_EQ(y, compute(graph, model, batch, 8)[0]);
    }
}

// ---- Data movement -------------------------------------------------------------------------------------------------

TEST(CpuGetRows, DequantisesEmbeddingsOfEveryType) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::q4_0, DType::q4_k, DType::q6_k}) {
    SCOPED_TRACE(tensor::dtype_name(dtype));
    Model model;
    model.add_random("table", dtype, {256, 10, 1, 1}, 19);
    Builder b(model.tensors);
    b.output("y", b.get_rows(b.embedding("table", {256, 10}), b.tokens()));
    Batch batch;
    batch.tokens = {9, 0, 3, 3, 1};
    batch.n_rows = 5;
    const auto y = compute(b.finish(), model, batch, 3)[0];
    for (size_t row = 0; row < 5; ++row)
      for (size_t i = 0; i < 256; ++i)
        ASSERT_EQ(y[row * 256 + i], model.values["table"][static_cast<size_t>(batch.tokens[row]) * 256 + i]);
  }
}

TEST(CpuGetRows, SelectsTheWantedRows) {
  const auto x = random_values(6 * 5, 20);
  Builder b(kNoTensors);
  b.output("y", b.select_output_rows(b.scale(b.hidden(6), 1)));
  Batch batch = hidden_batch(x, 6);
  batch.output_rows = {1, 4};
  const auto y = compute(b.finish(), {}, batch)[0];
  EXPECT_EQ(y, (std::vector<float>{x[6], x[7], x[8], x[9], x[10], x[11], x[24], x[25], x[26], x[27], x[28], x[29]}));
}

TEST(CpuCont, WritesAPermutedViewInOrder) {
  const auto x = random_values(2 * 3 * 4, 21);
  Builder b(kNoTensors);
  b.output("y", b.cont(b.permute(b.reshape(b.hidden(6), {2, 3, kRows}), 2, 0, 1, 3)));  // [3, rows, 2]
  const auto y = compute(b.finish(), {}, hidden_batch(x, 6), 3)[0];
  for (size_t row = 0; row < 4; ++row)
    for (size_t j = 0; j < 3; ++j)
      for (size_t i = 0; i < 2; ++i) EXPECT_EQ(y[(i * 4 + row) * 3 + j], x[row * 6 + j * 2 + i]);
}

TEST(CpuConcat, JoinsAlongAnyDimension) {
  const auto x = random_values(6 * 4, 22);
  for (const int dim : {0, 1}) {
    Builder b(kNoTensors);
    const ValueId shaped = b.reshape(b.hidden(6), {2, 3, kRows});
    const ValueId part = b.slice(shaped, dim, 1, 1);
    b.output("y", b.concat(shaped, part, dim));
    const auto y = compute(b.finish(), {}, hidden_batch(x, 6), 3)[0];
    const size_t n0 = dim == 0 ? 3 : 2, n1 = dim == 0 ? 3 : 4;
    for (size_t row = 0; row < 4; ++row)
      for (size_t j = 0; j < n1; ++j)
        for (size_t i = 0; i < n0; ++i)
          EXPECT_EQ(y[(row * n1 + j) * n0 + i], x[row * 6 + (j == 3 ? 1 : j) * 2 + (i == 2 ? 1 : i)]);
  }
}

// ---- Products ------------------------------------------------------------------------------------------------------

// y = W x in double, and per element how far int8 activations may take it: every activation is rounded to a multiple of
// max|block| / 127, so it is off by at most max|block| / 254, times |w|; 1% more and 1e-5 of the magnitudes for f32.
struct Product {
  Doubles y, bound;
};
Product multiply(const float* w, const float* x, int64_t n_in, int64_t n_out, int64_t n_rows, bool int8) {
  Product product;
  for (int64_t row = 0; row < n_rows; ++row)
    for (int64_t j = 0; j < n_out; ++j) {
      double sum = 0, bound = 0;
      for (int64_t k = 0; k < n_in; ++k) {
        sum += double{w[j * n_in + k]} * x[row * n_in + k];
        double largest = 0;
        if (int8)
          for (int64_t i = k / 32 * 32; i < k / 32 * 32 + 32; ++i)
            largest = std::max(largest, std::abs(double{x[row * n_in + i]}));
        bound += std::abs(double{w[j * n_in + k]}) * (largest / 254 * 1.01 + 1e-5 * std::abs(x[row * n_in + k]));
      }
      product.y.push_back(sum);
      product.bound.push_back(bound + 1e-6);
    }
  return product;
}

constexpr DType kMatrixTypes[] = {DType::f32,  DType::f16,  DType::bf16, DType::q8_0,   DType::q4_0,
                                  DType::q4_k, DType::q6_k, DType::q2_k, DType::iq4_xs, DType::mxfp4};

TEST(CpuMulMat, MatchesDoublePrecisionForEveryType) {
  for (const DType dtype : kMatrixTypes)
    for (const int64_t n_out : {1, 16, 37}) {
      SCOPED_TRACE(tensor::dtype_name(dtype));
      Model model;
      model.add_random("w", dtype, {256, n_out, 1, 1}, 23);
      const auto x = random_values(256 * 5, 24);
      const auto y =
          run_unary([&](Builder& b, ValueId v) { return b.mul_mat(b.matrix("w", {256, n_out}), v); }, x, 256, model);
      const Product expected =
          multiply(model.values["w"].data(), x.data(), 256, n_out, 5, activation_kind(dtype) == ActivationKind::q8);
      for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected.y[i], expected.bound[i]) << "element " << i;
    }
}

TEST(CpuMulMat, GivesARowTheSameBitsAloneAndAmongOthers) {
  for (const DType dtype : kMatrixTypes) {
    Model model;
    model.add_random("w", dtype, {256, 40, 1, 1}, 25);
    Builder b(model.tensors);
    b.output("y", b.mul_mat(b.matrix("w", {256, 40}), b.hidden(256)));
    const Graph graph = b.finish();
    const auto x = random_values(256 * 67, 26);
    const auto all = compute(graph, model, hidden_batch(x, 256), 3)[0];
    for (const size_t row : {0, 1, 33, 66}) {
      const std::vector<float> alone(x.begin() + static_cast<ptrdiff_t>(row * 256),
                                     x.begin() + static_cast<ptrdiff_t>(row * 256 + 256));
      const auto one = compute(graph, model, hidden_batch(alone, 256))[0];
      EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + static_cast<ptrdiff_t>(row * 40)))
          << tensor::dtype_name(dtype) << ", row " << row;
    }
  }
}

TEST(CpuMulMat, RepeatsAComputedFirstOperandOverHeads) {
  // Scores of 4 query heads against 2 key heads, all rows against all rows.
  constexpr size_t kDim = 12;
  const auto x = random_values(kDim * 6 * 5, 27);
  const auto y = run_unary(
      [](Builder& b, ValueId v) {
        const ValueId heads = b.reshape(v, {kDim, 6, kRows});
        const ValueId k = b.permute(b.slice(heads, 1, 4, 2), 0, 2, 1, 3),
                      q = b.permute(b.slice(heads, 1, 0, 4), 0, 2, 1, 3);
        return b.mul_mat(k, q);  // [rows, rows, 4]
      },
      x, kDim * 6);
  Doubles expected;
  for (size_t head = 0; head < 4; ++head)
    for (size_t i = 0; i < 5; ++i)
      for (size_t j = 0; j < 5; ++j) {
        double sum = 0;
        for (size_t k = 0; k < kDim; ++k)
          sum += double{x[(i * 6 + head) * kDim + k]} * x[(j * 6 + 4 + head / 2) * kDim + k];
        expected.push_back(sum);
      }
  expect_close(y, expected, 2e-6, 1e-5);
}

TEST(CpuMulMat, MultipliesEachHeadByItsOwnMatrix) {
  constexpr int64_t kDim = 64, kHeads = 3, kOut = 40;
  for (const DType dtype : {DType::f32, DType::f16, DType::q8_0}) {
    SCOPED_TRACE(tensor::dtype_name(dtype));
    Model model;
    model.add_random("w", dtype, {kDim, kOut, kHeads, 1}, 28);
    const auto x = random_values(kDim * kHeads * 7, 29);
    const auto y = run_unary(
        [](Builder& b, ValueId v) {
          const ValueId heads = b.permute(b.reshape(v, {kDim, kHeads, kRows}), 0, 2, 1, 3);  // [dim, rows, heads]
          return b.mul_mat(b.matrix("w", {kDim, kOut, kHeads}), heads);
        },
        x, kDim * kHeads, model);
    std::vector<float> expected;
    for (int64_t head = 0; head < kHeads; ++head)
      for (int64_t row = 0; row < 7; ++row)
        for (int64_t out = 0; out < kOut; ++out) {
          double sum = 0;
          for (int64_t k = 0; k < kDim; ++k)
            sum += double{model.values["w"][static_cast<size_t>((head * kOut + out) * kDim + k)]} *
                   x[static_cast<size_t>((row * kHeads + head) * kDim + k)];
          expected.push_back(static_cast<float>(sum));
        }
    EXPECT_LT(nmse(y, expected), dtype == DType::q8_0 ? 1e-4 : 1e-12);
  }
}

// ---- Encoder attention ---------------------------------------------------------------------------------------------

TEST(CpuEncoderAttention, LetsEveryRowSeeItsOwnTextOnly) {
  constexpr size_t kDim = 16, kHeads = 4, kHeadsKv = 2, kWidth = kDim * (kHeads + 2 * kHeadsKv);
  const std::vector<int32_t> lengths{5, 1, 40, 3};
  size_t n = 0;
  Batch::Group group;
  for (const int32_t length : lengths) {
    for (int32_t i = 0; i < length; ++i) {
      group.from.push_back(static_cast<int32_t>(n));
      group.to.push_back(static_cast<int32_t>(n) + length);
    }
    n += static_cast<size_t>(length);
  }
  const auto x = random_values(kWidth * n, 37);
  Batch batch = hidden_batch(x, kWidth);
  batch.groups = {group};
  for (const float softcap : {0.0F, 2.0F}) {
    Builder b(kNoTensors);
    const ValueId heads = b.reshape(b.hidden(kWidth), {kDim, kHeads + 2 * kHeadsKv, kRows});
    b.output("y",
             b.encoder_attention(b.slice(heads, 1, 0, kHeads), b.slice(heads, 1, kHeads, kHeadsKv),
                                 b.slice(heads, 1, kHeads + kHeadsKv, kHeadsKv), {.scale = 0.25F, .softcap = softcap}));
    const Graph graph = b.finish();
    Doubles expected;
    for (size_t row = 0; row < n; ++row)
      for (size_t head = 0; head < kHeads; ++head) {
        const auto element = [&](size_t r, size_t h, size_t i) { return double{x[r * kWidth + h * kDim + i]}; };
        Doubles sums(kDim);
        double total = 0;
        for (auto other = static_cast<size_t>(group.from[row]); other < static_cast<size_t>(group.to[row]); ++other) {
          double score = 0;
          for (size_t i = 0; i < kDim; ++i) score += element(row, head, i) * element(other, kHeads + head / 2, i);
          score *= 0.25;
          if (softcap != 0) score = softcap * std::tanh(score / softcap);
          const double e = std::exp(score);
          total += e;
          for (size_t i = 0; i < kDim; ++i) sums[i] += e * element(other, kHeads + kHeadsKv + head / 2, i);
        }
        for (const double sum : sums) expected.push_back(sum / total);
      }
    const auto y = compute(graph, {}, batch, 1)[0];
    expect_close(y, expected, 1e-5, 1e-5);
    EXPECT_EQ(y, compute(graph, {}, batch, 4)[0]);
    EXPECT_LT(nmse(compute(graph::lower(graph), {}, batch, 2)[0], y), 1e-12);
  }
}

// ---- What the CPU refuses ------------------------------------------------------------------------------------------

TEST(CpuPlanning, RefusesStridedRowsByName) {
  Builder b(kNoTensors);
  b.output("y", b.silu(b.permute(b.reshape(b.hidden(6), {2, 3, kRows}), 1, 0, 2, 3)));
  const Graph graph = b.finish();
  try {
    compute(graph, {}, hidden_batch(random_values(12, 1), 6));
    FAIL() << "no error";
  } catch (const NotSupportedError& error) {
    EXPECT_STREQ(error.what(), "CPU: node 2 (silu): rows of an operand are not contiguous; use cont");
  }
}

}  // namespace
}  // namespace caravan::device::cpu::test
