// nomic-bert: an encoder like bert with rotary positions, gated SiLU feed-forward and (in the published models) no
// biases in its products. Gives hidden rows to pool into embeddings; no cache, no logits.
// Source: Nussbaum et al. 2024, arXiv:2402.01613. The mixture of experts in other models of the family is refused.
#include <fmt/format.h>

#include "base/error.h"
#include "models/archs.h"
#include "models/blocks.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_common(metadata, NormKind::layer);
  if (hp.causal) {
    throw NotSupportedError(
        fmt::format("{}: nomic-bert models with 'nomic-bert.attention.causal' other than false are not supported",
                    metadata.source()));
  }
  if (metadata.get_u32("nomic-bert.moe_every_n_layers", 0) != 0 || hp.n_expert > 0) {
    throw NotSupportedError(fmt::format("{}: nomic-bert models with experts are not supported", metadata.source()));
  }
  hp.n_token_types = metadata.get_u32("tokenizer.ggml.token_type_count");
  if (hp.n_token_types == 0 || hp.n_token_types > 1u << 16) {
    throw FormatError(fmt::format("{}: key 'tokenizer.ggml.token_type_count': expected 1 to 65536, found {}",
                                  metadata.source(), hp.n_token_types));
  }
  hp.rope.pairing = graph::RopePairing::halves;
  return hp;
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  Declarations d;
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  d.vector("token_types.weight", {hp.n_embd, hp.n_token_types}, TensorDecl::Presence::optional);
  d.norm("token_embd_norm", hp.n_embd, NormKind::layer);
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    d.enter_layer(layer);
    d.attention(hp);
    d.norm("attn_output_norm", hp.n_embd, NormKind::layer);
    d.gated_ffn(hp);
    d.norm("layer_output_norm", hp.n_embd, NormKind::layer);
  }
  return d.release();
}

// One group without a cache: rows see their own sequence within the batch.
std::vector<CacheGroup> cache_groups(const Hyperparameters&) {
  CacheGroup group;
  group.kind = CacheGroup::Kind::none;
  return {group};
}

// Tokens, all of segment 0.
ValueId embed(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  ValueId x = slice_input(b, hp, slice);
  if (b.has("token_types.weight")) {
    x = b.add(x, b.slice(b.vector("token_types.weight", {hp.n_embd, hp.n_token_types}), 1, 0, 1));
  }
  return layer_norm(b, hp, "token_embd_norm", x);
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const Qkv qkv = project_qkv(b, hp, layer, x);
  graph::AttentionParams params;
  params.scale = hp.attention_scale;
  ValueId attended =
      b.encoder_attention(b.rope(qkv.q, b.positions(), hp.rope), b.rope(qkv.k, b.positions(), hp.rope), qkv.v, params);
  if (selects_rows(slice, layer)) attended = wanted_rows(b, attended), x = wanted_rows(b, x);
  x = layer_norm(b, hp, prefix + "attn_output_norm", b.add(attention_output(b, hp, layer, attended), x));
  const ValueId y = gated_ffn(b, hp, layer, x, graph::Activation::silu);
  return layer_norm(b, hp, prefix + "layer_output_norm", b.add(y, x));
}

void build(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  ValueId x = slice.embeds ? embed(b, hp, slice) : slice_input(b, hp, slice);
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) x = build_layer(b, hp, slice, layer, x);
  if (!slice.outputs) return hidden_output(b, x);
  b.output("embedding", wanted_rows(b, x));
}

}  // namespace

const Arch kNomicBert{"nomic-bert", read, tensors, cache_groups, build};

}  // namespace caravan::models
