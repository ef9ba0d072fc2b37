// llama: Llama 1 to 3, Mistral, TinyLlama, SmolLM and Mixtral (with experts).
// Pre-norm decoder: rotary attention with grouped keys and values, gated SiLU feed-forward or a mixture of such
// experts. Source: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2024, arXiv:2401.04088 (experts). Tensors and
// keys: docs/gguf.md.
#include <fmt/format.h>

#include "base/error.h"
#include "models/archs.h"
#include "models/blocks.h"

namespace caravan::models {
namespace {

void refuse(const gguf::Metadata& metadata, const std::string& key) {
  if (metadata.get_f32(key, 0) != 0) {
    throw NotSupportedError(fmt::format("{}: key '{}' is not supported for llama models", metadata.source(), key));
  }
}

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_common(metadata, NormKind::rms);
  refuse(metadata, "llama.attention.clamp_kqv");
  refuse(metadata, "llama.attention.max_alibi_bias");
  if (!hp.causal) throw NotSupportedError(fmt::format("{}: non-causal llama models", metadata.source()));
  if (hp.n_expert > 0 && hp.n_expert_used == 0) {
    throw FormatError(
        fmt::format("{}: key 'llama.expert_used_count': expected 1 to {}, found 0", metadata.source(), hp.n_expert));
  }
  hp.rope.pairing = graph::RopePairing::adjacent;
  return hp;
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  using Presence = TensorDecl::Presence;
  Declarations d;
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  d.enter(TensorDecl::Scope::every);
  d.vector("rope_freqs.weight", {hp.rope.n_rot / 2}, Presence::optional);
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    d.enter_layer(layer);
    d.vector("attn_norm.weight", {hp.n_embd});
    d.attention(hp);
    d.vector("ffn_norm.weight", {hp.n_embd});
    hp.n_expert > 0 ? d.moe(hp) : d.gated_ffn(hp);
  }
  d.enter(TensorDecl::Scope::output);
  d.vector("output_norm.weight", {hp.n_embd});
  d.matrix("output.weight", {hp.n_embd, hp.n_vocab}, 1).fallback = "token_embd.weight";
  return d.release();
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                    const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const ValueId factors = b.optional_vector("rope_freqs.weight", {hp.rope.n_rot / 2});
  Qkv qkv = project_qkv(b, hp, layer, rms_norm(b, hp, prefix + "attn_norm", x));
  qkv.q = b.rope(qkv.q, b.positions(), hp.rope, factors);
  qkv.k = b.rope(qkv.k, b.positions(), hp.rope, factors);
  ValueId attended = cached_attention(b, hp, qkv, place);
  // The mixture of experts works on all rows of a batch.
  if (selects_rows(slice, layer) && hp.n_expert == 0) attended = wanted_rows(b, attended), x = wanted_rows(b, x);
  x = b.add(attention_output(b, hp, layer, attended), x);

  const ValueId h = rms_norm(b, hp, prefix + "ffn_norm", x);
  const ValueId y = hp.n_expert > 0 ? moe_ffn(b, hp, layer, h) : gated_ffn(b, hp, layer, h, graph::Activation::silu);
  return b.add(y, x);
}

void build(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  const auto groups = full_cache_group(hp);
  ValueId x = slice_input(b, hp, slice);
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) {
    x = build_layer(b, hp, slice, layer, cache_place(groups, slice, layer), x);
  }
  if (!slice.outputs) return hidden_output(b, x);
  final_outputs(b, hp, rms_norm(b, hp, "output_norm", wanted_rows(b, x)));
}

}  // namespace

const Arch kLlama{"llama", read, tensors, full_cache_group, build};

}  // namespace caravan::models
