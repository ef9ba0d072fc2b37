// What a model computes, written down as plain loops in double precision from the papers' formulas: a check on the
// graph, the device and src/models that shares no code with them. For one sequence, slowly.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "gguf/reader.h"

namespace caravan::testing {

using Row = std::vector<double>;

class ReferenceEvaluator {
 public:
  // Every architecture of src/models.
  explicit ReferenceEvaluator(const std::filesystem::path& path);

  // Hidden rows after the final norm, one per token; the tokens are a sequence at positions 0, 1, ...
  std::vector<Row> hidden(const std::vector<int32_t>& tokens) const;
  // Logits of every token.
  std::vector<Row> logits(const std::vector<int32_t>& tokens) const;

 private:
  using Rows = std::vector<Row>;

  double number(const std::string& key, double default_value) const;
  std::vector<float> tensor(const std::string& name) const;
  bool has(const std::string& name) const { return model_.find(name) != nullptr; }

  Row lookup(const std::string& name, int32_t row) const;
  Rows linear(const std::string& name, const Rows& x, size_t expert = 0) const;
  Rows rms_norm(const std::string& name, const Rows& x) const;
  Rows layer_norm(const std::string& name, const Rows& x) const;
  Rows norm(const std::string& name, const Rows& x) const;
  void norm_heads(const std::string& name, Rows& x) const;
  void rotate(Rows& x, size_t head_dim, bool window_layer) const;
  Rows attend(size_t layer, const Rows& q, const Rows& k, const Rows& v, size_t n_head_kv, double scale) const;
  Rows latent_attention(size_t layer, const Rows& x) const;
  Rows attention(size_t layer, const Rows& x) const;
  Rows gated(const std::string& prefix, const std::string& suffix, const Rows& x, size_t expert) const;
  Rows plain(const std::string& prefix, const Rows& x) const;
  std::vector<size_t> ranked_experts(Row scores) const;
  Rows experts(const std::string& prefix, const Rows& x) const;
  Rows feed_forward(const std::string& prefix, const Rows& x) const;
  Rows decoder_layer(size_t layer, Rows x) const;
  Rows encoder_layer(size_t layer, Rows x) const;
  bool is_encoder() const { return arch_.ends_with("bert"); }
  bool is_window_layer(size_t layer) const;
  bool is_rotated(size_t layer) const;

  gguf::Model model_;
  std::string arch_;
  size_t n_layer_, n_head_, n_head_kv_, head_dim_k_, head_dim_v_;
  bool has_layer_norms_;
  double eps_;
};

// sum((a - b)^2) / sum(b^2) over all rows.
double normalised_error(const std::vector<Row>& a, const std::vector<Row>& b);

}  // namespace caravan::testing
