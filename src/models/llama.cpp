// llama: Llama 1 to 3, Mistral, TinyLlama, SmolLM and Mixtral (with experts).
// Pre-norm decoder: rotary attention with grouped keys and values, gated SiLU feed-forward or a mixture of such
// experts. Source: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2024, arXiv:2401.04088 (experts). Tensors and
// keys: docs/gguf.md.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.pairing = graph::RopePairing::adjacent,
                                 .rope_factors = RopeFactors::freqs,
                                 .feed_forward = FeedForward::gated_or_experts});
}

}  // namespace

const Arch kLlama{"llama", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
