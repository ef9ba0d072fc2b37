#include <gtest/gtest.h>

#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

using testing::kControl;
using testing::pieces;
using testing::small_spm;
using Texts = std::vector<std::string>;

TEST(Spm, MergesHighestScoreFirst) {
  const auto v = Vocabulary::load(small_spm().metadata());
  EXPECT_EQ(pieces(*v, "hello world"), (Texts{"▁hello", "▁world"}));
  EXPECT_EQ(pieces(*v, "world hell"), (Texts{"▁world", "▁", "hell"}));
  EXPECT_EQ(pieces(*v, "word"), (Texts{"▁wor", "d"}));
}

TEST(Spm, BreaksTiesFromTheLeft) {
  const auto v = Vocabulary::load(small_spm().metadata());
  EXPECT_EQ(pieces(*v, "aaa"), (Texts{"▁", "aa", "a"}));
  EXPECT_EQ(pieces(*v, "aaaaaaa"), (Texts{"▁", "aaaa", "aa", "a"}));
}

TEST(Spm, FallsBackToBytesForUnknownCharacters) {
  const auto v = Vocabulary::load(small_spm().metadata());
  EXPECT_EQ(pieces(*v, "aé中"), (Texts{"▁", "a", "é", "<0xE4>", "<0xB8>", "<0xAD>"}));
  EXPECT_EQ(pieces(*v, "\xFF"), (Texts{"▁", "<0xFF>"}));
  EXPECT_EQ(pieces(*v, "\xE4"), (Texts{"▁", "<0xE4>"})) << "a character cut off by the end of the text";
}

TEST(Spm, UsesTheUnknownTokenWhereThereAreNoByteTokens) {
  testing::VocabularyBuilder builder;
  builder.model = "llama";
  builder.add("<unk>", testing::kUnknown);
  builder.add("<s>", kControl);
  builder.add("</s>", kControl);
  builder.add("▁a");
  builder.add("▁");
  builder.add("a");
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(pieces(*v, "ab"), (Texts{"▁a", "<unk>"}));
}

TEST(Spm, PutsASpaceInFrontOfTheTextAndAfterSpecialTokens) {
  const auto v = Vocabulary::load(small_spm().metadata());
  EXPECT_EQ(pieces(*v, "hello</s>hello", AddSpecial::yes, ParseSpecial::yes),
            (Texts{"<s>", "▁hello", "</s>", "▁hello"}));
  EXPECT_EQ(pieces(*v, "<tool>hello"), (Texts{"<tool>", "▁hello"}));
  EXPECT_EQ(pieces(*v, ""), Texts{});
}

TEST(Spm, LeavesTheTextAsItIsWithoutSpacePrefix) {
  auto builder = small_spm();
  builder.set("tokenizer.ggml.add_space_prefix", gguf::Value::of(false));
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(pieces(*v, "hello"), (Texts{"hello"}));
  EXPECT_EQ(pieces(*v, " hello"), (Texts{"▁hello"}));
}

TEST(Spm, RendersSpacesAndBytes) {
  const auto v = Vocabulary::load(small_spm().metadata());
  const auto tokens = v->tokenize("hello 中", AddSpecial::yes, ParseSpecial::no);
  EXPECT_EQ(v->detokenize(tokens, RenderSpecial::no), " hello 中");
  EXPECT_EQ(v->detokenize(tokens, RenderSpecial::yes), "<s> hello 中");
}

TEST(Spm, KeepsEveryByteOfAnyText) {
  const auto v = Vocabulary::load(small_spm().metadata());
  std::mt19937 random(1);
  for (int i = 0; i < 300; i++) {
    const std::string text = i % 2 ? testing::random_bytes(random, i) : testing::random_unicode(random, i);
    if (text.empty()) continue;
    EXPECT_EQ(v->detokenize(v->tokenize(text, AddSpecial::no, ParseSpecial::no), RenderSpecial::no), " " + text);
  }
}

// Words are merged on their own only while no token spans two of them.
TEST(Spm, MergesAcrossSpacesWhereTokensDo) {
  auto builder = small_spm();
  builder.add("o▁", 1, 1);
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "hello world"), (Texts{"▁", "hell", "o▁", "w", "or", "ld"}));
  EXPECT_EQ(pieces(*Vocabulary::load(small_spm().metadata()), "  a  "), (Texts{"▁", "▁", "▁", "a", "▁", "▁"}));
}

// Would run for hours if merging were quadratic.
TEST(Spm, MergesALongWord) {
  const auto v = Vocabulary::load(small_spm().metadata());
  const std::string text(1 << 20, 'a');
  EXPECT_EQ(v->tokenize(text, AddSpecial::no, ParseSpecial::no).size(), 1u + (1 << 18));
}

}  // namespace
}  // namespace caravan::vocab
