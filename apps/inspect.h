// caravan inspect FILE: what a GGUF model holds, for people and (--json) for programs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "gguf/reader.h"

namespace caravan::app {

// The subcommand. Returns the exit status; throws RequestError for bad arguments, FormatError for a bad file.
int run_inspect(int argc, char** argv);

// Metadata (long values shortened), the table of tensors, and totals, as text in columns.
std::string describe(const gguf::Model& model);

// The same as one JSON object with "metadata", "tensors" and "totals"; arrays longer than max_elements are cut, their
// full length is in "length". Text that is not UTF-8 is shown with replacement characters.
nlohmann::json describe_json(const gguf::Model& model, size_t max_elements);

}  // namespace caravan::app
