// Real vocabularies of the conformance kit against recorded token ids.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/file.h"
#include "gguf/reader.h"
#include "support/kit.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

std::vector<std::string> split_texts(const std::string& content) {
  static const std::string kSeparator = "\n__ggml_vocab_test__\n";
  std::vector<std::string> texts;
  size_t begin = 0;
  for (size_t end; (end = content.find(kSeparator, begin)) != std::string::npos; begin = end + kSeparator.size()) {
    texts.push_back(content.substr(begin, end - begin));
  }
  return texts;  // every text is followed by the separator
}

class KitVocabulary : public ::testing::TestWithParam<std::string> {};

TEST_P(KitVocabulary, TokenizesAsRecorded) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto folder = kit / "tokenizers";
  const auto vocabulary = Vocabulary::load(gguf::Model::open(folder / (GetParam() + ".gguf")).metadata());
  std::vector<std::string> texts = split_texts(read_text_file(folder / (GetParam() + ".inp")));
  std::ifstream expected_lines(folder / (GetParam() + ".out"));
  size_t n = 0;
  for (std::string line; std::getline(expected_lines, line); n++) {
    ASSERT_LT(n, texts.size());
    std::istringstream numbers(line);
    const std::vector<TokenId> expected{std::istream_iterator<TokenId>(numbers), {}};
    EXPECT_EQ(vocabulary->tokenize(texts[n], AddSpecial::no, ParseSpecial::no), expected)
        << "text " << n << ": '" << texts[n] << "'";
  }
  EXPECT_EQ(n, texts.size());
  EXPECT_GT(n, 40u);
}

// What byte-level BPE cuts, it puts together again; the others lose or add spaces.
TEST_P(KitVocabulary, RendersWhatItTokenized) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto folder = kit / "tokenizers";
  const auto vocabulary = Vocabulary::load(gguf::Model::open(folder / (GetParam() + ".gguf")).metadata());
  if (vocabulary->model_name() == "bert") return;
  for (const std::string& text : split_texts(read_text_file(folder / (GetParam() + ".inp")))) {
    const auto tokens = vocabulary->tokenize(text, AddSpecial::no, ParseSpecial::no);
    const std::string prefix = vocabulary->model_name() == "llama" && !text.empty() ? " " : "";
    EXPECT_EQ(vocabulary->detokenize(tokens, RenderSpecial::no), prefix + text);

    IncrementalDetokenizer incremental(*vocabulary, RenderSpecial::no);
    std::string streamed;
    for (const TokenId token : tokens) streamed += incremental.push(token);
    EXPECT_EQ(streamed, prefix + text);
    EXPECT_EQ(incremental.finish(), "");
  }
}

INSTANTIATE_TEST_SUITE_P(All, KitVocabulary,
                         ::testing::Values("bert-bge", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe",
                                           "llama-spm", "phi-3", "qwen2", "refact", "starcoder"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(KitVocabulary, FindsSpecialTokensOfLlama3) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto vocabulary = Vocabulary::load(gguf::Model::open(kit / "tokenizers/llama-bpe.gguf").metadata());
  EXPECT_EQ(vocabulary->model_name(), "gpt2");
  EXPECT_EQ(vocabulary->bos(), 128000);
  EXPECT_EQ(vocabulary->eos(), 128009);
  EXPECT_EQ(vocabulary->eot(), 128009);
  EXPECT_FALSE(vocabulary->eom().has_value());
  EXPECT_TRUE(vocabulary->adds_bos());
  EXPECT_TRUE(vocabulary->chat_template().has_value());
  EXPECT_TRUE(vocabulary->is_end_of_generation(128001));  // <|end_of_text|>
  EXPECT_TRUE(vocabulary->is_end_of_generation(128009));
  EXPECT_FALSE(vocabulary->is_end_of_generation(128000));
  const std::vector<TokenId> expected{128000, 128006, 882, 128007, 271, 9906, 128009};
  const auto tokens = vocabulary->tokenize("<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
                                           AddSpecial::yes, ParseSpecial::yes);
  EXPECT_EQ(tokens, expected);
}

TEST(KitVocabulary, TokenizesThePromptsOfStories260K) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto vocabulary = Vocabulary::load(gguf::Model::open(kit / "models/real/stories260K.gguf").metadata());
  for (const auto& reference : nlohmann::json::parse(read_text_file(kit / "refs/stories260K.json"))) {
    const auto prompt = reference.at("prompt").get<std::string>();
    EXPECT_EQ(vocabulary->tokenize(prompt, AddSpecial::yes, ParseSpecial::no),
              reference.at("prompt_tokens").get<std::vector<TokenId>>())
        << prompt;
    const auto answer = reference.at("greedy_tokens").get<std::vector<TokenId>>();
    EXPECT_EQ(vocabulary->detokenize(answer, RenderSpecial::no), reference.at("text").get<std::string>()) << prompt;
  }
}

TEST(KitVocabulary, TestModelsHaveNoVocabulary) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto vocabulary = Vocabulary::load(gguf::Model::open(kit / "models/llama-dense.gguf").metadata());
  EXPECT_EQ(vocabulary->model_name(), "no_vocab");
  EXPECT_EQ(vocabulary->size(), 128u);
  EXPECT_FALSE(vocabulary->bos().has_value());
}

}  // namespace
}  // namespace caravan::vocab
