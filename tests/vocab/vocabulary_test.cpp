#include "vocab/vocabulary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "base/error.h"
#include "small_vocabularies.h"
#include "test_text.h"
#include "vocab/utf8.h"

namespace caravan::vocab {
namespace {

using gguf::Value;
using ::testing::HasSubstr;
using testing::kControl;
using testing::kUserDefined;
using testing::pieces;
using testing::small_bert;
using testing::small_bpe;
using testing::small_spm;
using testing::VocabularyBuilder;
using Texts = std::vector<std::string>;

// The message of the error that load() throws.
template <typename Error>
std::string load_error(const gguf::Metadata& metadata) {
  try {
    Vocabulary::load(metadata);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error of this type";
}

TEST(Vocabulary, RecognisesControlTokensOnlyWhenAsked) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  EXPECT_EQ(pieces(*v, "a<|stop|>", AddSpecial::no, ParseSpecial::yes), (Texts{"a", "<|stop|>"}));
  EXPECT_EQ(pieces(*v, "a<|stop|>", AddSpecial::no, ParseSpecial::no).size(), 9u);
  EXPECT_EQ(pieces(*v, "a<tool>b<tool>s"), (Texts{"a", "<tool>", "b", "<tool>s"})) << "user-defined ones always";
}

TEST(Vocabulary, AddsBosAndEosAsTheModelWants) {
  auto builder = small_bpe();
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "a", AddSpecial::yes), (Texts{"a"}));
  builder.set("tokenizer.ggml.add_bos_token", Value::of(true));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), "a", AddSpecial::yes), (Texts{"<|start|>x", "a"}));
  builder.set("tokenizer.ggml.add_eos_token", Value::of(true));
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(pieces(*v, "a", AddSpecial::yes), (Texts{"<|start|>x", "a", "<|stop|>"}));
  EXPECT_EQ(pieces(*v, "a", AddSpecial::no), (Texts{"a"}));

  EXPECT_TRUE(Vocabulary::load(small_bpe("llama-bpe").metadata())->adds_bos()) << "implied by the pre-tokenizer";
  auto quiet = small_spm();
  EXPECT_TRUE(Vocabulary::load(quiet.metadata())->adds_bos());
  quiet.set("tokenizer.ggml.add_bos_token", Value::of(false));
  EXPECT_EQ(pieces(*Vocabulary::load(quiet.metadata()), "hello", AddSpecial::yes), (Texts{"▁hello"}));
}

TEST(Vocabulary, UsesTheDefaultsOfItsKind) {
  const auto spm = Vocabulary::load(small_spm().metadata());
  EXPECT_EQ(spm->bos(), 1);
  EXPECT_EQ(spm->eos(), 2);
  EXPECT_EQ(spm->unknown(), 0);
  EXPECT_FALSE(spm->pad().has_value());
  const auto bert = Vocabulary::load(small_bert().metadata());
  EXPECT_EQ(bert->bos(), 2);
  EXPECT_EQ(bert->cls(), 2);
  EXPECT_EQ(bert->sep(), 3);
  EXPECT_EQ(bert->mask(), 4);
  EXPECT_EQ(bert->pad(), 0);
}

TEST(Vocabulary, IgnoresSpecialIdsOutsideTheVocabulary) {
  auto builder = small_spm();
  builder.set("tokenizer.ggml.eos_token_id", Value::of(uint32_t{0xFFFFFFFF}));
  builder.set("tokenizer.ggml.padding_token_id", Value::of(uint32_t{100000}));
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(v->eos(), 2);
  EXPECT_FALSE(v->pad().has_value());
}

TEST(Vocabulary, CollectsEndOfGenerationTokens) {
  auto builder = small_bpe();
  const TokenId im_end = builder.add("<|im_end|>", kUserDefined), pad = builder.add("<|fim_pad|>"),
                pre = builder.add("<fim_prefix>", kControl), eom = builder.add("<|eom_id|>", kControl);
  const auto v = Vocabulary::load(builder.metadata());
  for (const TokenId token : {*v->eos(), *v->find("<|eot_id|>"), im_end, pad, eom}) {
    EXPECT_TRUE(v->is_end_of_generation(token)) << v->text(token);
    EXPECT_EQ(v->type(token), TokenType::control) << v->text(token);
  }
  EXPECT_EQ(v->end_of_generation_tokens().size(), 5u);
  EXPECT_FALSE(v->is_end_of_generation(pre));
  EXPECT_EQ(v->eot(), v->find("<|eot_id|>"));
  EXPECT_EQ(v->eom(), eom);
  EXPECT_EQ(v->fim_pre(), pre);
  EXPECT_EQ(v->fim_pad(), pad);
}

TEST(Vocabulary, KeepsMessageEndsOfGptOssInTheAnswer) {
  auto builder = small_bpe();
  const TokenId end = builder.add("<|end|>", kControl), done = builder.add("<|return|>", kControl);
  builder.add("<|channel|>", kControl);
  EXPECT_TRUE(Vocabulary::load(builder.metadata())->is_end_of_generation(end));
  builder.add("<|call|>", kControl);
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_FALSE(v->is_end_of_generation(end));
  EXPECT_TRUE(v->is_end_of_generation(done));
  EXPECT_EQ(v->piece(end, RenderSpecial::no), "<|end|>");
  EXPECT_EQ(v->piece(*v->find("<|channel|>"), RenderSpecial::no), "<|channel|>");
}

TEST(Vocabulary, LetsToolResponsesOutrankTheOldEnd) {
  auto builder = small_spm();
  builder.set("tokenizer.ggml.eos_token_id", Value::of(static_cast<uint32_t>(builder.add("<turn|>", kControl))));
  EXPECT_TRUE(Vocabulary::load(builder.metadata())->is_end_of_generation(2));
  builder.add("<|tool_response>", kControl);
  EXPECT_FALSE(Vocabulary::load(builder.metadata())->is_end_of_generation(2));
}

TEST(Vocabulary, StripsWhiteSpaceAfterSpecialTokensOfPhi3) {
  auto builder = small_spm();
  builder.add("<|user|>", kControl);
  const std::string text = "<|user|>\n <s> aa";
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), text, AddSpecial::no, ParseSpecial::yes),
            (Texts{"<|user|>", "▁", "<0x0A>", "▁", "<s>", "▁", "▁", "aa"}));
  builder.set("general.name", Value::of("Phi-3 mini"));
  EXPECT_EQ(pieces(*Vocabulary::load(builder.metadata()), text, AddSpecial::no, ParseSpecial::yes),
            (Texts{"<|user|>", "<s>", "▁", "▁", "aa"}));
}

TEST(Vocabulary, NamesEmptyTokens) {
  auto builder = small_bpe();
  const TokenId empty = builder.add("");
  EXPECT_EQ(Vocabulary::load(builder.metadata())->text(empty), "[EMPTY_" + std::to_string(empty) + "]");
}

TEST(Vocabulary, RendersNothingForUnusedTokens) {
  auto builder = small_spm();
  const TokenId unused = builder.add("unused", 5);
  EXPECT_EQ(Vocabulary::load(builder.metadata())->piece(unused, RenderSpecial::yes), "");
}

TEST(Vocabulary, HoldsTemplatesAndSuppressedTokens) {
  auto builder = small_bpe();
  builder.set("tokenizer.chat_template", Value::of("default template"));
  builder.set("tokenizer.chat_template.tool_use", Value::of("tool template"));
  builder.set("tokenizer.chat_templates", Value::of(Texts{"tool_use"}));
  builder.set("tokenizer.ggml.suppress_tokens", Value::of(std::vector<int32_t>{9, -1, 3, 1000000, 9}));
  const auto v = Vocabulary::load(builder.metadata());
  EXPECT_EQ(v->chat_template(), "default template");
  EXPECT_EQ(v->chat_template("tool_use"), "tool template");
  EXPECT_FALSE(v->chat_template("rerank").has_value());
  EXPECT_EQ(v->suppressed_tokens(), (std::vector<TokenId>{3, 9}));
}

TEST(Vocabulary, WithoutTextCountsTokensOnly) {
  gguf::Metadata metadata("model.gguf");
  metadata.set("general.architecture", Value::of("llama"));
  metadata.set("tokenizer.ggml.model", Value::of("no_vocab"));
  metadata.set("llama.vocab_size", Value::of(uint32_t{77}));
  const auto v = Vocabulary::load(metadata);
  EXPECT_EQ(v->size(), 77u);
  EXPECT_FALSE(v->has_text());
  EXPECT_EQ(v->piece(42, RenderSpecial::no), "[42]");
  EXPECT_EQ(v->detokenize(std::vector<TokenId>{1, 2}, RenderSpecial::no), "[1][2]");
  EXPECT_THROW(v->tokenize("a", AddSpecial::no, ParseSpecial::no), RequestError);
  EXPECT_FALSE(v->bos().has_value());
  metadata.set("llama.vocab_size", Value::of(uint32_t{0xFFFFFFFF}));
  EXPECT_THROW(Vocabulary::load(metadata), FormatError);
}

TEST(Vocabulary, RejectsIdsOutsideIt) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  EXPECT_THROW(v->piece(-1, RenderSpecial::no), RequestError);
  EXPECT_THROW(v->text(static_cast<TokenId>(v->size())), RequestError);
  EXPECT_FALSE(v->is_end_of_generation(-1));
}

TEST(Vocabulary, NamesWhatItDoesNotSupport) {
  auto builder = small_bpe();
  builder.model = "plamo2";
  EXPECT_THAT(load_error<NotSupportedError>(builder.metadata()),
              HasSubstr("'plamo2' is not supported; known are: llama"));
  EXPECT_THAT(load_error<NotSupportedError>(small_bpe("surprise").metadata()), HasSubstr("'surprise'"));
}

TEST(Vocabulary, NamesWhatIsWrongWithAFile) {
  const auto with = [](const std::string& key, Value value) {
    auto builder = small_spm();
    builder.set(key, std::move(value));
    return load_error<FormatError>(builder.metadata());
  };
  EXPECT_THAT(with("tokenizer.ggml.scores", Value::of(std::vector<float>{1, 2})), HasSubstr("one per token, found 2"));
  EXPECT_THAT(with("tokenizer.ggml.scores", Value::of("high")), HasSubstr("tokenizer.ggml.scores"));
  EXPECT_THAT(with("tokenizer.ggml.token_type", Value::of(std::vector<int32_t>(3, 1))), HasSubstr("found 3"));
  auto builder = small_spm();
  builder.types[5] = 99;
  EXPECT_THAT(load_error<FormatError>(builder.metadata()), HasSubstr("token_type[5]: expected 0 to 6, found 99"));
  builder = small_spm();
  builder.scores[4] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(load_error<FormatError>(builder.metadata()), HasSubstr("NaN"));
  EXPECT_THAT(load_error<FormatError>(gguf::Metadata("empty.gguf")), HasSubstr("tokenizer.ggml.model"));
  VocabularyBuilder empty;
  empty.model = "llama";
  EXPECT_THAT(load_error<FormatError>(empty.metadata()), HasSubstr("found 0"));
}

TEST(Vocabulary, SurvivesRandomBytes) {
  std::mt19937 random(6);
  for (const auto& builder : {small_bpe(), small_bpe("llama-bpe"), small_spm(), small_bert()}) {
    const auto v = Vocabulary::load(builder.metadata());
    for (int i = 0; i < 200; i++) {
      const std::string text = testing::random_bytes(random, i);
      const auto tokens = v->tokenize(text, AddSpecial::yes, ParseSpecial::yes);
      IncrementalDetokenizer detokenizer(*v, RenderSpecial::yes);
      std::string streamed;
      for (const TokenId token : tokens) streamed += detokenizer.push(token);
      streamed += detokenizer.finish();
      EXPECT_TRUE(is_valid_utf8(streamed));
    }
  }
}

TEST(Vocabulary, ServesSeveralThreads) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  std::mt19937 random(8);
  const std::string text = testing::random_unicode(random, 2000);
  const auto expected = v->tokenize(text, AddSpecial::no, ParseSpecial::yes);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; i++) {
    threads.emplace_back([&] {
      for (int k = 0; k < 20; k++) EXPECT_EQ(v->tokenize(text, AddSpecial::no, ParseSpecial::yes), expected);
    });
  }
  for (auto& thread : threads) thread.join();
}

// Every way to cut a text into byte tokens (and merged ones) gives the same stream of whole characters.
TEST(IncrementalDetokenizer, NeverEmitsHalfACharacter) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  const std::string text = "aé中😀\u0301z";
  std::string streamed;
  IncrementalDetokenizer detokenizer(*v, RenderSpecial::no);
  for (size_t i = 0; i < text.size(); i++) {
    const std::string out = detokenizer.push(static_cast<uint8_t>(text[i]));
    EXPECT_TRUE(is_valid_utf8(out));
    streamed += out;
    EXPECT_EQ(text.substr(0, streamed.size()), streamed);
    EXPECT_LT(i + 1 - streamed.size(), 4u) << "held back longer than a character";
  }
  EXPECT_EQ(streamed, text);
  EXPECT_EQ(detokenizer.finish(), "");
}

TEST(IncrementalDetokenizer, HoldsEveryPrefixOfACharacterBack) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  for (const std::string character : {"é", "中", "😀"}) {
    for (size_t n = 1; n < character.size(); n++) {
      IncrementalDetokenizer detokenizer(*v, RenderSpecial::no);
      for (size_t i = 0; i < n; i++) EXPECT_EQ(detokenizer.push(static_cast<uint8_t>(character[i])), "");
      EXPECT_EQ(detokenizer.push('x'), "\uFFFDx") << "the character can no longer be completed";
      for (size_t i = 0; i < n; i++) EXPECT_EQ(detokenizer.push(static_cast<uint8_t>(character[i])), "");
      EXPECT_EQ(detokenizer.finish(), "\uFFFD");
      EXPECT_EQ(detokenizer.push('y'), "y");
    }
  }
}

TEST(IncrementalDetokenizer, ReplacesBytesThatCannotBeginACharacterAtOnce) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  IncrementalDetokenizer detokenizer(*v, RenderSpecial::no);
  EXPECT_EQ(detokenizer.push(0xFF), "\uFFFD");
  EXPECT_EQ(detokenizer.push(0x80), "\uFFFD");
  EXPECT_EQ(detokenizer.push(0xE4), "");
  EXPECT_EQ(detokenizer.push(0xC3), "\uFFFD");
  EXPECT_EQ(detokenizer.push(0xA9), "é");
}

TEST(IncrementalDetokenizer, AgreesWithReplacingInvalidBytesOfTheWhole) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  std::mt19937 random(9);
  for (int i = 0; i < 2000; i++) {
    std::string bytes, streamed;
    IncrementalDetokenizer detokenizer(*v, RenderSpecial::no);
    for (int k = 0; k < 12; k++) {
      const auto byte = static_cast<uint8_t>(
          "\xF0\x9F\x98\x80\xE4\xB8\xAD\xC3\xA9\xED\xA0"
          "a"[random() % 12]);
      bytes += static_cast<char>(byte);
      streamed += detokenizer.push(byte);
    }
    EXPECT_EQ(streamed + detokenizer.finish(), replace_invalid_utf8(bytes));
  }
}

TEST(IncrementalDetokenizer, RendersControlTokensWhenAsked) {
  const auto v = Vocabulary::load(small_bpe().metadata());
  EXPECT_EQ(IncrementalDetokenizer(*v, RenderSpecial::no).push(*v->eos()), "");
  EXPECT_EQ(IncrementalDetokenizer(*v, RenderSpecial::yes).push(*v->eos()), "<|stop|>");
}

}  // namespace
}  // namespace caravan::vocab
