// What caravan inspect prints.
#include "inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "gguf/writer.h"
#include "support/kit.h"

namespace caravan::app {
namespace {

using caravan::testing::TemporaryDirectory;
using gguf::Value;
using ::testing::HasSubstr;
using ::testing::Not;

gguf::Model sample_model(const std::filesystem::path& path) {
  gguf::Metadata metadata;
  metadata.set("general.architecture", Value::of("llama"));
  metadata.set("answer", Value::of(uint32_t{42}));
  metadata.set("on", Value::of(true));
  metadata.set("scores", Value::of(std::vector<float>{0.5f, 1.0f, 1.5f, 2.0f, 2.5f}));
  metadata.set("tokens", Value::of(std::vector<std::string>{"a\n", "\xff"}));
  std::string text;
  for (int i = 0; i < 100; ++i) text += "\u00e9";
  metadata.set("long", Value::of(text));
  gguf::Writer writer(path, metadata);
  writer.declare("x.weight", tensor::DType::q4_0, std::vector<int64_t>{64, 2});
  writer.declare("y.bias", tensor::DType::f32, std::vector<int64_t>{8});
  writer.begin_data();
  for (size_t i = 0; i < 2; ++i) writer.write(i, 0, std::vector<std::byte>(writer.tensors()[i].size_bytes));
  writer.finish();
  return gguf::Model::open(path);
}

TEST(Inspect, PrintsMetadataTensorsAndTotals) {
  const TemporaryDirectory folder;
  const std::string text = describe(sample_model(folder.path() / "m.gguf"));
  EXPECT_THAT(text, HasSubstr("metadata (6 entries)"));
  EXPECT_THAT(text, HasSubstr("general.architecture  string     \"llama\""));
  EXPECT_THAT(text, HasSubstr("f32[5]     [0.5, 1, 1.5, 2, ...]"));
  EXPECT_THAT(text, HasSubstr("x.weight  Q4_0  64 x 2"));
  EXPECT_THAT(text, HasSubstr("total  2 tensors  136 parameters  104 B   6.12 bits per weight"));
}

TEST(Inspect, ShortensTextBetweenCharactersAndEscapesWhatIsNone) {
  const TemporaryDirectory folder;
  const std::string text = describe(sample_model(folder.path() / "m.gguf"));
  EXPECT_THAT(text, HasSubstr("\u00e9...\" (200 bytes)"));
  EXPECT_THAT(text, HasSubstr("\"a\\n\"")) << "one line per entry";
  EXPECT_THAT(text, HasSubstr("\ufffd"));
  EXPECT_THAT(text, Not(HasSubstr("\xff")));
}

TEST(Inspect, GivesTheSameAsJson) {
  const TemporaryDirectory folder;
  const auto model = sample_model(folder.path() / "m.gguf");
  const auto described =
      nlohmann::json::parse(describe_json(model, 2).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  EXPECT_EQ(described["metadata"]["answer"], nlohmann::json({{"type", "u32"}, {"value", 42}}));
  EXPECT_EQ(described["metadata"]["on"]["value"], true);
  EXPECT_EQ(described["metadata"]["scores"]["length"], 5);
  EXPECT_EQ(described["metadata"]["scores"]["value"], nlohmann::json({0.5, 1.0})) << "cut after two elements";
  EXPECT_EQ(described["tensors"][0]["shape"], nlohmann::json({64, 2}));
  EXPECT_EQ(described["tensors"][0]["offset"], model.tensors()[0].offset);
  EXPECT_EQ(described["totals"]["parameters"], 136);
}

TEST(Inspect, RefusesWrongArgumentsAndFiles) {
  const auto run = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "inspect");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return run_inspect(static_cast<int>(argv.size()), argv.data());
  };
  EXPECT_THROW(run({}), RequestError);
  EXPECT_THROW(run({"a.gguf", "--colour"}), RequestError);
  EXPECT_THROW(run({"/nonexistent.gguf"}), SystemError);
  EXPECT_THROW(run({(testing::test_data_directory() / "../CMakeLists.txt").string()}), FormatError);
}

}  // namespace
}  // namespace caravan::app
