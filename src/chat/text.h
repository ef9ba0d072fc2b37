// Python's view of strings, over UTF-8: code points, white space, case, quoting. An invalid byte counts as one code
// point.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::chat {

struct CodePoint {
  char32_t value;  // an invalid byte b has the value 0xDC00 + b, as in Python's surrogateescape
  size_t size;     // bytes, at least 1
};

// The code point that begins at s[at]; at < s.size().
CodePoint code_point_at(std::string_view s, size_t at);
// Number of code points.
size_t count_code_points(std::string_view s);
// The code points one by one, as views into s.
std::vector<std::string_view> split_code_points(std::string_view s);
void append_utf8(std::string& out, char32_t code_point);

// What str.isspace() says of one character.
bool is_space(char32_t c);

enum class StripSide { left, right, both };
// str.strip and its kind: removes white space, or the characters of `chars`, from the sides named.
std::string_view strip(std::string_view s, StripSide side, std::optional<std::string_view> chars = std::nullopt);

std::string to_upper(std::string_view s);
std::string to_lower(std::string_view s);
// First character in upper case, the others in lower case.
std::string capitalize(std::string_view s);
// The first letter after every non-letter in upper case, the others in lower case.
std::string title_case(std::string_view s);

// str.splitlines(), without the line ends.
std::vector<std::string_view> split_lines(std::string_view s);
// str.split(None, limit): between runs of white space; limit < 0 means none.
std::vector<std::string_view> split_white_space(std::string_view s, int64_t limit);
// str.rsplit(None, limit).
std::vector<std::string_view> split_white_space_from_right(std::string_view s, int64_t limit);
// str.split(separator, limit) for a separator that is not empty.
std::vector<std::string_view> split_at(std::string_view s, std::string_view separator, int64_t limit);
// str.rsplit(separator, limit).
std::vector<std::string_view> split_at_from_right(std::string_view s, std::string_view separator, int64_t limit);

// repr(s): quoted as Python source.
std::string quote(std::string_view s);
// The text with &, <, >, ' and " as HTML entities.
std::string escape_html(std::string_view s);

// Whether every character (and at least one) belongs to the class, as str.isdigit() and its kind say.
enum class CharacterClass { alpha, alnum, digit, decimal, numeric, space, upper, lower };
bool consists_of(std::string_view s, CharacterClass which);

}  // namespace caravan::chat
