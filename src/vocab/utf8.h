// UTF-8 decoding that copes with any bytes (RFC 3629: no overlong forms, surrogates, or code points over U+10FFFF).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace caravan::vocab {

inline constexpr char32_t kReplacementCharacter = 0xFFFD;

// What stands at one place of a text.
struct Utf8Char {
  // incomplete: the text ends within a character that further bytes could complete.
  enum class State : uint8_t { valid, invalid, incomplete };
  State state;
  uint8_t length;       // bytes; for invalid and incomplete those to be replaced by one U+FFFD
  char32_t code_point;  // U+FFFD unless valid
};

// Decodes the character at text[position]; position < text.size(). An invalid sequence has the length of its longest
// part that could begin a character (the practice of Unicode section 3.9, also the WHATWG's).
Utf8Char decode_utf8(std::string_view text, size_t position);

// Appends code_point, which must be a Unicode scalar value.
void append_utf8(std::string& out, char32_t code_point);

bool is_valid_utf8(std::string_view text);

// text with each invalid sequence replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view text);

}  // namespace caravan::vocab
