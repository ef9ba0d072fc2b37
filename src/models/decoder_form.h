// How the shared decoder (decoder.h) is put together for an architecture: data only, and a part of Hyperparameters.
#pragma once

#include "graph/op.h"

namespace caravan::models {

// Which norm an architecture uses, and with it which key holds its epsilon.
enum class NormKind { rms, layer };

// Where a layer norms and what it adds to the residual stream x.
//   pre:      x += attention(norm(x)); x += ffn(norm(x))
//   sandwich: as pre, with another norm of each result before it is added
//   post:     x += norm(attention(x)); x += norm(ffn(x))
//   parallel: x += attention(norm(x)) + ffn(norm(x)); one norm serves both, unless the file has attn_norm_2, which is
//             the attention's own
enum class LayerLayout { pre, sandwich, post, parallel };

// Norms of queries and keys before they are rotated.
//   head:      RMS norm of each head with one weight [head_dim] for all
//   row:       RMS norm of the whole row, all heads together
//   each_head: layer norm of each head with weights [head_dim, heads], in files that have them
enum class QueryKeyNorm { none, head, row, each_head };

// What tells a layer where its rows are: rotary embedding, the same in sliding-window layers only, a table of learned
// embeddings that is added to those of the tokens, or nothing.
enum class Positions { rope, rope_in_windows, learned, none };

// Tensors that divide the rotary frequencies.
//   freqs:      rope_freqs.weight, in files that have it
//   by_context: rope_factors_short.weight or rope_factors_long.weight, by the context that is served
enum class RopeFactors { none, freqs, by_context };

// The feed-forward block.
//   gated:       down(activation(gate x) * up x)
//   fused_gated: as gated; ffn_up holds the gate's rows, then those of up
//   plain:       down(activation(up x))
//   gated_or_experts: gated, or a mixture of gated experts where the file counts some
enum class FeedForward { gated, fused_gated, plain, gated_or_experts };

// What the feed-forward's .scale tensors do to its products. llama.cpp computes some architectures without them; files
// of those may hold them nevertheless.
enum class FeedForwardScales { applied, ignored };

struct DecoderForm {
  NormKind norm = NormKind::rms;
  LayerLayout layout = LayerLayout::pre;
  QueryKeyNorm query_key_norm = QueryKeyNorm::none;
  Positions positions = Positions::rope;
  graph::RopePairing pairing = graph::RopePairing::halves;
  RopeFactors rope_factors = RopeFactors::none;
  FeedForward feed_forward = FeedForward::gated;
  FeedForwardScales feed_forward_scales = FeedForwardScales::applied;
  graph::Activation activation = graph::Activation::silu;
};

}  // namespace caravan::models
