// starcoder2: layer norms, biases everywhere, a feed-forward without gate (GELU, tanh form).
// Source: Lozhkov et al. 2024, arXiv:2402.19173.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.norm = NormKind::layer,
                                 .feed_forward = FeedForward::plain,
                                 .feed_forward_scales = FeedForwardScales::ignored,
                                 .activation = graph::Activation::gelu});
}

}  // namespace

const Arch kStarcoder2{"starcoder2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
