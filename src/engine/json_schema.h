// JSON schema -> GBNF: a grammar whose texts are JSON documents that the schema accepts. The subset that is understood,
// and what is refused, is in docs/grammar.md.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::engine {

// How JSON is written where it stands in something else.
struct JsonNotation {
  bool python = false;         // also 'text', True, False and None
  std::string forbidden = {};  // a text that strings must not hold, as what is around would end with it
};

// Collects the rules of a grammar: those of schemas and others, e.g. for a tool call around its arguments.
class SchemaGrammar {
 public:
  // Has the rules that JSON is made of: value, object, array, string, number, boolean, null, space and their parts.
  explicit SchemaGrammar(JsonNotation notation = {});

  // Adds the rules for a JSON value that schema accepts and returns the name of the one to refer to: name, or name
  // with a number when it is taken. References ("$ref") are looked up in schema itself.
  // Throws RequestError naming the path in the schema and what is not supported or contradictory there.
  std::string add_schema(std::string_view name, const nlohmann::ordered_json& schema);
  // The same for a part of a document, to which references refer.
  std::string add_schema(std::string_view name, const nlohmann::ordered_json& schema,
                         const nlohmann::ordered_json& document);

  // Adds `name ::= body` and returns name, or name with a number when that is taken by another body. Characters that
  // cannot stand in a name become '-'.
  std::string add_rule(std::string_view name, std::string_view body);

  // Adds the rules for any text up to the first place where mark stands, with it, and returns the name of the one to
  // refer to. mark must not be empty.
  std::string add_text_through(std::string_view name, std::string_view mark);

  // Rules in the order in which they were added: how many there are, and without those from n on. Nothing that is left
  // may refer to these.
  size_t n_rules() const { return order_.size(); }
  void remove_rules_from(size_t n);

  // The grammar: one rule per line.
  std::string text() const;

 private:
  friend class SchemaConverter;
  // A name that no rule has, for a rule that refers to itself; its body is set later.
  std::string reserve(std::string_view name);

  std::string add_text_rules(std::string_view name, std::string_view mark, std::string_view others,
                             const std::string& ways);
  // The class of characters that stand in JSON strings as they are, without its closing bracket.
  std::string plain_class() const;

  JsonNotation notation_;
  std::map<std::string, std::string, std::less<>> rules_;  // body by name
  std::vector<std::string> order_;                         // names that were added after the constructor's
};

// text as a GBNF literal, quotes included.
std::string grammar_literal(std::string_view text);

// A grammar (rule root) of the documents that schema accepts, e.g. {"type":"object"} for any object. Throws like
// SchemaGrammar::add_schema().
std::string grammar_for_schema(const nlohmann::ordered_json& schema);

}  // namespace caravan::engine
