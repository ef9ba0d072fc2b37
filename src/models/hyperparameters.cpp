#include "models/hyperparameters.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace caravan::models {
namespace {

// Bounds far above any model, so that sizes computed from hyperparameters of a file or a peer stay in 64 bits.
constexpr uint32_t kMaxLayers = 4096, kMaxWidth = 1u << 22, kMaxHeads = 1u << 16, kMaxVocab = 1u << 24,
                   kMaxContext = 1u << 30, kMaxExperts = 4096;

// Travels with the hyperparameters: contexts are shorter than the model's own.
constexpr const char* kShortContext = "caravan.short_context";

// Reads <architecture>.<key> with checks of the range.
class Keys {
 public:
  explicit Keys(const gguf::Metadata& metadata)
      : metadata_(metadata), prefix_(metadata.get_string("general.architecture") + ".") {}

  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  [[noreturn]] void fail(std::string_view name, const std::string& expected, const std::string& found) const {
    throw FormatError(
        fmt::format("{}: key '{}': expected {}, found {}", metadata_.source(), key(name), expected, found));
  }
  uint32_t in_range(std::string_view name, uint32_t value, uint32_t min, uint32_t max) const {
    if (value < min || value > max) fail(name, fmt::format("{} to {}", min, max), std::to_string(value));
    return value;
  }
  uint32_t u32(std::string_view name, uint32_t min, uint32_t max) const {
    return in_range(name, metadata_.get_u32(key(name)), min, max);
  }
  uint32_t u32(std::string_view name, uint32_t default_value, uint32_t min, uint32_t max) const {
    return in_range(name, metadata_.get_u32(key(name), default_value), min, max);
  }
  float f32(std::string_view name, float default_value) const {
    const float value = metadata_.get_f32(key(name), default_value);
    if (!std::isfinite(value)) fail(name, "a finite number", std::to_string(value));
    return value;
  }
  std::vector<uint32_t> per_layer(std::string_view name, uint32_t n_layer, std::optional<uint32_t> default_value,
                                  uint32_t min, uint32_t max) const {
    std::vector<uint32_t> values = metadata_.get_u32_per_layer(key(name), n_layer, default_value);
    for (const uint32_t value : values) in_range(name, value, min, max);
    return values;
  }
  const gguf::Metadata& metadata() const { return metadata_; }

 private:
  const gguf::Metadata& metadata_;
  std::string prefix_;
};

uint32_t vocab_size(const gguf::Metadata& metadata, const std::string& key) {
  if (const auto size = metadata.find_u32(key)) return *size;
  if (!metadata.contains("tokenizer.ggml.tokens")) {
    throw FormatError(
        fmt::format("{}: neither '{}' nor 'tokenizer.ggml.tokens' is present: the vocabulary's size is "
                    "unknown",
                    metadata.source(), key));
  }
  return static_cast<uint32_t>(metadata.get_strings("tokenizer.ggml.tokens").size());
}

// What rope multiplies its angles' magnitude by, so that the device's own factor 1 + 0.1 ln(s) gives YaRN's value
// (docs/gguf.md, "YaRN effective values").
float yarn_attention_factor(float scale, float log_multiplier) {
  if (scale <= 1) return 1;
  const float log_scale = std::log(scale);
  const auto magnitude = [&](float k) { return 0.1f * k * log_scale + 1; };
  const float factor = log_multiplier != 0 ? magnitude(1) / magnitude(log_multiplier) : magnitude(1);
  return factor / (1 + 0.1f * log_scale);
}

graph::RopeParams read_rope(const Keys& keys, const Hyperparameters& hp, LongRope long_rope) {
  const gguf::Metadata& metadata = keys.metadata();
  graph::RopeParams rope;
  const uint32_t n_rot = keys.u32("rope.dimension_count", hp.head_dim_k, 0, hp.head_dim_k);
  if (n_rot % 2 != 0) keys.fail("rope.dimension_count", "an even number", std::to_string(n_rot));
  rope.n_rot = static_cast<int>(n_rot);
  rope.freq_base = keys.f32("rope.freq_base", 10000);
  if (rope.freq_base <= 0) keys.fail("rope.freq_base", "a positive number", std::to_string(rope.freq_base));

  const std::string type = metadata.find_string(keys.key("rope.scaling.type")).value_or("linear");
  const bool is_long_rope = type == "longrope" && long_rope == LongRope::accepted;
  if (type != "none" && type != "linear" && type != "yarn" && !is_long_rope) {
    throw NotSupportedError(fmt::format(
        "{}: rope scaling type '{}' is not supported for {} models; supported: {}", metadata.source(), type,
        hp.architecture, long_rope == LongRope::accepted ? "none, linear, yarn, longrope" : "none, linear, yarn"));
  }
  const float factor = keys.f32("rope.scaling.factor", keys.f32("rope.scale_linear", 0));
  if (factor < 0) keys.fail("rope.scaling.factor", "a number >= 0", std::to_string(factor));
  if (type != "none" && factor != 0) rope.freq_scale = 1 / factor;
  rope.attn_factor = keys.f32("rope.scaling.attn_factor", 1);
  if (type == "yarn") {
    const float ext_factor = keys.f32("rope.scaling.yarn_ext_factor", -1);
    rope.ext_factor = ext_factor < 0 ? 1 : ext_factor;
    rope.beta_fast = keys.f32("rope.scaling.yarn_beta_fast", 32);
    rope.beta_slow = keys.f32("rope.scaling.yarn_beta_slow", 1);
    rope.n_ctx_orig = static_cast<int>(hp.n_ctx_original);
    if (rope.ext_factor != 0) {
      rope.attn_factor *= yarn_attention_factor(1 / rope.freq_scale, keys.f32("rope.scaling.yarn_log_multiplier", 0));
    }
  }
  return rope;
}

void read_attention(const Keys& keys, Hyperparameters& hp) {
  hp.n_head = keys.per_layer("attention.head_count", hp.n_layer, std::nullopt, 1, kMaxHeads);
  if (keys.metadata().contains(keys.key("attention.head_count_kv"))) {
    hp.n_head_kv = keys.per_layer("attention.head_count_kv", hp.n_layer, std::nullopt, 1, kMaxHeads);
  } else {
    hp.n_head_kv = hp.n_head;
  }
  for (size_t layer = 0; layer < hp.n_layer; ++layer) {
    if (hp.n_head[layer] % hp.n_head_kv[layer] != 0) {
      keys.fail("attention.head_count_kv", fmt::format("a divisor of head_count {}", hp.n_head[layer]),
                std::to_string(hp.n_head_kv[layer]));
    }
  }
  const uint32_t head_dim = hp.n_embd / hp.n_head[0];
  hp.head_dim_k = keys.u32("attention.key_length", head_dim, 1, kMaxWidth);
  hp.head_dim_v = keys.u32("attention.value_length", head_dim, 1, kMaxWidth);
  hp.attention_scale = keys.f32("attention.scale", 0);
  if (hp.attention_scale == 0) hp.attention_scale = 1 / std::sqrt(static_cast<float>(hp.head_dim_k));
  hp.causal = keys.metadata().get_bool(keys.key("attention.causal"), true);
}

Pooling read_pooling(const Keys& keys) {
  // Files also hold -1 for "unspecified".
  const uint32_t type = keys.metadata().get_u32(keys.key("pooling_type"), 0);
  return type <= static_cast<uint32_t>(Pooling::rank) ? static_cast<Pooling>(type) : Pooling::none;
}

}  // namespace

std::string arch_key(const gguf::Metadata& metadata, std::string_view name) {
  return metadata.get_string("general.architecture") + "." + std::string(name);
}

Hyperparameters read_common(const gguf::Metadata& metadata, NormKind norm, LongRope long_rope) {
  const Keys keys(metadata);
  Hyperparameters hp;
  hp.architecture = metadata.get_string("general.architecture");
  hp.n_layer = keys.u32("block_count", 1, kMaxLayers);
  hp.n_ctx_train = keys.u32("context_length", 1, kMaxContext);
  hp.n_ctx_original = keys.u32("rope.scaling.original_context_length", 0, 0, kMaxContext);
  if (hp.n_ctx_original == 0) hp.n_ctx_original = hp.n_ctx_train;
  hp.serves_long_context =
      is_long_context(hp.n_ctx_train, hp.n_ctx_original) && !metadata.get_bool(kShortContext, false);
  hp.n_embd = keys.u32("embedding_length", 1, kMaxWidth);
  hp.n_vocab = keys.in_range("vocab_size", vocab_size(metadata, keys.key("vocab_size")), 1, kMaxVocab);
  hp.n_ff = keys.per_layer("feed_forward_length", hp.n_layer, std::nullopt, 1, kMaxWidth);
  read_attention(keys, hp);
  const std::string_view eps_key =
      norm == NormKind::rms ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon";
  hp.norm_eps = metadata.get_f32(keys.key(eps_key));
  if (!(hp.norm_eps >= 0 && hp.norm_eps < 1)) keys.fail(eps_key, "0 to 1", std::to_string(hp.norm_eps));
  hp.rope = hp.rope_window = read_rope(keys, hp, long_rope);
  hp.n_expert = keys.u32("expert_count", 0, 0, kMaxExperts);
  hp.n_expert_used = keys.u32("expert_used_count", 0, 0, hp.n_expert);
  hp.routing.n_expert_used = hp.n_expert_used;
  hp.pooling = read_pooling(keys);
  return hp;
}

void read_experts(const gguf::Metadata& metadata, Hyperparameters& hp) {
  const Keys keys(metadata);
  hp.n_expert = keys.u32("expert_count", 1, kMaxExperts);
  hp.n_expert_used = keys.u32("expert_used_count", 1, hp.n_expert);
  hp.n_ff_expert = keys.u32("expert_feed_forward_length", 0, 0, kMaxWidth);
  hp.n_layer_dense = keys.u32("leading_dense_block_count", 0, 0, hp.n_layer);
  const uint32_t n_shared = keys.u32("expert_shared_count", 0, 0, kMaxExperts);
  if (n_shared > 0 && n_shared > kMaxWidth / std::max(1u, hp.n_ff_expert)) {
    keys.fail("expert_shared_count", fmt::format("at most {} together", kMaxWidth), std::to_string(n_shared));
  }
  hp.n_ff_shared = n_shared * hp.n_ff_expert;

  graph::MoeParams& routing = hp.routing;
  routing.n_expert_used = hp.n_expert_used;
  const float scale = keys.f32("expert_weights_scale", 0);
  if (scale != 0) routing.weight_scale = scale;  // files hold 0 for none
  if (metadata.contains(keys.key("expert_weights_norm"))) {
    const bool norm = metadata.get_bool(keys.key("expert_weights_norm"), false);
    routing.weight_norm = norm ? graph::WeightNorm::sum_to_one : graph::WeightNorm::none;
  }
  switch (const uint32_t gating = metadata.get_u32(keys.key("expert_gating_func"), 0)) {
    case 0:  // unspecified
      break;
    case 1:
      routing.gating = graph::Gating::softmax;
      break;
    case 2:
      routing.gating = graph::Gating::sigmoid;
      break;
    case 3:
      routing.gating = graph::Gating::softmax_over_selected;
      break;
    default:
      throw NotSupportedError(fmt::format("{}: key '{}': gating function {} is not supported", metadata.source(),
                                          keys.key("expert_gating_func"), gating));
  }
  routing.n_group = std::max(1u, keys.u32("expert_group_count", 0, 0, hp.n_expert));
  if (routing.n_group > 1) {
    routing.n_group_used = keys.u32("expert_group_used_count", 1, static_cast<uint32_t>(routing.n_group));
  }
}

bool is_long_context(uint32_t n_ctx, uint32_t n_ctx_original) {
  return (uint64_t{n_ctx} + 255) / 256 * 256 > n_ctx_original;
}

gguf::Metadata hyperparameter_metadata(const gguf::Metadata& model, uint32_t n_ctx) {
  const std::string prefix = model.get_string("general.architecture") + ".";
  constexpr std::string_view kTokenTypes = "tokenizer.ggml.token_type_count";
  gguf::Metadata result(model.source());
  for (const auto& [key, value] : model.entries()) {
    if (key == "general.architecture" || key == kTokenTypes || key.starts_with(prefix)) result.set(key, value);
  }
  const uint32_t n_ctx_original = model.get_u32(prefix + "rope.scaling.original_context_length", 0);
  if (n_ctx > 0 && n_ctx_original > 0 && !is_long_context(n_ctx, n_ctx_original) &&
      is_long_context(model.get_u32(prefix + "context_length", 0), n_ctx_original)) {
    result.set(kShortContext, gguf::Value::of(true));
  }
  const std::string vocab_key = prefix + "vocab_size";
  if (!result.contains(vocab_key)) result.set(vocab_key, gguf::Value::of(vocab_size(model, vocab_key)));
  return result;
}

}  // namespace caravan::models
