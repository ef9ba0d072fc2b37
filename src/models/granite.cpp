// granite: Granite 3 and 4 (dense): llama with factors on embeddings, scores, residuals and logits.
// Source: IBM's published configurations; Yang et al. 2022, arXiv:2203.03466 (why there are factors).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.pairing = graph::RopePairing::adjacent,
                                               .rope_factors = RopeFactors::freqs,
                                               .feed_forward_scales = FeedForwardScales::ignored});
  // Vision models add what they see to the input of some layers.
  constexpr const char* kDeepstack = "granite.deepstack_mapping";
  const std::vector<int64_t> deepstack = metadata.get_integers(kDeepstack);
  if (std::any_of(deepstack.begin(), deepstack.end(), [](int64_t stream) { return stream >= 0; })) {
    throw NotSupportedError(fmt::format("{}: key '{}' is not supported", metadata.source(), kDeepstack));
  }
  if (!metadata.get_bool("granite.rope.scaling.finetuned", true)) hp.form.positions = Positions::none;
  if (const float scale = metadata.get_f32("granite.embedding_scale", 0); scale != 0) hp.embedding_scale = scale;
  if (const float scale = metadata.get_f32("granite.residual_scale", 0); scale != 0) hp.residual_scale = scale;
  const float divisor = metadata.get_f32("granite.logit_scale");
  if (!(divisor != 0 && std::isfinite(divisor))) {
    throw FormatError(fmt::format("{}: key 'granite.logit_scale': expected a number other than 0, found {}",
                                  metadata.source(), divisor));
  }
  hp.logit_scale = 1 / divisor;
  return hp;
}

}  // namespace

const Arch kGranite{"granite", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
