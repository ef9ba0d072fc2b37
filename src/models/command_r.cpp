// command-r: Command R and R+: one layer norm without bias before attention and feed-forward, which work side by side;
// the largest model also norms queries and keys. Source: Cohere's published configurations. The output matrix is tied.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.norm = NormKind::layer,
                                               .layout = LayerLayout::parallel,
                                               .query_key_norm = QueryKeyNorm::each_head,
                                               .pairing = graph::RopePairing::adjacent,
                                               .feed_forward_scales = FeedForwardScales::ignored});
  if (const float scale = metadata.get_f32("command-r.logit_scale", 0); scale != 0) hp.logit_scale = scale;
  return hp;
}

}  // namespace

const Arch kCommandR{"command-r", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
