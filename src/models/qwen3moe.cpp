// qwen3moe: qwen3 with a mixture of experts in every layer.
// Source: Qwen Team 2025, arXiv:2505.09388. Softmax over all experts, the weights of the chosen ones sum to one.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp =
      read_decoder(metadata, {.query_key_norm = QueryKeyNorm::head, .feed_forward = FeedForward::gated_or_experts});
  read_experts(metadata, hp);
  hp.routing.gating = graph::Gating::softmax;
  hp.routing.weight_norm = graph::WeightNorm::sum_to_one;
  return hp;
}

}  // namespace

const Arch kQwen3Moe{"qwen3moe", read, decoder_tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
