// bert: an encoder that gives hidden rows to pool into embeddings; no cache, no logits.
// Source: Devlin et al. 2018, arXiv:1810.04805. Learned positions, segment 0 for every token, norms after each block,
// GELU (tanh form, as llama.cpp computes it).
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
        fmt::format("{}: bert models with 'bert.attention.causal' other than false are not "
                    "supported",
                    metadata.source()));
  }
  hp.n_positions = hp.n_ctx_train;
  hp.n_token_types = metadata.get_u32("tokenizer.ggml.token_type_count");
  if (hp.n_token_types == 0 || hp.n_token_types > 1u << 16) {
    throw FormatError(fmt::format("{}: key 'tokenizer.ggml.token_type_count': expected 1 to 65536, found {}",
                                  metadata.source(), hp.n_token_types));
  }
  return hp;
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  Declarations d;
  const auto norm = [&](const std::string& name) {
    d.vector(name + ".weight", {hp.n_embd});
    d.vector(name + ".bias", {hp.n_embd});
  };
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  d.vector("token_types.weight", {hp.n_embd, hp.n_token_types});
  d.embedding("position_embd.weight", {hp.n_embd, hp.n_positions});
  norm("token_embd_norm");
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    d.enter_layer(layer);
    d.attention(hp);
    norm("attn_output_norm");
    d.linear("ffn_up", hp.n_embd, hp.n_ff[layer], 1);
    d.linear("ffn_down", hp.n_ff[layer], hp.n_embd, 0);
    norm("layer_output_norm");
  }
  std::vector<TensorDecl> decls = d.release();
  // The classifier of rerankers: no part of the graph, the server applies it to the pooled row.
  for (const char* name : {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"}) {
    TensorDecl& classifier = decls.emplace_back();
    classifier.name = name;
    classifier.scope = TensorDecl::Scope::output;
    classifier.presence = TensorDecl::Presence::unused;
  }
  return decls;
}

// One group without a cache: rows see their own sequence within the batch.
std::vector<CacheGroup> cache_groups(const Hyperparameters&) {
  CacheGroup group;
  group.kind = CacheGroup::Kind::none;
  return {group};
}

ValueId embed(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  ValueId x = slice_input(b, hp, slice);
  const ValueId types = b.vector("token_types.weight", {hp.n_embd, hp.n_token_types});
  x = b.add(x, b.slice(types, 1, 0, 1));
  x = b.add(x, b.get_rows(b.embedding("position_embd.weight", {hp.n_embd, hp.n_positions}), b.positions()));
  return layer_norm(b, hp, "token_embd_norm", x);
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const Qkv qkv = project_qkv(b, hp, layer, x);
  graph::AttentionParams params;
  params.scale = hp.attention_scale;
  ValueId attended = b.encoder_attention(qkv.q, qkv.k, qkv.v, params);
  if (selects_rows(slice, layer)) attended = wanted_rows(b, attended), x = wanted_rows(b, x);
  x = layer_norm(b, hp, prefix + "attn_output_norm", b.add(attention_output(b, hp, layer, attended), x));

  const ValueId up = b.gelu(linear(b, prefix + "ffn_up", hp.n_embd, hp.n_ff[layer], x));
  const ValueId y = linear(b, prefix + "ffn_down", hp.n_ff[layer], hp.n_embd, up);
  return layer_norm(b, hp, prefix + "layer_output_norm", b.add(y, x));
}

void build(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  ValueId x = slice.embeds ? embed(b, hp, slice) : slice_input(b, hp, slice);
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) x = build_layer(b, hp, slice, layer, x);
  if (!slice.outputs) return hidden_output(b, x);
  b.output("embedding", wanted_rows(b, x));
}

}  // namespace

const Arch kBert{"bert", read, tensors, cache_groups, build};

}  // namespace caravan::models
