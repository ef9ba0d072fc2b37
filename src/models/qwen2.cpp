// qwen2: Qwen 1.5, 2 and 2.5: llama with biases on queries, keys and values, and rotated halves.
// Source: Yang et al. 2024, arXiv:2407.10671.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.feed_forward_scales = FeedForwardScales::ignored});
}

}  // namespace

const Arch kQwen2{"qwen2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
