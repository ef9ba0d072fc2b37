// Random and hostile texts for the tests of this folder, and a printable view of tokens.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "vocab/utf8.h"
#include "vocab/vocabulary.h"

namespace caravan::testing {

inline std::string random_bytes(std::mt19937& random, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; i++) out += static_cast<char>(random() & 0xFF);
  return out;
}

// Valid UTF-8: mostly letters, spaces and digits, with characters of every length between.
inline std::string random_unicode(std::mt19937& random, size_t n_characters) {
  static constexpr char32_t kFrequent[] = {' ', ' ',  '\n',  '\r',      'a',       'e',       'h',       'l',
                                           'o', 'w',  'S',   's',       '\'',      '1',       '2',       '.',
                                           '/', U'é', U'中', U'\u0301', U'\u00A0', U'\u180E', U'\u3000', U'\U0001F600'};
  std::string out;
  for (size_t i = 0; i < n_characters; i++) {
    char32_t c = kFrequent[random() % std::size(kFrequent)];
    if (random() % 8 == 0) {
      do {
        c = random() % 0x110000;
      } while (c >= 0xD800 && c <= 0xDFFF);
    }
    vocab::append_utf8(out, c);
  }
  return out;
}

// The tokens of text, rendered one by one: easier to read in a test than ids.
inline std::vector<std::string> pieces(const vocab::Vocabulary& vocabulary, std::string_view text,
                                       vocab::AddSpecial add = vocab::AddSpecial::no,
                                       vocab::ParseSpecial parse = vocab::ParseSpecial::no) {
  std::vector<std::string> out;
  for (const vocab::TokenId token : vocabulary.tokenize(text, add, parse)) {
    out.emplace_back(vocabulary.text(token));
  }
  return out;
}

}  // namespace caravan::testing
