#include "support/reference_evaluator.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <stdexcept>

namespace caravan::testing {
namespace {

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}

void add(std::vector<Row>& a, const std::vector<Row>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[i].size(); ++j) a[i][j] += b[i][j];
  }
}

Row soft_max(Row x) {
  const double largest = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp(value - largest);
  for (double& value : x) value /= sum;
  return x;
}

}  // namespace

ReferenceEvaluator::ReferenceEvaluator(const std::filesystem::path& path)
    : model_(gguf::Model::open(path)), arch_(model_.metadata().get_string("general.architecture")) {
  n_layer_ = static_cast<size_t>(number("block_count", 0));
  n_head_ = static_cast<size_t>(number("attention.head_count", 0));
  n_head_kv_ = static_cast<size_t>(number("attention.head_count_kv", static_cast<double>(n_head_)));
  const double head_dim = number("embedding_length", 0) / static_cast<double>(n_head_);
  head_dim_k_ = static_cast<size_t>(number("attention.key_length", head_dim));
  head_dim_v_ = static_cast<size_t>(number("attention.value_length", head_dim));
  eps_ = number(arch_ == "bert" ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 0);
}

double ReferenceEvaluator::number(const std::string& key, double default_value) const {
  const auto value = model_.metadata().find_f32(arch_ + "." + key);
  return value ? static_cast<double>(*value) : default_value;
}

std::vector<float> ReferenceEvaluator::tensor(const std::string& name) const {
  return model_.read_f32(model_.get(name));
}

Row ReferenceEvaluator::lookup(const std::string& name, int32_t row) const {
  const auto n = static_cast<size_t>(model_.get(name).ne[0]);
  const std::vector<float> table = tensor(name);
  const auto begin = table.begin() + static_cast<ptrdiff_t>(n) * row;
  return Row(begin, begin + static_cast<ptrdiff_t>(n));
}

// y = W x * scale + bias (feed-forward: (W x + bias) * scale, as llama.cpp has it), for matrix `expert` of a stack of
// them.
std::vector<Row> ReferenceEvaluator::linear(const std::string& name, const Rows& x, size_t expert) const {
  const gguf::TensorInfo& info = model_.get(name + ".weight");
  const auto n_in = static_cast<size_t>(info.ne[0]), n_out = static_cast<size_t>(info.ne[1]);
  const std::vector<float> w = tensor(name + ".weight");
  const double scale = has(name + ".scale") ? static_cast<double>(tensor(name + ".scale")[expert]) : 1;
  const std::vector<float> bias = has(name + ".bias") ? tensor(name + ".bias") : std::vector<float>(n_out, 0);
  const bool is_ffn = name.find("ffn_") != std::string::npos;
  Rows y(x.size(), Row(n_out));
  for (size_t row = 0; row < x.size(); ++row) {
    for (size_t out = 0; out < n_out; ++out) {
      const float* weights = &w[(expert * n_out + out) * n_in];
      double sum = 0;
      for (size_t in = 0; in < n_in; ++in) sum += static_cast<double>(weights[in]) * x[row][in];
      const auto b = static_cast<double>(bias[out]);
      y[row][out] = is_ffn ? (sum + b) * scale : sum * scale + b;
    }
  }
  return y;
}

std::vector<Row> ReferenceEvaluator::rms_norm(const std::string& name, const Rows& x) const {
  const std::vector<float> w = tensor(name + ".weight");
  Rows y = x;
  for (Row& row : y) {
    const double mean = std::inner_product(row.begin(), row.end(), row.begin(), 0.0) / static_cast<double>(row.size());
    for (size_t i = 0; i < row.size(); ++i) row[i] *= static_cast<double>(w[i]) / std::sqrt(mean + eps_);
  }
  return y;
}

std::vector<Row> ReferenceEvaluator::layer_norm(const std::string& name, const Rows& x) const {
  const std::vector<float> w = tensor(name + ".weight"), b = tensor(name + ".bias");
  Rows y = x;
  for (Row& row : y) {
    const auto n = static_cast<double>(row.size());
    const double mean = std::accumulate(row.begin(), row.end(), 0.0) / n;
    double variance = 0;
    for (const double value : row) variance += (value - mean) * (value - mean) / n;
    for (size_t i = 0; i < row.size(); ++i) {
      row[i] = (row[i] - mean) / std::sqrt(variance + eps_) * static_cast<double>(w[i]) + static_cast<double>(b[i]);
    }
  }
  return y;
}

void ReferenceEvaluator::norm_heads(const std::string& name, Rows& x) const {
  for (Row& row : x) {
    for (size_t head = 0; head < row.size() / head_dim_k_; ++head) {
      const auto begin = row.begin() + static_cast<ptrdiff_t>(head * head_dim_k_);
      const Rows normed = rms_norm(name, {Row(begin, begin + static_cast<ptrdiff_t>(head_dim_k_))});
      std::copy(normed[0].begin(), normed[0].end(), begin);
    }
  }
}

// Rotary embedding of every head of every row; row i is at position i.
void ReferenceEvaluator::rotate(Rows& x, bool window_layer) const {
  const bool is_gemma = arch_ == "gemma3";
  const auto n = static_cast<size_t>(number("rope.dimension_count", static_cast<double>(head_dim_k_)));
  const double base = window_layer ? number("rope.freq_base_swa", 10000) : number("rope.freq_base", 10000);
  const std::string type = model_.metadata().find_string(arch_ + ".rope.scaling.type").value_or("linear");
  const double given = number("rope.scaling.factor", 0);
  const double factor = window_layer || given == 0 || type == "none" ? 1 : given;
  const bool yarn = type == "yarn" && factor != 1;
  const std::vector<float> divisors =
      has("rope_freqs.weight") ? tensor("rope_freqs.weight") : std::vector<float>(n / 2, 1);
  const double original = number("rope.scaling.original_context_length", number("context_length", 0));
  const auto turn = [&](double turns) {  // the pair that turns so often over the original context
    return static_cast<double>(n) * std::log(original / (turns * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  const double low = std::max(0.0, std::floor(turn(32)));
  const double high = std::min(static_cast<double>(n) - 1, std::ceil(turn(1)));

  for (size_t position = 0; position < x.size(); ++position) {
    for (size_t head = 0; head < x[position].size() / head_dim_k_; ++head) {
      double* v = &x[position][head * head_dim_k_];
      for (size_t i = 0; i < n / 2; ++i) {
        const double extrapolated = static_cast<double>(position) *
                                    std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(n)) /
                                    static_cast<double>(divisors[i]);
        double angle = extrapolated / factor, magnitude = 1;
        if (yarn) {
          const double ramp = 1 - std::clamp((static_cast<double>(i) - low) / std::max(0.001, high - low), 0.0, 1.0);
          angle = angle * (1 - ramp) + extrapolated * ramp;
          magnitude = 1 + 0.1 * std::log(factor);
        }
        double& a = v[is_gemma ? i : 2 * i];
        double& b = v[is_gemma ? i + n / 2 : 2 * i + 1];
        const double rotated_a = (a * std::cos(angle) - b * std::sin(angle)) * magnitude;
        b = (a * std::sin(angle) + b * std::cos(angle)) * magnitude;
        a = rotated_a;
      }
    }
  }
}

std::vector<Row> ReferenceEvaluator::attention(size_t layer, const Rows& x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  Rows q = linear(p + "attn_q", x), k = linear(p + "attn_k", x);
  const Rows v = linear(p + "attn_v", x);
  if (arch_ == "gemma3") norm_heads(p + "attn_q_norm", q), norm_heads(p + "attn_k_norm", k);
  if (arch_ != "bert") rotate(q, is_window_layer(layer)), rotate(k, is_window_layer(layer));
  const size_t window = is_window_layer(layer) ? static_cast<size_t>(number("attention.sliding_window", 0)) : x.size();
  Rows y(x.size(), Row(n_head_ * head_dim_v_, 0));
  for (size_t row = 0; row < x.size(); ++row) {
    const size_t end = arch_ == "bert" ? x.size() : row + 1;
    const size_t begin = arch_ == "bert" || end <= window ? 0 : end - window;
    for (size_t head = 0; head < n_head_; ++head) {
      const size_t kv_head = head / (n_head_ / n_head_kv_);
      Row scores;
      for (size_t seen = begin; seen < end; ++seen) {
        double dot = 0;
        for (size_t i = 0; i < head_dim_k_; ++i) {
          dot += q[row][head * head_dim_k_ + i] * k[seen][kv_head * head_dim_k_ + i];
        }
        scores.push_back(dot / std::sqrt(static_cast<double>(head_dim_k_)));
      }
      scores = soft_max(scores);
      for (size_t seen = begin; seen < end; ++seen) {
        for (size_t i = 0; i < head_dim_v_; ++i) {
          y[row][head * head_dim_v_ + i] += scores[seen - begin] * v[seen][kv_head * head_dim_v_ + i];
        }
      }
    }
  }
  return linear(p + "attn_output", y);
}

std::vector<Row> ReferenceEvaluator::gated(const std::string& prefix, const Rows& x, size_t expert) const {
  const std::string suffix = has(prefix + "ffn_gate_exps.weight") ? "_exps" : "";
  Rows gate = linear(prefix + "ffn_gate" + suffix, x, expert);
  const Rows up = linear(prefix + "ffn_up" + suffix, x, expert);
  for (size_t row = 0; row < x.size(); ++row) {
    for (size_t i = 0; i < up[row].size(); ++i) {
      gate[row][i] = (arch_ == "gemma3" ? gelu(gate[row][i]) : silu(gate[row][i])) * up[row][i];
    }
  }
  return linear(prefix + "ffn_down" + suffix, gate, expert);
}

std::vector<Row> ReferenceEvaluator::experts(const std::string& prefix, const Rows& x) const {
  const auto n_used = static_cast<size_t>(number("expert_used_count", 0));
  const Rows router = linear(prefix + "ffn_gate_inp", x);
  Rows y;
  for (size_t row = 0; row < x.size(); ++row) {
    const Row probabilities = soft_max(router[row]);
    std::vector<size_t> order(probabilities.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return probabilities[a] != probabilities[b] ? probabilities[a] > probabilities[b] : a < b;
    });
    double sum = 0;
    for (size_t rank = 0; rank < n_used; ++rank) sum += probabilities[order[rank]];
    Row mixed(x[row].size(), 0);
    for (size_t rank = 0; rank < n_used; ++rank) {
      const Rows part = gated(prefix, {x[row]}, order[rank]);
      for (size_t i = 0; i < mixed.size(); ++i) mixed[i] += part[0][i] * probabilities[order[rank]] / sum;
    }
    y.push_back(mixed);
  }
  return y;
}

std::vector<Row> ReferenceEvaluator::decoder_layer(size_t layer, Rows x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  const bool is_gemma = arch_ == "gemma3";
  Rows y = attention(layer, rms_norm(p + "attn_norm", x));
  add(x, is_gemma ? rms_norm(p + "post_attention_norm", y) : y);
  const Rows h = rms_norm(p + "ffn_norm", x);
  y = has(p + "ffn_gate_inp.weight") ? experts(p, h) : gated(p, h, 0);
  add(x, is_gemma ? rms_norm(p + "post_ffw_norm", y) : y);
  return x;
}

std::vector<Row> ReferenceEvaluator::encoder_layer(size_t layer, Rows x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  add(x, attention(layer, x));
  x = layer_norm(p + "attn_output_norm", x);
  Rows h = linear(p + "ffn_up", x);
  for (Row& row : h) std::transform(row.begin(), row.end(), row.begin(), gelu);
  add(x, linear(p + "ffn_down", h));
  return layer_norm(p + "layer_output_norm", x);
}

std::vector<Row> ReferenceEvaluator::hidden(const std::vector<int32_t>& tokens) const {
  Rows x;
  for (const int32_t token : tokens) {
    Row row = lookup("token_embd.weight", token);
    if (arch_ == "gemma3") {
      const double factor = std::sqrt(static_cast<double>(row.size()));
      for (double& value : row) value *= factor;
    }
    if (arch_ == "bert") {
      const Row type = lookup("token_types.weight", 0);
      const Row place = lookup("position_embd.weight", static_cast<int32_t>(x.size()));
      for (size_t i = 0; i < row.size(); ++i) row[i] += type[i] + place[i];
    }
    x.push_back(row);
  }
  if (arch_ == "bert") {
    x = layer_norm("token_embd_norm", x);
    for (size_t layer = 0; layer < n_layer_; ++layer) x = encoder_layer(layer, x);
    return x;
  }
  for (size_t layer = 0; layer < n_layer_; ++layer) x = decoder_layer(layer, x);
  return rms_norm("output_norm", x);
}

std::vector<Row> ReferenceEvaluator::logits(const std::vector<int32_t>& tokens) const {
  Rows y = linear(has("output.weight") ? "output" : "token_embd", hidden(tokens));
  const double cap = arch_ == "gemma3" ? number("final_logit_softcapping", 0) : 0;
  if (cap != 0) {
    for (Row& row : y) {
      for (double& value : row) value = cap * std::tanh(value / cap);
    }
  }
  return y;
}

double normalised_error(const std::vector<Row>& a, const std::vector<Row>& b) {
  if (a.size() != b.size()) throw std::invalid_argument("different numbers of rows");
  double difference = 0, total = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].size() != b[i].size()) throw std::invalid_argument("rows of different lengths");
    for (size_t j = 0; j < a[i].size(); ++j) {
      difference += (a[i][j] - b[i][j]) * (a[i][j] - b[i][j]);
      total += b[i][j] * b[i][j];
    }
  }
  return difference / total;
}

}  // namespace caravan::testing
