#include "models/arch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "models/registry.h"
#include "support/kit.h"
#include "support/tiny_model.h"

namespace caravan::models {
namespace {

using testing::TinyKind;

// A tiny model and what is read from it.
struct Tiny {
  explicit Tiny(const testing::TinyModelOptions& options)
      : model(gguf::Model::open(testing::write_tiny_model(folder.path(), options))),
        arch(find_arch(model.metadata())),
        hp(arch.read(model.metadata())),
        tensors(tensor_map(model)) {}

  weights::Manifest manifest(const Slice& slice) const {
    return weights::make_manifest(model, slice_tensor_names(arch, hp, slice, tensors), weights::Hashing::none, nullptr,
                                  1);
  }

  testing::TemporaryDirectory folder;
  gguf::Model model;
  const Arch& arch;
  Hyperparameters hp;
  graph::TensorMap tensors;
};

testing::TinyModelOptions options_of(TinyKind kind) {
  testing::TinyModelOptions options;
  options.kind = kind;
  return options;
}

class EveryArch : public ::testing::TestWithParam<TinyKind> {};
INSTANTIATE_TEST_SUITE_P(Arch, EveryArch,
                         ::testing::Values(TinyKind::llama, TinyKind::llama_moe, TinyKind::qwen2, TinyKind::qwen3,
                                           TinyKind::gemma2, TinyKind::phi3, TinyKind::mistral3, TinyKind::glm4,
                                           TinyKind::command_r, TinyKind::cohere2, TinyKind::olmo2,
                                           TinyKind::starcoder2, TinyKind::falcon, TinyKind::gpt2, TinyKind::smollm3,
                                           TinyKind::granite, TinyKind::gemma3, TinyKind::qwen3moe, TinyKind::gpt_oss,
                                           TinyKind::deepseek2, TinyKind::bert, TinyKind::nomic_bert),
                         [](const auto& param) { return testing::tiny_kind_name(param.param); });

TEST_P(EveryArch, GivesEveryTensorOfTheFileToExactlyOneOfTwoSlices) {
  const Tiny tiny(options_of(GetParam()));
  const bool is_encoder = GetParam() == TinyKind::bert || GetParam() == TinyKind::nomic_bert;
  for (uint32_t at = 1; at < tiny.hp.n_layer; ++at) {
    const auto first = slice_tensor_names(tiny.arch, tiny.hp, {0, at, true, false}, tiny.tensors);
    const auto second = slice_tensor_names(tiny.arch, tiny.hp, {at, tiny.hp.n_layer, false, true}, tiny.tensors);
    std::multiset<std::string> names(first.begin(), first.end());
    names.insert(second.begin(), second.end());
    std::multiset<std::string> expected;
    for (const auto& [name, desc] : tiny.tensors) {
      if (name == "rope_factors_short.weight") continue;  // the model's context is long
      // Those of every slice, and of a tied matrix, are at both ends.
      const bool is_tied = name == "token_embd.weight" && !tiny.tensors.contains("output.weight");
      expected.insert(name);
      if (name == "rope_factors_long.weight" || (is_tied && !is_encoder)) expected.insert(name);
    }
    EXPECT_EQ(names, expected);
  }
}

TEST_P(EveryArch, UsesEveryDeclaredTensorInTheDeclaredRole) {
  const Tiny tiny(options_of(GetParam()));
  const Slice whole = whole_model(tiny.hp);
  const graph::Graph graph = build_graph(tiny.arch, tiny.hp, whole, tiny.tensors);
  std::set<std::pair<std::string, graph::WeightRole>> used, declared;
  for (const graph::WeightSpec& spec : graph.weights) used.insert({spec.name, spec.role});
  for (const TensorDecl& decl : slice_tensors(tiny.arch, tiny.hp, whole)) {
    if (decl.presence == TensorDecl::Presence::unused) continue;
    const std::string& name = tiny.tensors.contains(decl.name) ? decl.name : decl.fallback;
    if (tiny.tensors.contains(name)) declared.insert({name, decl.role});
  }
  EXPECT_EQ(used, declared);
}

TEST_P(EveryArch, PutsEveryLayerWithACacheIntoOneGroup) {
  const Tiny tiny(options_of(GetParam()));
  std::multiset<uint32_t> layers;
  for (const CacheGroup& group : tiny.arch.cache_groups(tiny.hp)) {
    for (const CacheLayer& layer : group.layers) layers.insert(layer.layer);
  }
  const bool encoder = GetParam() == TinyKind::bert || GetParam() == TinyKind::nomic_bert;
  EXPECT_EQ(layers.size(), encoder ? 0 : tiny.hp.n_layer);
  EXPECT_EQ(std::set<uint32_t>(layers.begin(), layers.end()).size(), layers.size());
}

TEST(SliceTensors, HoldATiedMatrixAtBothEnds) {
  testing::TinyModelOptions options;
  options.tied_output = true;
  const Tiny tiny(options);
  const auto first = slice_tensor_names(tiny.arch, tiny.hp, {0, 1, true, false}, tiny.tensors);
  const auto last = slice_tensor_names(tiny.arch, tiny.hp, {1, 3, false, true}, tiny.tensors);
  const auto whole = slice_tensor_names(tiny.arch, tiny.hp, whole_model(tiny.hp), tiny.tensors);
  EXPECT_EQ(std::count(first.begin(), first.end(), "token_embd.weight"), 1);
  EXPECT_EQ(std::count(last.begin(), last.end(), "token_embd.weight"), 1);
  EXPECT_EQ(std::count(whole.begin(), whole.end(), "token_embd.weight"), 1);
}

TEST(SliceTensors, HoldFrequencyFactorsInEverySlice) {
  testing::TinyModelOptions options;
  options.rope_freqs = true;
  const Tiny tiny(options);
  for (const Slice& slice : {Slice{0, 1, true, false}, Slice{1, 2, false, false}, Slice{2, 3, false, true}}) {
    const auto names = slice_tensor_names(tiny.arch, tiny.hp, slice, tiny.tensors);
    EXPECT_EQ(std::count(names.begin(), names.end(), "rope_freqs.weight"), 1);
  }
}

TEST(SliceTensors, RefuseSlicesThatTheModelDoesNotHave) {
  const Tiny tiny(options_of(TinyKind::llama));
  for (const Slice& slice : {Slice{0, 4, true, false}, Slice{2, 1, false, false}, Slice{1, 2, true, false},
                             Slice{0, 2, true, true}, Slice{1, 1, false, false}}) {
    EXPECT_THROW(slice_tensors(tiny.arch, tiny.hp, slice), FormatError);
  }
}

TEST(CheckManifest, AcceptsWhatTheSliceNeeds) {
  for (const auto kind : {TinyKind::llama, TinyKind::llama_moe, TinyKind::gemma3, TinyKind::bert}) {
    const Tiny tiny(options_of(kind));
    const Slice slice{1, 2, false, false};
    EXPECT_NO_THROW(check_manifest(tiny.arch, tiny.hp, slice, tiny.manifest(slice)));
  }
}

std::string refusal(const Tiny& tiny, const Slice& slice, const weights::Manifest& manifest) {
  try {
    check_manifest(tiny.arch, tiny.hp, slice, manifest);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(CheckManifest, NamesAMissingAnExtraAndAWrongTensor) {
  const Tiny tiny(options_of(TinyKind::llama));
  const Slice slice{1, 2, false, false};
  weights::Manifest manifest = tiny.manifest(slice);
  std::erase_if(manifest.tensors, [](const auto& tensor) { return tensor.name == "blk.1.ffn_up.weight"; });
  EXPECT_NE(refusal(tiny, slice, manifest).find("blk.1.ffn_up.weight"), std::string::npos);

  manifest = tiny.manifest({1, 3, false, true});
  EXPECT_NE(refusal(tiny, slice, manifest).find("blk.2.attn_norm.weight"), std::string::npos)
      << refusal(tiny, slice, manifest);

  manifest = tiny.manifest(slice);
  manifest.tensors[1].ne[1] += 1;
  const std::string message = refusal(tiny, slice, manifest);
  EXPECT_NE(message.find(manifest.tensors[1].name), std::string::npos) << message;
  EXPECT_NE(message.find("[64, 128]"), std::string::npos) << message;
  EXPECT_NE(message.find("[64, 129]"), std::string::npos) << message;
}

TEST(CheckModel, NamesATensorThatTheArchitectureDoesNotKnow) {
  Tiny tiny(options_of(TinyKind::llama));
  EXPECT_NO_THROW(check_model(tiny.arch, tiny.hp, tiny.tensors));
  tiny.tensors["blk.0.attn_q.input_scale"] = {tensor::DType::f32, {1, 1, 1, 1}};
  EXPECT_NO_THROW(check_model(tiny.arch, tiny.hp, tiny.tensors));
  tiny.tensors["blk.0.attn_sinks.weight"] = {tensor::DType::f32, {4, 1, 1, 1}};
  EXPECT_THROW(check_model(tiny.arch, tiny.hp, tiny.tensors), NotSupportedError);
}

TEST(BuildGraph, NamesWhatEachSliceGives) {
  const Tiny tiny(options_of(TinyKind::llama));
  const auto outputs = [&](const Slice& slice) {
    std::vector<std::string> names;
    for (const auto& output : build_graph(tiny.arch, tiny.hp, slice, tiny.tensors).outputs)
      names.push_back(output.name);
    return names;
  };
  EXPECT_EQ(outputs({0, 2, true, false}), std::vector<std::string>{"hidden"});
  EXPECT_EQ(outputs({2, 3, false, true}), (std::vector<std::string>{"embedding", "logits"}));
  EXPECT_EQ(outputs({3, 3, false, true}), (std::vector<std::string>{"embedding", "logits"}));
}

}  // namespace
}  // namespace caravan::models
