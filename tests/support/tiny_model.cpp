#include "support/tiny_model.h"

#include <cmath>
#include <functional>
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

std::string arch_of(TinyKind kind) {
  switch (kind) {
    case TinyKind::llama:
    case TinyKind::llama_moe:
      return "llama";
    case TinyKind::gemma3:
      return "gemma3";
    case TinyKind::qwen3moe:
      return "qwen3moe";
    case TinyKind::gpt_oss:
      return "gpt-oss";
    case TinyKind::deepseek2:
      return "deepseek2";
    case TinyKind::bert:
      return "bert";
    case TinyKind::nomic_bert:
      return "nomic-bert";
  }
  return "?";
}

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

gguf::Metadata tiny_metadata(const TinyModelOptions& options) {
  const bool encoder = is_encoder(options.kind), is_gemma = options.kind == TinyKind::gemma3;
  const std::string arch = arch_of(options.kind);
  gguf::Metadata m("tiny");
  m.set("general.architecture", Value::of(arch));
  m.set("general.name", Value::of("tiny " + tiny_kind_name(options.kind)));
  const auto set = [&](const char* key, auto value) { m.set(arch + "." + key, Value::of(value)); };
  set("block_count", options.n_layer);
  set("context_length", kContext);
  set("embedding_length", kEmbd);
  set("feed_forward_length", kFf);
  set("attention.head_count", kHeads);
  set("attention.head_count_kv", encoder ? kHeads : kHeadsKv);
  set("attention.key_length", encoder ? kEmbd / kHeads : kHeadDim);
  set("attention.value_length", encoder ? kEmbd / kHeads : kHeadDim);
  set(encoder ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 1e-5f);
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
  if (options.kind == TinyKind::deepseek2) {
    set_deepseek2([&](const char* key, Value value) { m.set(arch + "." + key, std::move(value)); }, options);
  }
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

void write_decoder_layer(TinyWriter& w, const std::string& p, uint32_t layer, const TinyModelOptions& options) {
  const bool is_gemma = options.kind == TinyKind::gemma3, is_oss = options.kind == TinyKind::gpt_oss;
  const auto linear = [&](const char* name, int64_t n_in, int64_t n_out, float gain = 1) {
    w.matrix(p + name, {n_in, n_out}, gain);
    if (options.biases || is_oss) w.bias(p + name, n_out);
    if (options.scales) w.vector(p + name + ".scale", {1}, 1, 0.5f);
  };
  w.norm(p + "attn_norm", kEmbd);
  if (options.kind == TinyKind::deepseek2) {
    write_latent_attention(w, p, options);
  } else {
    linear("attn_q", kEmbd, kHeads * kHeadDim, 2);  // scores far from uniform
    linear("attn_k", kEmbd, kHeadsKv * kHeadDim);
    linear("attn_v", kEmbd, kHeadsKv * kHeadDim);
    linear("attn_output", kHeads * kHeadDim, kEmbd);
  }
  if (is_oss) w.vector(p + "attn_sinks.weight", {kHeads}, 1, 2);
  if (is_gemma || options.kind == TinyKind::qwen3moe) {
    w.norm(p + "attn_q_norm", kHeadDim);
    w.norm(p + "attn_k_norm", kHeadDim);
  }
  if (is_gemma || is_oss) w.norm(p + "post_attention_norm", kEmbd);
  if (is_gemma) w.norm(p + "post_ffw_norm", kEmbd);
  if (!is_oss) w.norm(p + "ffn_norm", kEmbd);
  const bool is_dense = !has_experts(options.kind) || (options.kind == TinyKind::deepseek2 && layer == 0);
  if (!is_dense) return write_experts(w, p, options);
  linear("ffn_gate", kEmbd, kFf);
  linear("ffn_up", kEmbd, kFf);
  linear("ffn_down", kFf, kEmbd);
}

void write_decoder(TinyWriter& w, const TinyModelOptions& options, uint32_t n_vocab) {
  w.matrix("token_embd", {kEmbd, n_vocab}, std::sqrt(static_cast<float>(kEmbd)) / 3);
  if (options.rope_freqs) w.vector("rope_freqs.weight", {kHeadDim / 2}, 1.5f, 0.5f);
  for (uint32_t layer = 0; layer < options.n_layer; ++layer) {
    write_decoder_layer(w, "blk." + std::to_string(layer) + ".", layer, options);
  }
  w.norm("output_norm", kEmbd);
  if (!options.tied_output) w.matrix("output", {kEmbd, n_vocab}, 2);
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
    if (is_nomic) {
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

std::string tiny_kind_name(TinyKind kind) {
  switch (kind) {
    case TinyKind::llama:
      return "llama";
    case TinyKind::llama_moe:
      return "llama_moe";
    case TinyKind::gemma3:
      return "gemma3";
    case TinyKind::qwen3moe:
      return "qwen3moe";
    case TinyKind::gpt_oss:
      return "gpt_oss";
    case TinyKind::deepseek2:
      return "deepseek2";
    case TinyKind::bert:
      return "bert";
    case TinyKind::nomic_bert:
      return "nomic_bert";
  }
  return "?";
}

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
