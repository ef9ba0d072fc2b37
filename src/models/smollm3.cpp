// smollm3: SmolLM 3: llama in which every fourth layer has no rotary embedding.
// Source: Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context reasoner"; Yang et al. 2025,
// arXiv:2501.18795 (layers without positions).
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(
      metadata, {.pairing = graph::RopePairing::adjacent, .feed_forward_scales = FeedForwardScales::ignored});
  hp.no_rope_period = 4;
  return hp;
}

}  // namespace

const Arch kSmollm3{"smollm3", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
