// The options that constrain the form of answers: --grammar, --json-schema and their files.
#pragma once

#include <optional>

#include "engine/grammar_spec.h"
#include "options.h"

namespace caravan::app {

// Adds the options; the last one given sets grammar. Throws RequestError while parsing for a file that cannot be read
// and a schema that cannot be converted; mistakes in a grammar are found by engine::GrammarCompiler.
void add_grammar_options(OptionParser& parser, std::optional<engine::GrammarSpec>& grammar);

}  // namespace caravan::app
