// Grammars of answers that must call a tool, in the syntax of the model's family.
#pragma once

#include <string>

#include "chat/output_parser.h"
#include "server/json.h"

namespace caravan::server {

// GBNF of one call of one of the tools (OpenAI's, checked), or of several. An answer that begins inside the reasoning
// first ends that. Throws RequestError(not_supported) for families that write parameters without JSON, and as
// engine::SchemaGrammar::add_schema() does for the parameters' schemas.
std::string tool_call_grammar(const chat::OutputSyntax& syntax, const chat::ParseOptions& options, const Json& tools,
                              bool several);

}  // namespace caravan::server
