#include <gtest/gtest.h>

#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

using testing::pieces;
using testing::small_bert;
using Texts = std::vector<std::string>;

TEST(WordPiece, MatchesTheLongestPieces) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, "hello worlds"), (Texts{"▁hello", "▁wor", "ld", "s"}));
}

TEST(WordPiece, MakesAWordUnknownIfAnyPartIs) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, "hello helloz a"), (Texts{"▁hello", "[UNK]", "▁a"}));
  EXPECT_EQ(pieces(*v, std::string(100000, 'z')), (Texts{"[UNK]"}));
}

TEST(WordPiece, SeparatesPunctuationAndIdeographs) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, "hello,中中a$!"), (Texts{"▁hello", "▁,", "▁中", "▁中", "▁a", "▁$", "▁!"}));
}

TEST(WordPiece, LowercasesAndStripsAccents) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, "HELLO Café cafe\u0301"), (Texts{"▁hello", "▁cafe", "▁cafe"}));
}

TEST(WordPiece, ObeysTheNormalizerKeys) {
  auto builder = small_bert();
  builder.set("tokenizer.ggml.normalizer.lowercase", gguf::Value::of(false));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "Cafe café hello"), (Texts{"▁Cafe", "▁café", "▁hello"}));
  builder.set("tokenizer.ggml.normalizer.strip_accents", gguf::Value::of(true));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "Café"), (Texts{"▁Cafe"}));
}

TEST(WordPiece, DropsControlCharactersAndInvalidBytes) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, std::string("he\0l\x01l\xFFo\u200D\u0085\u00A0 a", 18)), (Texts{"▁hello", "▁a"}));
}

TEST(WordPiece, FramesTheTextWithClsAndSep) {
  const auto v = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(pieces(*v, "a", AddSpecial::yes), (Texts{"[CLS]", "▁a", "[SEP]"}));
  EXPECT_EQ(pieces(*v, "", AddSpecial::yes), (Texts{"[CLS]", "[SEP]"}));
  EXPECT_EQ(pieces(*v, "a[MASK]a", AddSpecial::no, ParseSpecial::yes), (Texts{"▁a", "[MASK]", "▁a"}));
  EXPECT_TRUE(v->end_of_generation_tokens().empty());
}

TEST(WordPiece, SurvivesAnyBytes) {
  const auto v = Vocabulary::load(small_bert().metadata());
  std::mt19937 random(3);
  for (int i = 0; i < 300; i++) {
    for (const TokenId token : v->tokenize(testing::random_bytes(random, i), AddSpecial::no, ParseSpecial::yes)) {
      EXPECT_LT(static_cast<size_t>(token), v->size());
    }
  }
}

}  // namespace
}  // namespace caravan::vocab
