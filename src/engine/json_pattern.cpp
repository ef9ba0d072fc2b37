#include "engine/json_pattern.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "engine/gbnf.h"
#include "vocab/utf8.h"

namespace caravan::engine {
namespace {

constexpr char32_t kLast = 0x10FFFF;
constexpr uint32_t kMaxNesting = 60;

using Ranges = std::vector<CodeRange>;

Ranges sorted(Ranges ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const CodeRange& a, const CodeRange& b) { return a.first < b.first; });
  Ranges merged;
  for (const CodeRange& range : ranges) {
    if (!merged.empty() && range.first <= merged.back().last + 1) {
      merged.back().last = std::max(merged.back().last, range.last);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

Ranges others(const Ranges& ranges) {
  Ranges result;
  char32_t next = 0;
  for (const CodeRange& range : sorted(ranges)) {
    if (range.first > next) result.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= kLast) result.push_back({next, kLast});
  return result;
}

const Ranges kDigits{{'0', '9'}};
const Ranges kWord{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
// ECMA-262's WhiteSpace and LineTerminator.
const Ranges kSpaces{{0x09, 0x0D},     {0x20, 0x20},     {0xA0, 0xA0},     {0x1680, 0x1680}, {0x2000, 0x200A},
                     {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
const Ranges kLineEnds{{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
// Characters that a JSON string holds only escaped; DEL need not be, but JSON grammars leave it out.
const Ranges kEscaped{{0, 0x1F}, {'"', '"'}, {'\\', '\\'}, {0x7F, 0x7F}};

std::string class_text(const Ranges& ranges) {
  const auto one = [](char32_t c) {
    return c < 0x80 ? fmt::format("\\x{:02X}", static_cast<uint32_t>(c))
                    : fmt::format("\\U{:08X}", static_cast<uint32_t>(c));
  };
  std::string text = "[";
  for (const CodeRange& range : ranges) {
    text += one(range.first);
    if (range.last > range.first) text += "-" + one(range.last);
  }
  return text + "]";
}

// The JSON escapes of a character, as a GBNF literal.
std::string escape_text(char32_t c) {
  switch (c) {
    case '"':
      return R"("\\\"")";
    case '\\':
      return R"("\\\\")";
    case '\b':
      return R"("\\b")";
    case '\f':
      return R"("\\f")";
    case '\n':
      return R"("\\n")";
    case '\r':
      return R"("\\r")";
    case '\t':
      return R"("\\t")";
    default:
      return fmt::format("\"\\\\u{:04x}\"", static_cast<uint32_t>(c));
  }
}

class PatternParser {
 public:
  PatternParser(std::string_view pattern, std::string_view char_rule) : pattern_(pattern), char_rule_(char_rule) {}

  // The alternatives of the whole expression; each may be anchored.
  std::string parse() {
    std::string text;
    do {
      const bool at_begin = take('^');
      const std::string body = parse_sequence(0);
      const bool at_end = take('$');
      if (!text.empty()) text += " | ";
      text += fmt::format("{}{}{}", at_begin ? "" : fmt::format("{}* ", char_rule_), body,
                          at_end ? "" : fmt::format(" {}*", char_rule_));
    } while (take('|'));
    if (at_ < pattern_.size()) fail(fmt::format("'{}' is not expected here", pattern_[at_]));
    return "(" + text + ")";
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw RequestError(fmt::format("pattern '{}', at byte {}: {}", pattern_, at_, what));
  }

  bool next_is(char c) const { return at_ < pattern_.size() && pattern_[at_] == c; }

  bool take(char c) {
    if (!next_is(c)) return false;
    ++at_;
    return true;
  }

  char32_t take_character() {
    if (at_ >= pattern_.size()) fail("the expression ends too early");
    const vocab::Utf8Char c = vocab::decode_utf8(pattern_, at_);
    if (c.state != vocab::Utf8Char::State::valid) fail("the expression is not UTF-8");
    at_ += c.length;
    return c.code_point;
  }

  std::string parse_choice(uint32_t nesting) {
    std::string text = parse_sequence(nesting);
    while (take('|')) text += " | " + parse_sequence(nesting);
    return "(" + text + ")";
  }

  std::string parse_sequence(uint32_t nesting) {
    std::string text = "\"\"";
    while (at_ < pattern_.size() && !next_is('|') && !next_is(')')) {
      if (next_is('$') && nesting == 0) {
        // An anchor at the end of an alternative is the caller's.
        if (at_ + 1 == pattern_.size() || pattern_[at_ + 1] == '|') break;
        fail("'$' is supported only at the end");
      }
      text += " " + parse_item(nesting);
      text += parse_quantifier();
    }
    return text;
  }

  std::string parse_item(uint32_t nesting) {
    switch (pattern_[at_]) {
      case '(':
        return parse_group(nesting);
      case '[':
        return characters(parse_class());
      case '.':
        ++at_;
        return characters(others(kLineEnds));
      case '\\':
        return characters(parse_escape());
      case '^':
      case '$':
        fail("'^' and '$' are supported only at the ends");
      case '*':
      case '+':
      case '?':
      case '{':
        fail("there is nothing to repeat");
      default: {
        const char32_t c = take_character();
        return characters({{c, c}});
      }
    }
  }

  std::string parse_group(uint32_t nesting) {
    if (nesting >= kMaxNesting) fail("too many nested groups");
    ++at_;
    if (take('?')) {
      if (next_is('<') && at_ + 1 < pattern_.size() && pattern_[at_ + 1] != '=' && pattern_[at_ + 1] != '!') {
        const size_t end = pattern_.find('>', at_);
        if (end == pattern_.npos) fail("the group's name has no '>'");
        at_ = end + 1;
      } else if (!take(':')) {
        fail("look-around and flags are not supported");
      }
    }
    std::string text = parse_choice(nesting + 1);
    if (!take(')')) fail("the group has no ')'");
    return text;
  }

  uint32_t parse_number() {
    uint32_t value = 0;
    if (at_ >= pattern_.size() || pattern_[at_] < '0' || pattern_[at_] > '9') fail("expected a number");
    while (at_ < pattern_.size() && pattern_[at_] >= '0' && pattern_[at_] <= '9') {
      value = value * 10 + static_cast<uint32_t>(pattern_[at_++] - '0');
      if (value > kMaxGrammarRepetitions) fail(fmt::format("more than {} repetitions", kMaxGrammarRepetitions));
    }
    return value;
  }

  std::string parse_quantifier() {
    std::string text;
    if (take('*')) {
      text = "*";
    } else if (take('+')) {
      text = "+";
    } else if (take('?')) {
      text = "?";
    } else if (take('{')) {
      const uint32_t least = parse_number();
      text = fmt::format("{{{}}}", least);
      if (take(',')) text = next_is('}') ? fmt::format("{{{},}}", least) : parse_most(least);
      if (!take('}')) fail("expected '}'");
    }
    if (!text.empty()) take('?');  // lazy or not: the same texts
    return text;
  }

  std::string parse_most(uint32_t least) {
    const uint32_t most = parse_number();
    if (most < least) fail("the maximum is below the minimum");
    return fmt::format("{{{},{}}}", least, most);
  }

  char32_t parse_hex(size_t n_digits) {
    uint32_t value = 0;
    for (size_t i = 0; i < n_digits; ++i) {
      const char c = at_ < pattern_.size() ? pattern_[at_] : '\0';
      const char lower = static_cast<char>(c | 0x20);
      const int digit = c >= '0' && c <= '9' ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
      if (digit < 0) fail("expected a hexadecimal digit");
      value = value * 16 + static_cast<uint32_t>(digit);
      ++at_;
    }
    if (value >= 0xD800 && value <= 0xDFFF) fail("surrogates are not supported");
    return value;
  }

  Ranges parse_escape() {
    ++at_;
    const char32_t c = take_character();
    switch (c) {
      case 'd':
        return kDigits;
      case 'D':
        return others(kDigits);
      case 'w':
        return kWord;
      case 'W':
        return others(kWord);
      case 's':
        return kSpaces;
      case 'S':
        return others(kSpaces);
      case 'n':
        return {{'\n', '\n'}};
      case 'r':
        return {{'\r', '\r'}};
      case 't':
        return {{'\t', '\t'}};
      case 'f':
        return {{'\f', '\f'}};
      case 'v':
        return {{'\v', '\v'}};
      case 'x':
      case 'u': {
        const char32_t value = parse_hex(c == 'x' ? 2 : 4);
        return {{value, value}};
      }
      default:
        if (c > 0x7F || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
          fail("this escape is not supported");
        return {{c, c}};
    }
  }

  Ranges parse_class() {
    ++at_;
    const bool negated = take('^');
    Ranges all;
    while (!next_is(']')) {
      Ranges part = class_part();
      const bool single = part.size() == 1 && part[0].first == part[0].last;
      if (next_is('-') && at_ + 1 < pattern_.size() && pattern_[at_ + 1] != ']') {
        ++at_;
        const Ranges end = class_part();
        if (!single || end.size() != 1 || end[0].first != end[0].last) fail("a range lies between two characters");
        if (end[0].first < part[0].first) fail("the range ends before it begins");
        part[0].last = end[0].first;
      }
      all.insert(all.end(), part.begin(), part.end());
    }
    ++at_;
    return negated ? others(all) : sorted(all);
  }

  Ranges class_part() {
    if (next_is('\\')) {
      if (at_ + 1 < pattern_.size() && pattern_[at_ + 1] == 'b') {
        at_ += 2;
        return {{'\b', '\b'}};
      }
      return parse_escape();
    }
    const char32_t c = take_character();
    return {{c, c}};
  }

  // One character of ranges, as JSON writes it.
  std::string characters(const Ranges& ranges) const {
    Ranges outside = others(ranges);
    outside.insert(outside.end(), kEscaped.begin(), kEscaped.end());
    outside.push_back({0xD800, 0xDFFF});
    const Ranges plain = others(outside);
    std::string text = plain.empty() ? "" : class_text(plain);
    for (const CodeRange& escaped : kEscaped) {
      for (char32_t c = escaped.first; c <= escaped.last; ++c) {
        const bool inside =
            std::any_of(ranges.begin(), ranges.end(), [c](const CodeRange& r) { return r.first <= c && c <= r.last; });
        if (inside) text += (text.empty() ? "" : " | ") + escape_text(c);
      }
    }
    if (text.empty()) fail("the class contains no character");
    return plain.empty() || text.find(" | ") != text.npos ? "(" + text + ")" : text;
  }

  std::string_view pattern_, char_rule_;
  size_t at_ = 0;
};

}  // namespace

std::string grammar_for_pattern(std::string_view pattern, std::string_view char_rule) {
  return PatternParser(pattern, char_rule).parse();
}

}  // namespace caravan::engine
