// phi3: Phi 3, 3.5 and 4: llama with fused matrices (attn_qkv; gate and up in ffn_up), rotated halves, and frequency
// factors for long contexts. Source: Abdin et al. 2024, arXiv:2404.14219; Ding et al. 2024, arXiv:2402.13753 (factors).
// Sliding windows that files announce are not what the models were trained with; they are left out, as llama.cpp does.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.rope_factors = RopeFactors::by_context,
                                 .feed_forward = FeedForward::fused_gated,
                                 .feed_forward_scales = FeedForwardScales::ignored});
}

}  // namespace

const Arch kPhi3{"phi3", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
