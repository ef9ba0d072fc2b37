// cohere2: Command R7B and Command A: command-r with three sliding-window layers, then one with full attention, which
// alone has no rotary embedding. Source: Cohere 2025, arXiv:2504.00698.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.norm = NormKind::layer,
                                               .layout = LayerLayout::parallel,
                                               .positions = Positions::rope_in_windows,
                                               .pairing = graph::RopePairing::adjacent});
  read_windows(metadata, 0, 4, hp);
  if (const float scale = metadata.get_f32("cohere2.logit_scale"); scale != 0) hp.logit_scale = scale;
  return hp;
}

}  // namespace

const Arch kCohere2{"cohere2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
