// Tiny models with seeded random weights, written as GGUF files: one per architecture, small enough that a test runs
// them in milliseconds, with vocabularies of single characters so that servers can serve them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "tensor/dtype.h"

namespace caravan::testing {

enum class TinyKind {
  llama,
  llama_moe,
  qwen2,
  qwen3,
  gemma2,
  gemma3,
  phi3,
  mistral3,
  glm4,
  command_r,
  cohere2,
  olmo2,
  starcoder2,
  falcon,
  gpt2,
  smollm3,
  granite,
  qwen3moe,
  gpt_oss,
  deepseek2,
  bert,
  nomic_bert
};

struct TinyModelOptions {
  TinyKind kind = TinyKind::llama;
  uint64_t seed = 1;
  // Type of the matrices; norms and biases are f32. Row lengths are multiples of 32, not of 256.
  tensor::DType matrix_type = tensor::DType::f32;
  uint32_t n_layer = 3;  // the first with full attention: 2nd (gemma2, gpt_oss), 4th (cohere2), 6th (gemma3)
  uint32_t window = 8;   // tokens that a layer with a sliding window sees
  bool tied_output = false;
  bool biases = false;         // llama: biases of attention and (dense) feed-forward
  bool scales = false;         // llama: .scale tensors of attention and (dense) feed-forward
  bool rope_freqs = false;     // llama: the tensor of frequency factors
  bool yarn = false;           // YaRN rope scaling with factor 4
  bool fused_qkv = false;      // queries, keys and values in one tensor; phi3, falcon, gpt2 and nomic_bert always do
  bool windows = false;        // olmo2: three sliding-window layers of four
  bool short_context = false;  // phi3: a context that is no longer than the original one
  bool no_rope = false;        // granite: no rotary embedding
  bool expert_scales = false;  // llama_moe, qwen3moe: per-expert .scale tensors
  bool fused_experts = false;  // gate and up of all experts in one tensor (without scales)
  bool expert_groups = false;  // deepseek2: eight experts in four groups, chosen by biased sigmoids
  bool query_rank = true;      // deepseek2: queries come from a latent vector of their own
  bool cached_heads = false;   // deepseek2: the older form, attn_kv_b
};

// The enumerator's name.
std::string tiny_kind_name(TinyKind kind);

// Writes <folder>/<name>.gguf and returns its path. The same options give the same bytes.
std::filesystem::path write_tiny_model(const std::filesystem::path& folder, const TinyModelOptions& options,
                                       const std::string& name = "tiny");

}  // namespace caravan::testing
