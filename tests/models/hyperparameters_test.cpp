#include "models/hyperparameters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

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
