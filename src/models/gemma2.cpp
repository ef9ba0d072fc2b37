// gemma2: norms before and after each block; sliding-window layers and layers with full attention take turns; scores
// and logits are capped. Source: Gemma Team 2024, arXiv:2408.00118. Embeddings are scaled by sqrt(n_embd), the
// feed-forward uses GELU (tanh form), the output matrix is tied. Norm weights in GGUF include the +1.
#include <cmath>

#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.layout = LayerLayout::sandwich,
                                               .feed_forward_scales = FeedForwardScales::ignored,
                                               .activation = graph::Activation::gelu});
  read_windows(metadata, 4096, 2, hp);
  // The largest model (27B, 46 layers) scales scores by the width per query head, the others by the head's size.
  if (hp.n_layer == 46) hp.attention_scale = 1 / std::sqrt(static_cast<float>(hp.n_embd / hp.n_head[0]));
  hp.embedding_scale = std::sqrt(static_cast<float>(hp.n_embd));
  hp.attention_softcap = metadata.get_f32("gemma2.attn_logit_softcapping", 50);
  hp.final_logit_softcap = metadata.get_f32("gemma2.final_logit_softcapping", 30);
  return hp;
}

}  // namespace

const Arch kGemma2{"gemma2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
