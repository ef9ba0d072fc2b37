#include <gtest/gtest.h>

#include <limits>
#include <map>

#include "base/error.h"
#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

using testing::kControl;
using testing::pieces;
using testing::small_bpe;
using testing::spell;
using Texts = std::vector<std::string>;

TEST(Bpe, MergesLowestRankFirst) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  EXPECT_EQ(pieces(*v, "hello world"), (Texts{"hello", "Ġworld"}));
  EXPECT_EQ(pieces(*v, "held"), (Texts{"he", "ld"}));
  EXPECT_EQ(pieces(*v, "hellld"), (Texts{"hell", "ld"}));
  EXPECT_EQ(pieces(*v, "aaaaaaa"), (Texts{"aaaa", "aa", "a"})) << "ties go to the left";
}

TEST(Bpe, SpellsEveryByte) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  for (int byte = 0; byte < 256; byte++) {
    EXPECT_EQ(v->piece(byte, RenderSpecial::no), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(pieces(*v, "\x01"), (Texts{"ā"}));
}

TEST(Bpe, ReplacesInvalidUtf8) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  EXPECT_EQ(v->detokenize(v->tokenize("a\xFFz\xE4\xB8", AddSpecial::no, ParseSpecial::no), RenderSpecial::no),
            "a\uFFFDz\uFFFD");
}

TEST(Bpe, TakesWholeWordsWithIgnoreMerges) {
  const auto builder = [](const std::string& pre) {
    auto b = small_bpe(pre);
    b.add("xyz");  // a token that no merge leads to
    return b;
  };
  EXPECT_EQ(pieces(*Vocabulary::load(builder("gpt-2").metadata()), "xyz"), (Texts{"x", "y", "z"}));
  const auto v = Vocabulary::load(builder("llama-bpe").metadata());
  EXPECT_EQ(pieces(*v, "xyz"), (Texts{"xyz"}));
  EXPECT_EQ(pieces(*v, "xyzx"), (Texts{"x", "y", "z", "x"}));
}

TEST(Bpe, EmitsBytesOfMergesThatAreNoTokens) {
  auto builder = small_bpe();
  builder.merges.push_back("q u");
  builder.merges.push_back("qu " + spell(" "));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "qua"), (Texts{"q", "u", "a"}));
}

TEST(Bpe, DropsBytesWithoutToken) {
  testing::VocabularyBuilder builder;
  builder.model = "gpt2";
  builder.pre = "gpt-2";
  builder.add("a");
  builder.add("b");
  builder.add("ab");
  builder.merges = {"a b"};
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "abcab"), (Texts{"ab", "ab"}));
}

TEST(Bpe, RejectsAMergeOfOneText) {
  for (const char* merge : {"ab", "a ", " a", ""}) {
    auto builder = small_bpe();
    builder.merges.emplace_back(merge);
    EXPECT_THROW(Vocabulary::load(builder.metadata()), FormatError) << "'" << merge << "'";
  }
}

// What the merges mean, spelled out: as long as there is one, apply the one of lowest rank, leftmost first.
Texts merge_naively(const std::map<std::pair<std::string, std::string>, size_t>& ranks, Texts parts) {
  while (true) {
    size_t best = 0, best_rank = std::numeric_limits<size_t>::max();
    for (size_t i = 0; i + 1 < parts.size(); i++) {
      const auto found = ranks.find({parts[i], parts[i + 1]});
      if (found != ranks.end() && found->second < best_rank) {
        best = i;
        best_rank = found->second;
      }
    }
    if (best_rank == std::numeric_limits<size_t>::max()) return parts;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
}

TEST(Bpe, AgreesWithTheDefinitionForWordsOfEveryLength) {
  std::mt19937 random(7);
  for (int round = 0; round < 8; round++) {
    testing::VocabularyBuilder builder;
    builder.model = "gpt2";
    builder.pre = "gpt-2";
    Texts known{"a", "b", "c"};
    for (const auto& text : known) builder.add(text);
    std::map<std::pair<std::string, std::string>, size_t> ranks;
    while (ranks.size() < 60) {
      const std::string left = known[random() % known.size()], right = known[random() % known.size()];
      if (left.size() + right.size() > 12) continue;
      if (ranks.try_emplace({left, right}, builder.merges.size()).second) {
        builder.merges.push_back(left + " " + right);
        if (std::find(known.begin(), known.end(), left + right) == known.end()) {
          known.push_back(left + right);
          builder.add(left + right);
        }
      }
    }
    const auto v = Vocabulary::load(builder.metadata());
    for (size_t length = 0; length < 120; length++) {
      Texts characters;
      std::string word;
      for (size_t i = 0; i < length; i++) {
        characters.emplace_back(1, static_cast<char>('a' + random() % 3));
        word += characters.back();
      }
      EXPECT_EQ(pieces(*v, word), merge_naively(ranks, characters)) << "round " << round << ", length " << length;
    }
  }
}

TEST(Bpe, RendersWhatItTokenizedForAnyUnicode) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  std::mt19937 random(2);
  for (int i = 0; i < 300; i++) {
    const std::string text = testing::random_unicode(random, i);
    EXPECT_EQ(v->detokenize(v->tokenize(text, AddSpecial::no, ParseSpecial::no), RenderSpecial::no), text);
  }
}

// Would run for hours if merging were quadratic.
TEST(Bpe, MergesALongWord) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  const std::string text(1 << 20, 'a');
  EXPECT_EQ(v->tokenize(text, AddSpecial::no, ParseSpecial::no).size(), size_t{1} << 18);
}

TEST(Bpe, KeepsPlainUtf8InVocabulariesLikeGemma4) {
  testing::VocabularyBuilder builder;
  builder.model = "gemma4";
  for (int byte = 0; byte < 256; byte++) builder.add(testing::byte_token_text(byte), testing::kByte);
  for (const char* text : {"▁", "h", "i", "▁h", "▁hi", "\n", "\n\n", "é"}) builder.add(text);
  builder.merges = {"▁ h", "▁h i"};
  builder.set("tokenizer.ggml.bos_token_id", gguf::Value::of(static_cast<uint32_t>(builder.add("<bos>", kControl))));
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(pieces(*v, "hi hi\n\né中", AddSpecial::yes),
            (Texts{"<bos>", "h", "i", "▁hi", "\n\n", "é", "<0xE4>", "<0xB8>", "<0xAD>"}));
  EXPECT_EQ(v->detokenize(v->tokenize("hi hi\n\né中", AddSpecial::no, ParseSpecial::no), RenderSpecial::no),
            "hi hi\n\né中");
}

}  // namespace
}  // namespace caravan::vocab
