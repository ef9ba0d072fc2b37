#include "engine/number_range.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace caravan::engine {
namespace {

constexpr int64_t kMostDigits = 9'999'999'999'999'999;  // 16 digits
constexpr double kLargestBound = 1e15;                  // doubles above may not be whole numbers exactly
constexpr std::string_view kAnyFraction = R"(("." [0-9]{1,16})?)";

struct Bound {
  double value = 0;
  bool inclusive = true;
};

// The stronger of two lower bounds; an upper bound is the lower one of the negated numbers.
std::optional<Bound> stronger(std::optional<double> inclusive, std::optional<double> exclusive) {
  if (!inclusive && !exclusive) return std::nullopt;
  if (!exclusive || (inclusive && *inclusive > *exclusive)) return Bound{*inclusive, true};
  return Bound{*exclusive, false};
}

std::optional<double> negated(std::optional<double> value) { return value ? std::optional(-*value) : std::nullopt; }

std::optional<Bound> lower_bound(const NumberBounds& b) { return stronger(b.minimum, b.exclusive_minimum); }

// Of the negated numbers.
std::optional<Bound> negated_upper_bound(const NumberBounds& b) {
  return stronger(negated(b.maximum), negated(b.exclusive_maximum));
}

[[noreturn]] void fail_empty() { throw RequestError("no number lies within minimum and maximum"); }

std::string joined(const std::vector<std::string>& alternatives) {
  return alternatives.size() == 1 ? alternatives.front() : fmt::format("({})", fmt::join(alternatives, " | "));
}

std::string digit_class(char first, char last) {
  return first == last ? fmt::format("\"{}\"", first) : fmt::format("[{}-{}]", first, last);
}

std::string any_digits(size_t n) { return n == 0 ? "" : n == 1 ? " [0-9]" : fmt::format(" [0-9]{{{}}}", n); }

// Digit strings of one length from low to high.
std::string equally_long(std::string_view low, std::string_view high) {
  if (low.empty()) return "";
  const std::string_view low_rest = low.substr(1), high_rest = high.substr(1);
  if (low.front() == high.front()) {
    const std::string rest = equally_long(low_rest, high_rest);
    return digit_class(low.front(), low.front()) + (rest.empty() ? "" : " " + rest);
  }
  char first = low.front(), last = high.front();
  std::vector<std::string> ways;
  if (low_rest.find_first_not_of('0') != low_rest.npos) {
    ways.push_back(digit_class(first, first) + " " + equally_long(low_rest, std::string(low_rest.size(), '9')));
    ++first;
  }
  std::string end;
  if (high_rest.find_first_not_of('9') != high_rest.npos) {
    end = digit_class(last, last) + " " + equally_long(std::string(high_rest.size(), '0'), high_rest);
    --last;
  }
  if (first <= last) ways.push_back(digit_class(first, last) + any_digits(low_rest.size()));
  if (!end.empty()) ways.push_back(end);
  return joined(ways);
}

// Whole numbers from low to high, 0 <= low <= high.
std::string whole_numbers(int64_t low, int64_t high) {
  std::vector<std::string> ways;
  int64_t longest = 9;  // of as many digits as low
  while (longest < low) longest = longest * 10 + 9;
  for (; low <= high; low = longest + 1, longest = longest * 10 + 9) {
    // From a power of ten on, all longer numbers are alike.
    const std::string first = std::to_string(low);
    const bool from_power = low > 0 && first.find_first_not_of('0', 1) == first.npos && first[0] == '1';
    if (from_power && high == kMostDigits) {
      ways.push_back(fmt::format("[1-9] [0-9]{{{},15}}", first.size() - 1));
      break;
    }
    ways.push_back(equally_long(first, std::to_string(std::min(longest, high))));
    if (longest >= high) break;
  }
  return joined(ways);
}

struct IntegerRange {
  int64_t low = -kMostDigits, high = kMostDigits;
};

// The first whole number that the bound allows.
int64_t first_integer(const Bound& bound) {
  if (bound.value > kLargestBound) throw RequestError("bounds beyond 10^15 are not supported");
  if (bound.value < -kLargestBound) return -kMostDigits;
  const double ceiling = std::ceil(bound.value);
  return static_cast<int64_t>(ceiling) + (!bound.inclusive && ceiling == bound.value ? 1 : 0);
}

// A bound that is not negative, in decimal.
struct Decimal {
  int64_t whole = 0;
  std::string fraction;  // digits after the point, the last one not 0
  bool inclusive = true;
};

Decimal decimal_of(const Bound& bound) {
  if (bound.value > kLargestBound) throw RequestError("bounds beyond 10^15 are not supported");
  // Shortest form that reads back as the same number; fmt keeps it free of an exponent with 'f' only for a fixed number
  // of digits, so the exponent is applied here.
  const std::string text = fmt::format("{:.17f}", bound.value);
  double read_back = 0;
  std::string shortest = text;
  for (int digits = 0; digits <= 17; ++digits) {
    shortest = fmt::format("{:.{}f}", bound.value, digits);
    read_back = std::stod(shortest);
    if (read_back == bound.value) break;
  }
  Decimal decimal;
  decimal.inclusive = bound.inclusive;
  const size_t point = shortest.find('.');
  decimal.whole = std::stoll(shortest.substr(0, point));
  if (point != shortest.npos) decimal.fraction = shortest.substr(point + 1);
  decimal.fraction.erase(decimal.fraction.find_last_not_of('0') + 1);
  return decimal;
}

// Digits after the point, at least as large as those given (with inclusive: or equal to them).
std::string digits_from(std::string_view digits, bool inclusive) {
  if (digits.empty()) return inclusive ? "[0-9]{0,16}" : "[0]{0,15} [1-9] [0-9]{0,16}";
  const std::string same = digit_class(digits[0], digits[0]) + " " + digits_from(digits.substr(1), inclusive);
  if (digits[0] == '9') return same;
  return fmt::format("({} | {} [0-9]{{0,16}})", same, digit_class(static_cast<char>(digits[0] + 1), '9'));
}

// Digits after the point, at most as large as those given; empty where there are none. digits is not empty.
std::string digits_to(std::string_view digits, bool inclusive) {
  std::vector<std::string> ways;
  if (digits[0] > '0') ways.push_back(digit_class('0', static_cast<char>(digits[0] - 1)) + " [0-9]{0,16}");
  const std::string same = digit_class(digits[0], digits[0]);
  if (digits.size() > 1) {
    ways.push_back(fmt::format("{} ({})?", same, digits_to(digits.substr(1), inclusive)));
  } else if (inclusive) {
    ways.push_back(same + " [0]{0,16}");
  }
  return joined(ways);
}

// What follows a whole part that is the bound's own.
std::string fraction_from(const Decimal& low) {
  if (low.fraction.empty()) return low.inclusive ? std::string(kAnyFraction) : "\".\" " + digits_from("", false);
  return "\".\" " + digits_from(low.fraction, low.inclusive);
}

std::optional<std::string> fraction_to(const Decimal& high) {
  if (high.fraction.empty()) {
    if (!high.inclusive) return std::nullopt;
    return R"(("." [0]{1,16})?)";
  }
  return fmt::format("(\".\" {})?", digits_to(high.fraction, high.inclusive));
}

// Digits between two strings of equal length, low < high; text so far may end where low has only zeros left.
std::string digits_between(std::string_view low, bool low_inclusive, std::string_view high, bool high_inclusive) {
  if (low[0] == high[0]) {
    const std::string rest = digits_between(low.substr(1), low_inclusive, high.substr(1), high_inclusive);
    const bool may_end = low_inclusive && low.find_first_not_of('0', 1) == low.npos;
    return fmt::format("{} ({}){}", digit_class(low[0], low[0]), rest, may_end ? "?" : "");
  }
  const auto without_zeros = [](std::string_view digits) { return digits.substr(0, digits.find_last_not_of('0') + 1); };
  std::vector<std::string> ways{digit_class(low[0], low[0]) + " " +
                                digits_from(without_zeros(low.substr(1)), low_inclusive)};
  if (low[0] + 1 < high[0])
    ways.push_back(digit_class(static_cast<char>(low[0] + 1), static_cast<char>(high[0] - 1)) + " [0-9]{0,16}");
  const std::string_view high_rest = without_zeros(high.substr(1));
  const std::string last = digit_class(high[0], high[0]);
  if (!high_rest.empty()) {
    ways.push_back(fmt::format("{} ({})?", last, digits_to(high_rest, high_inclusive)));
  } else if (high_inclusive) {
    ways.push_back(last + " [0]{0,16}");
  }
  return joined(ways);
}

// Both bounds have the same whole part.
std::string fraction_between(const Decimal& low, const Decimal& high) {
  std::string a = low.fraction, b = high.fraction;
  a.resize(std::max(a.size(), b.size()), '0');
  b.resize(a.size(), '0');
  if (a > b || (a == b && !(low.inclusive && high.inclusive))) fail_empty();
  if (a.empty()) return R"(("." [0]{1,16})?)";
  if (a == b) return fmt::format("\".{}\" [0]{{0,16}}", low.fraction);
  const bool may_end = low.inclusive && low.fraction.empty();
  return fmt::format("(\".\" {}){}", digits_between(a, low.inclusive, b, high.inclusive), may_end ? "?" : "");
}

// Numbers from low to high without a sign.
std::string magnitudes(const Decimal& low, const std::optional<Decimal>& high) {
  if (high && high->whole < low.whole) fail_empty();
  const std::string first = fmt::format("\"{}\" ", low.whole);
  if (high && high->whole == low.whole) return first + fraction_between(low, *high);
  std::vector<std::string> ways{first + fraction_from(low)};
  const int64_t last_whole = high ? high->whole - 1 : kMostDigits;
  if (low.whole + 1 <= last_whole)
    ways.push_back(fmt::format("{} {}", whole_numbers(low.whole + 1, last_whole), kAnyFraction));
  if (high)
    if (const auto fraction = fraction_to(*high)) ways.push_back(fmt::format("\"{}\" {}", high->whole, *fraction));
  return joined(ways);
}

}  // namespace

std::string grammar_for_integers(const NumberBounds& bounds) {
  IntegerRange range;
  if (const auto low = lower_bound(bounds)) range.low = first_integer(*low);
  if (const auto high = negated_upper_bound(bounds)) range.high = -first_integer(*high);
  if (range.low > range.high) fail_empty();
  std::vector<std::string> ways;
  if (range.high >= 0) ways.push_back(whole_numbers(std::max<int64_t>(range.low, 0), range.high));
  if (range.low < 0) ways.push_back("\"-\" " + whole_numbers(std::max<int64_t>(-range.high, 1), -range.low));
  return joined(ways);
}

std::string grammar_for_numbers(const NumberBounds& bounds) {
  std::optional<Bound> low = lower_bound(bounds), high = negated_upper_bound(bounds);
  if (low && low->value < -kLargestBound) low.reset();
  if (high && high->value < -kLargestBound) high.reset();
  if (low && high &&
      (low->value > -high->value || (low->value == -high->value && !(low->inclusive && high->inclusive))))
    fail_empty();
  std::vector<std::string> ways;
  const auto above_zero = [](const std::optional<Bound>& bound) { return bound && bound->value >= 0; };
  const auto most = [](const std::optional<Bound>& negated_bound) -> std::optional<Decimal> {
    if (!negated_bound) return std::nullopt;
    return decimal_of({-negated_bound->value, negated_bound->inclusive});
  };
  // high is a bound of the negated number: below zero it leaves room above.
  const bool zero_is_too_much = high && (high->value > 0 || (high->value == 0 && !high->inclusive));
  if (!zero_is_too_much) ways.push_back(magnitudes(above_zero(low) ? decimal_of(*low) : Decimal{}, most(high)));
  if (!above_zero(low)) {
    const Decimal least = above_zero(high) && high->value > 0 ? decimal_of(*high)
                                                              : Decimal{.whole = 0, .fraction = {}, .inclusive = false};
    ways.push_back("\"-\" " + magnitudes(least, most(low)));
  }
  return joined(ways);
}

}  // namespace caravan::engine
