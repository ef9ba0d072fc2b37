#include <gtest/gtest.h>

#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

using testing::pieces;
using testing::small_rwkv;
using Texts = std::vector<std::string>;

TEST(Rwkv, TakesTheLongestTokenAtEachPlace) {
  const auto v = Vocabulary::load(small_rwkv().metadata());
  EXPECT_EQ(v->model_name(), "rwkv");
  EXPECT_EQ(pieces(*v, "hello world"), (Texts{"hello", " world"}));
  EXPECT_EQ(pieces(*v, "helo wor"), (Texts{"he", "l", "o", " w", "o", "r"}));
  EXPECT_EQ(pieces(*v, ""), Texts{});
  EXPECT_EQ(pieces(*v, "hello", AddSpecial::yes), Texts{"hello"});
}

TEST(Rwkv, ReadsTheEscapesOfStoredTokens) {
  const auto v = Vocabulary::load(small_rwkv().metadata());
  EXPECT_EQ(pieces(*v, "\n\n\n\t"), (Texts{"\\n\\n", "\\x0a", "\\t"}));
  EXPECT_EQ(pieces(*v, "\\n"), (Texts{"\\\\n"}));  // a backslash and an n
  EXPECT_EQ(pieces(*v, "a'b"), (Texts{"a\\'b"}));
  EXPECT_EQ(pieces(*v, "é\U0001F600"), (Texts{"é", "\\xf0\\x9f", "\\x98", "\\x80"}));
}

TEST(Rwkv, KeepsEveryByteOfAnyText) {
  const auto v = Vocabulary::load(small_rwkv().metadata());
  std::mt19937 random(3);
  for (int i = 0; i < 300; i++) {
    const std::string text = i % 2 ? testing::random_bytes(random, i) : testing::random_unicode(random, i);
    EXPECT_EQ(v->detokenize(v->tokenize(text, AddSpecial::no, ParseSpecial::no), RenderSpecial::no), text);
  }
}

TEST(Rwkv, GoesOnBehindBytesThatBeginNoToken) {
  testing::VocabularyBuilder builder;
  builder.model = "rwkv";
  builder.add("abc");
  builder.add("b");
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "abxabc"), (Texts{"b", "abc"}));
  builder.add("<unk>", testing::kUnknown);
  builder.set("tokenizer.ggml.unknown_token_id", gguf::Value::of(uint32_t{2}));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "abxabc"), (Texts{"<unk>", "b", "<unk>", "abc"}));
}

}  // namespace
}  // namespace caravan::vocab
