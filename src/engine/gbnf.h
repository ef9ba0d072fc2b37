// GBNF, llama.cpp's grammar language: text -> rules. The dialect is described in docs/grammar.md.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::engine {

// Code points [first, last].
struct CodeRange {
  char32_t first = 0, last = 0;
  bool operator==(const CodeRange&) const = default;
};

// One node of a rule's right-hand side.
struct GrammarExpression {
  enum class Kind : uint8_t {
    text,       // these bytes, whole UTF-8 characters; empty: matches nothing but the empty text
    character,  // one character of ranges
    rule,       // what rule matches
    token,      // one token: this id, or with negated any other that is text
    sequence,   // children one after the other
    choice,     // one of children
    repeat,     // the only child, at_least to at_most times
  };
  Kind kind = Kind::text;
  std::string text;
  std::vector<CodeRange> ranges;  // ascending, disjoint, without surrogates
  uint32_t rule = 0;              // index into GrammarRules::rules
  int32_t token = 0;
  bool negated = false;
  std::vector<GrammarExpression> children;
  uint32_t at_least = 0;
  std::optional<uint32_t> at_most;  // unset: no limit
};

struct GrammarRule {
  std::string name;
  GrammarExpression body;
};

struct GrammarRules {
  std::vector<GrammarRule> rules;
  uint32_t root = 0;  // index of the rule named root
};

// Which tokens a grammar may name.
struct TokenNames {
  uint32_t n_tokens = 0;
  // The token that the text is, if it is exactly one.
  std::function<std::optional<int32_t>(std::string_view text)> find;
};

// Limits of what a grammar may ask for; beyond them it is refused.
constexpr size_t kMaxGrammarBytes = size_t{1} << 20;
constexpr uint32_t kMaxGrammarRules = 20'000;
constexpr uint32_t kMaxGrammarRepetitions = 2000;
constexpr uint32_t kMaxGrammarNesting = 200;  // of parentheses

// Parses a grammar. Throws RequestError(invalid) "grammar line L, column C: ..." saying what was expected and found;
// also for an undefined rule (named), a rule defined twice, a missing root, and when a limit is passed.
GrammarRules parse_gbnf(std::string_view text, const TokenNames& tokens);

}  // namespace caravan::engine
