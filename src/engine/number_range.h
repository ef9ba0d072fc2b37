// Ranges of numbers as GBNF over their decimal digits.
#pragma once

#include <optional>
#include <string>

namespace caravan::engine {

// Bounds as a JSON schema gives them; all that are set hold.
struct NumberBounds {
  std::optional<double> minimum, exclusive_minimum, maximum, exclusive_maximum;
  bool empty() const { return !minimum && !exclusive_minimum && !maximum && !exclusive_maximum; }
};

// The whole numbers within the bounds, of at most 16 digits, without exponent. Throws RequestError when there is none,
// or for a lower bound above 10^15 or an upper one below -10^15.
std::string grammar_for_integers(const NumberBounds& bounds);

// The decimal numbers within the bounds (with up to 16 digits before and about as many after the point), without
// exponent. Throws like grammar_for_integers().
std::string grammar_for_numbers(const NumberBounds& bounds);

}  // namespace caravan::engine
