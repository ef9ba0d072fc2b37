#include "vocab/utf8.h"

#include <cstring>

namespace caravan::vocab {

namespace {

// What the first byte demands: bytes in the character, and the range of the second byte, which excludes overlong forms,
// surrogates and code points over U+10FFFF. Length 0: not a first byte.
struct FirstByte {
  uint8_t length, second_min, second_max;
};

FirstByte first_byte(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

size_t ascii_prefix_length(std::string_view text, size_t position) {
  while (position + sizeof(uint64_t) <= text.size()) {
    uint64_t word;
    std::memcpy(&word, text.data() + position, sizeof word);
    if (word & 0x8080808080808080u) break;
    position += sizeof word;
  }
  while (position < text.size() && static_cast<uint8_t>(text[position]) < 0x80) position++;
  return position;
}

// The position of the first invalid or incomplete sequence, or text.size().
size_t valid_prefix_length(std::string_view text) {
  size_t position = 0;
  while ((position = ascii_prefix_length(text, position)) < text.size()) {
    const Utf8Char c = decode_utf8(text, position);
    if (c.state != Utf8Char::State::valid) break;
    position += c.length;
  }
  return position;
}

}  // namespace

Utf8Char decode_utf8(std::string_view text, size_t position) {
  const auto byte_at = [&](size_t i) { return static_cast<uint8_t>(text[position + i]); };
  const uint8_t lead = byte_at(0);
  if (lead < 0x80) return {Utf8Char::State::valid, 1, lead};
  const FirstByte demand = first_byte(lead);
  if (demand.length == 0) return {Utf8Char::State::invalid, 1, kReplacementCharacter};
  char32_t code_point = lead & (0x7F >> demand.length);
  for (uint8_t i = 1; i < demand.length; i++) {
    if (position + i >= text.size()) return {Utf8Char::State::incomplete, i, kReplacementCharacter};
    const uint8_t min = i == 1 ? demand.second_min : 0x80, max = i == 1 ? demand.second_max : 0xBF;
    if (byte_at(i) < min || byte_at(i) > max) return {Utf8Char::State::invalid, i, kReplacementCharacter};
    code_point = code_point << 6 | (byte_at(i) & 0x3F);
  }
  return {Utf8Char::State::valid, demand.length, code_point};
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto continuation = [&](int shift) { out += static_cast<char>(0x80 | ((code_point >> shift) & 0x3F)); };
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += static_cast<char>(0xC0 | (code_point >> 6));
    continuation(0);
  } else if (code_point < 0x10000) {
    out += static_cast<char>(0xE0 | (code_point >> 12));
    continuation(6);
    continuation(0);
  } else {
    out += static_cast<char>(0xF0 | (code_point >> 18));
    continuation(12);
    continuation(6);
    continuation(0);
  }
}

bool is_valid_utf8(std::string_view text) { return valid_prefix_length(text) == text.size(); }

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const size_t n_valid = valid_prefix_length(text);
    out += text.substr(0, n_valid);
    text.remove_prefix(n_valid);
    if (text.empty()) break;
    append_utf8(out, kReplacementCharacter);
    text.remove_prefix(decode_utf8(text, 0).length);
  }
  return out;
}

}  // namespace caravan::vocab
