#include "grammar_options.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "engine/json_schema.h"

namespace caravan::app {
namespace {

engine::GrammarSpec spec_for(const std::string& schema) {
  const auto json = nlohmann::ordered_json::parse(schema, nullptr, false);
  if (json.is_discarded()) throw RequestError("the JSON schema is not valid JSON");
  engine::GrammarSpec spec;
  spec.text = engine::grammar_for_schema(json);
  return spec;
}

engine::GrammarSpec spec_of(std::string text) {
  engine::GrammarSpec spec;
  spec.text = std::move(text);
  return spec;
}

}  // namespace

void add_grammar_options(OptionParser& parser, std::optional<engine::GrammarSpec>& grammar) {
  parser.section("Form of the answer (requests may override)");
  parser.add({{"--grammar"},
              "GBNF",
              "a grammar that every answer matches (docs/grammar.md)",
              {},
              [&grammar](const std::string& value) { grammar = spec_of(value); }});
  parser.add({{"--grammar-file"}, "FILE", "file that holds the grammar", {}, [&grammar](const std::string& value) {
                grammar = spec_of(read_text_file(value));
              }});
  parser.add({{"-j", "--json-schema"},
              "SCHEMA",
              "a JSON schema that every answer matches; {} is any JSON",
              {},
              [&grammar](const std::string& value) { grammar = spec_for(value); }});
  parser.add({{"-jf", "--json-schema-file"},
              "FILE",
              "file that holds the JSON schema",
              {},
              [&grammar](const std::string& value) { grammar = spec_for(read_text_file(value)); }});
}

}  // namespace caravan::app
