// What models compute, from tokens to logits: against a scalar double-precision evaluator and the kit's references.
#include <gtest/gtest.h>

#include <cstring>

#include "base/cpu_features.h"
#include "base/file.h"
#include "device/cpu/cpu_device.h"
#include "support/kit.h"
#include "support/reference_evaluator.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::models {
namespace {

using testing::Row;
using testing::TinyKind;

std::vector<Row> to_rows(const std::vector<std::vector<float>>& values) {
  std::vector<Row> rows;
  for (const auto& row : values) rows.emplace_back(row.begin(), row.end());
  return rows;
}

std::vector<std::vector<float>> compute(const std::filesystem::path& path, std::span<const int32_t> tokens,
                                        stage::OutputKind kind, size_t chunk = 64) {
  const gguf::Model model = gguf::Model::open(path);
  device::cpu::CpuDevice device(1, select_isa(), 0);
  const stage::CacheConfig cache = testing::test_cache(model);
  const Arch& arch = find_arch(model.metadata());
  const Hyperparameters hp = arch.read(model.metadata());
  testing::SliceChain chain(device, model, {whole_model(hp)}, cache);
  testing::BatchBuilder builder(arch.cache_groups(hp), cache);
  return testing::sequence_rows(chain, builder, tokens, chunk, kind);
}

std::vector<int32_t> some_tokens(size_t n, int32_t n_vocab) {
  std::vector<int32_t> tokens(n);
  for (size_t i = 0; i < n; ++i) tokens[i] = static_cast<int32_t>((i * 37 + 11) % static_cast<size_t>(n_vocab));
  return tokens;
}

// --- Tiny models against the evaluator.

// Every f32 operation rounds to 2^-24 and the errors of a few hundred of them in a row add up to some 1e-6 of a
// value, so that squares of differences are about 1e-12 of squares of values. 1e-9 leaves room for exp and cos of
// limited accuracy; a wrong formula is off by 1e-4 or more.
constexpr double kTolerance = 1e-9;

struct Case {
  const char* name;
  testing::TinyModelOptions options;
};

testing::TinyModelOptions tiny(TinyKind kind, uint32_t n_layer = 3) {
  testing::TinyModelOptions options;
  options.kind = kind;
  options.n_layer = n_layer;
  return options;
}

// Architectures that differ from llama in few things; four layers where the fourth is another than the others.
std::vector<Case> other_cases() {
  testing::TinyModelOptions short_context = tiny(TinyKind::phi3), windows = tiny(TinyKind::olmo2, 5),
                            no_rope = tiny(TinyKind::granite), fused = tiny(TinyKind::llama);
  short_context.short_context = windows.windows = no_rope.no_rope = true;
  fused.fused_qkv = fused.biases = fused.scales = true;
  return {{"llama_fused_qkv", fused},
          {"qwen2", tiny(TinyKind::qwen2)},
          {"qwen3", tiny(TinyKind::qwen3)},
          {"gemma2", tiny(TinyKind::gemma2)},
          {"phi3", tiny(TinyKind::phi3)},
          {"phi3_short", short_context},
          {"mistral3", tiny(TinyKind::mistral3)},
          {"glm4", tiny(TinyKind::glm4)},
          {"command_r", tiny(TinyKind::command_r)},
          {"cohere2", tiny(TinyKind::cohere2, 5)},
          {"olmo2", tiny(TinyKind::olmo2)},
          {"olmo2_windows", windows},
          {"starcoder2", tiny(TinyKind::starcoder2)},
          {"falcon", tiny(TinyKind::falcon)},
          {"gpt2", tiny(TinyKind::gpt2)},
          {"smollm3", tiny(TinyKind::smollm3, 5)},
          {"granite", tiny(TinyKind::granite)},
          {"granite_no_rope", no_rope}};
}

std::vector<Case> cases() {
  testing::TinyModelOptions llama;
  testing::TinyModelOptions biases = llama, tied = llama, freqs = llama, yarn = llama;
  biases.biases = biases.scales = tied.tied_output = freqs.rope_freqs = yarn.yarn = true;
  testing::TinyModelOptions moe;
  moe.kind = TinyKind::llama_moe;
  testing::TinyModelOptions scaled_moe = moe;
  scaled_moe.expert_scales = true;
  testing::TinyModelOptions gemma3;
  gemma3.kind = TinyKind::gemma3;
  gemma3.n_layer = 7;
  testing::TinyModelOptions gemma3_tied = gemma3;
  gemma3_tied.tied_output = true;
  testing::TinyModelOptions qwen3moe = moe, gpt_oss = moe, deepseek2 = moe;
  qwen3moe.kind = TinyKind::qwen3moe;
  gpt_oss.kind = TinyKind::gpt_oss;
  deepseek2.kind = TinyKind::deepseek2;
  testing::TinyModelOptions fused = qwen3moe, gpt_oss_yarn = gpt_oss, grouped = deepseek2, heads = deepseek2,
                            heads_yarn = deepseek2;
  fused.fused_experts = true;
  gpt_oss_yarn.yarn = true;
  grouped.expert_groups = grouped.fused_experts = grouped.yarn = true;
  heads.cached_heads = heads_yarn.cached_heads = heads_yarn.yarn = true;
  heads.query_rank = false;
  const std::vector<Case> more{{"qwen3moe", qwen3moe},     {"qwen3moe_fused", fused},
                               {"gpt_oss", gpt_oss},       {"gpt_oss_yarn", gpt_oss_yarn},
                               {"deepseek2", deepseek2},   {"deepseek2_groups_yarn", grouped},
                               {"deepseek2_heads", heads}, {"deepseek2_heads_yarn", heads_yarn}};
  std::vector<Case> result = other_cases();
  const std::vector<Case> llamas{{"llama", llama},
                                 {"llama_biases_scales", biases},
                                 {"llama_tied", tied},
                                 {"llama_rope_freqs", freqs},
                                 {"llama_yarn", yarn},
                                 {"llama_moe", moe},
                                 {"llama_moe_scales", scaled_moe},
                                 {"gemma3", gemma3},
                                 {"gemma3_tied", gemma3_tied}};
  result.insert(result.end(), more.begin(), more.end());
  result.insert(result.end(), llamas.begin(), llamas.end());
  return result;
}

class TinyDecoder : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Logits, TinyDecoder, ::testing::ValuesIn(cases()),
                         [](const auto& param) { return param.param.name; });

TEST_P(TinyDecoder, AgreesWithTheEvaluator) {
  const testing::TemporaryDirectory folder;
  const auto path = testing::write_tiny_model(folder.path(), GetParam().options);
  const std::vector<int32_t> tokens = some_tokens(40, 259);  // longer than a KV block and than the window
  const testing::ReferenceEvaluator evaluator(path);
  EXPECT_LT(
      testing::normalised_error(to_rows(compute(path, tokens, stage::OutputKind::logits)), evaluator.logits(tokens)),
      kTolerance);
  EXPECT_LT(
      testing::normalised_error(to_rows(compute(path, tokens, stage::OutputKind::hidden, 7)), evaluator.hidden(tokens)),
      kTolerance);
}

TEST(TinyEncoder, AgreesWithTheEvaluator) {
  testing::TinyModelOptions bert, fused_bert, nomic_bert;
  bert.kind = fused_bert.kind = TinyKind::bert;
  fused_bert.fused_qkv = true;
  nomic_bert.kind = TinyKind::nomic_bert;
  for (const testing::TinyModelOptions& options : {bert, fused_bert, nomic_bert}) {
    SCOPED_TRACE(testing::tiny_kind_name(options.kind));
    const testing::TemporaryDirectory folder;
    const auto path = testing::write_tiny_model(folder.path(), options);
    const std::vector<int32_t> tokens = some_tokens(30, 100);
    EXPECT_LT(testing::normalised_error(to_rows(compute(path, tokens, stage::OutputKind::hidden)),
                                        testing::ReferenceEvaluator(path).hidden(tokens)),
              kTolerance);
  }
}

// --- The kit.

const std::vector<int32_t> kKitTokens{3,   17, 42, 99, 7, 61,  120, 5,  88, 33, 12, 77,
                                      101, 64, 2,  50, 9, 113, 28,  71, 44, 90, 15, 36};

std::vector<Row> read_reference(const std::filesystem::path& path, size_t n_rows) {
  const std::vector<std::byte> bytes = read_file(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  std::vector<Row> rows;
  const size_t width = values.size() / n_rows;
  for (size_t i = 0; i < n_rows; ++i) {
    rows.emplace_back(values.begin() + static_cast<ptrdiff_t>(i * width),
                      values.begin() + static_cast<ptrdiff_t>((i + 1) * width));
  }
  return rows;
}

double kit_error(const std::filesystem::path& model, const std::filesystem::path& reference) {
  return testing::normalised_error(to_rows(compute(model, kKitTokens, stage::OutputKind::logits)),
                                   read_reference(reference, kKitTokens.size()));
}

TEST(KitLogits, MatchTheReferenceWithF16Weights) {
  CARAVAN_REQUIRE_KIT(kit);
  for (const char* name : {"llama-dense",   "llama-moe",     "gemma3-dense",     "qwen2-dense",  "qwen3-dense",
                           "gemma2-dense",  "phi3-dense",    "mistral3-dense",   "glm4-dense",   "command-r-dense",
                           "cohere2-dense", "olmo2-dense",   "starcoder2-dense", "falcon-dense", "gpt2-dense",
                           "smollm3-dense", "granite-dense", "qwen3moe-moe",     "gpt-oss-moe",  "deepseek2-moe"}) {
    const double error =
        kit_error(kit / "models" / (std::string(name) + ".gguf"), kit / "refs" / (std::string(name) + ".f32"));
    RecordProperty(name, std::to_string(error));
    EXPECT_LT(error, 1e-6) << name;
  }
}

// The reference rounds activations to int8 before it multiplies with quantised weights, and so may the device.
TEST(KitLogits, MatchTheReferenceWithQuantisedWeights) {
  CARAVAN_REQUIRE_KIT(kit);
  for (const char* type : {"F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M",
                           "Q6_K", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ2_0", "MXFP4_MOE"}) {
    const std::string name = std::string("llama-") + type;
    const double error =
        kit_error(kit / "models" / "quants" / (name + ".gguf"), kit / "refs" / "quants" / (name + ".f32"));
    RecordProperty(name, std::to_string(error));
    EXPECT_LT(error, 2e-3) << name;
  }
}

}  // namespace
}  // namespace caravan::models
