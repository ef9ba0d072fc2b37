// Every GGUF file of the conformance kit opens, and its tensors can be read.
#include "support/kit.h"

#include <gtest/gtest.h>

#include "gguf/reader.h"

namespace caravan::gguf {
namespace {

TEST(GgufReader, OpensEveryFileOfTheKit) {
  CARAVAN_REQUIRE_KIT(kit);
  int n_files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kit)) {
    if (entry.path().extension() != ".gguf") continue;
    const Model model = Model::open(entry.path());
    EXPECT_FALSE(model.metadata().get_string("general.architecture").empty()) << entry.path();
    for (const TensorInfo& tensor : model.tensors()) {
      const auto bytes = model.read(tensor);
      EXPECT_EQ(bytes.size(), tensor.size_bytes) << entry.path() << " " << tensor.name;
    }
    ++n_files;
  }
  EXPECT_GE(n_files, 30);
}

TEST(GgufReader, ReadsMetadataTensorsAndVocabularyOfARealModel) {
  CARAVAN_REQUIRE_KIT(kit);
  const Model model = Model::open(kit / "models/real/stories260K.gguf");
  EXPECT_EQ(model.metadata().get_string("general.architecture"), "llama");
  EXPECT_EQ(model.metadata().get_u32("llama.block_count"), 5U);
  EXPECT_EQ(model.metadata().get_strings("tokenizer.ggml.tokens").size(), 512U);
  EXPECT_EQ(model.metadata().get_floats("tokenizer.ggml.scores").size(), 512U);
  const TensorInfo& embeddings = model.get("token_embd.weight");
  EXPECT_EQ(embeddings.ne, (tensor::Shape{64, 512, 1, 1}));
  EXPECT_EQ(model.read_f32(embeddings).size(), 64U * 512U);
  EXPECT_EQ(model.find("no.such.tensor"), nullptr);
}

}  // namespace
}  // namespace caravan::gguf
