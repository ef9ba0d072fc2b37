// The mixture of experts in all its variants: against a plain loop in double precision and against its lowering.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include "base/error.h"
#include "device/cpu_harness.h"

namespace caravan::device::cpu::test {
namespace {

using graph::Activation;
using graph::GateUp;
using graph::Gating;
using graph::MoeParams;
using graph::MoeVector;
using graph::WeightNorm;
using Doubles = std::vector<double>;

constexpr int64_t kEmbd = 256, kFf = 288, kExperts = 8, kUsed = 3;

// A row's computation: parameters, and which optional operands there are.
struct Variant {
  std::string name;
  MoeParams params;
  bool fused = false;
  std::vector<MoeVector> vectors;
};

std::string tensor_of(MoeVector vector) {
  constexpr const char* kNames[] = {"selection_bias", "gate_scale", "gate_bias", "up_scale",
                                    "up_bias",        "down_scale", "down_bias"};
  return kNames[static_cast<size_t>(vector)];
}

graph::Dims shape_of(MoeVector vector, bool fused) {
  switch (vector) {
    case MoeVector::gate_bias:
      return {fused ? 2 * kFf : kFf, kExperts, 1, 1};
    case MoeVector::up_bias:
      return {kFf, kExperts, 1, 1};
    case MoeVector::down_bias:
      return {kEmbd, kExperts, 1, 1};
    default:
      return {kExperts, 1, 1, 1};
  }
}

Model expert_model(DType dtype, const Variant& variant) {
  Model model;
  // Inner width 288 is no multiple of 256: K-quants of the down matrix fall back to Q8_0, as in real files.
  const bool k_quant = tensor::dtype_info(dtype).block_length == 256;
  model.add_random("router", DType::f32, {kEmbd, kExperts, 1, 1}, 30, 0.1F);
  model.add_random("gate", dtype, {kEmbd, variant.fused ? 2 * kFf : kFf, kExperts, 1}, 31, 0.2F);
  if (!variant.fused) model.add_random("up", dtype, {kEmbd, kFf, kExperts, 1}, 32, 0.2F);
  model.add_random("down", k_quant ? DType::q8_0 : dtype, {kFf, kEmbd, kExperts, 1}, 33, 0.1F);
  unsigned seed = 34;
  for (const MoeVector vector : variant.vectors) {
    const float spread = vector == MoeVector::selection_bias ? 0.2F : 1;
    model.add_random(tensor_of(vector), DType::f32, shape_of(vector, variant.fused), seed++, spread);
  }
  return model;
}

Graph expert_graph(const Model& model, const Variant& variant, int64_t rows = kRows) {
  Builder b(model.tensors);
  ValueId x = b.hidden(kEmbd);
  if (rows != kRows) x = b.select_output_rows(x);
  const ValueId logits = b.mul_mat(b.matrix("router", {kEmbd, kExperts}), x);
  Builder::MoeVectors vectors = Builder::no_moe_vectors();
  for (const MoeVector vector : variant.vectors)
    vectors[static_cast<size_t>(vector)] = b.vector(tensor_of(vector), shape_of(vector, variant.fused));
  const ValueId gate = b.matrix("gate", {kEmbd, variant.fused ? 2 * kFf : kFf, kExperts});
  const ValueId up = variant.fused ? graph::kNoValue : b.matrix("up", {kEmbd, kFf, kExperts});
  b.output("y", b.moe(x, logits, gate, up, b.matrix("down", {kFf, kEmbd, kExperts}), variant.params, vectors));
  return b.finish();
}

// The same in double precision, for one row.
class Reference {
 public:
  Reference(Model& model, const Variant& variant) : model_(model), variant_(variant) {}

  Doubles row(const float* x) const {
    const MoeParams& p = variant_.params;
    const Doubles input(x, x + kEmbd);
    const Doubles probabilities = probabilities_of(product("router", input, 0));
    const std::vector<size_t> order = choice(probabilities);
    Doubles shares;
    for (size_t i = 0; i < kUsed; ++i) shares.push_back(probabilities[order[i]]);
    if (p.gating == Gating::softmax_over_selected) shares = soft_max(shares);
    const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
    Doubles y(kEmbd);
    for (size_t i = 0; i < kUsed; ++i) {
      Doubles gate = biased("gate", input, order[i]), up;
      if (variant_.fused) {
        up.assign(gate.begin() + kFf, gate.end());
        gate.resize(kFf);
      } else {
        up = biased("up", input, order[i]);
      }
      for (size_t j = 0; j < gate.size(); ++j) gate[j] = gated(gate[j], up[j]);
      const Doubles down = biased("down", gate, order[i]);
      const double share = shares[i] / (p.weight_norm == WeightNorm::sum_to_one ? sum : 1) * p.weight_scale;
      for (size_t j = 0; j < y.size(); ++j) y[j] += down[j] * share;
    }
    return y;
  }

 private:
  static Doubles soft_max(Doubles v) {
    double sum = 0;
    for (double& e : v) sum += e = std::exp(e);
    for (double& e : v) e /= sum;
    return v;
  }

  Doubles product(const std::string& name, const Doubles& in, size_t expert) const {
    const auto n_in = in.size(), n_out = static_cast<size_t>(model_.tensors[name].ne[1]);
    const std::vector<float>& w = model_.values[name];
    Doubles out;
    for (size_t j = 0; j < n_out; ++j) {
      double sum = 0;
      for (size_t k = 0; k < n_in; ++k) sum += w[(expert * n_out + j) * n_in + k] * in[k];
      out.push_back(sum);
    }
    return out;
  }

  Doubles biased(const std::string& name, const Doubles& in, size_t expert) const {
    Doubles y = product(name, in, expert);
    if (model_.values.contains(name + "_scale"))
      for (double& v : y) v *= model_.values[name + "_scale"][expert];
    if (model_.values.contains(name + "_bias"))
      for (size_t j = 0; j < y.size(); ++j) y[j] += model_.values[name + "_bias"][expert * y.size() + j];
    return y;
  }

  Doubles probabilities_of(Doubles logits) const {
    if (variant_.params.gating == Gating::softmax) return soft_max(logits);
    if (variant_.params.gating == Gating::sigmoid)
      for (double& v : logits) v = 1 / (1 + std::exp(-v));
    return logits;
  }

  // Experts from the best to the worst; those of excluded groups at the end.
  std::vector<size_t> choice(const Doubles& probabilities) const {
    const MoeParams& p = variant_.params;
    Doubles ranked = probabilities;
    if (model_.values.contains("selection_bias"))
      for (size_t i = 0; i < ranked.size(); ++i) ranked[i] += model_.values["selection_bias"][i];
    const auto size = static_cast<size_t>(kExperts / p.n_group);
    std::vector<std::pair<double, size_t>> groups;
    for (size_t group = 0; p.n_group > 1 && group < static_cast<size_t>(p.n_group); ++group) {
      Doubles members(ranked.begin() + static_cast<ptrdiff_t>(group * size),
                      ranked.begin() + static_cast<ptrdiff_t>((group + 1) * size));
      std::sort(members.rbegin(), members.rend());
      groups.emplace_back(members[0] + members[1], group);
    }
    std::sort(groups.rbegin(), groups.rend());
    for (size_t i = static_cast<size_t>(p.n_group_used); i < groups.size(); ++i)
      for (size_t j = 0; j < size; ++j) ranked[groups[i].second * size + j] = -1e9;
    std::vector<size_t> order(kExperts);
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ranked[a] > ranked[b]; });
    return order;
  }

  double gated(double gate, double up) const {
    switch (variant_.params.activation) {
      case Activation::gelu: {
        const double inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate);
        return gate / 2 * (1 + std::tanh(inner)) * up;
      }
      case Activation::swiglu_oai: {
        const double g = std::min(gate, 7.0), u = std::clamp(up, -7.0, 7.0);
        return g / (1 + std::exp(-1.702 * g)) * (u + 1);
      }
      default:
        return gate / (1 + std::exp(-gate)) * up;
    }
  }

  Model& model_;
  const Variant& variant_;
};

std::vector<Variant> variants() {
  const std::vector<MoeVector> biases{MoeVector::gate_bias, MoeVector::up_bias, MoeVector::down_bias};
  const std::vector<MoeVector> scales{MoeVector::gate_scale, MoeVector::up_scale, MoeVector::down_scale};
  std::vector<MoeVector> all{MoeVector::selection_bias};
  all.insert(all.end(), scales.begin(), scales.end());
  all.insert(all.end(), biases.begin(), biases.end());
  MoeParams base;
  base.n_expert_used = kUsed;
  std::vector<Variant> list;
  for (const auto gating : {Gating::softmax, Gating::sigmoid, Gating::softmax_over_selected})
    for (const auto norm : {WeightNorm::none, WeightNorm::sum_to_one}) {
      MoeParams params = base;
      params.gating = gating;
      params.weight_norm = norm;
      params.weight_scale = 1.5F;
      list.push_back({"gating " + std::to_string(list.size()), params, false, {}});
      params.activation = Activation::gelu;
      list.push_back({"biased gating " + std::to_string(list.size()), params, false, {MoeVector::selection_bias}});
    }
  list.push_back({"biases", base, false, biases});
  list.push_back({"scales", base, false, scales});
  list.push_back({"everything", base, false, all});
  list.push_back({"fused", base, true, {}});
  list.push_back({"fused with scales and biases",
                  base,
                  true,
                  {MoeVector::gate_scale, MoeVector::gate_bias, MoeVector::down_scale, MoeVector::down_bias}});
  MoeParams oai = base;
  oai.activation = Activation::swiglu_oai;
  oai.gating = Gating::softmax_over_selected;
  oai.weight_norm = WeightNorm::none;
  list.push_back({"gpt-oss", oai, false, biases});
  MoeParams grouped = base;
  grouped.gating = Gating::sigmoid;
  grouped.n_group = 4;
  grouped.n_group_used = 2;
  list.push_back({"groups", grouped, false, {}});
  list.push_back({"deepseek-v3", grouped, true, {MoeVector::selection_bias}});
  return list;
}

TEST(CpuMoe, MatchesDoublePrecisionInEveryVariant) {
  const auto x = random_values(kEmbd * 9, 35, 2);
  for (const Variant& variant : variants()) {
    SCOPED_TRACE(variant.name);
    Model model = expert_model(DType::f32, variant);
    const Graph graph = expert_graph(model, variant);
    std::vector<float> expected;
    for (size_t row = 0; row < 9; ++row)
      for (const double v : Reference(model, variant).row(x.data() + row * kEmbd))
        expected.push_back(static_cast<float>(v));
    const auto y = compute(graph, model, hidden_batch(x, kEmbd), 1)[0];
    EXPECT_LT(nmse(y, expected), 1e-11);
    EXPECT_EQ(y, compute(graph, model, hidden_batch(x, kEmbd), 4)[0]);
    // Lowered, the weighted sum rounds after the multiplication too.
    EXPECT_LT(nmse(compute(graph::lower(graph), model, hidden_batch(x, kEmbd), 2)[0], y), 1e-11);
  }
}

TEST(CpuMoe, IsCloseToDoublePrecisionWithQuantisedExpertsAndEqualAloneAndInABatch) {
  for (const DType dtype :
       {DType::f16, DType::q8_0, DType::q4_0, DType::q4_k, DType::q2_k, DType::iq4_nl, DType::mxfp4})
    for (const bool fused : {false, true}) {
      SCOPED_TRACE(std::string(tensor::dtype_name(dtype)) + (fused ? " fused" : ""));
      MoeParams params;
      params.n_expert_used = kUsed;
      const Variant variant{"", params, fused, {MoeVector::gate_bias, MoeVector::down_bias}};
      Model model = expert_model(dtype, variant);
      const Graph graph = expert_graph(model, variant);
      const auto x = random_values(kEmbd * 40, 36);
      const auto all = compute(graph, model, hidden_batch(x, kEmbd), 3)[0];
      EXPECT_LT(nmse(compute(graph::lower(graph), model, hidden_batch(x, kEmbd), 2)[0], all), 1e-11);
      for (const size_t row : {0, 17, 39}) {
        const std::vector<float> input(x.begin() + static_cast<ptrdiff_t>(row * kEmbd),
                                       x.begin() + static_cast<ptrdiff_t>(row * kEmbd + kEmbd));
        const auto alone = compute(graph, model, hidden_batch(input, kEmbd), 5)[0];
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<ptrdiff_t>(row * kEmbd)));
        const Doubles reference = Reference(model, variant).row(input.data());
        // int8 activations are off by about 0.4% of a block's spread, twice in a row.
        EXPECT_LT(nmse(alone, std::vector<float>(reference.begin(), reference.end())), 2e-4);
      }
    }
}

TEST(CpuMoe, ComputesOnlyTheRowsForWhichOutputIsWanted) {
  const Variant variant = variants().back();
  const Model model = expert_model(DType::f32, variant);
  const auto x = random_values(kEmbd * 9, 37);
  const auto all = compute(expert_graph(model, variant), model, hidden_batch(x, kEmbd), 2)[0];
  Batch batch = hidden_batch(x, kEmbd);
  batch.output_rows = {2, 8};
  const Graph graph = expert_graph(model, variant, graph::kOutputRows);
  const auto some = compute(graph, model, batch, 2)[0];
  ASSERT_EQ(some.size(), 2U * kEmbd);
  EXPECT_TRUE(std::equal(some.begin(), some.begin() + kEmbd, all.begin() + 2 * kEmbd));
  EXPECT_TRUE(std::equal(some.begin() + kEmbd, some.end(), all.begin() + 8 * kEmbd));
  EXPECT_LT(nmse(compute(graph::lower(graph), model, batch, 2)[0], some), 1e-11);
}

TEST(CpuMoe, RefusesGroupsThatDoNotDivideTheExperts) {
  Variant variant = variants().front();
  for (const auto& [n_group, n_used] : {std::pair{3, 1}, {4, 5}, {8, 4}, {4, 1}}) {
    variant.params.n_group = n_group;
    variant.params.n_group_used = n_used;
    const Model model = expert_model(DType::f32, variant);
    EXPECT_THROW(expert_graph(model, variant), FormatError) << n_group << " groups";
  }
}

}  // namespace
}  // namespace caravan::device::cpu::test
