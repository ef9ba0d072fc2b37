#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {
namespace {

using testing::pieces;
using testing::small_unigram;
using Texts = std::vector<std::string>;

// Every way to cut text, tried one after the other. Independent of the implementation: no trie, no table of best cuts.
class AllCuts {
 public:
  AllCuts(const testing::VocabularyBuilder& vocabulary, std::string_view text) : vocabulary_(vocabulary), text_(text) {
    for (size_t i = 0; i < text.size(); i += decode_utf8(text, i).length) ends_.push_back(i);
    ends_.push_back(text.size());
    for (size_t i = 0; i < vocabulary.texts.size(); i++) {
      if (vocabulary.types[i] == 1) unknown_score_ = std::min(unknown_score_, double{vocabulary.scores[i]} - 10);
    }
    extend(0, {}, {}, 0);
  }

  Texts best() const {
    Texts out;
    for (const std::string& token : best_) {
      if (token != "<unk>" || out.empty() || out.back() != "<unk>") out.push_back(token);
    }
    return out;
  }

 private:
  // Of equally good ones the one whose last token is longer wins, then whose last but one is, and so on.
  void extend(size_t character, Texts tokens, std::vector<size_t> begins, double score) {
    if (character + 1 == ends_.size()) {
      std::reverse(begins.begin(), begins.end());
      if (best_.empty() || score > best_score_ || (score == best_score_ && begins < best_begins_)) {
        best_ = tokens;
        best_begins_ = begins;
        best_score_ = score;
      }
      return;
    }
    bool has_token = false;
    begins.push_back(ends_[character]);
    for (size_t end = character + 1; end < ends_.size(); end++) {
      const std::string part(text_.substr(ends_[character], ends_[end] - ends_[character]));
      for (size_t i = 0; i < vocabulary_.texts.size(); i++) {
        if (vocabulary_.texts[i] != part || (vocabulary_.types[i] != 1 && vocabulary_.types[i] != 4)) continue;
        has_token |= end == character + 1;
        auto more = tokens;
        more.push_back(part);
        extend(end, more, begins, score + (vocabulary_.types[i] == 4 ? 0 : double{vocabulary_.scores[i]}));
      }
    }
    if (has_token) return;
    tokens.push_back("<unk>");
    extend(character + 1, tokens, begins, score + unknown_score_);
  }

  const testing::VocabularyBuilder& vocabulary_;
  std::string_view text_;
  std::vector<size_t> ends_;
  double unknown_score_ = 0, best_score_ = 0;
  Texts best_;
  std::vector<size_t> best_begins_;
};

TEST(Unigram, TakesTheBestOfAllCuts) {
  std::mt19937 random(11);
  static constexpr std::string_view kParts[] = {"h", "e", "l", "o", "a", "b", "aa", "hello", " ", "é", "z", "中"};
  for (int i = 0; i < 400; i++) {
    auto builder = small_unigram();
    // Whole numbers as scores: their sums are exact, so ties are ties in every order of adding.
    for (size_t id = 3; id < builder.scores.size(); id++) {
      builder.scores[id] = static_cast<float>(-1 - static_cast<int>(random() % 12));
    }
    const auto vocabulary = Vocabulary::load(builder.metadata());
    std::string text, normal = "▁";
    const size_t n_parts = 1 + random() % 6;
    for (size_t k = 0; k < n_parts; k++) {
      const std::string_view part = kParts[random() % std::size(kParts)];
      if (part == " " && (text.empty() || text.ends_with(" "))) continue;
      text += part;
      normal += part == " " ? "▁" : part == "中" ? "ab" : part;
    }
    while (text.ends_with(" ")) {
      text.pop_back();
      normal.resize(normal.size() - 3);
    }
    EXPECT_EQ(pieces(*vocabulary, text), text.empty() ? Texts{} : AllCuts(builder, normal).best()) << text;
  }
}

TEST(Unigram, NormalisesBeforeItCuts) {
  const auto v = Vocabulary::load(small_unigram().metadata());
  EXPECT_EQ(pieces(*v, "  hello \t world  "), (Texts{"▁hello", "▁world"}));
  EXPECT_EQ(pieces(*v, "\uFF21\uFF41\u3000\uFB01\u00AD\u2460"), (Texts{"▁", "A", "a", "▁", "fi", "1"}));
  EXPECT_EQ(pieces(*v, "he\u0301"), (Texts{"▁", "h", "é"}));
  EXPECT_EQ(pieces(*v, "xyz\u4E2D\xFFq"), (Texts{"▁", "<unk>", "ab", "<unk>"}));
  EXPECT_EQ(pieces(*v, ""), Texts{});
  EXPECT_EQ(pieces(*v, "   "), Texts{});
}

TEST(Unigram, KeepsSpacesWhereTheModelWantsThem) {
  auto builder = small_unigram();
  builder.set("tokenizer.ggml.remove_extra_whitespaces", gguf::Value::of(false));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), " hello  a "), (Texts{"▁", "▁hello", "▁", "▁", "a", "▁"}));
  builder.set("tokenizer.ggml.add_space_prefix", gguf::Value::of(false));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "hello a"), (Texts{"hello", "▁", "a"}));
}

TEST(Unigram, EndsWithEosAndCutsSpecialTokensOut) {
  const auto v = Vocabulary::load(small_unigram().metadata());
  EXPECT_EQ(v->model_name(), "t5");
  EXPECT_EQ(v->eos(), 1);
  EXPECT_EQ(v->unknown(), 2);
  EXPECT_EQ(v->pad(), 0);
  EXPECT_FALSE(v->adds_bos());
  EXPECT_EQ(pieces(*v, "hello<tool></s>", AddSpecial::yes, ParseSpecial::yes),
            (Texts{"▁hello", "<tool>", "</s>", "</s>"}));
  const auto tokens = v->tokenize("hello world", AddSpecial::yes, ParseSpecial::no);
  EXPECT_EQ(v->detokenize(tokens, RenderSpecial::no), " hello world");
}

TEST(Unigram, IsLinearInTextWithoutSpaces) {
  const auto v = Vocabulary::load(small_unigram().metadata());
  const std::string text(300000, 'a');
  EXPECT_EQ(v->tokenize(text, AddSpecial::no, ParseSpecial::no).size(), 1 + 150000u);
}

TEST(Unigram, RefusesACharsmapThatIsNoneAndBytesThatAreNone) {
  auto builder = small_unigram();
  builder.set("tokenizer.ggml.precompiled_charsmap", gguf::Value::of(std::vector<int32_t>{1, 2, 3}));
  EXPECT_THROW(Vocabulary::load(builder.metadata()), FormatError);
  builder.set("tokenizer.ggml.precompiled_charsmap", gguf::Value::of(std::vector<int32_t>{256}));
  EXPECT_THROW(Vocabulary::load(builder.metadata()), FormatError);
}

}  // namespace
}  // namespace caravan::vocab
