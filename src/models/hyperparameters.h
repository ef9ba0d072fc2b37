// The numbers that describe a model: one struct for all architectures, read from GGUF metadata (docs/gguf.md) or from
// the part of it that travels to backends. Fields that an architecture does not use keep their defaults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/metadata.h"
#include "graph/op.h"

namespace caravan::models {

// How hidden rows become one embedding (GGUF <arch>.pooling_type).
enum class Pooling { none, mean, cls, last, rank };

struct Hyperparameters {
  std::string architecture;
  uint32_t n_layer = 0;
  uint32_t n_ctx_train = 0;
  uint32_t n_embd = 0;
  uint32_t n_vocab = 0;
  // Per layer.
  std::vector<uint32_t> n_ff, n_head, n_head_kv;
  uint32_t head_dim_k = 0, head_dim_v = 0;
  float norm_eps = 0;
  float attention_scale = 0;  // what q.k is multiplied by
  bool causal = true;

  graph::RopeParams rope;         // full attention
  graph::RopeParams rope_window;  // layers with a sliding window
  uint32_t window = 0;            // tokens that a sliding-window layer sees, its own included; 0: no such layers
  uint32_t window_pattern = 0;    // every n-th layer is a full one

  uint32_t n_expert = 0, n_expert_used = 0;  // 0: dense
  float final_logit_softcap = 0;             // 0: none
  uint32_t n_token_types = 0;
  Pooling pooling = Pooling::none;

  bool is_window_layer(uint32_t layer) const { return window > 0 && (layer + 1) % window_pattern != 0; }
};

// Which key holds the epsilon of an architecture's norms.
enum class NormKind { rms, layer };

// Reads the keys that all architectures share and checks that they fit together; window layers, attention scale and
// experts are the architecture's business. Throws FormatError naming the key, NotSupportedError for a rope scaling
// type.
Hyperparameters read_common(const gguf::Metadata& metadata, NormKind norm);

// The entries that a stage needs to know: general.architecture, <arch>.* and the number of token types. Adds
// <arch>.vocab_size from the token list where the key is missing, so that the token list can stay behind.
gguf::Metadata hyperparameter_metadata(const gguf::Metadata& model);

}  // namespace caravan::models
