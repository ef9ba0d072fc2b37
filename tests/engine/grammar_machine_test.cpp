#include "engine/grammar_machine.h"

#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>

#include "base/error.h"
#include "engine/grammar_reference.h"
#include "vocab/utf8.h"

namespace caravan::engine {
namespace {

GrammarAutomaton automaton_of(const std::string& text) { return GrammarAutomaton(parse_gbnf(text, {1000, {}})); }

bool accepts(GrammarMachine& machine, std::string_view text) {
  return machine.accepts(machine.step(machine.initial(), text));
}

std::string utf8(const std::u32string& text) {
  std::string out;
  for (const char32_t c : text) vocab::append_utf8(out, c);
  return out;
}

// All texts over the letters up to a length.
void for_each_text(size_t max_length, const std::function<void(const std::u32string&)>& visit) {
  std::vector<std::u32string> layer{U""};
  for (size_t length = 0; length <= max_length; ++length) {
    std::vector<std::u32string> next;
    for (const std::u32string& text : layer) {
      visit(text);
      for (const char32_t c : {U'a', U'b', U'\u00E9'}) next.push_back(text + c);
    }
    layer = std::move(next);
  }
}

TEST(GrammarMachine, AgreesWithTheDefinitionOnRandomGrammars) {
  int n_grammars = 0;
  for (uint32_t seed = 1; n_grammars < 300; ++seed) {
    const std::string text = test::RandomGrammar(seed).make();
    const GrammarRules rules = parse_gbnf(text, {1000, {}});
    std::unique_ptr<GrammarAutomaton> automaton;
    try {
      automaton = std::make_unique<GrammarAutomaton>(rules);
    } catch (const RequestError&) {
      continue;  // left-recursive, or without a text
    }
    ++n_grammars;
    GrammarMachine machine(*automaton);
    for_each_text(4, [&](const std::u32string& sample) {
      const bool wanted = test::ReferenceMatcher(rules, sample).matches();
      EXPECT_EQ(accepts(machine, utf8(sample)), wanted) << "seed " << seed << ", text '" << utf8(sample) << "' of\n"
                                                        << text;
    });
    if (::testing::Test::HasFailure()) return;
  }
}

// All texts of an expression without endless repetition; the only recursive rule is "endless". Throws length_error for
// too many.
std::set<std::string> texts_of(const GrammarRules& rules, const GrammarExpression& e) {
  using Kind = GrammarExpression::Kind;
  const auto after = [](const std::set<std::string>& a, const std::set<std::string>& b) {
    if (a.size() * b.size() > 2000) throw std::length_error("too many texts");
    std::set<std::string> all;
    for (const std::string& first : a)
      for (const std::string& second : b) all.insert(first + second);
    return all;
  };
  std::set<std::string> all;
  switch (e.kind) {
    case Kind::text:
      return {e.text};
    case Kind::character:
      for (const CodeRange& range : e.ranges)
        for (char32_t c = range.first; c <= range.last; ++c) all.insert(utf8({c}));
      return all;
    case Kind::rule:
      if (rules.rules[e.rule].name == "endless") return {};
      return texts_of(rules, rules.rules[e.rule].body);
    case Kind::token:
      return {};
    case Kind::sequence:
      all = {""};
      for (const GrammarExpression& child : e.children) all = after(all, texts_of(rules, child));
      return all;
    case Kind::choice:
      for (const GrammarExpression& child : e.children) all.merge(texts_of(rules, child));
      return all;
    case Kind::repeat: {
      const std::set<std::string> one = texts_of(rules, e.children.front());
      std::set<std::string> now = {""};
      for (uint32_t n = 0; n <= *e.at_most; now = after(now, one), ++n)
        if (n >= e.at_least) all.insert(now.begin(), now.end());
      return all;
    }
  }
  return all;
}

std::string random_finite_grammar(std::mt19937& random) {
  const auto body = [&](std::initializer_list<const char*> more) {
    std::vector<std::string> atoms = {"\"a\"", "\"ab\"", "[ab]", "[b\xC3\xA9]", "endless", "\"\""};
    atoms.insert(atoms.end(), more.begin(), more.end());
    std::string text;
    for (size_t ways = 1 + random() % 3; ways > 0; --ways) {
      for (size_t n = random() % 3 + 1; n > 0; --n)
        text += atoms[random() % atoms.size()] + std::array{"", "", "?", "{0,2}"}[random() % 4] + " ";
      text += ways > 1 ? "| " : "\"\"\n";
    }
    return text;
  };
  return "root ::= " + body({"r1", "r2", "r1"}) + "r1 ::= " + body({"r2", "r2"}) + "r2 ::= " + body({}) +
         "endless ::= \"a\" endless | [b] endless \"a\"\n";
}

TEST(GrammarMachine, IsDeadExactlyWhereNoTextGoesOn) {
  std::mt19937 random(3);
  int n_grammars = 0, n_complete = 0;
  while (n_grammars < 200) {
    const std::string text = random_finite_grammar(random);
    const GrammarRules rules = parse_gbnf(text, {1000, {}});
    std::set<std::string> texts;
    try {
      texts = texts_of(rules, rules.rules[rules.root].body);
    } catch (const std::length_error&) {
      continue;
    }
    ++n_grammars;
    if (texts.empty()) {
      EXPECT_THROW(GrammarAutomaton{rules}, RequestError) << text;
      continue;
    }
    const GrammarAutomaton automaton(rules);
    GrammarMachine machine(automaton);
    const auto goes_on = [&](const std::string& begin) {
      const auto next = texts.lower_bound(begin);
      return next != texts.end() && next->starts_with(begin);
    };
    for (const std::string& whole : texts) {
      GrammarMachine::State state = machine.initial();
      for (size_t n = 0; n <= whole.size(); ++n) {
        const std::string begin = whole.substr(0, n);
        ASSERT_EQ(machine.accepts(state), texts.count(begin) > 0) << begin << " of\n" << text;
        bool may_go_on = false;
        for (const char c : {'a', 'b', 'c', '\xC3', '\xA9'}) {
          const bool alive = machine.step(state, static_cast<uint8_t>(c)) != GrammarMachine::kDead;
          ASSERT_EQ(alive, goes_on(begin + c)) << begin << " then " << c << " of\n" << text;
          may_go_on |= alive;
        }
        const bool only_accepted = machine.accepts(state) && machine.frames(state).size() == 1;
        ASSERT_EQ(only_accepted, !may_go_on) << begin << " of\n" << text;
        n_complete += only_accepted;
        if (n < whole.size()) state = machine.step(state, static_cast<uint8_t>(whole[n]));
      }
    }
  }
  EXPECT_GT(n_complete, 300);
}

TEST(GrammarMachine, RefusesAGrammarWhoseTextsNeverEnd) {
  for (const char* text : {"root ::= \"a\" root", "root ::= \"a\" x\nx ::= \"b\" y | [c] x\ny ::= x \"d\""}) {
    try {
      automaton_of(text);
      ADD_FAILURE() << text;
    } catch (const RequestError& error) {
      EXPECT_STREQ(error.what(), "grammar: no text of the rule 'root' ever ends");
    }
  }
}

TEST(GrammarMachine, TakesCharactersByteByByte) {
  const GrammarAutomaton automaton = automaton_of("root ::= [^a\\u00e9] \"\\U0001F600\"");
  GrammarMachine machine(automaton);
  EXPECT_TRUE(accepts(machine, "b\xF0\x9F\x98\x80"));
  EXPECT_TRUE(accepts(machine, "\xC3\xA8\xF0\x9F\x98\x80"));
  EXPECT_FALSE(accepts(machine, "\xC3\xA9\xF0\x9F\x98\x80"));
  EXPECT_NE(machine.step(machine.initial(), "b\xF0\x9F\x98"), GrammarMachine::kDead);
  EXPECT_EQ(machine.step(machine.initial(), "b\xF0\x9F\x99"), GrammarMachine::kDead);
}

TEST(GrammarMachine, TakesOnlyUtf8WhereAnyCharacterMayStand) {
  const GrammarAutomaton automaton = automaton_of("root ::= .");
  GrammarMachine machine(automaton);
  for (char32_t c = 0; c <= 0x10FFFF; c += c < 0x3000 ? 1 : 61) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    vocab::append_utf8(text, c);
    EXPECT_TRUE(accepts(machine, text)) << static_cast<uint32_t>(c);
  }
  for (const std::string text : {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80",
                                 "\xF5\x80\x80\x80", "\xFF", "ab"})
    EXPECT_FALSE(accepts(machine, text)) << text;
}

TEST(GrammarMachine, RecursesDeepAndComesBack) {
  const GrammarAutomaton automaton = automaton_of("root ::= \"(\" root \")\" | \"x\"");
  GrammarMachine machine(automaton);
  const size_t depth = 20'000;
  GrammarMachine::State state = machine.step(machine.initial(), std::string(depth, '(') + "x");
  state = machine.step(state, std::string(depth - 1, ')'));
  EXPECT_FALSE(machine.accepts(state));
  EXPECT_NE(state, GrammarMachine::kDead);
  state = machine.step(state, ")");
  EXPECT_TRUE(machine.accepts(state));
  EXPECT_EQ(machine.step(state, ")"), GrammarMachine::kDead);
}

TEST(GrammarMachine, NeedsNoMemoryForRepetitionByRecursion) {
  const GrammarAutomaton automaton = automaton_of("root ::= \"a\" root | \"b\" list\nlist ::= \"c\" (\",\" list)?");
  GrammarMachine machine(automaton);
  GrammarMachine::State state = machine.step(machine.initial(), "aaab" + std::string("c,c"));
  const size_t n_states = machine.n_states();
  for (int i = 0; i < 1000; ++i) state = machine.step(state, ",c");
  EXPECT_TRUE(machine.accepts(state));
  EXPECT_EQ(machine.n_states(), n_states);
}

// 2^40 ways to read the text; each rule's callers are held once.
TEST(GrammarMachine, ReadsAmbiguousTextsInLittleMemory) {
  const GrammarAutomaton automaton =
      automaton_of("root ::= e\ne ::= \"a\" e \"b\" | \"a\" e \"c\" | \"\" | \"a\" e d\nd ::= [bc]");
  GrammarMachine machine(automaton);
  EXPECT_TRUE(accepts(machine, std::string(40, 'a') + std::string(40, 'b')));
  EXPECT_LT(machine.n_states(), 2000u);
}

TEST(GrammarMachine, CopiesAStateIntoANewMachine) {
  const GrammarAutomaton automaton = automaton_of("root ::= \"[\" (root (\",\" root)*)? \"]\"");
  GrammarMachine machine(automaton), other(automaton);
  const auto state = machine.step(machine.initial(), "[[],[[");
  const auto copy = machine.copy_state(state, other);
  EXPECT_TRUE(other.accepts(other.step(copy, "]],[]]")));
  EXPECT_EQ(other.step(copy, "]]]]"), GrammarMachine::kDead);
  EXPECT_EQ(machine.copy_state(GrammarMachine::kDead, other), GrammarMachine::kDead);
}

TEST(GrammarMachine, TakesTokensByTheirId) {
  const GrammarAutomaton automaton = automaton_of("root ::= <[5]> !<[6]>* \"a\" <[6]>");
  GrammarMachine machine(automaton);
  auto state = machine.step_token(machine.initial(), 5, false);
  ASSERT_NE(state, GrammarMachine::kDead);
  EXPECT_EQ(machine.step_token(state, 6, true), GrammarMachine::kDead);
  EXPECT_EQ(machine.step_token(state, 7, false), GrammarMachine::kDead) << "not text";
  state = machine.step_token(state, 7, true);
  ASSERT_NE(state, GrammarMachine::kDead);
  state = machine.step_token(machine.step(state, "a"), 6, false);
  EXPECT_TRUE(machine.accepts(state));
}

}  // namespace
}  // namespace caravan::engine
