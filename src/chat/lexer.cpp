#include "chat/lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "chat/text.h"
#include "chat/value.h"

namespace caravan::chat {
namespace {

// The source with \n line ends and without the last of them.
std::string normalized(std::string_view source) {
  std::string text;
  text.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      text += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      text += source[i];
    }
  }
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || static_cast<unsigned char>(c) >= 0x80;
}
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_part(char c) { return is_name_start(c) || is_digit(c); }

class Lexer {
 public:
  explicit Lexer(std::string_view source) : storage_(normalized(source)), source_(storage_) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) {
      const size_t tag = find_tag();
      if (tag == std::string_view::npos) {
        add_data(source_.substr(at_));
        advance(source_.size());
        break;
      }
      read_tag(tag);
    }
    add(TokenKind::end, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw TemplateError("TemplateSyntaxError", message, line_);
  }

  void add(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  // Adjacent data become one token.
  void add_data(std::string_view text) {
    if (text.empty()) return;
    if (!tokens_.empty() && tokens_.back().kind == TokenKind::data) {
      tokens_.back().text += text;
    } else {
      add(TokenKind::data, std::string(text));
    }
  }

  void advance(size_t to) {
    line_ += static_cast<uint32_t>(
        std::count(source_.begin() + static_cast<ptrdiff_t>(at_), source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    if (to > at_) at_line_start_ = source_[to - 1] == '\n';
    at_ = to;
  }

  char peek(size_t at) const { return at < source_.size() ? source_[at] : '\0'; }
  bool starts_with(size_t at, std::string_view text) const { return source_.substr(at, text.size()) == text; }

  size_t find_tag() const {
    for (size_t at = at_; (at = source_.find('{', at)) != std::string_view::npos; ++at)
      if (peek(at + 1) == '{' || peek(at + 1) == '%' || peek(at + 1) == '#') return at;
    return std::string_view::npos;
  }

  size_t skip_space(size_t at) const {
    while (at < source_.size()) {
      const CodePoint c = code_point_at(source_, at);
      if (!is_space(c.value)) break;
      at += c.size;
    }
    return at;
  }

  // The text before a tag, without what its sign ('-', '+' or none) or lstrip_blocks removes.
  std::string_view data_before(std::string_view text, char sign, bool strips_line) const {
    if (sign == '-') return strip(text, StripSide::right);
    if (sign == '+' || !strips_line) return text;
    const size_t line_begin = text.rfind('\n') + 1;  // 0 where there is none
    if (line_begin == 0 && !at_line_start_) return text;
    const std::string_view last_line = text.substr(line_begin);
    return strip(last_line, StripSide::left).empty() ? text.substr(0, line_begin) : text;
  }

  void read_tag(size_t tag) {
    const char sign_here = peek(tag + 2);
    const char sign = sign_here == '-' || sign_here == '+' ? sign_here : '\0';
    const char type = source_[tag + 1];
    add_data(data_before(source_.substr(at_, tag - at_), sign, type != '{'));
    advance(tag);
    const size_t inside = tag + 2 + (sign != '\0' ? 1 : 0);
    if (type == '#') {
      read_comment(inside);
    } else if (const auto raw = type == '%' ? end_of_raw_tag(inside) : std::nullopt) {
      read_raw(*raw);
    } else {
      advance(inside);
      add(type == '%' ? TokenKind::block_begin : TokenKind::variable_begin, "");
      read_expression(type == '%');
    }
  }

  // Where a tag's or comment's end mark, which begins at `at`, ends together with what it strips; nullopt where none
  // is.
  std::optional<size_t> end_mark(size_t at, char type) const {
    const char marks[] = {type, '}'};
    const std::string_view mark(marks, 2);
    if (peek(at) == '-' && starts_with(at + 1, mark)) return skip_space(at + 3);
    if (type != '}' && peek(at) == '+' && starts_with(at + 1, mark)) return at + 3;
    if (!starts_with(at, mark)) return std::nullopt;
    return at + 2 + (type != '}' && peek(at + 2) == '\n' ? 1 : 0);
  }

  void read_comment(size_t at) {
    for (; at < source_.size(); ++at)
      if (const auto end = end_mark(at, '#')) return advance(*end);
    fail("missing end of comment tag");
  }

  // Behind "{% raw %}", when the tag whose inside begins at `at` is that.
  std::optional<size_t> end_of_raw_tag(size_t at) const {
    at = skip_space(at);
    if (!starts_with(at, "raw")) return std::nullopt;
    at = skip_space(at + 3);
    if (starts_with(at, "-%}")) return skip_space(at + 3);
    return starts_with(at, "%}") ? std::optional(at + 2) : std::nullopt;
  }

  void read_raw(size_t begin) {
    advance(begin);
    for (size_t at = begin; (at = source_.find("{%", at)) != std::string_view::npos; ++at) {
      const char sign_here = peek(at + 2);
      const char sign = sign_here == '-' || sign_here == '+' ? sign_here : '\0';
      const size_t word = skip_space(at + 2 + (sign != '\0' ? 1 : 0));
      if (!starts_with(word, "endraw")) continue;
      const auto end = end_mark(skip_space(word + 6), '%');
      if (!end) continue;
      add_data(data_before(source_.substr(begin, at - begin), sign, true));
      return advance(*end);
    }
    fail("missing end of raw block");
  }

  // Tokens up to and with the end of the tag.
  void read_expression(bool is_block) {
    std::vector<char> open;  // brackets that wait for their end
    for (;;) {
      advance(skip_space(at_));
      if (at_ >= source_.size()) fail("unexpected end of template inside a tag");
      if (open.empty())
        if (const auto end = end_mark(at_, is_block ? '%' : '}')) {
          add(is_block ? TokenKind::block_end : TokenKind::variable_end, "");
          return advance(*end);
        }
      const char c = source_[at_];
      if (c == '\'' || c == '"') {
        read_string(c);
      } else if (is_digit(c)) {
        read_number();
      } else if (is_name_start(c)) {
        size_t end = at_;
        while (end < source_.size() && is_name_part(source_[end])) ++end;
        add(TokenKind::name, std::string(source_.substr(at_, end - at_)));
        advance(end);
      } else {
        read_operator(open);
      }
    }
  }

  void read_operator(std::vector<char>& open) {
    constexpr std::string_view kTwo[] = {"==", "!=", ">=", "<=", "//", "**"};
    for (const std::string_view op : kTwo)
      if (starts_with(at_, op)) {
        add(TokenKind::op, std::string(op));
        return advance(at_ + 2);
      }
    const char c = source_[at_];
    constexpr std::string_view kOne = "+-/*%~[](){}><=.:|,;";
    if (kOne.find(c) == std::string_view::npos)
      fail(fmt::format("unexpected character {}", quote(source_.substr(at_, code_point_at(source_, at_).size))));
    if (c == '(' || c == '[' || c == '{') open.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (open.empty()) fail(fmt::format("unexpected '{}'", c));
      if (open.back() != c) fail(fmt::format("unexpected '{}', expected '{}'", c, open.back()));
      open.pop_back();
    }
    add(TokenKind::op, std::string(1, c));
    advance(at_ + 1);
  }

  void read_number() {
    size_t end = at_;
    const auto digits = [&](auto&& is_one) {
      while (is_one(peek(end)) || (peek(end) == '_' && is_one(peek(end + 1)))) ++end;
    };
    const auto decimal = [](char c) { return is_digit(c); };
    const char prefix = source_[at_] == '0' ? static_cast<char>(peek(at_ + 1) | 0x20) : '\0';
    if (prefix == 'x' || prefix == 'o' || prefix == 'b') {
      end += 2;
      digits([](char c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); });
      add(TokenKind::integer, std::string(source_.substr(at_, end - at_)));
      return advance(end);
    }
    digits(decimal);
    bool is_real = false;
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';  // a.0.1 are two subscripts
    if (!after_dot && peek(end) == '.' && is_digit(peek(end + 1))) {
      is_real = true;
      ++end;
      digits(decimal);
    }
    if (!after_dot && (peek(end) == 'e' || peek(end) == 'E')) {
      const size_t sign = peek(end + 1) == '+' || peek(end + 1) == '-' ? 1 : 0;
      if (is_digit(peek(end + 1 + sign))) {
        is_real = true;
        end += 1 + sign;
        digits(decimal);
      }
    }
    std::string text(source_.substr(at_, end - at_));
    std::erase(text, '_');
    add(is_real ? TokenKind::real : TokenKind::integer, std::move(text));
    advance(end);
  }

  void read_string(char mark) {
    std::string text;
    size_t at = at_ + 1;
    for (;;) {
      if (at >= source_.size()) fail("a string without its end");
      const char c = source_[at++];
      if (c == mark) break;
      if (c != '\\') {
        text += c;
      } else {
        if (at >= source_.size()) fail("a string without its end");
        at = read_escape(at, text);
      }
    }
    add(TokenKind::string, std::move(text));
    advance(at);
  }

  // Decodes the escape whose letter is at `at`; returns what comes after it.
  size_t read_escape(size_t at, std::string& text) {
    constexpr std::string_view kLetters = "\\'\"abfnrtv", kMeaning = "\\'\"\a\b\f\n\r\t\v";
    const char c = source_[at];
    const size_t found = kLetters.find(c);
    if (found != std::string_view::npos) {
      text += kMeaning[found];
      return at + 1;
    }
    if (c == '\n') return at + 1;
    if (c >= '0' && c <= '7') {
      char32_t value = 0;
      size_t n = 0;
      while (n < 3 && peek(at) >= '0' && peek(at) <= '7')
        value = value * 8 + static_cast<char32_t>(source_[at++] - '0'), ++n;
      append_utf8(text, value);
      return at;
    }
    if (c == 'x' || c == 'u' || c == 'U') return read_hex_escape(at + 1, c == 'x' ? 2 : c == 'u' ? 4 : 8, text);
    if (c == 'N') fail("\\N{...} in a string is not supported");
    text += '\\';
    text += c;
    return at + 1;
  }

  size_t read_hex_escape(size_t at, size_t n_digits, std::string& text) {
    char32_t value = 0;
    for (size_t i = 0; i < n_digits; ++i) {
      const char c = peek(at + i), low = static_cast<char>(c | 0x20);
      if (!is_digit(c) && (low < 'a' || low > 'f')) fail("a broken \\x or \\u escape in a string");
      value = value * 16 + static_cast<char32_t>(is_digit(c) ? c - '0' : low - 'a' + 10);
    }
    if (value > 0x10FFFF) fail("a \\U escape beyond U+10FFFF");
    append_utf8(text, value);
    return at + n_digits;
  }

  std::string storage_;
  std::string_view source_;
  size_t at_ = 0;
  uint32_t line_ = 1;
  bool at_line_start_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize_template(std::string_view source) { return Lexer(source).run(); }

}  // namespace caravan::chat
