// A slow recogniser to compare with: the ends of all texts that an expression takes from a place on, by its definition.
// Grammars must not be left-recursive. Also random grammars.
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/gbnf.h"

namespace caravan::engine::test {

class ReferenceMatcher {
 public:
  ReferenceMatcher(const GrammarRules& rules, std::u32string text) : rules_(rules), text_(std::move(text)) {}

  bool matches() { return ends(rules_.rules[rules_.root].body, 0).count(text_.size()) > 0; }

 private:
  using Ends = std::set<size_t>;

  Ends ends(const GrammarExpression& e, size_t at) {
    using Kind = GrammarExpression::Kind;
    switch (e.kind) {
      case Kind::text:
        return ends_of_text(e.text, at);
      case Kind::character:
        for (const CodeRange& range : e.ranges)
          if (at < text_.size() && range.first <= text_[at] && text_[at] <= range.last) return {at + 1};
        return {};
      case Kind::rule: {
        const auto known = known_.find({e.rule, at});
        if (known != known_.end()) return known->second;
        return known_[{e.rule, at}] = ends(rules_.rules[e.rule].body, at);
      }
      case Kind::token:
        return {};
      case Kind::sequence: {
        Ends now{at};
        for (const GrammarExpression& child : e.children) now = ends_after(child, now);
        return now;
      }
      case Kind::choice: {
        Ends all;
        for (const GrammarExpression& child : e.children) all.merge(ends(child, at));
        return all;
      }
      case Kind::repeat:
        return ends_of_repeat(e, at);
    }
    return {};
  }

  Ends ends_after(const GrammarExpression& e, const Ends& from) {
    Ends all;
    for (const size_t at : from) all.merge(ends(e, at));
    return all;
  }

  // Only ASCII text is used here.
  Ends ends_of_text(const std::string& text, size_t at) const {
    for (size_t i = 0; i < text.size(); ++i)
      if (at + i >= text_.size() || text_[at + i] != static_cast<char32_t>(text[i])) return {};
    return {at + text.size()};
  }

  Ends ends_of_repeat(const GrammarExpression& e, size_t at) {
    Ends now{at}, all;
    const size_t most = e.at_most ? *e.at_most : e.at_least + text_.size() + 1;
    for (size_t n = 0; n <= most; ++n) {
      if (n >= e.at_least) all.insert(now.begin(), now.end());
      now = ends_after(e.children.front(), now);
    }
    return all;
  }

  const GrammarRules& rules_;
  const std::u32string text_;
  std::map<std::pair<uint32_t, size_t>, Ends> known_;
};

// A GBNF text over the letters a, b and é with rules root, r1, r2. It may be left-recursive.
class RandomGrammar {
 public:
  explicit RandomGrammar(uint32_t seed) : random_(seed) {}

  std::string make() {
    // After a bar or "::=" a rule would go on in the next line: something has to follow.
    std::string text = "root ::= " + choice(3) + " \"\"\n";
    for (const char* name : {"r1", "r2"}) text += std::string(name) + " ::= " + choice(3) + " \"\"\n";
    return text;
  }

 private:
  uint32_t pick(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  std::string choice(int depth) {
    std::string text = sequence(depth);
    for (uint32_t i = pick(3); i > 0; --i) text += " | " + sequence(depth);
    return text;
  }

  std::string sequence(int depth) {
    std::string text;
    for (uint32_t i = pick(4); i > 0; --i) text += item(depth) + " ";
    return text;
  }

  std::string item(int depth) {
    static const char* const kAtoms[] = {"\"a\"", "\"b\"", "\"ab\"", "[ab]", "[^a]", "[a\xC3\xA9]", "\"\"",
                                         ".",     "r1",    "r2",     "root", "r1",   "r2"};
    static const char* const kRepeats[] = {"", "", "", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}", "{2,}"};
    const bool group = depth > 0 && pick(4) == 0;
    std::string text = group ? "(" + choice(depth - 1) + ")" : kAtoms[pick(std::size(kAtoms))];
    return text + kRepeats[pick(std::size(kRepeats))];
  }

  std::mt19937 random_;
};

}  // namespace caravan::engine::test
