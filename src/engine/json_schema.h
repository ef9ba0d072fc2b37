// JSON schema -> GBNF: a grammar whose texts are JSON documents that the schema accepts. The subset that is understood,
// and what is refused, is in docs/grammar.md.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace caravan::engine {

// Collects the rules of a grammar: those of schemas and others, e.g. for a tool call around its arguments.
class SchemaGrammar {
 public:
  // Has the rules that JSON is made of: value, object, array, string, number, boolean, null, space and their parts.
  SchemaGrammar();

  // Adds the rules for a JSON value that schema accepts and returns the name of the one to refer to: name, or name
  // with a number when it is taken. References ("$ref") are looked up in schema itself.
  // Throws RequestError naming the path in the schema and what is not supported or contradictory there.
  std::string add_schema(std::string_view name, const nlohmann::ordered_json& schema);

  // Adds `name ::= body` and returns name, or name with a number when that is taken by another body. Characters that
  // cannot stand in a name become '-'.
  std::string add_rule(std::string_view name, std::string_view body);

  // The grammar: one rule per line.
  std::string text() const;

 private:
  friend class SchemaConverter;
  // A name that no rule has, for a rule that refers to itself; its body is set later.
  std::string reserve(std::string_view name);

  std::map<std::string, std::string, std::less<>> rules_;  // body by name
};

// text as a GBNF literal, quotes included.
std::string grammar_literal(std::string_view text);

// A grammar (rule root) of the documents that schema accepts, e.g. {"type":"object"} for any object. Throws like
// SchemaGrammar::add_schema().
std::string grammar_for_schema(const nlohmann::ordered_json& schema);

}  // namespace caravan::engine
