#include "support/tiny_model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <vector>

#include "gguf/writer.h"

namespace caravan::testing {
namespace {

using gguf::Value;

constexpr uint32_t kEmbd = 64, kHeads = 4, kHeadsKv = 2, kHeadDim = 32, kFf = 96, kExperts = 4, kExpertsUsed = 2,
                   kContext = 512;
// deepseek2: widths of the latent vectors, of the plain and the rotated part of a key, and of a value.
constexpr uint32_t kKvRank = 64, kQRank = 32, kPlain = 32, kRotated = 16, kValue = 32, kFfExpert = 64, kShared = 2;

bool is_encoder(TinyKind kind) { return kind == TinyKind::bert || kind == TinyKind::nomic_bert; }
bool has_experts(TinyKind kind) {
  return kind == TinyKind::llama_moe || kind == TinyKind::qwen3moe || kind == TinyKind::gpt_oss ||
         kind == TinyKind::deepseek2;
}

struct Names {
  TinyKind kind;
  const char *name, *arch;
};
constexpr Names kNames[] = {{TinyKind::llama, "llama", "llama"},
                            {TinyKind::llama_moe, "llama_moe", "llama"},
                            {TinyKind::qwen2, "qwen2", "qwen2"},
                            {TinyKind::qwen3, "qwen3", "qwen3"},
                            {TinyKind::gemma2, "gemma2", "gemma2"},
                            {TinyKind::gemma3, "gemma3", "gemma3"},
                            {TinyKind::phi3, "phi3", "phi3"},
                            {TinyKind::mistral3, "mistral3", "mistral3"},
                            {TinyKind::glm4, "glm4", "glm4"},
                            {TinyKind::command_r, "command_r", "command-r"},
                            {TinyKind::cohere2, "cohere2", "cohere2"},
                            {TinyKind::olmo2, "olmo2", "olmo2"},
                            {TinyKind::starcoder2, "starcoder2", "starcoder2"},
                            {TinyKind::falcon, "falcon", "falcon"},
                            {TinyKind::gpt2, "gpt2", "gpt2"},
                            {TinyKind::smollm3, "smollm3", "smollm3"},
                            {TinyKind::granite, "granite", "granite"},
                            {TinyKind::qwen3moe, "qwen3moe", "qwen3moe"},
                            {TinyKind::gpt_oss, "gpt_oss", "gpt-oss"},
                            {TinyKind::deepseek2, "deepseek2", "deepseek2"},
                            {TinyKind::bert, "bert", "bert"},
                            {TinyKind::nomic_bert, "nomic_bert", "nomic-bert"}};

const Names& names_of(TinyKind kind) {
  return *std::find_if(std::begin(kNames), std::end(kNames), [&](const Names& names) { return names.kind == kind; });
}

bool is_one_of(TinyKind kind, std::initializer_list<TinyKind> list) {
  return std::find(list.begin(), list.end(), kind) != list.end();
}
bool has_layer_norms(TinyKind kind) {
  return is_encoder(kind) || is_one_of(kind, {TinyKind::command_r, TinyKind::cohere2, TinyKind::starcoder2,
                                              TinyKind::falcon, TinyKind::gpt2});
}
bool has_norm_biases(TinyKind kind) {
  return is_one_of(kind, {TinyKind::starcoder2, TinyKind::falcon, TinyKind::gpt2});
}
bool has_biases(TinyKind kind) { return is_one_of(kind, {TinyKind::gpt_oss, TinyKind::starcoder2, TinyKind::gpt2}); }
bool has_post_norms(TinyKind kind) {
  return is_one_of(kind, {TinyKind::gemma2, TinyKind::gemma3, TinyKind::glm4, TinyKind::olmo2});
}
bool is_parallel(TinyKind kind) { return is_one_of(kind, {TinyKind::falcon, TinyKind::command_r, TinyKind::cohere2}); }
bool has_fused_qkv(const TinyModelOptions& options) {
  return options.fused_qkv || is_one_of(options.kind, {TinyKind::phi3, TinyKind::falcon, TinyKind::gpt2});
}

uint32_t heads_kv(TinyKind kind) { return is_encoder(kind) ? kHeads : kind == TinyKind::falcon ? 1 : kHeadsKv; }

uint32_t n_expert(const TinyModelOptions& options) { return options.expert_groups ? 8 : kExperts; }

// Uniform numbers in [-1, 1) from a 64-bit mix (Steele et al. 2014, splitmix64): the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  float next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-23f - 1;
  }

 private:
  uint64_t state_;
};

// Collects tensors, then writes them.
class TinyWriter {
 public:
  TinyWriter(const std::filesystem::path& path, gguf::Metadata metadata, const TinyModelOptions& options)
      : writer_(path, std::move(metadata)), random_(options.seed), matrix_type_(options.matrix_type) {}

  // Values of unit variance after a product with a row of unit variance, times gain.
  void matrix(const std::string& name, const std::vector<int64_t>& ne, float gain = 1) {
    add(name + ".weight", matrix_type_, ne, 0, gain * std::sqrt(3.0f / static_cast<float>(ne[0])));
  }
  void vector(const std::string& name, const std::vector<int64_t>& ne, float center, float spread) {
    add(name, tensor::DType::f32, ne, center, spread);
  }
  void norm(const std::string& name, int64_t n) { vector(name + ".weight", {n}, 1, 0.3f); }
  void bias(const std::string& name, int64_t n) { vector(name + ".bias", {n}, 0, 0.2f); }
  void layer_norm(const std::string& name, int64_t n) { norm(name, n), bias(name, n); }

  void finish() {
    writer_.begin_data();
    for (const Tensor& tensor : tensors_) {
      const tensor::DTypeInfo& info = tensor::dtype_info(tensor.type);
      const auto n = static_cast<int64_t>(tensor.values.size());
      std::vector<std::byte> bytes(tensor::row_bytes(tensor.type, static_cast<uint64_t>(n)));
      info.quantize(tensor.values.data(), bytes.data(), n);
      writer_.write(tensor.number, 0, bytes);
    }
    writer_.finish();
  }

 private:
  struct Tensor {
    size_t number;
    tensor::DType type;
    std::vector<float> values;
  };

  void add(const std::string& name, tensor::DType type, const std::vector<int64_t>& ne, float center, float spread) {
    int64_t n = 1;
    for (const int64_t dim : ne) n *= dim;
    Tensor tensor{writer_.declare(name, type, ne), type, std::vector<float>(static_cast<size_t>(n))};
    for (float& value : tensor.values) value = center + spread * random_.next();
    tensors_.push_back(std::move(tensor));
  }

  gguf::Writer writer_;
  Random random_;
  tensor::DType matrix_type_;
  std::vector<Tensor> tensors_;
};

// <unk>, <s>, </s>, then a token per byte: an SPM vocabulary that encodes any text.
uint32_t set_byte_vocabulary(gguf::Metadata& m) {
  std::vector<std::string> tokens{"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types{2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", byte);
    tokens.emplace_back(text);
    types.push_back(6);
  }
  const auto n = static_cast<uint32_t>(tokens.size());
  m.set("tokenizer.ggml.model", Value::of("llama"));
  m.set("tokenizer.ggml.tokens", Value::of(tokens));
  m.set("tokenizer.ggml.scores", Value::of(std::vector<float>(n, 0.0f)));
  m.set("tokenizer.ggml.token_type", Value::of(types));
  m.set("tokenizer.ggml.bos_token_id", Value::of(1u));
  m.set("tokenizer.ggml.eos_token_id", Value::of(2u));
  m.set("tokenizer.ggml.unknown_token_id", Value::of(0u));
  m.set("tokenizer.ggml.add_bos_token", Value::of(true));
  m.set("tokenizer.ggml.add_space_prefix", Value::of(false));
  return n;
}

// WordPiece with every printable ASCII character, at the start of a word and inside one.
uint32_t set_wordpiece_vocabulary(gguf::Metadata& m) {
  std::vector<std::string> tokens{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  std::vector<int32_t> types{3, 2, 3, 3, 3};
  for (char c = '!'; c <= '~'; ++c) {
    if (c >= 'A' && c <= 'Z') continue;
    tokens.push_back(std::string("\u2581") + c);
    tokens.emplace_back(1, c);
    types.insert(types.end(), {1, 1});
  }
  m.set("tokenizer.ggml.model", Value::of("bert"));
  m.set("tokenizer.ggml.tokens", Value::of(tokens));
  m.set("tokenizer.ggml.token_type", Value::of(types));
  m.set("tokenizer.ggml.token_type_count", Value::of(2u));
  m.set("tokenizer.ggml.padding_token_id", Value::of(0u));
  m.set("tokenizer.ggml.unknown_token_id", Value::of(1u));
  m.set("tokenizer.ggml.cls_token_id", Value::of(2u));
  m.set("tokenizer.ggml.seperator_token_id", Value::of(3u));
  m.set("tokenizer.ggml.mask_token_id", Value::of(4u));
  return static_cast<uint32_t>(tokens.size());
}

void set_deepseek2(const std::function<void(const char*, Value)>& set, const TinyModelOptions& options) {
  const bool latent = !options.cached_heads;
  set("leading_dense_block_count", Value::of(1u));
  set("attention.kv_lora_rank", Value::of(kKvRank));
  if (options.query_rank) set("attention.q_lora_rank", Value::of(kQRank));
  set("attention.head_count_kv", Value::of(latent ? 1u : kHeads));
  set("attention.key_length", Value::of(latent ? kKvRank + kRotated : kPlain + kRotated));
  set("attention.value_length", Value::of(latent ? kKvRank : kValue));
  if (latent) set("attention.key_length_mla", Value::of(kPlain + kRotated));
  if (latent) set("attention.value_length_mla", Value::of(kValue));
  set("rope.dimension_count", Value::of(kRotated));
  set("expert_shared_count", Value::of(kShared));
  set("expert_weights_scale", Value::of(2.5f));
  set("expert_weights_norm", Value::of(options.expert_groups));
  set("expert_gating_func", Value::of(options.expert_groups ? 2u : 1u));
  if (options.yarn) set("rope.scaling.yarn_log_multiplier", Value::of(0.08f));
  if (!options.expert_groups) return;
  set("expert_group_count", Value::of(4u));
  set("expert_group_used_count", Value::of(2u));
}

// Keys that decoders of one architecture or few have.
void set_decoder(const std::function<void(const char*, Value)>& set, const TinyModelOptions& options) {
  const auto original = [&](uint32_t n_ctx) { set("rope.scaling.original_context_length", Value::of(n_ctx)); };
  switch (options.kind) {
    case TinyKind::gemma2:
      set("attention.sliding_window", Value::of(options.window));
      set("attn_logit_softcapping", Value::of(5.0f));
      set("final_logit_softcapping", Value::of(20.0f));
      return;
    case TinyKind::phi3:
      original(options.short_context ? kContext : kContext / 2);
      set("rope.scaling.type", Value::of("longrope"));
      set("rope.scaling.attn_factor", Value::of(1.2f));
      return;
    case TinyKind::mistral3:
      original(kContext / 64);
      set("attention.temperature_scale", Value::of(0.1f));
      return;
    case TinyKind::glm4:
      set("rope.dimension_count", Value::of(kHeadDim / 2));
      return;
    case TinyKind::command_r:
      set("logit_scale", Value::of(0.25f));
      return;
    case TinyKind::cohere2:
      set("logit_scale", Value::of(0.25f));
      set("attention.sliding_window", Value::of(options.window));
      return;
    case TinyKind::olmo2:
      if (!options.windows) return;
      set("attention.sliding_window", Value::of(options.window));
      set("rope.scaling.type", Value::of("yarn"));
      set("rope.scaling.factor", Value::of(4.0f));
      return original(kContext / 4);
    case TinyKind::granite:
      set("attention.scale", Value::of(0.1f));
      set("embedding_scale", Value::of(6.0f));
      set("residual_scale", Value::of(0.4f));
      set("logit_scale", Value::of(4.0f));
      if (options.no_rope) set("rope.scaling.finetuned", Value::of(false));
      return;
    default:
      return;
  }
}

gguf::Metadata tiny_metadata(const TinyModelOptions& options) {
  const bool encoder = is_encoder(options.kind), is_gemma = options.kind == TinyKind::gemma3;
  const std::string arch = names_of(options.kind).arch;
  gguf::Metadata m("tiny");
  m.set("general.architecture", Value::of(arch));
  m.set("general.name", Value::of("tiny " + tiny_kind_name(options.kind)));
  const auto set = [&](const char* key, auto value) { m.set(arch + "." + key, Value::of(value)); };
  set("block_count", options.n_layer);
  set("context_length", kContext);
  set("embedding_length", kEmbd);
  set("feed_forward_length", kFf);
  set("attention.head_count", kHeads);
  set("attention.head_count_kv", heads_kv(options.kind));
  set("attention.key_length", encoder ? kEmbd / kHeads : kHeadDim);
  set("attention.value_length", encoder ? kEmbd / kHeads : kHeadDim);
  set(has_layer_norms(options.kind) ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 1e-5f);
  if (encoder) {
    set("attention.causal", false);
    set("pooling_type", 1u);
  }
  if (is_gemma || options.kind == TinyKind::gpt_oss) set("attention.sliding_window", options.window);
  if (is_gemma) {
    set("rope.freq_base", 1e6f);
    set("rope.scaling.type", "linear");
    set("rope.scaling.factor", 8.0f);
    set("final_logit_softcapping", 30.0f);
  }
  if (options.kind == TinyKind::nomic_bert) set("rope.freq_base", 1000.0f);
  if (has_experts(options.kind)) {
    set("expert_count", n_expert(options));
    set("expert_used_count", kExpertsUsed);
    if (options.kind != TinyKind::llama_moe) set("expert_feed_forward_length", kFfExpert);
  }
  if (options.yarn) {
    set("rope.scaling.type", "yarn");
    set("rope.scaling.factor", 4.0f);
    set("rope.scaling.original_context_length", kContext / 4);
  }
  const auto set_value = [&](const char* key, Value value) { m.set(arch + "." + key, std::move(value)); };
  if (options.kind == TinyKind::deepseek2) set_deepseek2(set_value, options);
  set_decoder(set_value, options);
  return m;
}

void write_experts(TinyWriter& w, const std::string& p, const TinyModelOptions& options) {
  const uint32_t n = n_expert(options), n_ff = options.kind == TinyKind::llama_moe ? kFf : kFfExpert;
  // The router is f32 in real files, whatever the type of the rest.
  w.vector(p + "ffn_gate_inp.weight", {kEmbd, n}, 0, 0.4f);
  if (options.fused_experts) {
    w.matrix(p + "ffn_gate_up_exps", {kEmbd, 2 * n_ff, n});
  } else {
    w.matrix(p + "ffn_gate_exps", {kEmbd, n_ff, n});
    w.matrix(p + "ffn_up_exps", {kEmbd, n_ff, n});
  }
  w.matrix(p + "ffn_down_exps", {n_ff, kEmbd, n});
  if (options.kind == TinyKind::gpt_oss) {
    w.bias(p + "ffn_gate_inp", n);
    // Some gates and ups are past the limit of 7.
    for (const char* name : {"ffn_gate_exps", "ffn_up_exps"}) w.vector(p + name + ".bias", {n_ff, n}, 0, 9);
    w.vector(p + "ffn_down_exps.bias", {kEmbd, n}, 0, 0.2f);
  }
  if (options.kind == TinyKind::deepseek2) {
    if (options.expert_groups) w.vector(p + "exp_probs_b.bias", {n}, 0, 0.3f);
    w.matrix(p + "ffn_gate_shexp", {kEmbd, n_ff * kShared});
    w.matrix(p + "ffn_up_shexp", {kEmbd, n_ff * kShared});
    w.matrix(p + "ffn_down_shexp", {n_ff * kShared, kEmbd});
  }
  if (!options.expert_scales) return;
  for (const char* name : {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}) {
    w.vector(p + name + ".scale", {n}, 1, 0.5f);
  }
}

void write_latent_attention(TinyWriter& w, const std::string& p, const TinyModelOptions& options) {
  constexpr int64_t q_width = kHeads * (kPlain + kRotated);
  if (options.query_rank) {
    w.matrix(p + "attn_q_a", {kEmbd, kQRank});
    w.norm(p + "attn_q_a_norm", kQRank);
    w.matrix(p + "attn_q_b", {kQRank, q_width}, 2);
  } else {
    w.matrix(p + "attn_q", {kEmbd, q_width}, 2);
  }
  w.matrix(p + "attn_kv_a_mqa", {kEmbd, kKvRank + kRotated});
  w.norm(p + "attn_kv_a_norm", kKvRank);
  if (options.cached_heads) {
    w.matrix(p + "attn_kv_b", {kKvRank, kHeads * (kPlain + kValue)});
  } else {
    w.matrix(p + "attn_k_b", {kPlain, kKvRank, kHeads});
    w.matrix(p + "attn_v_b", {kKvRank, kValue, kHeads});
  }
  w.matrix(p + "attn_output", {kHeads * kValue, kEmbd});
}

// Writes one product's tensors.
using LinearWriter = std::function<void(const char* name, int64_t n_in, int64_t n_out, float gain)>;

void write_attention(TinyWriter& w, const std::string& p, const TinyModelOptions& options, const LinearWriter& linear) {
  const TinyKind kind = options.kind;
  const int64_t q_width = kHeads * kHeadDim, kv_width = heads_kv(kind) * kHeadDim;
  if (has_fused_qkv(options)) {
    linear("attn_qkv", kEmbd, q_width + 2 * kv_width, 1.5f);
  } else {
    linear("attn_q", kEmbd, q_width, 2);  // scores far from uniform
    linear("attn_k", kEmbd, kv_width, 1);
    linear("attn_v", kEmbd, kv_width, 1);
    if (kind == TinyKind::qwen2) {
      w.bias(p + "attn_q", q_width);
      w.bias(p + "attn_k", kv_width);
      w.bias(p + "attn_v", kv_width);
    }
  }
  linear("attn_output", q_width, kEmbd, 1);
  if (kind == TinyKind::gpt_oss) w.vector(p + "attn_sinks.weight", {kHeads}, 1, 2);
  if (is_one_of(kind, {TinyKind::gemma3, TinyKind::qwen3, TinyKind::qwen3moe})) {
    w.norm(p + "attn_q_norm", kHeadDim);
    w.norm(p + "attn_k_norm", kHeadDim);
  }
  if (kind == TinyKind::olmo2) {
    w.norm(p + "attn_q_norm", q_width);
    w.norm(p + "attn_k_norm", kv_width);
  }
  if (kind == TinyKind::command_r) {
    w.vector(p + "attn_q_norm.weight", {kHeadDim, kHeads}, 1, 0.3f);
    w.vector(p + "attn_k_norm.weight", {kHeadDim, kHeadsKv}, 1, 0.3f);
  }
}

void write_decoder_layer(TinyWriter& w, const std::string& p, uint32_t layer, const TinyModelOptions& options) {
  const TinyKind kind = options.kind;
  const LinearWriter linear = [&](const char* name, int64_t n_in, int64_t n_out, float gain) {
    w.matrix(p + name, {n_in, n_out}, gain);
    if (options.biases || has_biases(kind)) w.bias(p + name, n_out);
    if (options.scales) w.vector(p + name + ".scale", {1}, 1, 0.5f);
  };
  const auto norm = [&](const char* name) {
    has_norm_biases(kind) ? w.layer_norm(p + name, kEmbd) : w.norm(p + name, kEmbd);
  };
  if (kind != TinyKind::olmo2) norm("attn_norm");
  if (kind == TinyKind::falcon) norm("attn_norm_2");
  kind == TinyKind::deepseek2 ? write_latent_attention(w, p, options) : write_attention(w, p, options, linear);
  if (has_post_norms(kind) || kind == TinyKind::gpt_oss) norm("post_attention_norm");
  if (has_post_norms(kind)) norm("post_ffw_norm");
  if (!is_parallel(kind) && !is_one_of(kind, {TinyKind::gpt_oss, TinyKind::olmo2})) norm("ffn_norm");
  const bool is_dense = !has_experts(kind) || (kind == TinyKind::deepseek2 && layer == 0);
  if (!is_dense) return write_experts(w, p, options);
  const bool is_fused = is_one_of(kind, {TinyKind::phi3, TinyKind::glm4});
  const bool is_plain = is_one_of(kind, {TinyKind::starcoder2, TinyKind::falcon, TinyKind::gpt2});
  if (!is_fused && !is_plain) linear("ffn_gate", kEmbd, kFf, 1);
  linear("ffn_up", kEmbd, is_fused ? 2 * kFf : kFf, 1);
  linear("ffn_down", kFf, kEmbd, 1);
}

void write_decoder(TinyWriter& w, const TinyModelOptions& options, uint32_t n_vocab) {
  w.matrix("token_embd", {kEmbd, n_vocab}, std::sqrt(static_cast<float>(kEmbd)) / 3);
  if (options.kind == TinyKind::gpt2) w.vector("position_embd.weight", {kEmbd, kContext}, 0, 1);
  if (options.rope_freqs) w.vector("rope_freqs.weight", {kHeadDim / 2}, 1.5f, 0.5f);
  if (options.kind == TinyKind::phi3) {
    w.vector("rope_factors_long.weight", {kHeadDim / 2}, 4, 3);
    w.vector("rope_factors_short.weight", {kHeadDim / 2}, 1.2f, 0.2f);
  }
  for (uint32_t layer = 0; layer < options.n_layer; ++layer) {
    write_decoder_layer(w, "blk." + std::to_string(layer) + ".", layer, options);
  }
  has_norm_biases(options.kind) ? w.layer_norm("output_norm", kEmbd) : w.norm("output_norm", kEmbd);
  const bool is_tied =
      options.tied_output || is_one_of(options.kind, {TinyKind::gemma2, TinyKind::command_r, TinyKind::cohere2});
  if (is_tied) return;
  w.matrix("output", {kEmbd, n_vocab}, 2);
  if (options.kind == TinyKind::qwen2) w.bias("output", n_vocab);
}

void write_encoder(TinyWriter& w, const TinyModelOptions& options, uint32_t n_vocab) {
  const bool is_nomic = options.kind == TinyKind::nomic_bert;
  w.matrix("token_embd", {kEmbd, n_vocab}, std::sqrt(static_cast<float>(kEmbd)) / 3);
  if (!is_nomic) w.matrix("position_embd", {kEmbd, kContext}, 3);
  w.vector("token_types.weight", {kEmbd, 2}, 0, 0.3f);
  w.layer_norm("token_embd_norm", kEmbd);
  for (uint32_t layer = 0; layer < options.n_layer; ++layer) {
    const std::string p = "blk." + std::to_string(layer) + ".";
    const auto linear = [&](const char* name, int64_t n_in, int64_t n_out) {
      w.matrix(p + name, {n_in, n_out});
      if (!is_nomic) w.bias(p + name, n_out);
    };
    if (is_nomic || options.fused_qkv) {
      linear("attn_qkv", kEmbd, 3 * kEmbd);
    } else {
      linear("attn_q", kEmbd, kEmbd);
      linear("attn_k", kEmbd, kEmbd);
      linear("attn_v", kEmbd, kEmbd);
    }
    linear("attn_output", kEmbd, kEmbd);
    w.layer_norm(p + "attn_output_norm", kEmbd);
    if (is_nomic) linear("ffn_gate", kEmbd, kFf);
    linear("ffn_up", kEmbd, kFf);
    linear("ffn_down", kFf, kEmbd);
    w.layer_norm(p + "layer_output_norm", kEmbd);
  }
}

}  // namespace

std::string tiny_kind_name(TinyKind kind) { return names_of(kind).name; }

std::filesystem::path write_tiny_model(const std::filesystem::path& folder, const TinyModelOptions& options,
                                       const std::string& name) {
  const std::filesystem::path path = folder / (name + ".gguf");
  gguf::Metadata metadata = tiny_metadata(options);
  const bool encoder = is_encoder(options.kind);
  const uint32_t n_vocab = encoder ? set_wordpiece_vocabulary(metadata) : set_byte_vocabulary(metadata);
  TinyWriter writer(path, std::move(metadata), options);
  encoder ? write_encoder(writer, options, n_vocab) : write_decoder(writer, options, n_vocab);
  writer.finish();
  return path;
}

}  // namespace caravan::testing
