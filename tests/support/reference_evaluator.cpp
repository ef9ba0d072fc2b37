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

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Row soft_max(Row x) {
  const double largest = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp(value - largest);
  for (double& value : x) value /= sum;
  return x;
}

bool is_one_of(const std::string& value, std::initializer_list<const char*> list) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

// Columns [begin, begin + n) of every row.
std::vector<Row> columns(const std::vector<Row>& x, size_t begin, size_t n) {
  std::vector<Row> y;
  for (const Row& row : x) {
    const auto first = row.begin() + static_cast<ptrdiff_t>(begin);
    y.emplace_back(first, first + static_cast<ptrdiff_t>(n));
  }
  return y;
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
  has_layer_norms_ = model_.metadata().contains(arch_ + ".attention.layer_norm_epsilon");
  eps_ = number(has_layer_norms_ ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 0);
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

// y = W x * scale + bias (dense feed-forward: (W x + bias) * scale, as llama.cpp has it), for matrix `expert` of a
// stack of them.
std::vector<Row> ReferenceEvaluator::linear(const std::string& name, const Rows& x, size_t expert) const {
  const gguf::TensorInfo& info = model_.get(name + ".weight");
  const auto n_in = static_cast<size_t>(info.ne[0]), n_out = static_cast<size_t>(info.ne[1]);
  const std::vector<float> w = tensor(name + ".weight");
  const double scale = has(name + ".scale") ? static_cast<double>(tensor(name + ".scale")[expert]) : 1;
  const std::vector<float> bias = has(name + ".bias") ? tensor(name + ".bias") : std::vector<float>(n_out, 0);
  const bool is_ffn = name.find("ffn_") != std::string::npos && name.find("_exps") == std::string::npos;
  const size_t first_bias = bias.size() > n_out ? expert * n_out : 0;
  Rows y(x.size(), Row(n_out));
  for (size_t row = 0; row < x.size(); ++row) {
    for (size_t out = 0; out < n_out; ++out) {
      const float* weights = &w[(expert * n_out + out) * n_in];
      double sum = 0;
      for (size_t in = 0; in < n_in; ++in) sum += static_cast<double>(weights[in]) * x[row][in];
      const auto b = static_cast<double>(bias[first_bias + out]);
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
  const std::vector<float> w = tensor(name + ".weight");
  const std::vector<float> b = has(name + ".bias") ? tensor(name + ".bias") : std::vector<float>(w.size(), 0);
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

std::vector<Row> ReferenceEvaluator::norm(const std::string& name, const Rows& x) const {
  return has_layer_norms_ ? layer_norm(name, x) : rms_norm(name, x);
}

// Norms of queries or keys: of the whole row, or of each head with one weight for all or a weight for each.
void ReferenceEvaluator::norm_heads(const std::string& name, Rows& x) const {
  const std::vector<float> w = tensor(name + ".weight");
  if (arch_ == "olmo2") {
    x = rms_norm(name, x);
    return;
  }
  if (arch_ == "command-r") {
    for (Row& row : x) {
      for (size_t begin = 0; begin < row.size(); begin += head_dim_k_) {
        double mean = 0, variance = 0;
        for (size_t i = begin; i < begin + head_dim_k_; ++i) mean += row[i] / static_cast<double>(head_dim_k_);
        for (size_t i = begin; i < begin + head_dim_k_; ++i) {
          variance += (row[i] - mean) * (row[i] - mean) / static_cast<double>(head_dim_k_);
        }
        for (size_t i = begin; i < begin + head_dim_k_; ++i) {
          row[i] = (row[i] - mean) / std::sqrt(variance + eps_) * static_cast<double>(w[i]);
        }
      }
    }
    return;
  }
  for (Row& row : x) {
    for (size_t head = 0; head < row.size() / head_dim_k_; ++head) {
      const auto begin = row.begin() + static_cast<ptrdiff_t>(head * head_dim_k_);
      const Rows normed = rms_norm(name, {Row(begin, begin + static_cast<ptrdiff_t>(head_dim_k_))});
      std::copy(normed[0].begin(), normed[0].end(), begin);
    }
  }
}

// Rotary embedding of every head of every row; row i is at position i.
void ReferenceEvaluator::rotate(Rows& x, size_t head_dim, bool window_layer) const {
  const bool halves =
      !is_one_of(arch_, {"llama", "deepseek2", "mistral3", "glm4", "command-r", "cohere2", "smollm3", "granite"});
  // Window layers that are not scaled for long contexts.
  const bool is_gemma_window = window_layer && arch_ == "gemma3";
  const bool is_plain_window = window_layer && is_one_of(arch_, {"gemma3", "olmo2"});
  const auto n = static_cast<size_t>(number("rope.dimension_count", static_cast<double>(head_dim)));
  const double full_base = number("rope.freq_base", 10000);
  const double base = window_layer ? number("rope.freq_base_swa", is_gemma_window ? 10000 : full_base) : full_base;
  const std::string type = model_.metadata().find_string(arch_ + ".rope.scaling.type").value_or("linear");
  const double given = number("rope.scaling.factor", 0);
  const double factor = is_plain_window || given == 0 || type == "none" ? 1 : given;
  const bool yarn = type == "yarn" && factor != 1;
  const double original = number("rope.scaling.original_context_length", number("context_length", 0));
  const double attn_factor = is_plain_window ? 1 : number("rope.scaling.attn_factor", 1);
  const std::string long_or_short = number("context_length", 0) > original ? "long" : "short";
  std::vector<float> divisors(n / 2, 1);
  for (const std::string& name : {std::string("rope_freqs"), "rope_factors_" + long_or_short}) {
    if (has(name + ".weight")) divisors = tensor(name + ".weight");
  }
  const auto turn = [&](double turns) {  // the pair that turns so often over the original context
    return static_cast<double>(n) * std::log(original / (turns * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  const double low = std::max(0.0, std::floor(turn(32)));
  const double high = std::min(static_cast<double>(n) - 1, std::ceil(turn(1)));

  for (size_t position = 0; position < x.size(); ++position) {
    for (size_t head = 0; head < x[position].size() / head_dim; ++head) {
      double* v = &x[position][head * head_dim];
      for (size_t i = 0; i < n / 2; ++i) {
        const double extrapolated = static_cast<double>(position) *
                                    std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(n)) /
                                    static_cast<double>(divisors[i]);
        double angle = extrapolated / factor, magnitude = attn_factor;
        if (yarn) {
          const double ramp = 1 - std::clamp((static_cast<double>(i) - low) / std::max(0.001, high - low), 0.0, 1.0);
          angle = angle * (1 - ramp) + extrapolated * ramp;
          const bool magnified_scores = arch_ == "deepseek2" && number("rope.scaling.yarn_log_multiplier", 0) != 0;
          magnitude *= magnified_scores ? 1 : 1 + 0.1 * std::log(factor);
        }
        double& a = v[halves ? i : 2 * i];
        double& b = v[halves ? i + n / 2 : 2 * i + 1];
        const double rotated_a = (a * std::cos(angle) - b * std::sin(angle)) * magnitude;
        b = (a * std::sin(angle) + b * std::cos(angle)) * magnitude;
        a = rotated_a;
      }
    }
  }
}

// What every row reads: q [heads * head_dim_k], k and v with the same number of heads or fewer.
std::vector<Row> ReferenceEvaluator::attend(size_t layer, const Rows& q, const Rows& k, const Rows& v, size_t n_head_kv,
                                            double scale) const {
  const std::string sinks_name = "blk." + std::to_string(layer) + ".attn_sinks.weight";
  const std::vector<float> sinks = has(sinks_name) ? tensor(sinks_name) : std::vector<float>();
  const size_t dim_k = q[0].size() / n_head_, dim_v = v[0].size() / n_head_kv;
  const double cap = arch_ == "gemma2" ? number("attn_logit_softcapping", 50) : 0;
  const size_t window = is_window_layer(layer) ? static_cast<size_t>(number("attention.sliding_window", 0)) : q.size();
  Rows y(q.size(), Row(n_head_ * dim_v, 0));
  for (size_t row = 0; row < q.size(); ++row) {
    const size_t end = is_encoder() ? q.size() : row + 1;
    const size_t begin = is_encoder() || end <= window ? 0 : end - window;
    for (size_t head = 0; head < n_head_; ++head) {
      const size_t kv_head = head / (n_head_ / n_head_kv);
      Row scores;
      for (size_t seen = begin; seen < end; ++seen) {
        double dot = 0;
        for (size_t i = 0; i < dim_k; ++i) dot += q[row][head * dim_k + i] * k[seen][kv_head * dim_k + i];
        scores.push_back(cap != 0 ? cap * std::tanh(dot * scale / cap) : dot * scale);
      }
      if (!sinks.empty()) scores.push_back(static_cast<double>(sinks[head]));
      scores = soft_max(scores);
      for (size_t seen = begin; seen < end; ++seen) {
        for (size_t i = 0; i < dim_v; ++i) {
          y[row][head * dim_v + i] += scores[seen - begin] * v[seen][kv_head * dim_v + i];
        }
      }
    }
  }
  return y;
}

std::vector<Row> ReferenceEvaluator::attention(size_t layer, const Rows& x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  if (arch_ == "deepseek2") return linear(p + "attn_output", latent_attention(layer, x));
  Rows q, k, v;
  if (has(p + "attn_qkv.weight")) {
    const Rows all = linear(p + "attn_qkv", x);
    q = columns(all, 0, n_head_ * head_dim_k_);
    k = columns(all, n_head_ * head_dim_k_, n_head_kv_ * head_dim_k_);
    v = columns(all, (n_head_ + n_head_kv_) * head_dim_k_, n_head_kv_ * head_dim_v_);
  } else {
    q = linear(p + "attn_q", x), k = linear(p + "attn_k", x), v = linear(p + "attn_v", x);
  }
  if (has(p + "attn_q_norm.weight")) norm_heads(p + "attn_q_norm", q), norm_heads(p + "attn_k_norm", k);
  if (is_rotated(layer)) {
    rotate(q, head_dim_k_, is_window_layer(layer)), rotate(k, head_dim_k_, is_window_layer(layer));
  }
  if (const double growth = number("attention.temperature_scale", 0); growth != 0) {
    const double period = number("rope.scaling.original_context_length", 0);
    for (size_t position = 0; position < q.size(); ++position) {
      const double periods = std::floor(static_cast<double>(position) / period);
      for (double& value : q[position]) value *= 1 + growth * std::log(periods + 1);
    }
  }
  const double scale = number("attention.scale", 1 / std::sqrt(static_cast<double>(head_dim_k_)));
  return linear(p + "attn_output", attend(layer, q, k, v, n_head_kv_, scale));
}

bool ReferenceEvaluator::is_rotated(size_t layer) const {
  if (has("position_embd.weight") || arch_ == "bert") return false;
  if (arch_ == "cohere2") return is_window_layer(layer);
  if (arch_ == "smollm3") return layer % 4 != 3;
  return arch_ != "granite" || model_.metadata().get_bool("granite.rope.scaling.finetuned", true);
}

bool ReferenceEvaluator::is_window_layer(size_t layer) const {
  if (number("attention.sliding_window", 0) == 0) return false;
  if (arch_ == "gemma2" || arch_ == "gpt-oss") return layer % 2 != 1;
  if (arch_ == "cohere2" || arch_ == "olmo2") return layer % 4 != 3;
  return arch_ == "gemma3" && layer % 6 != 5;
}

// Multi-head latent attention as the paper defines it: keys and values of every head are computed from the latent
// vector, and nothing is absorbed into anything.
std::vector<Row> ReferenceEvaluator::latent_attention(size_t layer, const Rows& x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  const auto rank = static_cast<size_t>(number("attention.kv_lora_rank", 0));
  const auto n_rot = static_cast<size_t>(number("rope.dimension_count", 0));
  const auto dim_k = static_cast<size_t>(number("attention.key_length_mla", static_cast<double>(head_dim_k_)));
  const auto dim_v = static_cast<size_t>(number("attention.value_length_mla", static_cast<double>(head_dim_v_)));
  const size_t plain = dim_k - n_rot;

  Rows q = has(p + "attn_q.weight") ? linear(p + "attn_q", x)
                                    : linear(p + "attn_q_b", rms_norm(p + "attn_q_a_norm", linear(p + "attn_q_a", x)));
  const Rows both = linear(p + "attn_kv_a_mqa", x);
  const Rows latent = rms_norm(p + "attn_kv_a_norm", columns(both, 0, rank));
  Rows k_rotated = columns(both, rank, n_rot);
  rotate(k_rotated, n_rot, false);
  Rows k(x.size()), v(x.size());
  const Rows expanded = has(p + "attn_kv_b.weight") ? linear(p + "attn_kv_b", latent) : Rows(x.size());
  const std::vector<float> k_b = expanded[0].empty() ? tensor(p + "attn_k_b.weight") : std::vector<float>();
  for (size_t head = 0; head < n_head_; ++head) {
    const Rows value = expanded[0].empty() ? linear(p + "attn_v_b", latent, head)
                                           : columns(expanded, head * (plain + dim_v) + plain, dim_v);
    Rows q_rotated = columns(q, head * dim_k + plain, n_rot);
    rotate(q_rotated, n_rot, false);
    for (size_t row = 0; row < x.size(); ++row) {
      std::copy(q_rotated[row].begin(), q_rotated[row].end(),
                q[row].begin() + static_cast<ptrdiff_t>(head * dim_k + plain));
      for (size_t i = 0; i < plain; ++i) {
        double sum = 0;
        if (expanded[0].empty()) {
          for (size_t r = 0; r < rank; ++r)
            sum += static_cast<double>(k_b[(head * rank + r) * plain + i]) * latent[row][r];
        } else {
          sum = expanded[row][head * (plain + dim_v) + i];
        }
        k[row].push_back(sum);
      }
      k[row].insert(k[row].end(), k_rotated[row].begin(), k_rotated[row].end());
      v[row].insert(v[row].end(), value[row].begin(), value[row].end());
    }
  }
  // Yarn lets scores grow by the square of 1 + 0.1 L ln s; files hold L / 10.
  double growth = 1;
  if (model_.metadata().find_string(arch_ + ".rope.scaling.type") == "yarn") {
    const double multiplier = number("rope.scaling.yarn_log_multiplier", 0) * 10;
    growth = 1 + 0.1 * (multiplier != 0 ? multiplier : 1) * std::log(number("rope.scaling.factor", 1));
  }
  return attend(layer, q, k, v, n_head_, growth * growth / std::sqrt(static_cast<double>(dim_k)));
}

// suffix: "" (dense), "_exps" or "_shexp".
std::vector<Row> ReferenceEvaluator::gated(const std::string& prefix, const std::string& suffix, const Rows& x,
                                           size_t expert) const {
  Rows gate, up;
  const bool fused_experts = has(prefix + "ffn_gate_up" + suffix + ".weight");
  if (fused_experts || is_one_of(arch_, {"phi3", "glm4"})) {
    const Rows both = linear(prefix + (fused_experts ? "ffn_gate_up" : "ffn_up") + suffix, x, expert);
    gate = columns(both, 0, both[0].size() / 2), up = columns(both, both[0].size() / 2, both[0].size() / 2);
  } else {
    gate = linear(prefix + "ffn_gate" + suffix, x, expert), up = linear(prefix + "ffn_up" + suffix, x, expert);
  }
  const auto activate = [&](double g, double u) {
    if (arch_.starts_with("gemma")) return gelu(g) * u;
    if (arch_ != "gpt-oss") return silu(g) * u;
    const double limited = std::min(g, 7.0);
    return limited * sigmoid(1.702 * limited) * (std::clamp(u, -7.0, 7.0) + 1);
  };
  for (size_t row = 0; row < x.size(); ++row) {
    for (size_t i = 0; i < up[row].size(); ++i) gate[row][i] = activate(gate[row][i], up[row][i]);
  }
  return linear(prefix + "ffn_down" + suffix, gate, expert);
}

std::vector<Row> ReferenceEvaluator::plain(const std::string& prefix, const Rows& x) const {
  Rows h = linear(prefix + "ffn_up", x);
  for (Row& row : h) std::transform(row.begin(), row.end(), row.begin(), gelu);
  return linear(prefix + "ffn_down", h);
}

// The experts of a row, best first: by score, of the best groups only where there are groups.
std::vector<size_t> ReferenceEvaluator::ranked_experts(Row scores) const {
  const auto n_group = static_cast<size_t>(number("expert_group_count", 0));
  if (n_group > 1) {
    const auto n_used = static_cast<size_t>(number("expert_group_used_count", 0));
    const size_t size = scores.size() / n_group;
    std::vector<std::pair<double, size_t>> groups;
    for (size_t group = 0; group < n_group; ++group) {
      Row members = columns({scores}, group * size, size)[0];
      std::sort(members.rbegin(), members.rend());
      groups.emplace_back(members[0] + members[1], group);
    }
    std::sort(groups.rbegin(), groups.rend());
    for (size_t i = n_used; i < n_group; ++i) {
      for (size_t j = 0; j < size; ++j) scores[groups[i].second * size + j] = -1e300;
    }
  }
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
  return order;
}

std::vector<Row> ReferenceEvaluator::experts(const std::string& prefix, const Rows& x) const {
  const auto n_used = static_cast<size_t>(number("expert_used_count", 0));
  const bool is_deepseek = arch_ == "deepseek2", is_oss = arch_ == "gpt-oss";
  const bool normed = is_deepseek ? model_.metadata().get_bool("deepseek2.expert_weights_norm", false) : !is_oss;
  const double given_scale = number("expert_weights_scale", 0);
  const Rows router = linear(prefix + "ffn_gate_inp", x);
  Rows y;
  for (size_t row = 0; row < x.size(); ++row) {
    Row scores = router[row];
    if (is_deepseek && number("expert_gating_func", 1) == 2) {
      std::transform(scores.begin(), scores.end(), scores.begin(), sigmoid);
    } else if (!is_oss) {
      scores = soft_max(scores);
    }
    Row biased = scores;
    if (has(prefix + "exp_probs_b.bias")) {
      const std::vector<float> bias = tensor(prefix + "exp_probs_b.bias");
      for (size_t i = 0; i < biased.size(); ++i) biased[i] += static_cast<double>(bias[i]);
    }
    const std::vector<size_t> order = ranked_experts(biased);
    Row shares;
    for (size_t rank = 0; rank < n_used; ++rank) shares.push_back(scores[order[rank]]);
    if (is_oss) shares = soft_max(shares);
    const double sum = normed ? std::accumulate(shares.begin(), shares.end(), 0.0) : 1;
    Row mixed(x[row].size(), 0);
    for (size_t rank = 0; rank < n_used; ++rank) {
      const Rows part = gated(prefix, "_exps", {x[row]}, order[rank]);
      const double share = shares[rank] / sum * (given_scale != 0 ? given_scale : 1);
      for (size_t i = 0; i < mixed.size(); ++i) mixed[i] += part[0][i] * share;
    }
    y.push_back(mixed);
  }
  if (has(prefix + "ffn_gate_shexp.weight")) add(y, gated(prefix, "_shexp", x, 0));
  return y;
}

std::vector<Row> ReferenceEvaluator::feed_forward(const std::string& prefix, const Rows& x) const {
  if (has(prefix + "ffn_gate_inp.weight")) return experts(prefix, x);
  return is_one_of(arch_, {"falcon", "gpt2", "starcoder2"}) ? plain(prefix, x) : gated(prefix, "", x, 0);
}

std::vector<Row> ReferenceEvaluator::decoder_layer(size_t layer, Rows x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  const double residual = arch_ == "granite" ? number("residual_scale", 1) : 1;
  const auto add_scaled = [&](Rows y) {
    for (Row& row : y) {
      for (double& value : row) value *= residual;
    }
    add(x, y);
  };
  const auto norm_if_there = [&](const std::string& name, const Rows& y) {
    return has(p + name + ".weight") ? norm(p + name, y) : y;
  };
  const Rows h = norm_if_there("attn_norm", x);
  Rows y = attention(layer, has(p + "attn_norm_2.weight") ? norm(p + "attn_norm_2", x) : h);
  if (is_one_of(arch_, {"falcon", "command-r", "cohere2"})) {
    add(y, feed_forward(p, h));
    add(x, y);
    return x;
  }
  if (arch_ == "gpt-oss") {
    add(x, y);
    add(x, feed_forward(p, norm(p + "post_attention_norm", x)));
    return x;
  }
  add_scaled(norm_if_there("post_attention_norm", y));
  add_scaled(norm_if_there("post_ffw_norm", feed_forward(p, norm_if_there("ffn_norm", x))));
  return x;
}

std::vector<Row> ReferenceEvaluator::encoder_layer(size_t layer, Rows x) const {
  const std::string p = "blk." + std::to_string(layer) + ".";
  add(x, attention(layer, x));
  x = layer_norm(p + "attn_output_norm", x);
  add(x, has(p + "ffn_gate.weight") ? gated(p, "", x, 0) : plain(p, x));
  return layer_norm(p + "layer_output_norm", x);
}

std::vector<Row> ReferenceEvaluator::hidden(const std::vector<int32_t>& tokens) const {
  Rows x;
  for (const int32_t token : tokens) {
    Row row = lookup("token_embd.weight", token);
    double factor = arch_.starts_with("gemma") ? std::sqrt(static_cast<double>(row.size())) : 1;
    if (arch_ == "granite") factor = number("embedding_scale", 1);
    for (double& value : row) value *= factor;
    const auto add_row = [&](const std::string& table, size_t index) {
      if (!has(table)) return;
      const Row other = lookup(table, static_cast<int32_t>(index));
      for (size_t i = 0; i < row.size(); ++i) row[i] += other[i];
    };
    add_row("token_types.weight", 0);
    add_row("position_embd.weight", x.size());
    x.push_back(row);
  }
  if (is_encoder()) {
    x = layer_norm("token_embd_norm", x);
    for (size_t layer = 0; layer < n_layer_; ++layer) x = encoder_layer(layer, x);
    return x;
  }
  for (size_t layer = 0; layer < n_layer_; ++layer) x = decoder_layer(layer, x);
  return norm("output_norm", x);
}

std::vector<Row> ReferenceEvaluator::logits(const std::vector<int32_t>& tokens) const {
  Rows y = linear(has("output.weight") ? "output" : "token_embd", hidden(tokens));
  const double cap = arch_.starts_with("gemma") ? number("final_logit_softcapping", arch_ == "gemma2" ? 30 : 0) : 0;
  double factor = 1;
  if (arch_ == "command-r" || arch_ == "cohere2") factor = number("logit_scale", 1);
  if (arch_ == "granite") factor = 1 / number("logit_scale", 1);
  for (Row& row : y) {
    for (double& value : row) {
      value *= factor;
      if (cap != 0) value = cap * std::tanh(value / cap);
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
