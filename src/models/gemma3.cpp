// gemma3 (text): five sliding-window layers, then one with full attention; norms before and after each block.
// Source: Gemma Team 2025, arXiv:2503.19786. Embeddings are scaled by sqrt(n_embd), queries and keys are normalised per
// head, the feed-forward uses GELU (tanh form), the output matrix may be tied. Norm weights in GGUF include the +1.
#include <cmath>

#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(
      metadata,
      {.layout = LayerLayout::sandwich, .query_key_norm = QueryKeyNorm::head, .activation = graph::Activation::gelu});
  read_windows(metadata, 0, 6, hp);
  // Window layers keep their rotation as it is when that of the others is scaled for long contexts.
  hp.rope_window = {.n_rot = hp.rope.n_rot,
                    .pairing = hp.rope.pairing,
                    .freq_base = metadata.get_f32("gemma3.rope.freq_base_swa", 10000)};
  // The largest model (27B, 62 layers) scales scores by the width per query head, the others by the head's size.
  if (hp.n_layer == 62) hp.attention_scale = 1 / std::sqrt(static_cast<float>(hp.n_embd / hp.n_head[0]));
  hp.embedding_scale = std::sqrt(static_cast<float>(hp.n_embd));
  hp.final_logit_softcap = metadata.get_f32("gemma3.final_logit_softcapping", 0);
  return hp;
}

}  // namespace

const Arch kGemma3{"gemma3", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
