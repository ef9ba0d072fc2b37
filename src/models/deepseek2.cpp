// deepseek2: DeepSeek-V2, V3 and R1 and what is built like them: multi-head latent attention, a few dense layers, then
// experts with shared ones beside them.
// Source: DeepSeek-AI 2024, arXiv:2405.04434 (attention) and arXiv:2412.19437 (routing); YaRN's magnitude as the
// models' own code has it. Keys and values of all heads come from one latent vector per token and one rotated key part.
//   Files since 2025 (attn_k_b, attn_v_b): the latent vector is what is cached; queries are taken into its space, and
//   what is read there is taken out again, head by head. K and V are cached each in the layout that attention reads,
//   so that the latent vector lies there twice.
//   Older files (attn_kv_b): keys and values of every head are computed and cached.
#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "models/archs.h"
#include "models/blocks.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

using graph::kRows;

bool caches_latent(const Hyperparameters& hp) { return hp.latent.head_dim_k > 0; }
// Width of a head's key and value outside the latent space, and of the part of a key that is not rotated.
int64_t key_width(const Hyperparameters& hp) { return caches_latent(hp) ? hp.latent.head_dim_k : hp.head_dim_k; }
int64_t value_width(const Hyperparameters& hp) { return caches_latent(hp) ? hp.latent.head_dim_v : hp.head_dim_v; }
int64_t plain_width(const Hyperparameters& hp) { return key_width(hp) - hp.rope.n_rot; }

void check(bool condition, const gguf::Metadata& metadata, const char* key, const std::string& expected) {
  if (condition) return;
  throw FormatError(fmt::format("{}: key 'deepseek2.{}': expected {}", metadata.source(), key, expected));
}

void read_latent(const gguf::Metadata& metadata, Hyperparameters& hp) {
  // Models of these sizes ("Lite" and those of its form) have no latent queries, whatever their files say.
  const bool is_lite = hp.n_layer == 26 || hp.n_layer == 27 || (hp.n_layer == 48 && hp.n_vocab == 128256);
  constexpr uint32_t kMaxRank = 1u << 16;
  hp.latent.q_rank = is_lite ? 0 : metadata.get_u32("deepseek2.attention.q_lora_rank", 0);
  hp.latent.kv_rank = metadata.get_u32("deepseek2.attention.kv_lora_rank");
  hp.latent.head_dim_k = metadata.get_u32("deepseek2.attention.key_length_mla", 0);
  hp.latent.head_dim_v = metadata.get_u32("deepseek2.attention.value_length_mla", 0);
  check(hp.latent.q_rank <= kMaxRank, metadata, "attention.q_lora_rank", fmt::format("at most {}", kMaxRank));
  check(hp.latent.kv_rank > 0 && hp.latent.kv_rank <= kMaxRank, metadata, "attention.kv_lora_rank",
        fmt::format("1 to {}", kMaxRank));
  check((hp.latent.head_dim_k > 0) == (hp.latent.head_dim_v > 0) && hp.latent.head_dim_k <= kMaxRank &&
            hp.latent.head_dim_v <= kMaxRank,
        metadata, "attention.value_length_mla", "a width where attention.key_length_mla has one");
  check(hp.rope.n_rot > 0 && plain_width(hp) > 0, metadata, "rope.dimension_count", "a part of the key's width");
  if (!caches_latent(hp)) return;
  const uint32_t width = hp.latent.kv_rank + static_cast<uint32_t>(hp.rope.n_rot);
  check(hp.head_dim_k == width, metadata, "attention.key_length",
        fmt::format("{}, kv_lora_rank and rope.dimension_count together", width));
  check(hp.head_dim_v == hp.latent.kv_rank, metadata, "attention.value_length",
        fmt::format("kv_lora_rank {}", hp.latent.kv_rank));
  for (const uint32_t n_head_kv : hp.n_head_kv)
    check(n_head_kv == 1, metadata, "attention.head_count_kv", "1, as the latent vector is that of all heads");
}

// What rope's results and scores are multiplied by. With YaRN by a factor s, the rotated parts keep their magnitude
// and scores get (1 + 0.1 L ln s)^2; a file without L has rotated parts grow by 1 + 0.1 ln s instead. Files hold L
// / 10.
void read_scale(const gguf::Metadata& metadata, Hyperparameters& hp) {
  float growth = 1;
  if (hp.rope.ext_factor != 0 && hp.rope.freq_scale < 1) {
    const float log_scale = std::log(1 / hp.rope.freq_scale);
    const float log_multiplier = metadata.get_f32("deepseek2.rope.scaling.yarn_log_multiplier", 0) / 0.1F;
    const float given = metadata.get_f32("deepseek2.rope.scaling.attn_factor", 1);
    const float magnitude = given * (log_multiplier != 0 ? 1 : 1 + 0.1F * log_scale);
    growth = magnitude * (1 + 0.1F * log_multiplier * log_scale);
    hp.rope.attn_factor = magnitude / (1 + 0.1F * log_scale);  // the device multiplies by the divisor
    check(std::isfinite(growth), metadata, "rope.scaling.yarn_log_multiplier", "a finite number");
  }
  hp.attention_scale = growth * growth / std::sqrt(static_cast<float>(key_width(hp)));
}

Hyperparameters read(const gguf::Metadata& metadata) {
  Hyperparameters hp = read_decoder(metadata, {.pairing = graph::RopePairing::adjacent,
                                               .feed_forward = FeedForward::gated_or_experts,
                                               .feed_forward_scales = FeedForwardScales::ignored});
  hp.routing.weight_norm = graph::WeightNorm::none;
  read_experts(metadata, hp);
  // GLM-4.7-Flash, whose files do not say it.
  if (metadata.get_u32("deepseek2.expert_gating_func", 0) == 0 && (hp.n_layer == 47 || hp.n_layer == 48) &&
      hp.n_vocab == 154880) {
    hp.routing.gating = graph::Gating::sigmoid;
  }
  check(hp.n_ff_expert > 0, metadata, "expert_feed_forward_length", "a width");
  if (metadata.get_f32("deepseek2.attention.temperature_scale", 0) != 0) {
    throw NotSupportedError(
        fmt::format("{}: key 'deepseek2.attention.temperature_scale' is not supported", metadata.source()));
  }
  read_latent(metadata, hp);
  read_scale(metadata, hp);
  return hp;
}

void declare_attention(Declarations& d, const Hyperparameters& hp, uint32_t layer) {
  const int64_t n_head = hp.n_head[layer], kv_rank = hp.latent.kv_rank, q_rank = hp.latent.q_rank;
  if (q_rank > 0) {
    d.matrix("attn_q_a.weight", {hp.n_embd, q_rank});
    d.vector("attn_q_a_norm.weight", {q_rank});
    d.matrix("attn_q_b.weight", {q_rank, n_head * key_width(hp)}, 1);
  } else {
    d.matrix("attn_q.weight", {hp.n_embd, n_head * key_width(hp)}, 1);
  }
  d.matrix("attn_kv_a_mqa.weight", {hp.n_embd, kv_rank + hp.rope.n_rot});
  d.vector("attn_kv_a_norm.weight", {kv_rank});
  if (caches_latent(hp)) {
    d.matrix("attn_k_b.weight", {plain_width(hp), kv_rank, n_head}, 2);
    d.matrix("attn_v_b.weight", {kv_rank, value_width(hp), n_head}, 2);
  } else {
    d.matrix("attn_kv_b.weight", {kv_rank, n_head * (plain_width(hp) + value_width(hp))}, 1);
  }
  d.linear("attn_output", n_head * value_width(hp), hp.n_embd, 0);
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  Declarations d;
  d.enter(TensorDecl::Scope::embedding);
  d.embedding("token_embd.weight", {hp.n_embd, hp.n_vocab});
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    d.enter_layer(layer);
    d.vector("attn_norm.weight", {hp.n_embd});
    declare_attention(d, hp, layer);
    d.vector("ffn_norm.weight", {hp.n_embd});
    if (layer < hp.n_layer_dense) {
      d.gated_ffn(hp);
      continue;
    }
    d.moe(hp);
    if (hp.n_ff_shared > 0) d.shared_experts(hp);
  }
  d.enter(TensorDecl::Scope::output);
  d.vector("output_norm.weight", {hp.n_embd});
  d.matrix("output.weight", {hp.n_embd, hp.n_vocab}, 1).fallback = "token_embd.weight";
  return d.release();
}

// The parts of queries and keys of a layer, rotated where they are to be, and the normed latent vector.
struct Parts {
  ValueId q_plain, q_rotated;  // [plain_width, n_head, rows], [n_rot, n_head, rows]
  ValueId k_rotated;           // [n_rot, 1, rows]
  ValueId latent;              // [kv_rank, rows]
};

// x [n_embd, rows], normed.
Parts project(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const int64_t n_head = hp.n_head[layer], kv_rank = hp.latent.kv_rank, q_rank = hp.latent.q_rank,
                n_rot = hp.rope.n_rot, q_width = n_head * key_width(hp);
  ValueId q;
  if (q_rank > 0) {
    q = b.mul_mat(b.matrix(prefix + "attn_q_a.weight", {hp.n_embd, q_rank}), x);
    q = rms_norm(b, hp, prefix + "attn_q_a_norm", q);
    q = b.mul_mat(b.matrix(prefix + "attn_q_b.weight", {q_rank, q_width}), q);
  } else {
    q = b.mul_mat(b.matrix(prefix + "attn_q.weight", {hp.n_embd, q_width}), x);
  }
  q = b.reshape(q, {key_width(hp), n_head, kRows});
  const ValueId kv = b.mul_mat(b.matrix(prefix + "attn_kv_a_mqa.weight", {hp.n_embd, kv_rank + n_rot}), x);
  Parts parts{};
  parts.q_plain = b.slice(q, 0, 0, plain_width(hp));
  parts.q_rotated = b.rope(b.cont(b.slice(q, 0, plain_width(hp), n_rot)), b.positions(), hp.rope);
  const ValueId k = b.reshape(b.cont(b.slice(kv, 0, kv_rank, n_rot)), {n_rot, 1, kRows});
  parts.k_rotated = b.rope(k, b.positions(), hp.rope);
  parts.latent = rms_norm(b, hp, prefix + "attn_kv_a_norm", b.slice(kv, 0, 0, kv_rank));
  return parts;
}

// Attention over cached latent vectors, for all heads at once: -> [kv_rank * n_head, rows].
ValueId attend_latent(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, const CachePlace& place,
                      const Parts& parts) {
  const int64_t n_head = hp.n_head[layer], kv_rank = hp.latent.kv_rank;
  const ValueId k_b = b.matrix(layer_prefix(layer) + "attn_k_b.weight", {plain_width(hp), kv_rank, n_head});
  const ValueId absorbed = b.mul_mat(k_b, b.permute(parts.q_plain, 0, 2, 1, 3));  // [kv_rank, rows, n_head]
  const ValueId latent = b.reshape(parts.latent, {kv_rank, 1, kRows});
  return cached_attention(
      b, hp,
      {b.concat(b.permute(absorbed, 0, 2, 1, 3), parts.q_rotated, 0), b.concat(latent, parts.k_rotated, 0), latent},
      place);
}

// What was read from latent vectors [kv_rank * n_head, n] as values of the heads: [value_width * n_head, n].
ValueId expand_values(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  const int64_t n_head = hp.n_head[layer], kv_rank = hp.latent.kv_rank, rows = b.type(x).ne[1];
  const ValueId heads = b.permute(b.reshape(x, {kv_rank, n_head, rows}), 0, 2, 1, 3);  // [kv_rank, n, n_head]
  const ValueId v_b = b.matrix(layer_prefix(layer) + "attn_v_b.weight", {kv_rank, value_width(hp), n_head});
  const ValueId values = b.mul_mat(v_b, heads);  // [value_width, n, n_head]
  return b.reshape(b.cont(b.permute(values, 0, 2, 1, 3)), {value_width(hp) * n_head, rows});
}

// Attention over cached keys and values of every head: -> [value_width * n_head, rows].
ValueId attend_heads(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, const CachePlace& place,
                     const Parts& parts) {
  const int64_t n_head = hp.n_head[layer], kv_rank = hp.latent.kv_rank, plain = plain_width(hp),
                value = value_width(hp);
  const ValueId kv_b = b.matrix(layer_prefix(layer) + "attn_kv_b.weight", {kv_rank, n_head * (plain + value)});
  const ValueId kv = b.reshape(b.mul_mat(kv_b, parts.latent), {plain + value, n_head, kRows});
  // The rotated part of the key is the same for every head: added to zeros of the shape of all.
  const ValueId k_rotated = b.add(b.scale(b.clamp(parts.q_rotated, -1, 1), 0), parts.k_rotated);
  return cached_attention(b, hp,
                          {b.concat(parts.q_plain, parts.q_rotated, 0),
                           b.concat(b.slice(kv, 0, 0, plain), k_rotated, 0), b.cont(b.slice(kv, 0, plain, value))},
                          place);
}

ValueId feed_forward(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x) {
  if (layer < hp.n_layer_dense) return gated_ffn(b, hp, layer, x, graph::Activation::silu);
  const ValueId y = moe_ffn(b, hp, layer, x);
  return hp.n_ff_shared > 0 ? b.add(y, shared_experts(b, hp, layer, x, graph::Activation::silu)) : y;
}

ValueId build_layer(graph::Builder& b, const Hyperparameters& hp, const Slice& slice, uint32_t layer,
                    const CachePlace& place, ValueId x) {
  const std::string prefix = layer_prefix(layer);
  const Parts parts = project(b, hp, layer, rms_norm(b, hp, prefix + "attn_norm", x));
  ValueId y = caches_latent(hp) ? attend_latent(b, hp, layer, place, parts) : attend_heads(b, hp, layer, place, parts);
  if (selects_rows(slice, layer)) y = wanted_rows(b, y), x = wanted_rows(b, x);
  if (caches_latent(hp)) y = expand_values(b, hp, layer, y);
  x = b.add(linear(b, prefix + "attn_output", hp.n_head[layer] * value_width(hp), hp.n_embd, y), x);
  return b.add(feed_forward(b, hp, layer, rms_norm(b, hp, prefix + "ffn_norm", x)), x);
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

const Arch kDeepseek2{"deepseek2", read, tensors, full_cache_group, build};

}  // namespace caravan::models
