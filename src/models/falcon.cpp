// falcon: Falcon 7B and 40B: attention (with one key head, or few) and a feed-forward without gate (GELU, tanh form)
// side by side; the larger model norms twice. Source: Almazrouei et al. 2023, arXiv:2311.16867.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.norm = NormKind::layer,
                                 .layout = LayerLayout::parallel,
                                 .feed_forward = FeedForward::plain,
                                 .feed_forward_scales = FeedForwardScales::ignored,
                                 .activation = graph::Activation::gelu});
}

}  // namespace

const Arch kFalcon{"falcon", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
