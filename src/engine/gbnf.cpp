#include "engine/gbnf.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <utility>

#include "base/error.h"
#include "vocab/utf8.h"

namespace caravan::engine {
namespace {

using Expression = GrammarExpression;
using Kind = GrammarExpression::Kind;

constexpr char32_t kLastCodePoint = 0x10FFFF;
constexpr CodeRange kSurrogates{0xD800, 0xDFFF};
constexpr size_t kMaxOperators = 8;  // repetitions of one symbol, "a*?": bounds the depth of expressions

bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || is_digit(c) || c == '-' || c == '_';
}

// Ascending, disjoint, not adjacent, without surrogates.
std::vector<CodeRange> normalised(std::vector<CodeRange> ranges) {
  std::vector<CodeRange> clipped;
  for (const CodeRange& range : ranges) {
    if (range.first < kSurrogates.first)
      clipped.push_back({range.first, std::min<char32_t>(range.last, kSurrogates.first - 1)});
    if (range.last > kSurrogates.last)
      clipped.push_back({std::max<char32_t>(range.first, kSurrogates.last + 1), range.last});
  }
  std::sort(clipped.begin(), clipped.end(), [](const CodeRange& a, const CodeRange& b) { return a.first < b.first; });
  std::vector<CodeRange> merged;
  for (const CodeRange& range : clipped) {
    if (!merged.empty() && range.first <= merged.back().last + 1) {
      merged.back().last = std::max(merged.back().last, range.last);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::vector<CodeRange> complement(const std::vector<CodeRange>& ranges) {
  std::vector<CodeRange> others;
  char32_t next = 0;
  for (const CodeRange& range : ranges) {
    if (range.first > next) others.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= kLastCodePoint) others.push_back({next, kLastCodePoint});
  return normalised(std::move(others));
}

enum class Newlines : uint8_t { end_the_rule, are_spaces };

class Parser {
 public:
  Parser(std::string_view text, const TokenNames& tokens) : text_(text), tokens_(tokens) {}

  GrammarRules parse() {
    if (text_.size() > kMaxGrammarBytes)
      throw RequestError(
          fmt::format("grammar: at most {} bytes are supported, found {}", kMaxGrammarBytes, text_.size()));
    skip_space(Newlines::are_spaces);
    while (at_ < text_.size()) parse_rule();
    for (const auto& [index, where] : first_use_) {
      if (!defined_[index]) fail(where, fmt::format("the rule '{}' is not defined", rules_.rules[index].name));
    }
    const auto root = index_.find("root");
    if (root == index_.end()) throw RequestError("grammar: the rule 'root', where it starts, is not defined");
    rules_.root = root->second;
    return std::move(rules_);
  }

 private:
  [[noreturn]] void fail(size_t where, std::string_view what) const {
    const std::string_view before = text_.substr(0, where);
    const size_t line = static_cast<size_t>(std::count(before.begin(), before.end(), '\n')) + 1;
    const size_t line_begin = before.find_last_of('\n') == before.npos ? 0 : before.find_last_of('\n') + 1;
    throw RequestError(fmt::format("grammar line {}, column {}: {}", line, where - line_begin + 1, what));
  }

  [[noreturn]] void fail_expected(std::string_view expected) const {
    fail(at_, fmt::format("expected {}, found {}", expected, found()));
  }

  std::string found() const {
    if (at_ >= text_.size()) return "the end";
    if (text_[at_] == '\n' || text_[at_] == '\r') return "the end of the line";
    const vocab::Utf8Char c = vocab::decode_utf8(text_, at_);
    if (c.state != vocab::Utf8Char::State::valid) return "bytes that are not UTF-8";
    return fmt::format("'{}'", text_.substr(at_, c.length));
  }

  bool next_is(char c) const { return at_ < text_.size() && text_[at_] == c; }

  bool take(char c) {
    if (!next_is(c)) return false;
    ++at_;
    return true;
  }

  void skip_space(Newlines newlines) {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '#') {
        while (at_ < text_.size() && text_[at_] != '\n' && text_[at_] != '\r') ++at_;
      } else if (c == ' ' || c == '\t' || (newlines == Newlines::are_spaces && (c == '\n' || c == '\r'))) {
        ++at_;
      } else {
        return;
      }
    }
  }

  std::string_view parse_name() {
    const size_t begin = at_;
    while (at_ < text_.size() && is_name_char(text_[at_])) ++at_;
    if (begin == at_) fail_expected("the name of a rule");
    return text_.substr(begin, at_ - begin);
  }

  uint32_t rule_index(std::string_view name, size_t where) {
    const auto known = index_.find(name);
    if (known != index_.end()) return known->second;
    if (rules_.rules.size() >= kMaxGrammarRules) fail(where, fmt::format("more than {} rules", kMaxGrammarRules));
    const auto index = static_cast<uint32_t>(rules_.rules.size());
    rules_.rules.push_back({std::string(name), {}});
    defined_.push_back(false);
    index_.emplace(name, index);
    return index;
  }

  void parse_rule() {
    const size_t begin = at_;
    const std::string_view name = parse_name();
    const uint32_t index = rule_index(name, begin);
    if (defined_[index]) fail(begin, fmt::format("the rule '{}' is defined twice", name));
    skip_space(Newlines::end_the_rule);
    if (text_.substr(at_, 3) != "::=") fail_expected("'::='");
    at_ += 3;
    skip_space(Newlines::are_spaces);
    Expression body = parse_choice(Newlines::end_the_rule, 0);
    if (at_ < text_.size() && !next_is('\n') && !next_is('\r')) fail_expected("the end of the rule");
    rules_.rules[index].body = std::move(body);
    defined_[index] = true;
    skip_space(Newlines::are_spaces);
  }

  Expression parse_choice(Newlines newlines, uint32_t nesting) {
    Expression choice;
    choice.kind = Kind::choice;
    do {
      if (!choice.children.empty()) skip_space(Newlines::are_spaces);
      choice.children.push_back(parse_sequence(newlines, nesting));
    } while (take('|'));
    return choice.children.size() == 1 ? std::move(choice.children.front()) : choice;
  }

  Expression parse_sequence(Newlines newlines, uint32_t nesting) {
    Expression sequence;
    sequence.kind = Kind::sequence;
    while (std::optional<Expression> item = parse_item(nesting)) {
      skip_space(newlines);
      size_t n_operators = 0;
      while (std::optional<Expression> repeat = parse_repeat()) {
        if (++n_operators > kMaxOperators) fail(at_, "too many repetition operators in a row");
        repeat->children.push_back(std::move(*item));
        item = std::move(repeat);
        skip_space(newlines);
      }
      sequence.children.push_back(std::move(*item));
    }
    return sequence.children.size() == 1 ? std::move(sequence.children.front()) : sequence;
  }

  // One symbol; nullopt where none begins.
  std::optional<Expression> parse_item(uint32_t nesting) {
    if (at_ >= text_.size()) return std::nullopt;
    const char c = text_[at_];
    if (c == '"') return parse_literal();
    if (c == '[') return parse_class();
    if (c == '<' || c == '!') return parse_token();
    if (c == '(') return parse_group(nesting);
    Expression item;
    if (c == '.') {
      ++at_;
      item.kind = Kind::character;
      item.ranges = normalised({{0, kLastCodePoint}});
      return item;
    }
    if (!is_name_char(c)) return std::nullopt;
    const size_t where = at_;
    item.kind = Kind::rule;
    item.rule = rule_index(parse_name(), where);
    first_use_.emplace_back(item.rule, where);
    return item;
  }

  Expression parse_group(uint32_t nesting) {
    if (nesting >= kMaxGrammarNesting) fail(at_, fmt::format("more than {} nested groups", kMaxGrammarNesting));
    ++at_;
    skip_space(Newlines::are_spaces);
    Expression group = parse_choice(Newlines::are_spaces, nesting + 1);
    if (!take(')')) fail_expected("')'");
    return group;
  }

  Expression parse_literal() {
    const size_t begin = at_++;
    Expression literal;
    while (!next_is('"')) {
      if (at_ >= text_.size()) fail(begin, "the text in quotes has no end");
      const size_t where = at_;
      const char32_t c = parse_character();
      if (c >= kSurrogates.first && c <= kSurrogates.last)
        fail(where, fmt::format("U+{:04X} is half of a surrogate pair, not a character", static_cast<uint32_t>(c)));
      vocab::append_utf8(literal.text, c);
    }
    ++at_;
    return literal;
  }

  Expression parse_class() {
    const size_t begin = at_++;
    const bool negated = take('^');
    Expression result;
    result.kind = Kind::character;
    while (!next_is(']')) {
      if (at_ >= text_.size()) fail(begin, "the character class has no ']'");
      const size_t where = at_;
      CodeRange range;
      range.first = range.last = parse_character();
      if (next_is('-') && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        ++at_;
        range.last = parse_character();
        if (range.last < range.first) fail(where, "the range ends before it begins");
      }
      result.ranges.push_back(range);
    }
    ++at_;
    result.ranges = normalised(std::move(result.ranges));
    if (negated) result.ranges = complement(result.ranges);
    if (result.ranges.empty()) fail(begin, "the character class contains no character");
    return result;
  }

  // One character of a literal or a class, escaped or not.
  char32_t parse_character() {
    if (next_is('\\')) return parse_escape();
    const vocab::Utf8Char c = vocab::decode_utf8(text_, at_);
    if (c.state != vocab::Utf8Char::State::valid) fail(at_, "the grammar is not UTF-8");
    at_ += c.length;
    return c.code_point;
  }

  char32_t parse_escape() {
    const size_t begin = at_++;
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    switch (c) {
      case 'x':
        return parse_hex(2);
      case 'u':
        return parse_hex(4);
      case 'U':
        return parse_hex(8);
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case '\\':
      case '"':
      case '[':
      case ']':
      case '-':
      case '^':
        return static_cast<char32_t>(c);
      default:
        fail(begin, "expected one of the escapes \\n \\r \\t \\\\ \\\" \\[ \\] \\- \\^ \\xHH \\uHHHH \\UHHHHHHHH");
    }
  }

  char32_t parse_hex(size_t n_digits) {
    const std::string_view digits = text_.substr(at_, n_digits);
    uint32_t value = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (digits.size() != n_digits || parsed.ec != std::errc() || parsed.ptr != digits.data() + digits.size())
      fail(at_, fmt::format("expected {} hexadecimal digits", n_digits));
    if (value > kLastCodePoint) fail(at_, fmt::format("U+{:X} is above U+10FFFF", value));
    at_ += n_digits;
    return value;
  }

  // <[id]>, <text>, and both with ! before.
  Expression parse_token() {
    const size_t begin = at_;
    Expression item;
    item.kind = Kind::token;
    item.negated = take('!');
    if (!next_is('<')) fail_expected("'<' and a token after '!'");
    const size_t end = text_.find_first_of(">\n", at_);
    if (end == text_.npos || text_[end] != '>') fail(begin, "the token has no '>'");
    const std::string_view name = text_.substr(at_, end + 1 - at_);
    at_ = end + 1;
    if (name.substr(0, 2) == "<[") {
      const std::string_view digits = name.size() > 4 ? name.substr(2, name.size() - 4) : std::string_view();
      const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), item.token);
      if (digits.empty() || !is_digit(digits.front()) || parsed.ec != std::errc() ||
          parsed.ptr != digits.data() + digits.size() || name.substr(name.size() - 2) != "]>")
        fail(begin, "expected a token id: <[id]>");
      if (static_cast<uint32_t>(item.token) >= tokens_.n_tokens)
        fail(begin, fmt::format("expected a token id below {}, found {}", tokens_.n_tokens, item.token));
      return item;
    }
    const std::optional<int32_t> token = tokens_.find ? tokens_.find(name) : std::nullopt;
    if (!token) fail(begin, fmt::format("'{}' is not one token of this model's vocabulary", name));
    item.token = *token;
    return item;
  }

  uint32_t parse_count() {
    uint32_t count = 0;
    const auto parsed = std::from_chars(text_.data() + at_, text_.data() + text_.size(), count);
    if (!next_is('-') && parsed.ec == std::errc::invalid_argument) fail_expected("a number of repetitions");
    if (parsed.ec != std::errc() || count > kMaxGrammarRepetitions)
      fail(at_, fmt::format("at most {} repetitions are supported", kMaxGrammarRepetitions));
    at_ = static_cast<size_t>(parsed.ptr - text_.data());
    return count;
  }

  // The repetition operator that stands here, without its operand.
  std::optional<Expression> parse_repeat() {
    Expression repeat;
    repeat.kind = Kind::repeat;
    if (take('*')) return repeat;
    if (take('+')) {
      repeat.at_least = 1;
      return repeat;
    }
    if (take('?')) {
      repeat.at_most = 1;
      return repeat;
    }
    const size_t begin = at_;
    if (!take('{')) return std::nullopt;
    skip_space(Newlines::end_the_rule);
    repeat.at_least = parse_count();
    repeat.at_most = repeat.at_least;
    skip_space(Newlines::end_the_rule);
    if (take(',')) {
      skip_space(Newlines::end_the_rule);
      repeat.at_most.reset();
      if (!next_is('}')) repeat.at_most = parse_count();
      skip_space(Newlines::end_the_rule);
    }
    if (!take('}')) fail_expected("'}'");
    if (repeat.at_most && *repeat.at_most < repeat.at_least)
      fail(begin, "the repetition's maximum is below its minimum");
    return repeat;
  }

  std::string_view text_;
  const TokenNames& tokens_;
  size_t at_ = 0;
  GrammarRules rules_;
  std::vector<bool> defined_;                           // by rule
  std::map<std::string, uint32_t, std::less<>> index_;  // by name
  std::vector<std::pair<uint32_t, size_t>> first_use_;  // rule, place of the reference
};

}  // namespace

GrammarRules parse_gbnf(std::string_view text, const TokenNames& tokens) { return Parser(text, tokens).parse(); }

}  // namespace caravan::engine
