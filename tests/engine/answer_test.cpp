#include "engine/answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "engine/fake_pipeline.h"

namespace caravan::engine {
namespace {

struct Cut {
  std::string text;
  std::optional<std::string> word;
  bool operator==(const Cut&) const = default;
};

Cut feed(std::vector<std::string> stop, const std::vector<std::string>& pieces) {
  StopMatcher matcher(std::move(stop));
  Cut cut;
  for (const std::string& piece : pieces) {
    StopMatcher::Result result = matcher.push(piece);
    cut.text += result.text;
    if (result.stopping_word) {
      cut.word = result.stopping_word;
      return cut;
    }
  }
  cut.text += matcher.finish();
  return cut;
}

TEST(StopMatcher, WithholdsWhatMayBecomeAStopString) {
  StopMatcher matcher({"</s>"});
  EXPECT_EQ(matcher.push("a<").text, "a");
  EXPECT_EQ(matcher.push("/").text, "");
  EXPECT_EQ(matcher.push("b<").text, "</b");
  EXPECT_EQ(matcher.finish(), "<");
}

TEST(StopMatcher, FindsAMatchAfterAFailedStartThatOverlapsIt) {
  EXPECT_EQ(feed({"aab"}, {"a", "a", "a", "b", "c"}), (Cut{"a", "aab"}));
  EXPECT_EQ(feed({"\n\n"}, {"x\n", "y\n", "\nz"}), (Cut{"x\ny", "\n\n"}));
}

TEST(StopMatcher, TakesTheFirstCompletedAndTheLongestOfThoseEndingTogether) {
  EXPECT_EQ(feed({"bcd", "c"}, {"abcd"}), (Cut{"ab", "c"}));
  EXPECT_EQ(feed({"c", "abc"}, {"xabc"}), (Cut{"x", "abc"}));
  EXPECT_EQ(feed({""}, {"abc"}), (Cut{"abc", std::nullopt}));
}

TEST(StopMatcher, GivesTheSameHoweverTheTextIsCut) {
  std::mt19937 random(5);
  for (int round = 0; round < 3000; ++round) {
    const auto word = [&](size_t max) {
      std::string text(1 + random() % max, 'a');
      for (char& letter : text) letter = static_cast<char>('a' + random() % 2);
      return text;
    };
    std::vector<std::string> stop;
    for (uint32_t i = 0; i < 1 + random() % 3; ++i) stop.push_back(word(6));
    const std::string text = word(30);
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      pieces.push_back(text.substr(at, random() % 4));
      at += pieces.back().size();
    }
    ASSERT_EQ(feed(stop, pieces), feed(stop, {text})) << text;
    // The earliest end of any stop string ends the text.
    size_t end = std::string::npos;
    for (const std::string& w : stop) {
      if (const size_t at = text.find(w); at != std::string::npos) end = std::min(end, at + w.size());
    }
    const Cut cut = feed(stop, {text});
    ASSERT_EQ(cut.text + cut.word.value_or(""), text.substr(0, end));
  }
}

TEST(AnswerText, KeepsTokensWithTheTextTheyBeganAndDropsThoseOfTheStopString) {
  const auto vocabulary = test::make_vocabulary();
  AnswerText answer(*vocabulary, {"ab!"});
  AnswerText::Result result = answer.push(test::byte_token('x'), std::nullopt);
  EXPECT_EQ(result.event->text, "x");
  EXPECT_THAT(result.event->tokens, testing::ElementsAre(test::byte_token('x')));
  EXPECT_FALSE(answer.push(test::kPieceAB, std::nullopt).event);  // may be the start of "ab!"
  result = answer.push(test::kPieceAB, std::nullopt);
  EXPECT_EQ(result.event->text, "ab");
  EXPECT_THAT(result.event->tokens, testing::ElementsAre(test::kPieceAB));
  result = answer.push(test::byte_token('!'), std::nullopt);
  EXPECT_EQ(result.stopping_word, "ab!");
  EXPECT_FALSE(result.event);
}

// What is left of a text that arrives in these pieces.
std::string until_indent_ends(int32_t n_indent, const std::vector<std::string>& pieces) {
  IndentWatch watch(n_indent);
  std::string text;
  for (const std::string& piece : pieces) {
    const auto end = watch.find_end(piece);
    text += piece.substr(0, end.value_or(piece.size()));
    if (end) break;
  }
  return text;
}

TEST(IndentWatch, EndsBeforeALineWithTooFewBlanks) {
  EXPECT_EQ(until_indent_ends(2, {"a\n  b\n \tc\n d"}), "a\n  b\n \tc\n ");
  EXPECT_EQ(until_indent_ends(2, {"a", "\n", " ", " b\n", "", " ", "c d"}), "a\n  b\n ");
  EXPECT_EQ(until_indent_ends(2, {"  a\n   b\n\n  c"}), "  a\n   b\n");  // an empty line has none
  EXPECT_EQ(until_indent_ends(2, {"b\n  "}), "b\n  ");
  EXPECT_EQ(until_indent_ends(0, {"a\nb\n"}), "a\nb\n");
}

TEST(AnswerText, EndsWithTheIndentation) {
  const auto vocabulary = test::make_vocabulary();
  AnswerText answer(*vocabulary, {"never"}, 1);
  for (const char c : {'{', '\n', ' ', 'x', '\n'})
    EXPECT_FALSE(answer.push(test::byte_token(c), std::nullopt).indent_ended) << c;
  const AnswerText::Result last = answer.push(test::byte_token('}'), std::nullopt);
  EXPECT_TRUE(last.indent_ended);
  EXPECT_FALSE(last.event);
  EXPECT_FALSE(answer.finish().event);
}

TEST(AnswerText, FinishGivesWhatWasWithheld) {
  const auto vocabulary = test::make_vocabulary();
  AnswerText answer(*vocabulary, {"STOP"});
  EXPECT_FALSE(answer.push(test::byte_token('S'), StepProbabilities{}).event);
  EXPECT_FALSE(answer.push(test::byte_token('\xe2'), StepProbabilities{}).event);
  const AnswerText::Result rest = answer.finish();
  ASSERT_TRUE(rest.event);
  EXPECT_EQ(rest.event->text, "S\ufffd");  // half a character
  EXPECT_EQ(rest.event->tokens.size(), 2u);
  EXPECT_EQ(rest.event->probabilities.size(), 2u);
}

}  // namespace
}  // namespace caravan::engine
