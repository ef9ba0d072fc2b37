// Grammars of tool calls, in the syntax of the model's family: for answers that must call a tool, and lazy ones for
// answers that may.
#pragma once

#include <optional>

#include "chat/output_parser.h"
#include "engine/grammar_spec.h"
#include "server/json.h"

namespace caravan::server {

// How many calls an answer may have.
enum class CallCount { one, several };

// The grammar of an answer that calls one of the tools (OpenAI's, checked) and is nothing else, in the form in which
// the family's template writes calls. An answer that begins inside the reasoning first ends that. special_tokens are
// left to the caller. Throws RequestError: as engine::SchemaGrammar::add_schema() does for the parameters' schemas, and
// not_supported for what cannot be demanded of parameters that the family writes without JSON.
engine::GrammarSpec forced_call_grammar(const chat::OutputSyntax& syntax, const chat::ParseOptions& options,
                                        const Json& tools, CallCount count);

// The lazy grammar of an answer that may call: any text, until a call begins outside of the reasoning; from there on
// calls of the tools with arguments that their schemas accept, and the end. White space is freer than in
// forced_call_grammar(). Arguments whose schema is not supported are any object, which is logged (debug). nullopt for
// families without a text that nothing but calls begins with, and where a tool's name cannot be written.
std::optional<engine::GrammarSpec> lazy_call_grammar(const chat::OutputSyntax& syntax,
                                                     const chat::ParseOptions& options, const Json& tools,
                                                     CallCount count);

}  // namespace caravan::server
