#include <gtest/gtest.h>

#include <cstring>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/file.h"
#include "commands.h"
#include "device/cpu/cpu_device.h"
#include "gguf/writer.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::app {
namespace {

using testing::TinyKind;

int run(std::vector<std::string> arguments) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return run_logits(static_cast<int>(argv.size()), argv.data());
}

std::string join(const std::vector<int32_t>& tokens) {
  std::string text;
  for (const int32_t token : tokens) text += (text.empty() ? "" : ",") + std::to_string(token);
  return text;
}

class LogitsCommand : public ::testing::TestWithParam<TinyKind> {};
INSTANTIATE_TEST_SUITE_P(Apps, LogitsCommand,
                         ::testing::Values(TinyKind::llama, TinyKind::llama_moe, TinyKind::gemma2, TinyKind::gemma3,
                                           TinyKind::phi3, TinyKind::cohere2),
                         [](const auto& param) { return testing::tiny_kind_name(param.param); });

TEST_P(LogitsCommand, WritesTheBitsThatOneSliceComputes) {
  const testing::TemporaryDirectory folder;
  testing::TinyModelOptions options;
  options.kind = GetParam();
  options.n_layer = 7;
  const auto path = testing::write_tiny_model(folder.path(), options);
  std::vector<int32_t> tokens(300);  // several batches, and several times the blocks of gemma3's window
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % 259);
  const auto output = folder.path() / "logits.f32";
  ASSERT_EQ(run({"caravan logits", "-m", path.string(), "--tokens", join(tokens), "-o", output.string(), "-t", "2"}),
            0);

  const gguf::Model model = gguf::Model::open(path);
  const models::Arch& arch = models::find_arch(model.metadata());
  const models::Hyperparameters hp = arch.read(model.metadata());
  const stage::CacheConfig cache = testing::test_cache(model);
  device::cpu::CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model, {models::whole_model(hp)}, cache);
  testing::BatchBuilder builder(arch.cache_groups(hp), cache);
  std::vector<float> expected;
  for (const auto& row : testing::sequence_rows(chain, builder, tokens, 50, stage::OutputKind::logits)) {
    expected.insert(expected.end(), row.begin(), row.end());
  }
  const std::vector<std::byte> bytes = read_file(output);
  ASSERT_EQ(bytes.size(), expected.size() * sizeof(float));
  EXPECT_EQ(std::memcmp(bytes.data(), expected.data(), bytes.size()), 0);
}

TEST(LogitsContext, ChoosesShortRopeFactorsForAShortContext) {
  const testing::TemporaryDirectory folder;
  testing::TinyModelOptions options;
  options.kind = TinyKind::phi3;
  const auto path = testing::write_tiny_model(folder.path(), options);
  options.short_context = true;  // the same weights; no context of this model is long
  const auto short_path = testing::write_tiny_model(folder.path(), options, "short");
  const auto output = folder.path() / "logits.f32";
  const auto logits = [&](const std::filesystem::path& model, const std::string& n_ctx) {
    EXPECT_EQ(run({"caravan logits", "-m", model.string(), "--tokens", "3,17,42,99,7,61", "-o", output.string(), "-t",
                   "1", "-c", n_ctx}),
              0);
    return read_file(output);
  };
  const std::vector<std::byte> expected = logits(short_path, "0");
  EXPECT_EQ(logits(path, "256"), expected);
  EXPECT_EQ(logits(path, "0"), expected);  // as long as the six tokens need
  EXPECT_NE(logits(path, "257"), expected);
}

TEST(LogitsCommand, RefusesWhatItCannotCompute) {
  const testing::TemporaryDirectory folder;
  const std::string model = testing::write_tiny_model(folder.path(), {}).string();
  const std::string output = (folder.path() / "logits.f32").string();
  EXPECT_THROW(run({"caravan logits", "-m", model, "--tokens", "1,x", "-o", output}), RequestError);
  EXPECT_THROW(run({"caravan logits", "-m", model, "--tokens", "1,", "-o", output}), RequestError);
  EXPECT_THROW(run({"caravan logits", "-m", model, "--tokens", "1,259", "-o", output}), RequestError);
  EXPECT_THROW(run({"caravan logits", "-m", model, "--tokens", "1,-1", "-o", output}), RequestError);
  EXPECT_THROW(run({"caravan logits", "-m", model, "--tokens", "1", "--kv-type", "f8", "-o", output}), RequestError);
  EXPECT_FALSE(std::filesystem::exists(output));
}

TEST(LogitsCommand, RefusesAnUnsupportedArchitectureByName) {
  const testing::TemporaryDirectory folder;
  gguf::Metadata metadata;
  metadata.set("general.architecture", gguf::Value::of("unheard-of"));
  gguf::Writer writer(folder.path() / "m.gguf", metadata);
  writer.begin_data();
  writer.finish();
  try {
    run({"caravan logits", "-m", (folder.path() / "m.gguf").string(), "--tokens", "1", "-o",
         (folder.path() / "out").string()});
    FAIL() << "nothing was thrown";
  } catch (const NotSupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("unheard-of"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("gemma3"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace caravan::app
