#include "models/decoder.h"

#include <fmt/format.h>

#include "base/error.h"
#include "models/blocks.h"

namespace caravan::models {
namespace {

using Presence = TensorDecl::Presence;

constexpr const char* kRopeFreqs = "rope_freqs.weight";
constexpr const char* kRopeShort = "rope_factors_short.weight";
constexpr const char* kRopeLong = "rope_factors_long.weight";

[[noreturn]] void refuse(const gguf::Metadata& metadata, std::string_view name, const std::string& found) {
  throw NotSupportedError(fmt::format("{}: key '{}': {} is not supported for {} models", metadata.source(),
                                      arch_key(metadata, name), found, metadata.get_string("general.architecture")));
}

// Numbers other than 0, which mean that something is computed that this decoder does not compute.
void refuse_what_is_not_computed(const gguf::Metadata& metadata) {
  for (const char* name : {"attention.clamp_kqv", "attention.max_alibi_bias", "nextn_predict_layers"}) {
    const float value = metadata.get_f32(arch_key(metadata, name), 0);
    if (value != 0) refuse(metadata, name, fmt::format("{}", value));
  }
}

bool has_experts(const Hyperparameters& hp) {
  return hp.form.feed_forward == FeedForward::gated_or_experts && hp.n_expert > 0;
}

bool uses_rope(const Hyperparameters& hp, uint32_t layer) {
  switch (hp.form.positions) {
    case Positions::rope:
      return hp.no_rope_period == 0 || (layer + 1) % hp.no_rope_period != 0;
    case Positions::rope_in_windows:
      return hp.is_window_layer(layer);
    case Positions::learned:
    case Positions::none:
      return false;
  }
  return false;
}

// Which layers have a sliding window.
std::vector<bool> window_layers(const gguf::Metadata& metadata, uint32_t default_period, uint32_t n_layer) {
  constexpr const char* kPattern = "attention.sliding_window_pattern";
  const std::string key = arch_key(metadata, kPattern);
  const gguf::Value* value = metadata.find(key);
  std::vector<bool> result(n_layer);
  if (value != nullptr && value->type == gguf::ValueType::array) {
    const std::vector<uint32_t> flags = metadata.get_u32_per_layer(key, n_layer, std::nullopt);
    for (uint32_t layer = 0; layer < n_layer; ++layer) result[layer] = flags[layer] != 0;
    return result;
  }
  const uint32_t period = metadata.get_u32(key, default_period);
  if (period == 0) refuse(metadata, kPattern, "0");
  for (uint32_t layer = 0; layer < n_layer; ++layer) result[layer] = (layer + 1) % period != 0;
  return result;
}

// --- Tensors.

void declare_rope_factors(Declarations& d, const Hyperparameters& hp) {
  const int64_t n = hp.rope.n_rot / 2;
  if (hp.form.rope_factors == RopeFactors::freqs) d.vector(kRopeFreqs, {n}, Presence::optional);
  if (hp.form.rope_factors != RopeFactors::by_context) return;
  for (const char* name : {kRopeLong, kRopeShort}) {
    d.vector(name, {n}, name == hp.rope_factors ? Presence::optional : Presence::unused);
  }
}

void declare_query_key_norms(Declarations& d, const Hyperparameters& hp, uint32_t layer) {
  const int64_t q_heads = hp.n_head[layer], k_heads = hp.n_head_kv[layer], head_dim = hp.head_dim_k;
  switch (hp.form.query_key_norm) {
    case QueryKeyNorm::none:
      return;
    case QueryKeyNorm::head:
      d.vector("attn_q_norm.weight", {head_dim});
      d.vector("attn_k_norm.weight", {head_dim});
      return;
    case QueryKeyNorm::row:
      d.vector("attn_q_norm.weight", {head_dim * q_heads});
      d.vector("attn_k_norm.weight", {head_dim * k_heads});
      return;
    case QueryKeyNorm::each_head:
      d.vector("attn_q_norm.weight", {head_dim, q_heads}, Presence::optional);
      d.vector("attn_k_norm.weight", {head_dim, k_heads}, Presence::optional);
      return;
  }
}

void declare_feed_forward(Declarations& d, const Hyperparameters& hp) {
  if (has_experts(hp)) return d.moe(hp);
  if (hp.form.feed_forward == FeedForward::plain) return d.plain_ffn(hp);
  if (hp.form.feed_forward == FeedForward::fused_gated) return d.fused_gated_ffn(hp);
  d.gated_ffn(hp);
}

void declare_layer(Declarations& d, const Hyperparameters& hp, uint32_t layer) {
  const DecoderForm& form = hp.form;
  d.enter_layer(layer);
  if (form.layout != LayerLayout::post) d.norm("attn_norm", hp.n_embd, form.norm);
  if (form.layout == LayerLayout::parallel) {
    d.vector("attn_norm_2.weight", {hp.n_embd}, Presence::optional);
    d.vector("attn_norm_2.bias", {hp.n_embd}, Presence::optional);
  }
  d.attention(hp);
  declare_query_key_norms(d, hp, layer);
  const bool norms_results = form.layout == LayerLayout::sandwich || form.layout == LayerLayout::post;
  if (norms_results) d.norm("post_attention_norm", hp.n_embd, form.norm);
  if (form.layout == LayerLayout::pre || form.layout == LayerLayout::sandwich) d.norm("ffn_norm", hp.n_embd, form.norm);
  declare_feed_forward(d, hp);
  if (norms_results) d.norm("post_ffw_norm", hp.n_embd, form.norm);
}

// --- The graph.

// One of queries and keys, x [head_dim, heads, rows], normed.
ValueId query_key_norm(graph::Builder& b, const Hyperparameters& hp, const std::string& name, ValueId x) {
  const int64_t head_dim = b.type(x).ne[0], n_head = b.type(x).ne[1];
  switch (hp.form.query_key_norm) {
    case QueryKeyNorm::none:
      return x;
    case QueryKeyNorm::head:
      return rms_norm(b, hp, name, x);
    case QueryKeyNorm::row: {
      const ValueId row = rms_norm(b, hp, name, b.reshape(x, {head_dim * n_head, graph::kRows}));
      return b.reshape(row, {head_dim, n_head, graph::kRows});
    }
    case QueryKeyNorm::each_head:
      if (!b.has(name + ".weight")) return x;
      return b.mul(b.layer_norm(x, graph::kNoValue, graph::kNoValue, hp.norm_eps),
                   b.vector(name + ".weight", {head_dim, n_head}));
  }
  return x;
}

// x [n_embd, rows] -> what its rows read from the values they see: [head_dim_v * n_head, rows].
ValueId attend(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  Qkv qkv = project_qkv(b, hp, layer, x);
  qkv.q = query_key_norm(b, hp, prefix + "attn_q_norm", qkv.q);
  qkv.k = query_key_norm(b, hp, prefix + "attn_k_norm", qkv.k);
  if (uses_rope(hp, layer)) {
    const bool in_window = hp.is_window_layer(layer);
    const graph::RopeParams& rope = in_window ? hp.rope_window : hp.rope;
    const bool has_factors = !in_window && !hp.rope_factors.empty();
    const ValueId factors = has_factors ? b.optional_vector(hp.rope_factors, {hp.rope.n_rot / 2}) : graph::kNoValue;
    graph::RopeParams query_rope = rope;
    query_rope.temperature_scale = hp.temperature_scale;
    query_rope.temperature_length = static_cast<int>(hp.temperature_length);
    qkv.q = b.rope(qkv.q, b.positions(), query_rope, factors);
    qkv.k = b.rope(qkv.k, b.positions(), rope, factors);
  }
  return cached_attention(b, hp, qkv, place);
}

ValueId feed_forward(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  if (has_experts(hp)) return moe_ffn(b, hp, layer, x);
  switch (hp.form.feed_forward) {
    case FeedForward::plain:
      return plain_ffn(b, hp, layer, x, hp.form.activation);
    case FeedForward::fused_gated:
      return fused_gated_ffn(b, hp, layer, x, hp.form.activation);
    case FeedForward::gated:
    case FeedForward::gated_or_experts:
      break;
  }
  return gated_ffn(b, hp, layer, x, hp.form.activation);
}

// x + y, y scaled as the model wants it.
ValueId add_to_stream(graph::Builder& b, const Hyperparameters& hp, ValueId y, ValueId x) {
  if (hp.residual_scale != 1) y = b.scale(y, hp.residual_scale);
  return b.add(y, x);
}

ValueId parallel_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                       const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  ValueId h = norm(b, hp, hp.form.norm, prefix + "attn_norm", x);
  const bool has_second = b.has(prefix + "attn_norm_2.weight");
  ValueId attended = attend(b, hp, layer, place, has_second ? norm(b, hp, hp.form.norm, prefix + "attn_norm_2", x) : h);
  if (selects_rows(slice, layer)) attended = wanted_rows(b, attended), x = wanted_rows(b, x), h = wanted_rows(b, h);
  const ValueId y = b.add(feed_forward(b, hp, layer, h), attention_output(b, hp, layer, attended));
  return add_to_stream(b, hp, y, x);
}

ValueId serial_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                     const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const LayerLayout layout = hp.form.layout;
  const auto norm_if = [&](bool wanted, const char* name, ValueId value) {
    return wanted ? norm(b, hp, hp.form.norm, prefix + name, value) : value;
  };
  ValueId y = attend(b, hp, layer, place, norm_if(layout != LayerLayout::post, "attn_norm", x));
  if (selects_rows(slice, layer)) y = wanted_rows(b, y), x = wanted_rows(b, x);
  y = attention_output(b, hp, layer, y);
  x = add_to_stream(b, hp, norm_if(layout != LayerLayout::pre, "post_attention_norm", y), x);

  y = feed_forward(b, hp, layer, norm_if(layout != LayerLayout::post, "ffn_norm", x));
  return add_to_stream(b, hp, norm_if(layout != LayerLayout::pre, "post_ffw_norm", y), x);
}

ValueId decoder_input(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  ValueId x = slice_input(b, hp, slice);
  if (!slice.embeds) return x;
  if (hp.embedding_scale != 1) x = b.scale(x, hp.embedding_scale);
  if (hp.form.positions == Positions::learned) {
    const ValueId table = b.embedding("position_embd.weight", {hp.n_embd, hp.n_positions});
    x = b.add(x, b.get_rows(table, b.positions()));
  }
  return x;
}

}  // namespace

Hyperparameters read_decoder(const gguf::Metadata& metadata, const DecoderForm& form) {
  const bool has_factors = form.rope_factors != RopeFactors::none;
  Hyperparameters hp = read_common(metadata, form.norm, has_factors ? LongRope::accepted : LongRope::refused);
  hp.form = form;
  refuse_what_is_not_computed(metadata);
  if (!hp.causal) refuse(metadata, "attention.causal", "false");
  if (hp.n_expert > 0 && form.feed_forward != FeedForward::gated_or_experts) {
    refuse(metadata, "expert_count", std::to_string(hp.n_expert));
  }
  if (hp.n_expert > 0 && hp.n_expert_used == 0) {
    throw FormatError(fmt::format("{}: key '{}': expected 1 to {}, found 0", metadata.source(),
                                  arch_key(metadata, "expert_used_count"), hp.n_expert));
  }
  if (form.positions == Positions::learned) hp.n_positions = hp.n_ctx_train;
  hp.rope.pairing = hp.rope_window.pairing = form.pairing;
  if (metadata.find_string(arch_key(metadata, "rope.scaling.type")) == "longrope") {
    hp.form.rope_factors = RopeFactors::by_context;
  }
  if (hp.form.rope_factors == RopeFactors::freqs) hp.rope_factors = kRopeFreqs;
  if (hp.form.rope_factors == RopeFactors::by_context) {
    hp.rope_factors = hp.serves_long_context ? kRopeLong : kRopeShort;
  }
  return hp;
}

void read_windows(const gguf::Metadata& metadata, uint32_t default_window, uint32_t default_period,
                  Hyperparameters& hp) {
  const std::string window = arch_key(metadata, "attention.sliding_window");
  hp.window = default_window == 0 ? metadata.get_u32(window) : metadata.get_u32(window, default_window);
  if (hp.window > 1u << 30) {
    throw FormatError(
        fmt::format("{}: key '{}': expected 0 to {}, found {}", metadata.source(), window, 1u << 30, hp.window));
  }
  if (hp.window > 0) hp.window_layers = window_layers(metadata, default_period, hp.n_layer);
  hp.rope_window = hp.rope;
  const std::string base = arch_key(metadata, "rope.freq_base_swa");
  hp.rope_window.freq_base = metadata.get_f32(base, hp.rope.freq_base);
  if (!(hp.rope_window.freq_base > 0)) {
    throw FormatError(fmt::format("{}: key '{}': expected a positive number, found {}", metadata.source(), base,
                                  hp.rope_window.freq_base));
  }
}

std::vector<TensorDecl> decoder_tensors(const Hyperparameters& hp) {
  Declarations d;
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  if (hp.form.positions == Positions::learned) d.embedding("position_embd.weight", {hp.n_embd, hp.n_positions});
  d.enter(TensorDecl::Scope::every);
  declare_rope_factors(d, hp);
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) declare_layer(d, hp, layer);
  d.enter(TensorDecl::Scope::output);
  d.norm("output_norm", hp.n_embd, hp.form.norm);
  d.matrix("output.weight", {hp.n_embd, hp.n_vocab}, 1).fallback = "token_embd.weight";
  d.vector("output.bias", {hp.n_vocab}, Presence::optional).shard_axis = 0;
  return d.release();
}

std::vector<CacheGroup> decoder_cache_groups(const Hyperparameters& hp) {
  if (hp.window == 0) return full_cache_group(hp);
  CacheGroup full, window;
  window.kind = CacheGroup::Kind::window;
  window.window = hp.window;
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    (hp.is_window_layer(layer) ? window : full)
        .layers.push_back({layer, hp.n_head_kv[layer], hp.head_dim_k, hp.head_dim_v});
  }
  return {full, window};
}

void build_decoder(graph::Builder& b, const Hyperparameters& hp, const Slice& slice) {
  const auto groups = decoder_cache_groups(hp);
  ValueId x = decoder_input(b, hp, slice);
  for (uint32_t layer = slice.layer_begin; layer < slice.layer_end; ++layer) {
    const CachePlace place = cache_place(groups, slice, layer);
    x = hp.form.layout == LayerLayout::parallel ? parallel_layer(b, hp, slice, layer, place, x)
                                                : serial_layer(b, hp, slice, layer, place, x);
  }
  if (!slice.outputs) return hidden_output(b, x);
  final_outputs(b, hp, norm(b, hp, hp.form.norm, "output_norm", wanted_rows(b, x)));
}

}  // namespace caravan::models
