// olmo2: OLMo 2 and 3: norms after each block only, and RMS norms over all query and all key heads together. OLMo 3
// has three sliding-window layers, then one with full attention; YaRN is for the latter alone.
// Source: OLMo Team 2025, arXiv:2501.00656.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.layout = LayerLayout::post,
                                               .query_key_norm = QueryKeyNorm::row,
                                               .feed_forward_scales = FeedForwardScales::ignored});
  if (metadata.get_u32("olmo2.attention.sliding_window", 0) == 0) return hp;
  read_windows(metadata, 0, 4, hp);
  hp.rope_window = {.n_rot = hp.rope.n_rot, .pairing = hp.rope.pairing, .freq_base = hp.rope.freq_base};
  return hp;
}

}  // namespace

const Arch kOlmo2{"olmo2", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
