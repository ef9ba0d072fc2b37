// gpt2: GPT-2: layer norms, biases everywhere, learned positions, a feed-forward without gate (GELU, tanh form).
// Source: Radford et al. 2019, "Language models are unsupervised multitask learners".
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.norm = NormKind::layer,
                                 .positions = Positions::learned,
                                 .feed_forward = FeedForward::plain,
                                 .feed_forward_scales = FeedForwardScales::ignored,
                                 .activation = graph::Activation::gelu});
}

}  // namespace

const Arch kGpt2{"gpt2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
