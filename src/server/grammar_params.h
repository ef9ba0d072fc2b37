// The fields of a request that say what form its answer has: grammar, json_schema, response_format and what belongs to
// them.
#pragma once

#include <optional>

#include "engine/grammar_spec.h"
#include "server/json.h"
#include "vocab/vocabulary.h"

namespace caravan::server {

// Chat endpoints refuse a grammar and a schema together; the others take the grammar.
enum class GrammarRules : uint8_t { grammar_wins, exclusive };

// The grammar that the request asks for, or fallback where it has none of the fields. Throws RequestError (400) naming
// the field: a wrong shape, an unknown type, a schema that cannot be converted. Mistakes inside a grammar are found
// when the engine compiles it.
std::optional<engine::GrammarSpec> parse_grammar(const Json& body, const vocab::Vocabulary& vocabulary,
                                                 const std::optional<engine::GrammarSpec>& fallback,
                                                 GrammarRules rules = GrammarRules::grammar_wins);

// A trigger as llama-server's API and generation_settings write it: {"type", "value", "token"}.
Json trigger_json(const engine::GrammarTrigger& trigger);

}  // namespace caravan::server
