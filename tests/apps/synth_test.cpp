// Synthetic models: the published sizes, reproducible bytes, finite values, a usable vocabulary.
#include "synth.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "gguf/reader.h"
#include "support/kit.h"

namespace caravan::app {
namespace {

using caravan::testing::TemporaryDirectory;
using tensor::DType;
using ::testing::HasSubstr;

gguf::Model write_and_open(const std::filesystem::path& path, std::string_view shape, std::string_view type,
                           SynthOptions options) {
  write_synthetic_model(path, *find_model_shape(shape), *gguf::find_file_type(type), options);
  return gguf::Model::open(path);
}

// One layer and a small vocabulary keep the files at some megabytes.
SynthOptions small(uint64_t seed = 1, int n_threads = 2) { return {seed, 1, 300, n_threads}; }

// The counts that the models' publishers state; Llama 3's files add the rotary divisors, half a head of numbers.
TEST(Synth, HasThePublishedNumbersOfParameters) {
  EXPECT_EQ(count_parameters(*find_model_shape("tinyllama-1.1b")), 1100048384U);
  EXPECT_EQ(count_parameters(*find_model_shape("llama-3.2-1b")), 1235814400U + 32);
  EXPECT_EQ(count_parameters(*find_model_shape("llama-3.2-3b")), 3212749824U + 64);
  EXPECT_EQ(count_parameters(*find_model_shape("llama-3.1-8b")), 8030261248U + 64);
  EXPECT_EQ(count_parameters(*find_model_shape("mistral-7b")), 7241732096U);
  EXPECT_EQ(count_parameters(*find_model_shape("mixtral-8x7b")), 46702792704U);
  EXPECT_EQ(count_parameters(*find_model_shape("gemma-3-1b")), 999885952U);
  EXPECT_EQ(find_model_shape("gpt-5"), nullptr);
}

TEST(Synth, WritesTheSameBytesForTheSameSeedOnAnyNumberOfThreads) {
  const TemporaryDirectory folder;
  const auto a = folder.path() / "a", b = folder.path() / "b", c = folder.path() / "c";
  write_and_open(a, "tinyllama-1.1b", "Q4_K_M", small(7, 1));
  write_and_open(b, "tinyllama-1.1b", "Q4_K_M", small(7, 3));
  write_and_open(c, "tinyllama-1.1b", "Q4_K_M", small(8, 3));
  EXPECT_TRUE(read_file(a) == read_file(b));
  EXPECT_FALSE(read_file(a) == read_file(c));
}

TEST(Synth, DrawsWeightsThatKeepActivationsInRange) {
  const TemporaryDirectory folder;
  for (const char* type : {"BF16", "Q8_0", "Q4_0", "Q4_K_S"}) {
    const auto model = write_and_open(folder.path() / "m", "tinyllama-1.1b", type, small());
    for (const gguf::TensorInfo& tensor : model.tensors()) {
      const auto values = model.read_f32(tensor);
      double sum = 0, square = 0;
      for (const float x : values) {
        ASSERT_TRUE(std::isfinite(x)) << tensor.name;
        sum += x;
        square += double{x} * double{x};
      }
      const double n = static_cast<double>(values.size()), mean = sum / n;
      const double deviation = std::sqrt(square / n - mean * mean);
      const bool is_norm = tensor.n_dims == 1;
      const double expected = is_norm ? 0.1 : 1 / std::sqrt(static_cast<double>(tensor.ne[0]));
      EXPECT_NEAR(deviation, expected, 0.1 * expected) << type << " " << tensor.name;
      EXPECT_NEAR(mean, is_norm ? 1 : 0, 0.1 * (is_norm ? 1 : expected)) << type << " " << tensor.name;
    }
  }
}

TEST(Synth, RepeatsNoRow) {
  const TemporaryDirectory folder;
  const auto model = write_and_open(folder.path() / "m", "tinyllama-1.1b", "Q4_0", small());
  const gguf::TensorInfo& tensor = model.get("blk.0.ffn_up.weight");
  const auto bytes = model.read(tensor);
  const size_t row = tensor::row_bytes(tensor.type, static_cast<uint64_t>(tensor.ne[0]));
  std::set<std::string_view> rows;
  for (size_t i = 0; i < bytes.size(); i += row)
    EXPECT_TRUE(rows.insert({reinterpret_cast<const char*>(bytes.data()) + i, row}).second) << "row " << i / row;
}

TEST(Synth, GivesEveryByteATokenAndAnEnd) {
  const TemporaryDirectory folder;
  const auto model = write_and_open(folder.path() / "m", "tinyllama-1.1b", "Q4_0", small());
  const auto& metadata = model.metadata();
  const auto& tokens = metadata.get_strings("tokenizer.ggml.tokens");
  ASSERT_EQ(tokens.size(), 300U);
  EXPECT_EQ(std::set(tokens.begin(), tokens.end()).size(), tokens.size()) << "no token occurs twice";
  EXPECT_EQ(tokens['A'], "A");
  EXPECT_EQ(tokens[' '], "\u0120");
  EXPECT_EQ(tokens['\n'], "\u010a");
  EXPECT_EQ(tokens[0xff], "\u00ff");
  EXPECT_EQ(metadata.get_u32("tokenizer.ggml.eos_token_id"), 299U);
  EXPECT_EQ(metadata.get_integers("tokenizer.ggml.token_type")[299], 3) << "the end is a control token";
  EXPECT_EQ(metadata.get_string("tokenizer.ggml.pre"), "gpt-2");
}

TEST(Synth, WritesExpertsRotaryFactorsAndTiedEmbeddings) {
  const TemporaryDirectory folder;
  const auto experts = write_and_open(folder.path() / "moe", "moe-8x76m", "Q4_K_M", small());
  EXPECT_EQ(experts.get("blk.0.ffn_down_exps.weight").ne, (tensor::Shape{2048, 1024, 8, 1}));
  EXPECT_EQ(experts.get("blk.0.ffn_gate_inp.weight").type, DType::f32);
  EXPECT_EQ(experts.metadata().get_u32("llama.expert_used_count"), 2U);
  const auto tied = write_and_open(folder.path() / "tied", "llama-3.2-1b", "Q4_0", small());
  EXPECT_EQ(tied.find("output.weight"), nullptr);
  EXPECT_EQ(tied.get("token_embd.weight").type, DType::q6_k);
  const auto factors = tied.read_f32(tied.get("rope_freqs.weight"));
  ASSERT_EQ(factors.size(), 32U);
  EXPECT_EQ(factors.front(), 1.0f);
  EXPECT_EQ(factors.back(), 32.0f);
  EXPECT_TRUE(std::is_sorted(factors.begin(), factors.end()));
  const auto gemma = write_and_open(folder.path() / "gemma", "gemma-3-1b", "Q4_0", small());
  EXPECT_EQ(gemma.metadata().get_string("general.architecture"), "gemma3");
  EXPECT_NE(gemma.find("blk.0.post_ffw_norm.weight"), nullptr);
}

TEST(Synth, ListsWhatItAcceptsWhenItDoesNotKnowAName) {
  const auto refusal = [](std::vector<std::string> arguments) -> std::string {
    arguments.insert(arguments.begin(), "synth");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    try {
      run_synth(static_cast<int>(argv.size()), argv.data());
    } catch (const RequestError& error) {
      return error.what();
    }
    return "accepted";
  };
  const TemporaryDirectory folder;
  const std::string out = (folder.path() / "m.gguf").string();
  EXPECT_THAT(refusal({"--shape", "x", "--type", "Q4_0", "-o", out}), HasSubstr("accepted: tinyllama-1.1b"));
  EXPECT_THAT(refusal({"--shape", "mistral-7b", "--type", "IQ1_S", "-o", out}),
              HasSubstr("file type 'IQ1_S' cannot be written; accepted: F32"));
  EXPECT_THAT(refusal({"--shape", "mistral-7b", "-o", out}), HasSubstr("--type"));
  EXPECT_THAT(refusal({"--shape", "mistral-7b", "--type", "Q4_0", "-o", out, "--layers", "0"}), HasSubstr("--layers"));
  EXPECT_THAT(refusal({"--shpe", "mistral-7b"}), HasSubstr("--shape")) << "a suggestion";
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace caravan::app
