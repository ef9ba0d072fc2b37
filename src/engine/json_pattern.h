// Regular expressions of JSON schemas ("pattern") -> GBNF. Understood: ECMA-262 without look-around, back-references,
// word boundaries and Unicode properties; ^ and $ only at the ends of the expression or of its alternatives.
#pragma once

#include <string>
#include <string_view>

namespace caravan::engine {

// A GBNF expression for what stands between the quotes of a JSON string whose value pattern finds a match in. char_rule
// is the rule of one character of a JSON string. Throws RequestError naming what is not supported and where.
std::string grammar_for_pattern(std::string_view pattern, std::string_view char_rule);

}  // namespace caravan::engine
