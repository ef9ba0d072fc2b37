// gpt-oss: experts in every layer, a learned sink per head, sliding windows in every other layer.
// Source: OpenAI 2025, arXiv:2508.10925. A head's sink is a logit that takes part in its softmax and has no value; the
// router chooses by logit and weights by a softmax over the chosen ones; experts have biases and limit what enters
// their SwiGLU. Expert weights are MXFP4 in the published files.
#include <fmt/format.h>

#include "base/error.h"
#include "models/archs.h"
#include "models/blocks.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

using Presence = TensorDecl::Presence;

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.feed_forward = FeedForward::gated_or_experts,
                                               .feed_forward_scales = FeedForwardScales::ignored,
                                               .activation = graph::Activation::swiglu_oai});
  read_windows(metadata, 0, 2, hp);
  read_experts(metadata, hp);
  hp.routing.gating = graph::Gating::softmax_over_selected;
  hp.routing.weight_norm = graph::WeightNorm::none;
  hp.routing.activation = graph::Activation::swiglu_oai;
  return hp;
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  Declarations d;
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    d.enter_layer(layer);
    d.vector("attn_norm.weight", {hp.n_embd});
    d.attention(hp);
    d.vector("attn_sinks.weight", {hp.n_head[layer]});
    d.vector("post_attention_norm.weight", {hp.n_embd});
    d.moe(hp);
  }
  d.enter(TensorDecl::Scope::output);
  d.vector("output_norm.weight", {hp.n_embd});
  d.matrix("output.weight", {hp.n_embd, hp.n_vocab}, 1).fallback = "token_embd.weight";
  return d.release();
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                    const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const graph::RopeParams& rope = hp.is_window_layer(layer) ? hp.rope_window : hp.rope;
  Qkv qkv = project_qkv(b, hp, layer, rms_norm(b, hp, prefix + "attn_norm", x));
  qkv.q = b.rope(qkv.q, b.positions(), rope);
  qkv.k = b.rope(qkv.k, b.positions(), rope);
  ValueId attended = cached_attention(b, hp, qkv, place, b.vector(prefix + "attn_sinks.weight", {hp.n_head[layer]}));
  if (selects_rows(slice, layer)) attended = wanted_rows(b, attended), x = wanted_rows(b, x);
  x = b.add(attention_output(b, hp, layer, attended), x);
  return b.add(moe_ffn(b, hp, layer, rms_norm(b, hp, prefix + "post_attention_norm", x)), x);
}

void build(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  const auto groups = decoder_cache_groups(hp);
  ValueId x = slice_input(b, hp, slice);
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) {
    x = build_layer(b, hp, slice, layer, cache_place(groups, slice, layer), x);
  }
  if (!slice.outputs) return hidden_output(b, x);
  final_outputs(b, hp, rms_norm(b, hp, "output_norm", wanted_rows(b, x)));
}

}  // namespace

const Arch kGptOss{"gpt-oss", read, tensors, decoder_cache_groups, build};

}  // namespace caravan::models
