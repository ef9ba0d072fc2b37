// Arbitrary bytes as a JSON schema: it is refused, or becomes a grammar that the grammar parser accepts; and a text of
// that grammar, written by taking the first byte that is possible, is JSON.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "engine/gbnf.h"
#include "engine/grammar_machine.h"
#include "engine/json_schema.h"

namespace caravan {
namespace {

// Bytes that come to an end soon come first.
std::string write(engine::GrammarMachine& machine, const std::string& order) {
  std::string text;
  auto state = machine.initial();
  while (!machine.accepts(state) && text.size() < 2000) {
    auto next = engine::GrammarMachine::kDead;
    for (size_t i = 0; i < order.size() && next == engine::GrammarMachine::kDead; ++i) {
      next = machine.step(state, static_cast<uint8_t>(order[i]));
      if (next != engine::GrammarMachine::kDead) text += order[i];
    }
    if (next == engine::GrammarMachine::kDead) return "";
    state = next;
  }
  return machine.accepts(state) ? text : "";
}

}  // namespace
}  // namespace caravan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  using Json = nlohmann::ordered_json;
  // As a server parses requests: no deeper than 64 levels.
  const auto shallow = [](int depth, nlohmann::detail::parse_event_t, Json&) { return depth <= 64; };
  const Json schema = Json::parse(data, data + size, shallow, false);
  if (schema.is_discarded()) return 0;
  std::string grammar;
  try {
    grammar = engine::grammar_for_schema(schema);
  } catch (const RequestError&) {
    return 0;
  }
  try {
    const engine::GrammarAutomaton automaton(engine::parse_gbnf(grammar, {1, {}}));
    engine::GrammarMachine machine(automaton);
    std::string order = "\"}]0an";
    for (int byte = 0; byte < 256; ++byte) order += static_cast<char>(byte);
    const std::string text = write(machine, order);
    if (!text.empty() && !Json::accept(text)) {
      std::fprintf(stderr, "not JSON: %s\n%s\n", text.c_str(), grammar.c_str());
      std::abort();
    }
  } catch (const RequestError& error) {
    // Limits, and references that lead to themselves; but never a mistake in what was written here.
    const std::string what = error.what();
    for (const char* fine : {"left-recursive", "too large", "more than", "at most", "too ambiguous", "too much memory"})
      if (what.find(fine) != what.npos) return 0;
    std::fprintf(stderr, "%s\n%s\n", what.c_str(), grammar.c_str());
    std::abort();
  }
  return 0;
}
