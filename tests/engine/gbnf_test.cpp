#include "engine/gbnf.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "engine/grammar_automaton.h"

namespace caravan::engine {
namespace {

using ::testing::HasSubstr;
using Kind = GrammarExpression::Kind;

TokenNames some_tokens() {
  return {100, [](std::string_view text) -> std::optional<int32_t> {
            if (text == "<think>") return 7;
            return std::nullopt;
          }};
}

GrammarRules parse(std::string_view text) { return parse_gbnf(text, some_tokens()); }

std::string error_of(std::string_view text) {
  try {
    GrammarAutomaton automaton(parse(text));
  } catch (const RequestError& error) {
    EXPECT_EQ(error.kind(), RequestError::Kind::invalid);
    return error.what();
  }
  return "no error";
}

GrammarExpression root_of(std::string_view text) {
  GrammarRules rules = parse(text);
  return rules.rules[rules.root].body;
}

TEST(Gbnf, ReadsEverySymbol) {
  const GrammarExpression root =
      root_of("root ::= \"a\\n\" [b-d\\x41] r . <[42]> !<think> (\"x\" | \"y\")\nr ::= \"\"");
  ASSERT_EQ(root.kind, Kind::sequence);
  ASSERT_EQ(root.children.size(), 7u);
  EXPECT_EQ(root.children[0].text, "a\n");
  EXPECT_EQ(root.children[1].ranges, (std::vector<CodeRange>{{'A', 'A'}, {'b', 'd'}}));
  EXPECT_EQ(root.children[2].kind, Kind::rule);
  EXPECT_EQ(root.children[3].ranges, (std::vector<CodeRange>{{0, 0xD7FF}, {0xE000, 0x10FFFF}}));
  EXPECT_EQ(root.children[4].token, 42);
  EXPECT_FALSE(root.children[4].negated);
  EXPECT_EQ(root.children[5].token, 7);
  EXPECT_TRUE(root.children[5].negated);
  EXPECT_EQ(root.children[6].kind, Kind::choice);
}

TEST(Gbnf, ReadsRepetitions) {
  struct Case {
    const char* text;
    uint32_t at_least;
    std::optional<uint32_t> at_most;
  };
  for (const Case& c : {Case{"*", 0, {}}, Case{"+", 1, {}}, Case{"?", 0, 1}, Case{"{3}", 3, 3}, Case{"{3,}", 3, {}},
                        Case{"{ 0, 5 }", 0, 5}}) {
    const GrammarExpression root = root_of(std::string("root ::= \"a\"") + c.text);
    EXPECT_EQ(root.kind, Kind::repeat) << c.text;
    EXPECT_EQ(root.at_least, c.at_least) << c.text;
    EXPECT_EQ(root.at_most, c.at_most) << c.text;
  }
}

TEST(Gbnf, ReadsEscapesAndNegation) {
  EXPECT_EQ(root_of("root ::= \"\\x41\\u00e9\\U0001F600\\\\\\\"\\[\\]\\t\"").text, "A\xC3\xA9\xF0\x9F\x98\x80\\\"[]\t");
  EXPECT_EQ(root_of("root ::= [^\\n]").ranges, (std::vector<CodeRange>{{0, 9}, {11, 0xD7FF}, {0xE000, 0x10FFFF}}));
  EXPECT_EQ(root_of("root ::= [a-]").ranges, (std::vector<CodeRange>{{'-', '-'}, {'a', 'a'}}));
  EXPECT_EQ(root_of("root ::= [ -3000 ]").ranges, (std::vector<CodeRange>{{' ', '3'}}));
}

TEST(Gbnf, LetsLinesGoOnInGroupsAndAfterABar) {
  const GrammarRules rules = parse(
      "# a comment\n\nroot ::= # another\n  \"a\" |\n  \"b\" (\n \"c\" # inside\n | \"d\"\n)\r\nother_rule-1 ::= "
      "\"e\"");
  EXPECT_EQ(rules.rules.size(), 2u);
  EXPECT_EQ(rules.rules[rules.root].body.children.size(), 2u);
}

TEST(Gbnf, SaysWhereTheMistakeIs) {
  EXPECT_THAT(error_of("root ::= \"a\"\nx = \"b\""), HasSubstr("line 2, column 3: expected '::=', found '='"));
  EXPECT_THAT(error_of("root ::= \"a"), HasSubstr("line 1, column 10: the text in quotes has no end"));
  EXPECT_THAT(error_of("root ::= [a"), HasSubstr("no ']'"));
  EXPECT_THAT(error_of("root ::= []"), HasSubstr("contains no character"));
  EXPECT_THAT(error_of("root ::= [b-a]"), HasSubstr("column 11: the range ends before it begins"));
  EXPECT_THAT(error_of("root ::= (\"a\""), HasSubstr("expected ')', found the end"));
  EXPECT_THAT(error_of("root ::= \"a\" )"), HasSubstr("expected the end of the rule, found ')'"));
  EXPECT_THAT(error_of("root ::= \"\\q\""), HasSubstr("expected one of the escapes"));
  EXPECT_THAT(error_of("root ::= \"\\u12\""), HasSubstr("expected 4 hexadecimal digits"));
  EXPECT_THAT(error_of("root ::= \"\\uD800\""), HasSubstr("surrogate"));
  EXPECT_THAT(error_of("root ::= \"a\"{2,1}"), HasSubstr("maximum is below its minimum"));
  EXPECT_THAT(error_of("root ::= \"a\"{,1}"), HasSubstr("expected a number of repetitions, found ','"));
  EXPECT_THAT(error_of("root ::= \"a\"{2001}"), HasSubstr("at most 2000 repetitions"));
  EXPECT_THAT(error_of("root ::= \"\xff\""), HasSubstr("not UTF-8"));
  EXPECT_THAT(error_of("root ::= !x"), HasSubstr("expected '<'"));
}

TEST(Gbnf, NamesRulesThatAreMissingOrThereTwice) {
  EXPECT_THAT(error_of("root ::= a\na ::= \"x\" | b"), HasSubstr("line 2, column 13: the rule 'b' is not defined"));
  EXPECT_THAT(error_of("main ::= \"x\""), HasSubstr("the rule 'root', where it starts, is not defined"));
  EXPECT_THAT(error_of(""), HasSubstr("'root'"));
  EXPECT_THAT(error_of("root ::= \"x\"\nroot ::= \"y\""),
              HasSubstr("line 2, column 1: the rule 'root' is defined twice"));
}

TEST(Gbnf, RefusesTokensThatTheVocabularyLacks) {
  EXPECT_THAT(error_of("root ::= <[100]>"), HasSubstr("a token id below 100, found 100"));
  EXPECT_THAT(error_of("root ::= <[x]>"), HasSubstr("expected a token id"));
  EXPECT_THAT(error_of("root ::= <nothing>"), HasSubstr("'<nothing>' is not one token"));
  EXPECT_THAT(error_of("root ::= <think"), HasSubstr("no '>'"));
}

TEST(Gbnf, RefusesLeftRecursionByName) {
  EXPECT_THAT(error_of("root ::= root \"a\" | \"a\""), HasSubstr("'root' is left-recursive"));
  EXPECT_THAT(error_of("root ::= x\nx ::= y* z\ny ::= \"\"\nz ::= x \"a\" | \"b\""),
              HasSubstr("'x' is left-recursive, which is not supported: x -> z -> x"));
  EXPECT_THAT(error_of("root ::= \"a\" root | \"b\" (\"c\" | root)"), HasSubstr("no error"));
}

TEST(Gbnf, RefusesWhatWouldNeedTooMuchMemory) {
  EXPECT_THAT(error_of("root ::= " + std::string(1000, '(')), HasSubstr("nested groups"));
  EXPECT_THAT(error_of("root ::= \"a\"" + std::string(1000, '*')), HasSubstr("too many repetition operators"));
  std::string big = "root ::= r0\n";
  for (int i = 0; i < 300; ++i) big += "r" + std::to_string(i) + " ::= \"a\"{2000}\n";
  EXPECT_THAT(error_of(big), HasSubstr("too large"));
  EXPECT_THAT(error_of("root ::= ((\"abc\"{2000}){2000}){2000}"), HasSubstr("no error"));
}

}  // namespace
}  // namespace caravan::engine
