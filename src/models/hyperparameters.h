// The numbers that describe a model: one struct for all architectures, read from GGUF metadata (docs/gguf.md) or from
// the part of it that travels to backends. Fields that an architecture does not use keep their defaults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/metadata.h"
#include "graph/op.h"
#include "models/decoder_form.h"

namespace caravan::models {

// How hidden rows become one embedding (GGUF <arch>.pooling_type).
enum class Pooling { none, mean, cls, last, rank };

// Multi-head latent attention (deepseek2): keys and values of all heads come from one vector per token.
struct LatentAttention {
  uint32_t kv_rank = 0;                     // width of that vector; 0: the model has none
  uint32_t q_rank = 0;                      // width of what queries come from; 0: they come from the hidden row
  uint32_t head_dim_k = 0, head_dim_v = 0;  // of a head, where the vector is what is cached; 0: heads are cached
};

struct Hyperparameters {
  std::string architecture;
  uint32_t n_layer = 0;
  uint32_t n_ctx_train = 0;
  uint32_t n_ctx_original = 0;  // context of the training before that for long contexts; n_ctx_train: there was none
  bool serves_long_context = false;  // contexts are longer than n_ctx_original
  uint32_t n_positions = 0;          // length of the table of learned positions; 0: there is none
  uint32_t n_embd = 0;
  uint32_t n_vocab = 0;
  // Per layer.
  std::vector<uint32_t> n_ff, n_head, n_head_kv;
  uint32_t head_dim_k = 0, head_dim_v = 0;
  float norm_eps = 0;
  float attention_scale = 0;    // what q.k is multiplied by
  float attention_softcap = 0;  // 0: none
  bool causal = true;

  graph::RopeParams rope;         // full attention
  graph::RopeParams rope_window;  // layers with a sliding window
  std::string rope_factors;       // tensor of divisors of rope's frequencies; empty: none
  // Queries are multiplied by 1 + temperature_scale * ln(1 + floor(position / temperature_length)); 0: they are not.
  float temperature_scale = 0;
  uint32_t temperature_length = 0;
  uint32_t no_rope_period = 0;      // every n-th layer has no rotary embedding; 0: all have
  uint32_t window = 0;              // tokens that a sliding-window layer sees, its own included; 0: no such layers
  std::vector<bool> window_layers;  // which layers are such layers; empty: none

  uint32_t n_expert = 0, n_expert_used = 0;  // 0: dense
  uint32_t n_ff_expert = 0;                  // inner width of an expert; 0: n_ff
  uint32_t n_ff_shared = 0;                  // inner width of the shared experts together; 0: none
  uint32_t n_layer_dense = 0;                // leading layers without experts
  graph::MoeParams routing;                  // how experts are chosen and weighted
  LatentAttention latent;
  float embedding_scale = 1;      // token embeddings are multiplied by
  float residual_scale = 1;       // what a block adds to the residual stream is multiplied by
  float logit_scale = 1;          // logits are multiplied by, before the cap
  float final_logit_softcap = 0;  // 0: none
  uint32_t n_token_types = 0;
  Pooling pooling = Pooling::none;

  DecoderForm form;  // architectures that use decoder.h

  bool is_window_layer(uint32_t layer) const { return layer < window_layers.size() && window_layers[layer]; }
};

// "<general.architecture>.<name>".
std::string arch_key(const gguf::Metadata& metadata, std::string_view name);

// Reads the keys that all architectures share and checks that they fit together; window layers, attention scale and
// experts are the architecture's business. Throws FormatError naming the key, NotSupportedError for a rope scaling
// type.
//   long_rope: whether the architecture has the frequency factors of rope scaling type "longrope"
enum class LongRope { refused, accepted };
Hyperparameters read_common(const gguf::Metadata& metadata, NormKind norm, LongRope long_rope = LongRope::refused);

// Reads how experts are chosen and how wide they are: expert_feed_forward_length, expert_shared_count,
// expert_weights_scale, expert_weights_norm, expert_gating_func, expert_group_count, expert_group_used_count,
// leading_dense_block_count. Keys that the file lacks leave hp.routing as it is.
// Throws FormatError naming the key, also when the model has no experts; NotSupportedError for other gating functions.
void read_experts(const gguf::Metadata& metadata, Hyperparameters& hp);

// Whether contexts of n_ctx tokens are longer than the original training's, by which longrope chooses its factors.
// Contexts come in steps of 256 tokens, as in llama.cpp.
bool is_long_context(uint32_t n_ctx, uint32_t n_ctx_original);

// The entries that a stage needs to know: general.architecture, <arch>.* and the number of token types. Adds
// <arch>.vocab_size from the token list where the key is missing, so that the token list can stay behind; and
// "caravan.short_context" where n_ctx, the context that the user asks for (0: none), is not long while the model's own
// is.
gguf::Metadata hyperparameter_metadata(const gguf::Metadata& model, uint32_t n_ctx = 0);

}  // namespace caravan::models
