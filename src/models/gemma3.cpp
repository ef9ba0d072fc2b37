// gemma3 (text): five sliding-window layers, then one with full attention; norms before and after each block.
// Source: Gemma Team 2025, arXiv:2503.19786. Embeddings are scaled by sqrt(n_embd), queries and keys are normalised per
// head, the feed-forward uses GELU (tanh form), the output matrix may be tied. Norm weights in GGUF include the +1.
#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "models/archs.h"
#include "models/blocks.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_common(metadata, NormKind::rms);
  hp.window = metadata.get_u32("gemma3.attention.sliding_window");
  if (hp.window == 0 || hp.window > 1u << 30) {
    throw FormatError(fmt::format("{}: key 'gemma3.attention.sliding_window': expected 1 to {}, found {}",
                                  metadata.source(), 1u << 30, hp.window));
  }
  hp.window_pattern = metadata.get_u32("gemma3.attention.sliding_window_pattern", 6);
  if (hp.window_pattern < 2) {
    throw NotSupportedError(fmt::format("{}: key 'gemma3.attention.sliding_window_pattern': {} is not supported",
                                        metadata.source(), hp.window_pattern));
  }
  // The largest model (27B, 62 layers) scales scores by the width per query head, the others by the head's size.
  if (hp.n_layer == 62) hp.attention_scale = 1 / std::sqrt(static_cast<float>(hp.n_embd / hp.n_head[0]));
  hp.rope.pairing = graph::RopePairing::halves;
  hp.rope_window = graph::RopeParams{};
  hp.rope_window.n_rot = hp.rope.n_rot;
  hp.rope_window.pairing = graph::RopePairing::halves;
  hp.rope_window.freq_base = metadata.get_f32("gemma3.rope.freq_base_swa", 10000);
  hp.final_logit_softcap = metadata.get_f32("gemma3.final_logit_softcapping", 0);
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
    d.vector("attn_q_norm.weight", {hp.head_dim_k});
    d.vector("attn_k_norm.weight", {hp.head_dim_k});
    d.vector("post_attention_norm.weight", {hp.n_embd});
    d.vector("ffn_norm.weight", {hp.n_embd});
    d.gated_ffn(hp);
    d.vector("post_ffw_norm.weight", {hp.n_embd});
  }
  d.enter(TensorDecl::Scope::output);
  d.vector("output_norm.weight", {hp.n_embd});
  d.matrix("output.weight", {hp.n_embd, hp.n_vocab}, 1).fallback = "token_embd.weight";
  return d.release();
}

// Group 0: full attention; group 1: the sliding window.
std::vector<CacheGroup> cache_groups(const Hyperparameters& hp) {
  CacheGroup full, window;
  window.kind = CacheGroup::Kind::window;
  window.window = hp.window;
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    (hp.is_window_layer(layer) ? window : full)
        .layers.push_back({layer, hp.n_head_kv[layer], hp.head_dim_k, hp.head_dim_v});
  }
  return {full, window};
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                    const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const graph::RopeParams& rope = hp.is_window_layer(layer) ? hp.rope_window : hp.rope;
  Qkv qkv = project_qkv(b, hp, layer, rms_norm(b, hp, prefix + "attn_norm", x));
  qkv.q = b.rope(rms_norm(b, hp, prefix + "attn_q_norm", qkv.q), b.positions(), rope);
  qkv.k = b.rope(rms_norm(b, hp, prefix + "attn_k_norm", qkv.k), b.positions(), rope);
  ValueId attended = cached_attention(b, hp, qkv, place);
  if (selects_rows(slice, layer)) attended = wanted_rows(b, attended), x = wanted_rows(b, x);
  attended = attention_output(b, hp, layer, attended);
  x = b.add(rms_norm(b, hp, prefix + "post_attention_norm", attended), x);

  const ValueId y = gated_ffn(b, hp, layer, rms_norm(b, hp, prefix + "ffn_norm", x), graph::Activation::gelu);
  return b.add(rms_norm(b, hp, prefix + "post_ffw_norm", y), x);
}

void build(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  const auto groups = cache_groups(hp);
  ValueId x = slice_input(b, hp, slice);
  if (slice.embeds) x = b.scale(x, std::sqrt(static_cast<float>(hp.n_embd)));
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) {
    x = build_layer(b, hp, slice, layer, cache_place(groups, slice, layer), x);
  }
  if (!slice.outputs) return hidden_output(b, x);
  final_outputs(b, hp, rms_norm(b, hp, "output_norm", wanted_rows(b, x)));
}

}  // namespace

const Arch kGemma3{"gemma3", read, tensors, cache_groups, build};

}  // namespace caravan::models
