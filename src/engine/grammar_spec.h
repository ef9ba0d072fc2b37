// What a request says about the form of its answer: a grammar, and for a lazy one what makes it apply.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace caravan::engine {

// What makes a lazy grammar apply: from there on the answer must match it, the trigger itself included.
struct GrammarTrigger {
  enum class Kind : uint8_t {
    token,         // this token is generated
    word,          // the answer contains text
    pattern,       // the answer contains a match of the regular expression text; the grammar applies from its first
                   // non-empty capture group on, or from the start of the match
    pattern_full,  // the whole answer so far matches text; otherwise like pattern
  };
  Kind kind = Kind::word;
  std::string text = {};
  int32_t token = -1;  // Kind::token
  bool operator==(const GrammarTrigger&) const = default;
};

// A thought that begins an answer, white space before it aside: the words in it trigger nothing.
struct GrammarThought {
  std::string begin = {}, end = {};  // its marks; end empty: there is none
  bool open = false;                 // the answer begins inside it
  bool operator==(const GrammarThought&) const = default;
};

// The answer must be a text of the grammar; an end-of-generation token is possible only where the grammar can end.
// For a JSON schema, text comes from grammar_for_schema() or SchemaGrammar (json_schema.h).
struct GrammarSpec {
  std::string text = {};                      // GBNF, docs/grammar.md; its first symbol is the rule root
  bool lazy = false;                          // nothing is constrained before a trigger occurs
  std::vector<GrammarTrigger> triggers = {};  // at least one when lazy, else none
  // Control tokens that the grammar may match by their text. Others occur only where it names them: <[id]>, <text>.
  std::vector<int32_t> special_tokens = {};
  GrammarThought thought = {};  // of a lazy grammar
  bool operator==(const GrammarSpec&) const = default;
};

}  // namespace caravan::engine
