// glm4: GLM-4 (0414): norms before and after each block, gate and up fused in ffn_up, part of each head rotated.
// Source: GLM Team 2024, arXiv:2406.12793. Models that also see images rotate halves of a head, in sections that all
// follow the same position where there is only text; the others rotate adjacent pairs.
#include <fmt/format.h>

#include "base/error.h"
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.layout = LayerLayout::sandwich,
                                               .pairing = graph::RopePairing::adjacent,
                                               .feed_forward = FeedForward::fused_gated,
                                               .feed_forward_scales = FeedForwardScales::ignored});
  constexpr const char* kSections = "glm4.rope.dimension_sections";
  if (!metadata.contains(kSections)) return hp;
  const std::vector<uint32_t> sections = metadata.get_u32_per_layer(kSections, 4, std::nullopt);
  if (sections[0] == 0 || sections[1] == 0) return hp;
  // The fourth section follows a position that text does not have.
  if (uint64_t{sections[0]} + sections[1] + sections[2] < static_cast<uint64_t>(hp.rope.n_rot) / 2) {
    throw NotSupportedError(fmt::format("{}: key '{}': {}, {}, {} do not cover the {} rotated pairs: not supported",
                                        metadata.source(), kSections, sections[0], sections[1], sections[2],
                                        hp.rope.n_rot / 2));
  }
  hp.rope.pairing = graph::RopePairing::halves;
  return hp;
}

}  // namespace

const Arch kGlm4{"glm4", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
