#include "models/blocks.h"

#include "base/error.h"

namespace caravan::models {
namespace {

using graph::kRows;

int64_t q_width(const Hyperparameters& hp, uint32_t layer) { return int64_t{hp.head_dim_k} * hp.n_head[layer]; }
int64_t k_width(const Hyperparameters& hp, uint32_t layer) { return int64_t{hp.head_dim_k} * hp.n_head_kv[layer]; }
int64_t v_width(const Hyperparameters& hp, uint32_t layer) { return int64_t{hp.head_dim_v} * hp.n_head_kv[layer]; }
int64_t qkv_width(const Hyperparameters& hp, uint32_t layer) {
  return q_width(hp, layer) + k_width(hp, layer) + v_width(hp, layer);
}
int64_t attention_width(const Hyperparameters& hp, uint32_t layer) { return int64_t{hp.head_dim_v} * hp.n_head[layer]; }

int64_t expert_width(const Hyperparameters& hp, uint32_t layer) {
  return hp.n_ff_expert > 0 ? hp.n_ff_expert : hp.n_ff[layer];
}

TensorDecl::Presence scale_presence(const Hyperparameters& hp) {
  return hp.form.feed_forward_scales == FeedForwardScales::applied ? TensorDecl::Presence::optional
                                                                   : TensorDecl::Presence::unused;
}
ScaleOrder ffn_scale_order(const Hyperparameters& hp) {
  return hp.form.feed_forward_scales == FeedForwardScales::applied ? ScaleOrder::after_bias : ScaleOrder::ignored;
}

}  // namespace

std::string layer_prefix(uint32_t layer) { return "blk." + std::to_string(layer) + "."; }

TensorDecl& Declarations::add(std::string_view name, const graph::DimList& ne, graph::WeightRole role) {
  TensorDecl& decl = decls_.emplace_back();
  decl.name = prefix_ + std::string(name);
  decl.ne = ne.ne;
  decl.role = role;
  decl.scope = scope_;
  decl.layer = layer_;
  return decl;
}

TensorDecl& Declarations::vector(std::string_view name, const graph::DimList& ne, TensorDecl::Presence presence) {
  TensorDecl& decl = add(name, ne, graph::WeightRole::vector);
  decl.presence = presence;
  return decl;
}

TensorDecl& Declarations::matrix(std::string_view name, const graph::DimList& ne, std::optional<int> shard_axis) {
  TensorDecl& decl = add(name, ne, graph::WeightRole::matrix);
  decl.shard_axis = shard_axis;
  return decl;
}

TensorDecl& Declarations::embedding(std::string_view name, const graph::DimList& ne) {
  return add(name, ne, graph::WeightRole::embedding);
}

void Declarations::linear(std::string_view name, int64_t n_in, int64_t n_out, int shard_axis,
                          TensorDecl::Presence scale) {
  const std::string base(name);
  matrix(base + ".weight", {n_in, n_out}, shard_axis);
  // The bias of a product cut along its outputs is cut with it; cut along inputs, it is added once.
  TensorDecl& bias = vector(base + ".bias", {n_out}, TensorDecl::Presence::optional);
  if (shard_axis == 1) bias.shard_axis = 0;
  vector(base + ".scale", {1}, scale);
}

TensorDecl& Declarations::experts(std::string_view name, int64_t n_in, int64_t n_out, int64_t n_expert, int shard_axis,
                                  TensorDecl::Presence scale) {
  const std::string base(name);
  const size_t weight = decls_.size();
  matrix(base + ".weight", {n_in, n_out, n_expert}, shard_axis).expert_axis = 2;
  TensorDecl& bias = vector(base + ".bias", {n_out, n_expert}, TensorDecl::Presence::optional);
  bias.expert_axis = 1;
  if (shard_axis == 1) bias.shard_axis = 0;
  vector(base + ".scale", {n_expert}, scale).expert_axis = 0;
  return decls_[weight];
}

void Declarations::norm(std::string_view name, int64_t n, NormKind kind) {
  const std::string base(name);
  vector(base + ".weight", {n});
  if (kind == NormKind::layer) vector(base + ".bias", {n}, TensorDecl::Presence::optional);
}

void Declarations::attention(const Hyperparameters& hp) {
  // Cutting its outputs would cut q, k and v at different heads: no shard axis.
  matrix("attn_qkv.weight", {hp.n_embd, qkv_width(hp, layer_)}).presence = TensorDecl::Presence::optional;
  vector("attn_qkv.bias", {qkv_width(hp, layer_)}, TensorDecl::Presence::optional);
  vector("attn_qkv.scale", {1}, TensorDecl::Presence::optional);
  const auto part = [&](std::string_view name, int64_t width) {
    const size_t weight = decls_.size();
    linear(name, hp.n_embd, width, 1);
    decls_[weight].fallback = prefix_ + "attn_qkv.weight";
  };
  part("attn_q", q_width(hp, layer_));
  part("attn_k", k_width(hp, layer_));
  part("attn_v", v_width(hp, layer_));
  linear("attn_output", attention_width(hp, layer_), hp.n_embd, 0);
}

void Declarations::gated_ffn(const Hyperparameters& hp) {
  linear("ffn_gate", hp.n_embd, hp.n_ff[layer_], 1, scale_presence(hp));
  linear("ffn_up", hp.n_embd, hp.n_ff[layer_], 1, scale_presence(hp));
  linear("ffn_down", hp.n_ff[layer_], hp.n_embd, 0, scale_presence(hp));
}

void Declarations::fused_gated_ffn(const Hyperparameters& hp) {
  linear("ffn_up", hp.n_embd, int64_t{2} * hp.n_ff[layer_], 1, scale_presence(hp));
  linear("ffn_down", hp.n_ff[layer_], hp.n_embd, 0, scale_presence(hp));
}

void Declarations::plain_ffn(const Hyperparameters& hp) {
  linear("ffn_up", hp.n_embd, hp.n_ff[layer_], 1, scale_presence(hp));
  linear("ffn_down", hp.n_ff[layer_], hp.n_embd, 0, scale_presence(hp));
}

void Declarations::moe(const Hyperparameters& hp) {
  const int64_t n_embd = hp.n_embd, n_ff = expert_width(hp, layer_), n_expert = hp.n_expert;
  matrix("ffn_gate_inp.weight", {n_embd, n_expert});
  vector("ffn_gate_inp.bias", {n_expert}, TensorDecl::Presence::optional);
  vector("exp_probs_b.bias", {n_expert}, TensorDecl::Presence::optional);
  // Cutting its outputs would cut gate and up at different places: no shard axis.
  TensorDecl& fused = matrix("ffn_gate_up_exps.weight", {n_embd, 2 * n_ff, n_expert});
  fused.presence = TensorDecl::Presence::optional;
  fused.expert_axis = 2;
  const std::string fused_name = fused.name;
  experts("ffn_gate_exps", n_embd, n_ff, n_expert, 1, scale_presence(hp)).fallback = fused_name;
  experts("ffn_up_exps", n_embd, n_ff, n_expert, 1, scale_presence(hp)).fallback = fused_name;
  experts("ffn_down_exps", n_ff, n_embd, n_expert, 0, scale_presence(hp));
}

void Declarations::shared_experts(const Hyperparameters& hp) {
  linear("ffn_gate_shexp", hp.n_embd, hp.n_ff_shared, 1, scale_presence(hp));
  linear("ffn_up_shexp", hp.n_embd, hp.n_ff_shared, 1, scale_presence(hp));
  linear("ffn_down_shexp", hp.n_ff_shared, hp.n_embd, 0, scale_presence(hp));
}

ValueId linear(graph::Builder& b, const std::string& name, int64_t n_in, int64_t n_out, ValueId x, ScaleOrder order) {
  ValueId y = b.mul_mat(b.matrix(name + ".weight", {n_in, n_out}), x);
  const auto scale = [&] {
    if (b.has(name + ".scale")) y = b.mul(y, b.vector(name + ".scale", {1}));
  };
  if (order == ScaleOrder::before_bias) scale();
  if (b.has(name + ".bias")) y = b.add(y, b.vector(name + ".bias", {n_out}));
  if (order == ScaleOrder::after_bias) scale();
  return y;
}

ValueId rms_norm(graph::Builder& b, const Hyperparameters& hp, const std::string& name, ValueId x) {
  return b.rms_norm(x, b.vector(name + ".weight", {b.type(x).ne[0]}), hp.norm_eps);
}

ValueId layer_norm(graph::Builder& b, const Hyperparameters& hp, const std::string& name, ValueId x) {
  const int64_t n = b.type(x).ne[0];
  return b.layer_norm(x, b.vector(name + ".weight", {n}), b.optional_vector(name + ".bias", {n}), hp.norm_eps);
}

Qkv project_qkv(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  ValueId q, k, v;
  if (b.has(prefix + "attn_qkv.weight")) {
    const ValueId all = linear(b, prefix + "attn_qkv", hp.n_embd, qkv_width(hp, layer), x);
    q = b.cont(b.slice(all, 0, 0, q_width(hp, layer)));
    k = b.cont(b.slice(all, 0, q_width(hp, layer), k_width(hp, layer)));
    v = b.cont(b.slice(all, 0, q_width(hp, layer) + k_width(hp, layer), v_width(hp, layer)));
  } else {
    q = linear(b, prefix + "attn_q", hp.n_embd, q_width(hp, layer), x);
    k = linear(b, prefix + "attn_k", hp.n_embd, k_width(hp, layer), x);
    v = linear(b, prefix + "attn_v", hp.n_embd, v_width(hp, layer), x);
  }
  return {b.reshape(q, {hp.head_dim_k, hp.n_head[layer], kRows}),
          b.reshape(k, {hp.head_dim_k, hp.n_head_kv[layer], kRows}),
          b.reshape(v, {hp.head_dim_v, hp.n_head_kv[layer], kRows})};
}

CachePlace cache_place(const std::vector<CacheGroup>& groups, const Slice& slice, uint32_t layer) {
  for (size_t group = 0; group < groups.size(); ++group) {
    const auto layers = slice_cache_layers(groups[group], slice);
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i].layer == layer) return {static_cast<int>(group), static_cast<int>(i)};
    }
  }
  CARAVAN_ASSERT(false, "an architecture puts every layer with attention into a cache group");
  return {};
}

ValueId cached_attention(graph::Builder& b, const Hyperparameters& hp, const Qkv& qkv, const CachePlace& place,
                         ValueId sinks) {
  graph::AttentionParams params;
  params.scale = hp.attention_scale;
  params.softcap = hp.attention_softcap;
  params.group = place.group;
  params.layer = place.layer;
  return b.paged_attention(qkv.q, qkv.k, qkv.v, params, sinks);
}

ValueId attention_output(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  return linear(b, layer_prefix(layer) + "attn_output", attention_width(hp, layer), hp.n_embd, x);
}

ValueId gated_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                  graph::Activation activation) {
  const std::string prefix = layer_prefix(layer);
  const ValueId gate = linear(b, prefix + "ffn_gate", hp.n_embd, hp.n_ff[layer], x, ffn_scale_order(hp));
  const ValueId up = linear(b, prefix + "ffn_up", hp.n_embd, hp.n_ff[layer], x, ffn_scale_order(hp));
  return linear(b, prefix + "ffn_down", hp.n_ff[layer], hp.n_embd, b.gated(gate, up, activation), ffn_scale_order(hp));
}

ValueId fused_gated_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                        graph::Activation activation) {
  const std::string prefix = layer_prefix(layer);
  const int64_t n_ff = hp.n_ff[layer];
  const ValueId both = linear(b, prefix + "ffn_up", hp.n_embd, 2 * n_ff, x, ffn_scale_order(hp));
  const ValueId y = b.gated(b.slice(both, 0, 0, n_ff), b.slice(both, 0, n_ff, n_ff), activation);
  return linear(b, prefix + "ffn_down", n_ff, hp.n_embd, y, ffn_scale_order(hp));
}

ValueId plain_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                  graph::Activation activation) {
  const std::string prefix = layer_prefix(layer);
  const ValueId up = linear(b, prefix + "ffn_up", hp.n_embd, hp.n_ff[layer], x, ffn_scale_order(hp));
  return linear(b, prefix + "ffn_down", hp.n_ff[layer], hp.n_embd, b.activate(up, activation), ffn_scale_order(hp));
}

ValueId moe_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  using graph::MoeVector;
  const std::string prefix = layer_prefix(layer);
  const int64_t n_expert = hp.n_expert, n_embd = hp.n_embd, n_ff = expert_width(hp, layer);
  const ValueId logits = linear(b, prefix + "ffn_gate_inp", n_embd, n_expert, x);
  graph::Builder::MoeVectors vectors = graph::Builder::no_moe_vectors();
  const auto set = [&](MoeVector vector, const char* name, const graph::DimList& ne) {
    vectors[static_cast<size_t>(vector)] = b.optional_vector(prefix + name, ne);
  };
  const auto set_scale = [&](MoeVector vector, const char* name) {
    if (ffn_scale_order(hp) != ScaleOrder::ignored) set(vector, name, {n_expert});
  };
  set(MoeVector::selection_bias, "exp_probs_b.bias", {n_expert});
  set_scale(MoeVector::down_scale, "ffn_down_exps.scale");
  set(MoeVector::down_bias, "ffn_down_exps.bias", {n_embd, n_expert});
  ValueId gate, up = graph::kNoValue;
  if (b.has(prefix + "ffn_gate_up_exps.weight")) {
    gate = b.matrix(prefix + "ffn_gate_up_exps.weight", {n_embd, 2 * n_ff, n_expert});
  } else {
    gate = b.matrix(prefix + "ffn_gate_exps.weight", {n_embd, n_ff, n_expert});
    up = b.matrix(prefix + "ffn_up_exps.weight", {n_embd, n_ff, n_expert});
    set_scale(MoeVector::gate_scale, "ffn_gate_exps.scale");
    set(MoeVector::gate_bias, "ffn_gate_exps.bias", {n_ff, n_expert});
    set_scale(MoeVector::up_scale, "ffn_up_exps.scale");
    set(MoeVector::up_bias, "ffn_up_exps.bias", {n_ff, n_expert});
  }
  const ValueId down = b.matrix(prefix + "ffn_down_exps.weight", {n_ff, n_embd, n_expert});
  return b.moe(x, logits, gate, up, down, hp.routing, vectors);
}

ValueId shared_experts(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                       graph::Activation activation) {
  const std::string prefix = layer_prefix(layer);
  const ValueId gate = linear(b, prefix + "ffn_gate_shexp", hp.n_embd, hp.n_ff_shared, x, ffn_scale_order(hp));
  const ValueId up = linear(b, prefix + "ffn_up_shexp", hp.n_embd, hp.n_ff_shared, x, ffn_scale_order(hp));
  return linear(b, prefix + "ffn_down_shexp", hp.n_ff_shared, hp.n_embd, b.gated(gate, up, activation),
                ffn_scale_order(hp));
}

ValueId slice_input(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  if (!slice.embeds) return b.hidden(hp.n_embd);
  return b.get_rows(b.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab}), b.tokens());
}

ValueId wanted_rows(graph::Builder& b, ValueId x) { return b.type(x).ne[1] == kRows ? b.select_output_rows(x) : x; }

void hidden_output(graph::Builder& b, ValueId x) { b.output("hidden", x); }

void final_outputs(graph::Builder& b, const Hyperparameters& hp, ValueId x) {
  b.output("embedding", x);
  const std::string matrix = b.has("output.weight") ? "output.weight" : "token_embd.weight";
  ValueId logits = b.mul_mat(b.matrix(matrix, {hp.n_embd, hp.n_vocab}), x);
  if (b.has("output.bias")) logits = b.add(logits, b.vector("output.bias", {hp.n_vocab}));
  if (hp.logit_scale != 1) logits = b.scale(logits, hp.logit_scale);
  if (hp.final_logit_softcap != 0) {
    logits = b.scale(b.tanh(b.scale(logits, 1 / hp.final_logit_softcap)), hp.final_logit_softcap);
  }
  b.output("logits", logits);
}

std::vector<CacheGroup> full_cache_group(const Hyperparameters& hp) {
  CacheGroup group;
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    group.layers.push_back({layer, hp.n_head_kv[layer], hp.head_dim_k, hp.head_dim_v});
  }
  return {group};
}

}  // namespace caravan::models
