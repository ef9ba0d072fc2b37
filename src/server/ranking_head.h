// The classifier that turns a text's pooled hidden row into scores: what reranking models have in place of an output
// matrix. A few thousand multiplications, computed here and not at a stage.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace caravan::gguf {
class Model;
}

namespace caravan::server {

// y = W x + b, W [n_out, n_in] by rows.
struct Linear {
  uint32_t n_in = 0, n_out = 0;
  std::vector<float> weight;  // n_out x n_in
  std::vector<float> bias;    // n_out, or empty
  // Sums in double.
  std::vector<float> apply(std::span<const float> x) const;
};

struct RankingHead {
  std::optional<Linear> dense;   // GGUF cls.weight, cls.bias; followed by tanh
  std::optional<Linear> output;  // GGUF cls.output.weight, cls.output.bias; at least one of both is there
  // Two outputs, "yes" and "no", whose softmax counts (Qwen3 rerankers: Zhang et al. 2025, arXiv:2506.05176).
  bool softmax = false;

  // How relevant the document of a pair is: the first output.
  float score(std::span<const float> pooled) const;

  // The head of a model file; nullopt when it has none. Throws FormatError naming a tensor whose shape does not fit.
  static std::optional<RankingHead> load(const gguf::Model& model, uint32_t n_embd);
};

}  // namespace caravan::server
