#include "models/hyperparameters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "base/error.h"
#include "gguf/reader.h"
#include "models/registry.h"
#include "support/kit.h"
#include "support/tiny_model.h"

namespace caravan::models {
namespace {

using gguf::Value;

gguf::Metadata llama_metadata() {
  gguf::Metadata m("test.gguf");
  m.set("general.architecture", Value::of("llama"));
  m.set("llama.block_count", Value::of(2u));
  m.set("llama.context_length", Value::of(256u));
  m.set("llama.embedding_length", Value::of(64u));
  m.set("llama.feed_forward_length", Value::of(96u));
  m.set("llama.attention.head_count", Value::of(4u));
  m.set("llama.attention.layer_norm_rms_epsilon", Value::of(1e-5f));
  m.set("llama.vocab_size", Value::of(100u));
  return m;
}

template <typename E>
std::string message_of(const gguf::Metadata& metadata) {
  try {
    find_arch(metadata).read(metadata);
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Hyperparameters, TakeTheDefaultsOfTheFormat) {
  const Hyperparameters hp = find_arch("llama").read(llama_metadata());
  EXPECT_EQ(hp.n_head_kv, (std::vector<uint32_t>{4, 4}));
  EXPECT_EQ(hp.head_dim_k, 16u);
  EXPECT_EQ(hp.rope.n_rot, 16);
  EXPECT_EQ(hp.rope.freq_base, 10000);
  EXPECT_EQ(hp.rope.freq_scale, 1);
  EXPECT_FLOAT_EQ(hp.attention_scale, 0.25f);
  EXPECT_EQ(hp.n_expert, 0u);
  EXPECT_EQ(hp.pooling, Pooling::none);
}

TEST(Hyperparameters, NameTheMissingKey) {
  for (const char* key : {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
                          "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"}) {
    const gguf::Metadata complete = llama_metadata();
    gguf::Metadata m("test.gguf");
    for (const auto& [name, value] : complete.entries()) {
      if (name != key) m.set(name, value);
    }
    const std::string message = message_of<FormatError>(m);
    EXPECT_NE(message.find(key), std::string::npos) << message;
    EXPECT_NE(message.find("test.gguf"), std::string::npos) << message;
  }
}

TEST(Hyperparameters, RefuseValuesThatCannotBe) {
  const std::pair<const char*, Value> cases[] = {
      {"llama.block_count", Value::of(0u)},
      {"llama.block_count", Value::of(1u << 20)},
      {"llama.embedding_length", Value::of(0u)},
      {"llama.attention.head_count", Value::of(0u)},
      {"llama.attention.head_count_kv", Value::of(3u)},
      {"llama.attention.head_count_kv", Value::of(std::vector<int32_t>{4, 3})},
      {"llama.rope.dimension_count", Value::of(15u)},
      {"llama.rope.dimension_count", Value::of(32u)},
      {"llama.rope.freq_base", Value::of(-1.0f)},
      {"llama.rope.scaling.factor", Value::of(std::nanf(""))},
      {"llama.attention.layer_norm_rms_epsilon", Value::of(std::nanf(""))},
      {"llama.expert_used_count", Value::of(2u)},
      {"llama.vocab_size", Value::of(0u)},
  };
  for (const auto& [key, value] : cases) {
    gguf::Metadata m = llama_metadata();
    m.set(key, value);
    const std::string message = message_of<FormatError>(m);
    EXPECT_NE(message.find(key), std::string::npos) << key << ": " << message;
  }
}

TEST(Hyperparameters, RefuseWhatIsKnownButNotSupported) {
  gguf::Metadata m = llama_metadata();
  m.set("llama.rope.scaling.type", Value::of("dynamic"));
  EXPECT_NE(message_of<NotSupportedError>(m).find("dynamic"), std::string::npos);
  m = llama_metadata();
  m.set("llama.attention.max_alibi_bias", Value::of(8.0f));
  EXPECT_NE(message_of<NotSupportedError>(m).find("max_alibi_bias"), std::string::npos);
}

TEST(Hyperparameters, ComputeYarnFactors) {
  gguf::Metadata m = llama_metadata();
  m.set("llama.rope.scaling.type", Value::of("yarn"));
  m.set("llama.rope.scaling.factor", Value::of(4.0f));
  m.set("llama.rope.scaling.original_context_length", Value::of(64u));
  Hyperparameters hp = find_arch("llama").read(m);
  EXPECT_FLOAT_EQ(hp.rope.freq_scale, 0.25f);
  EXPECT_EQ(hp.rope.ext_factor, 1);
  EXPECT_EQ(hp.rope.n_ctx_orig, 64);
  EXPECT_FLOAT_EQ(hp.rope.attn_factor, 1);
  m.set("llama.rope.scaling.yarn_log_multiplier", Value::of(0.5f));
  hp = find_arch("llama").read(m);
  // m(s, 1) / m(s, 0.5) over the factor that rope applies itself, m(s, 1).
  EXPECT_FLOAT_EQ(hp.rope.attn_factor, 1 / (0.1f * 0.5f * std::log(4.0f) + 1));
}

// The same keys for another architecture.
gguf::Metadata as_arch(const std::string& arch) {
  gguf::Metadata m("test.gguf");
  const gguf::Metadata llama = llama_metadata();
  for (const auto& [key, value] : llama.entries()) {
    m.set(key.starts_with("llama.") ? arch + key.substr(5) : key, value);
  }
  m.set("general.architecture", Value::of(arch));
  m.set(arch + ".attention.layer_norm_epsilon", Value::of(1e-5f));
  return m;
}

TEST(Decoder, RefusesWhatItDoesNotComputeByName) {
  const std::tuple<const char*, const char*, Value> cases[] = {
      {"qwen2", "attention.causal", Value::of(false)},       {"qwen2", "expert_count", Value::of(4u)},
      {"glm4", "nextn_predict_layers", Value::of(1u)},       {"falcon", "attention.clamp_kqv", Value::of(8.0f)},
      {"gpt2", "attention.max_alibi_bias", Value::of(8.0f)}, {"starcoder2", "rope.scaling.type", Value::of("longrope")},
  };
  for (const auto& [arch, name, value] : cases) {
    gguf::Metadata m = as_arch(arch);
    EXPECT_EQ(message_of<NotSupportedError>(m), "nothing was thrown") << arch;
    const std::string key = std::string(arch) + "." + name;
    m.set(key, value);
    const std::string message = message_of<NotSupportedError>(m);
    EXPECT_NE(message.find(value.type == gguf::ValueType::string ? "longrope" : key), std::string::npos) << message;
    EXPECT_NE(message.find(arch), std::string::npos) << message;
  }
}

std::vector<uint32_t> window_layers_of(const Hyperparameters& hp) {
  std::vector<uint32_t> layers;
  for (uint32_t layer = 0; layer < hp.n_layer; ++layer) {
    if (hp.is_window_layer(layer)) layers.push_back(layer);
  }
  return layers;
}

TEST(Decoder, ReadsWindowLayersFromAPeriodOrAnArray) {
  gguf::Metadata m = as_arch("gemma2");
  m.set("gemma2.block_count", Value::of(6u));
  Hyperparameters hp = find_arch("gemma2").read(m);
  EXPECT_EQ(hp.window, 4096u);
  EXPECT_EQ(window_layers_of(hp), (std::vector<uint32_t>{0, 2, 4}));
  m.set("gemma2.attention.sliding_window_pattern", Value::of(3u));
  EXPECT_EQ(window_layers_of(find_arch("gemma2").read(m)), (std::vector<uint32_t>{0, 1, 3, 4}));
  m.set("gemma2.attention.sliding_window_pattern", Value::of(std::vector<int32_t>{1, 0, 0, 1, 1, 0}));
  EXPECT_EQ(window_layers_of(find_arch("gemma2").read(m)), (std::vector<uint32_t>{0, 3, 4}));
  m.set("gemma2.attention.sliding_window_pattern", Value::of(std::vector<int32_t>{1, 0}));
  EXPECT_NE(message_of<FormatError>(m).find("sliding_window_pattern"), std::string::npos);
  m.set("gemma2.attention.sliding_window", Value::of(0u));
  hp = find_arch("gemma2").read(m);
  EXPECT_EQ(window_layers_of(hp), std::vector<uint32_t>{});
  EXPECT_EQ(find_arch("gemma2").cache_groups(hp).size(), 1u);
}

TEST(Decoder, ChoosesLongRopeFactorsByTheContextThatIsServed) {
  gguf::Metadata m = as_arch("phi3");
  m.set("phi3.context_length", Value::of(131072u));
  m.set("phi3.rope.scaling.type", Value::of("longrope"));
  m.set("phi3.rope.scaling.original_context_length", Value::of(4096u));
  const auto factors = [&](uint32_t n_ctx) {
    return find_arch("phi3").read(hyperparameter_metadata(m, n_ctx)).rope_factors;
  };
  EXPECT_EQ(factors(0), "rope_factors_long.weight");  // the model's own
  EXPECT_EQ(factors(8192), "rope_factors_long.weight");
  EXPECT_EQ(factors(4097), "rope_factors_long.weight");
  EXPECT_EQ(factors(4096), "rope_factors_short.weight");
  EXPECT_EQ(factors(100), "rope_factors_short.weight");
  m.set("phi3.context_length", Value::of(4096u));
  EXPECT_EQ(factors(0), "rope_factors_short.weight");
}

TEST(Decoder, RotatesHalvesOfGlm4HeadsInSections) {
  gguf::Metadata m = as_arch("glm4");
  EXPECT_EQ(find_arch("glm4").read(m).rope.pairing, graph::RopePairing::adjacent);
  m.set("glm4.rope.dimension_sections", Value::of(std::vector<int32_t>{2, 3, 3, 0}));
  EXPECT_EQ(find_arch("glm4").read(m).rope.pairing, graph::RopePairing::halves);
  m.set("glm4.rope.dimension_sections", Value::of(std::vector<int32_t>{2, 2, 2, 2}));
  EXPECT_NE(message_of<NotSupportedError>(m).find("glm4.rope.dimension_sections"), std::string::npos);
}

TEST(Decoder, DividesGraniteLogitsAndRefusesToDivideByZero) {
  gguf::Metadata m = as_arch("granite");
  m.set("granite.logit_scale", Value::of(8.0f));
  EXPECT_EQ(find_arch("granite").read(m).logit_scale, 0.125f);
  m.set("granite.deepstack_mapping", Value::of(std::vector<int32_t>{-1, -1}));
  EXPECT_NO_THROW(find_arch("granite").read(m));
  m.set("granite.deepstack_mapping", Value::of(std::vector<int32_t>{-1, 0}));
  EXPECT_NE(message_of<NotSupportedError>(m).find("granite.deepstack_mapping"), std::string::npos);
  m.set("granite.deepstack_mapping", Value::of(std::vector<int32_t>{-1, -1}));
  m.set("granite.logit_scale", Value::of(0.0f));
  EXPECT_NE(message_of<FormatError>(m).find("granite.logit_scale"), std::string::npos);
}

TEST(Hyperparameters, TravelWithoutTheTokenList) {
  const testing::TemporaryDirectory folder;
  for (const auto kind : {testing::TinyKind::llama, testing::TinyKind::gemma3, testing::TinyKind::bert}) {
    testing::TinyModelOptions options;
    options.kind = kind;
    const auto path = testing::write_tiny_model(folder.path(), options, testing::tiny_kind_name(kind));
    const gguf::Model model = gguf::Model::open(path);
    const gguf::Metadata sent = hyperparameter_metadata(model.metadata());
    EXPECT_FALSE(sent.contains("tokenizer.ggml.tokens"));
    const Arch& arch = find_arch(sent);
    EXPECT_EQ(arch.read(sent).n_vocab, model.metadata().get_strings("tokenizer.ggml.tokens").size());
    EXPECT_EQ(arch.read(sent).n_token_types, arch.read(model.metadata()).n_token_types);
  }
}

TEST(Registry, NamesAnUnsupportedArchitectureAndListsTheOthers) {
  try {
    find_arch("mamba");
    FAIL() << "nothing was thrown";
  } catch (const NotSupportedError& error) {
    const std::string message = error.what();
    for (const char* part : {"'mamba'", "llama", "gemma3", "bert"}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
  }
}

TEST(Registry, KnowsOrRefusesEveryModelOfTheKit) {
  CARAVAN_REQUIRE_KIT(kit);
  int n_known = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kit / "models")) {
    if (entry.path().extension() != ".gguf") continue;
    const gguf::Model model = gguf::Model::open(entry.path());
    const std::string name = model.metadata().get_string("general.architecture");
    const bool is_known =
        std::any_of(all_archs().begin(), all_archs().end(), [&](const Arch* arch) { return arch->name == name; });
    if (is_known) {
      const Arch& arch = find_arch(model.metadata());
      const Hyperparameters hp = arch.read(model.metadata());
      EXPECT_NO_THROW(check_model(arch, hp, tensor_map(model))) << entry.path();
      EXPECT_NO_THROW(slice_tensor_names(arch, hp, whole_model(hp), tensor_map(model))) << entry.path();
      ++n_known;
    } else {
      EXPECT_THROW(find_arch(model.metadata()), NotSupportedError) << entry.path();
    }
  }
  EXPECT_GE(n_known, 18);
}

}  // namespace
}  // namespace caravan::models
