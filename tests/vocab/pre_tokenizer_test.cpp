#include "vocab/pre_tokenizer.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "test_text.h"

namespace caravan::vocab {
namespace {

using Texts = std::vector<std::string>;

Texts split(std::string_view name, std::string_view text) {
  const PreTokenizer pre_tokenizer(*find_pre_tokenizer(name).splitter);
  Texts out;
  for (const auto word : pre_tokenizer.split(text)) out.emplace_back(word);
  return out;
}

struct Case {
  const char* name;
  std::string text;
  Texts words;
};

TEST(PreTokenizer, SplitsAsEachFamilyDoes) {
  const Case cases[] = {
      {"gpt-2", "I'll GO'S  to 2024!!\n\nx", {"I", "'ll", " GO", "'", "S", " ", " to", " 2024", "!!", "\n", "\n", "x"}},
      {"default", "a1234,b", {"a", "123", "4", ",", "b"}},
      {"llama-bpe",
       "I'LL (go) 12345!\n\n  x y",
       {"I", "'LL", " (", "go", ")", " ", "123", "45", "!\n\n", " ", " x", " y"}},
      {"qwen2", "ab 12x's", {"ab", " ", "1", "2", "x", "'s"}},
      {"qwen35", "a\u0301b!\u0301 !", {"a\u0301b", "!\u0301", " !"}},
      {"starcoder", "a 12b", {"a", " ", "1", "2", "b"}},
      {"falcon", "1234`a", {"123", "4", "`", "a"}},
      {"deepseek-llm", "Hi, 中文ab12 \n ", {"Hi", ",", " ", "中文", "ab", "12", " ", "\n", " "}},
      {"deepseek-coder", "if(x) 12", {"if", "(", "x", ")", " ", "1", "2"}},
      {"deepseek-v3", "x.foo 12345 かな漢字", {"x", ".foo", " ", "123", "45", " ", "かな漢字"}},
      {"tekken", "helloWorld HTTPServer 42", {"hello", "World", " HTTPServer", " ", "4", "2"}},
      {"gpt-4o", "He's fooBar/\n1234", {"He's", " foo", "Bar", "/\n", "123", "4"}},
      {"tiny_aya", "1234567 a", {"1", "234", "567", " a"}},
      {"tiny_aya", "1234x", {"123", "4", "x"}},
      {"superbpe", "a b1234567", {"a b", "1", "234", "567"}},
      {"bloom", "Hi, you. 12", {"Hi", ",", " you", ".", " 12"}},
      {"viking", "a12", {"a", "1", "2"}},
      {"bailingmoe", "a\n\nb", {"a", "\n\n", "b"}},
      {"seed-coder", "a!\nb12", {"a", "!", "\n", "b", "1", "2"}},
      {"jais-2", "a" + std::string(7, ' ') + "b\n 1234", {"a", "    ", "  ", " b", "\n", " ", "123", "4"}},
      {"minicpm5", "He'LL 12345", {"He", "'LL", " ", "123", "45"}},
      {"laguna", "a!\n\nb12", {"a", "!", "\n\n", "b", "1", "2"}},
      {"exaone-moe", "to be  or 12!\n\nx", {"to be", " ", " or", " ", "1", "2", "!\n", "\n", "x"}},
      {"afmoe",
       "x1234567 中文.foo \u0E44\u0E17\u0E22",
       {"x", "1", "234", "567", " ", "中文", ".foo", " ", "\u0E44", "\u0E17\u0E22"}},
      {"afmoe", "1234x", {"1", "234", "x"}},
      {"youtu", "한국어abc中！…xY's 12", {"한국어", "abc", "中", "！…", "x", "Y's", " ", "1", "2"}},
      {"kimi-k2", "你好abC's 中b1234。\n", {"你好", "ab", "C's", " ", "中", "b", "123", "4", "。\n"}},
      {"chameleon",
       "a<sentinel:12>IMGIMGABZ  b'll 12..",
       {"a", "<", "sentinel", ":", "1", "2", ">", "IMGIMGABZ", "  ", "b", "'", "ll", " ", "1", "2", ".", "."}},
      {"gemma4", "a b\n\nc", {"a b", "\n\n", "c"}},
      {"whitespace", "a b\tc", {"a", " ", "b", "\t", "c"}},
  };
  for (const Case& c : cases) EXPECT_EQ(split(c.name, c.text), c.words) << c.name << ": '" << c.text << "'";
}

// \s of PCRE2 matches it, but it is no white space since Unicode 6.3.
TEST(PreTokenizer, DoesNotTakeMongolianVowelSeparatorForASpace) {
  EXPECT_EQ(split("gpt-2", "a\u180E!"), (Texts{"a", "\u180E!"}));
  EXPECT_EQ(split("gpt-2", "a\u3000!"), (Texts{"a", "\u3000", "!"}));
}

TEST(PreTokenizer, KeepsEveryByteOfTheText) {
  std::mt19937 random(4);
  for (const auto name : pre_tokenizer_names()) {
    const PreTokenizer pre_tokenizer(*find_pre_tokenizer(name).splitter);
    for (int i = 0; i < 40; i++) {
      const std::string text = testing::random_unicode(random, i * 3);
      std::string joined;
      for (const auto word : pre_tokenizer.split(text)) {
        EXPECT_FALSE(word.empty());
        joined += word;
      }
      EXPECT_EQ(joined, text) << name;
    }
  }
}

// Would not finish if an expression went back over the run at every place.
TEST(PreTokenizer, IsLinearInRunsOfOneCharacter) {
  for (const char* name :
       {"default",     "gpt-2",  "llama-bpe",  "qwen35",   "falcon", "deepseek-llm", "deepseek-coder",
        "deepseek-v3", "tekken", "gpt-4o",     "tiny_aya", "bloom",  "superbpe",     "bailingmoe",
        "seed-coder",  "jais-2", "exaone-moe", "afmoe",    "youtu",  "kimi-k2",      "chameleon"}) {
    const PreTokenizer pre_tokenizer(*find_pre_tokenizer(name).splitter);
    for (const std::string unit : {" ", "a", "A", "7", "\n", "!", "\r\n ", "\u4E2D", "\u0301"}) {
      std::string text;
      while (text.size() < 300000) text += unit;
      for (const std::string& variant : {text, text + "x", text + "!"}) {
        size_t n_bytes = 0;
        for (const auto word : pre_tokenizer.split(variant)) n_bytes += word.size();
        EXPECT_EQ(n_bytes, variant.size());
      }
    }
  }
}

TEST(PreTokenizer, RefusesUnknownNamesAndListsTheKnown) {
  try {
    find_pre_tokenizer("surprise");
    FAIL() << "accepted";
  } catch (const NotSupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("'surprise'"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("llama-bpe, "), std::string::npos);
  }
}

}  // namespace
}  // namespace caravan::vocab
