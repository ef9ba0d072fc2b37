// What models with experts and with latent attention read from their files, and what they refuse.
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "models/registry.h"
#include "support/kit.h"
#include "support/tiny_model.h"

namespace caravan::models {
namespace {

using gguf::Value;
using testing::TinyKind;

gguf::Metadata metadata_of(const testing::TinyModelOptions& options) {
  const testing::TemporaryDirectory folder;
  return gguf::Model::open(testing::write_tiny_model(folder.path(), options)).metadata();
}

gguf::Metadata metadata_of(TinyKind kind) {
  testing::TinyModelOptions options;
  options.kind = kind;
  return metadata_of(options);
}

Hyperparameters read(const gguf::Metadata& metadata) { return find_arch(metadata).read(metadata); }

template <typename E>
std::string refusal(const gguf::Metadata& metadata) {
  try {
    read(metadata);
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(ReadExperts, GivesEachArchitectureItsRouting) {
  EXPECT_EQ(read(metadata_of(TinyKind::llama_moe)).routing.weight_norm, graph::WeightNorm::sum_to_one);
  EXPECT_EQ(read(metadata_of(TinyKind::qwen3moe)).routing.gating, graph::Gating::softmax);
  const graph::MoeParams oss = read(metadata_of(TinyKind::gpt_oss)).routing;
  EXPECT_EQ(oss.gating, graph::Gating::softmax_over_selected);
  EXPECT_EQ(oss.weight_norm, graph::WeightNorm::none);
  EXPECT_EQ(oss.activation, graph::Activation::swiglu_oai);
  testing::TinyModelOptions options;
  options.kind = TinyKind::deepseek2;
  options.expert_groups = true;
  const Hyperparameters deepseek = read(metadata_of(options));
  EXPECT_EQ(deepseek.routing.gating, graph::Gating::sigmoid);
  EXPECT_EQ(deepseek.routing.n_group, 4);
  EXPECT_EQ(deepseek.routing.n_group_used, 2);
  EXPECT_EQ(deepseek.routing.weight_scale, 2.5f);
  EXPECT_EQ(deepseek.n_layer_dense, 1u);
  EXPECT_EQ(deepseek.n_ff_shared, 2 * deepseek.n_ff_expert);
}

TEST(ReadExperts, RefusesWhatDoesNotFit) {
  const gguf::Metadata good = metadata_of(TinyKind::qwen3moe);
  struct Change {
    const char* key;
    uint32_t value;
  };
  for (const Change& change :
       {Change{"expert_count", 0}, Change{"expert_used_count", 0}, Change{"expert_used_count", 5},
        Change{"expert_shared_count", 4096}, Change{"expert_feed_forward_length", 1u << 30}}) {
    gguf::Metadata metadata = good;
    metadata.set(std::string("qwen3moe.") + change.key, Value::of(change.value));
    if (std::string_view(change.key) == "expert_count") metadata.set("qwen3moe.expert_used_count", Value::of(0u));
    if (std::string_view(change.key) == "expert_shared_count") {
      metadata.set("qwen3moe.expert_feed_forward_length", Value::of(1u << 20));
    }
    EXPECT_NE(refusal<FormatError>(metadata).find(change.key), std::string::npos) << refusal<FormatError>(metadata);
  }
  gguf::Metadata metadata = good;
  metadata.set("qwen3moe.expert_gating_func", Value::of(4u));
  EXPECT_NE(refusal<NotSupportedError>(metadata).find("expert_gating_func"), std::string::npos);
}

TEST(ReadLatentAttention, RefusesWidthsThatDoNotFitTogether) {
  const gguf::Metadata good = metadata_of(TinyKind::deepseek2);
  for (const char* key : {"attention.key_length", "attention.value_length", "attention.kv_lora_rank",
                          "attention.value_length_mla", "attention.head_count_kv", "rope.dimension_count"}) {
    for (const uint32_t value : {0u, 2u, 1u << 20}) {
      if (value == 2 && std::string_view(key) == "attention.value_length_mla") continue;  // is what it is
      gguf::Metadata metadata = good;
      metadata.set(std::string("deepseek2.") + key, Value::of(value));
      EXPECT_NE(refusal<FormatError>(metadata), "nothing was thrown") << key << " = " << value;
    }
  }
}

// DeepSeek-V3: factor 40, mscale and mscale_all_dim 1, so that scores are multiplied by (0.1 ln 40 + 1)^2.
TEST(ReadLatentAttention, LetsScoresGrowWithYarn) {
  gguf::Metadata metadata = metadata_of(TinyKind::deepseek2);
  const float plain = read(metadata).attention_scale;
  EXPECT_FLOAT_EQ(plain, 1 / std::sqrt(48.0f));
  metadata.set("deepseek2.rope.scaling.type", Value::of("yarn"));
  metadata.set("deepseek2.rope.scaling.factor", Value::of(40.0f));
  metadata.set("deepseek2.rope.scaling.yarn_log_multiplier", Value::of(0.1f));
  const Hyperparameters hp = read(metadata);
  EXPECT_NEAR(hp.attention_scale / plain, 1.3688879 * 1.3688879, 1e-5);
  EXPECT_NEAR(hp.rope.attn_factor * (1 + 0.1 * std::log(40.0)), 1, 1e-6);  // what rotated parts are multiplied by
}

TEST(ReadNomicBert, RefusesExperts) {
  gguf::Metadata metadata = metadata_of(TinyKind::nomic_bert);
  EXPECT_NO_THROW(read(metadata));
  metadata.set("nomic-bert.moe_every_n_layers", Value::of(2u));
  EXPECT_NE(refusal<NotSupportedError>(metadata).find("experts"), std::string::npos);
}

}  // namespace
}  // namespace caravan::models
