#include "server/ranking_head.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "gguf/reader.h"

namespace caravan::server {
namespace {

std::optional<Linear> load_linear(const gguf::Model& model, const std::string& name, uint32_t n_in) {
  const gguf::TensorInfo* weight = model.find(name + ".weight");
  if (weight == nullptr) return std::nullopt;
  if (weight->ne[0] != n_in || weight->ne[1] < 1 || weight->ne[2] != 1 || weight->ne[3] != 1)
    throw FormatError(fmt::format("{}: tensor '{}': expected rows of {} values, found {} x {}", model.path(),
                                  weight->name, n_in, weight->ne[0], weight->ne[1]));
  Linear linear;
  linear.n_in = n_in;
  linear.n_out = static_cast<uint32_t>(weight->ne[1]);
  linear.weight = model.read_f32(*weight);
  if (const gguf::TensorInfo* bias = model.find(name + ".bias")) {
    if (bias->ne[0] != linear.n_out)
      throw FormatError(fmt::format("{}: tensor '{}': expected {} values, found {}", model.path(), bias->name,
                                    linear.n_out, bias->ne[0]));
    linear.bias = model.read_f32(*bias);
  }
  return linear;
}

}  // namespace

std::vector<float> Linear::apply(std::span<const float> x) const {
  CARAVAN_ASSERT(x.size() == n_in, "a head fits the model it was read with");
  std::vector<float> y(n_out);
  for (uint32_t row = 0; row < n_out; ++row) {
    double sum = bias.empty() ? 0.0 : bias[row];
    for (uint32_t i = 0; i < n_in; ++i) sum += double{weight[size_t{row} * n_in + i]} * x[i];
    y[row] = static_cast<float>(sum);
  }
  return y;
}

float RankingHead::score(std::span<const float> pooled) const {
  std::vector<float> values(pooled.begin(), pooled.end());
  if (dense) {
    values = dense->apply(values);
    for (float& value : values) value = std::tanh(value);
  }
  if (output) values = output->apply(values);
  if (!softmax) return values.front();
  const float largest = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const float value : values) sum += std::exp(double{value} - largest);
  return static_cast<float>(std::exp(double{values.front()} - largest) / sum);
}

std::optional<RankingHead> RankingHead::load(const gguf::Model& model, uint32_t n_embd) {
  RankingHead head;
  head.dense = load_linear(model, "cls", n_embd);
  head.output = load_linear(model, "cls.output", head.dense ? head.dense->n_out : n_embd);
  if (!head.dense && !head.output) return std::nullopt;
  head.softmax = model.metadata().get_string("general.architecture") == "qwen3";
  return head;
}

}  // namespace caravan::server
