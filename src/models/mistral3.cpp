// mistral3: Ministral 3 and its like: llama with YaRN, and with queries that grow with the position.
// Source: the models' published configurations; Meta 2025 (attention temperature, first in Llama 4).
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.pairing = graph::RopePairing::adjacent,
                                               .rope_factors = RopeFactors::freqs,
                                               .feed_forward = FeedForward::gated_or_experts});
  hp.temperature_scale = metadata.get_f32("mistral3.attention.temperature_scale", 0);
  hp.temperature_length = hp.n_ctx_original;
  return hp;
}

}  // namespace

const Arch kMistral3{"mistral3", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
