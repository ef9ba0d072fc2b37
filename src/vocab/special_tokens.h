// Cuts special tokens out of a text before the rest of it is tokenized.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "vocab/byte_trie.h"
#include "vocab/vocabulary.h"

namespace caravan::vocab {

// A token that is recognised in the text by its exact spelling.
struct SpecialToken {
  TokenId id;
  std::string text;          // not empty
  bool strip_left = false;   // swallows white space in front of it
  bool strip_right = false;  // swallows white space after it
};

// Either a special token or a stretch of the text between them.
struct Fragment {
  TokenId token = -1;     // -1: text
  std::string_view text;  // not empty when token is -1
};

// A trie over the spellings. Immutable, used by several threads at once.
class SpecialTokenMatcher {
 public:
  explicit SpecialTokenMatcher(std::vector<SpecialToken> tokens);

  // Longer spellings win over shorter ones wherever they are in the text, equally long ones by lower id, then from the
  // left; in order of the text.
  std::vector<Fragment> split(std::string_view text) const;

 private:
  struct Match {
    size_t begin, end;              // of the spelling
    size_t outer_begin, outer_end;  // with the white space swallowed
    TokenId token;
  };

  std::vector<Match> find_matches(std::string_view text) const;

  std::vector<SpecialToken> tokens_;  // by id
  std::vector<int> next_shorter_;     // per token: the longest other token that is a prefix of it, or -1
  std::array<bool, 256> begins_token_{};
  ByteTrie trie_;  // spelling -> index into tokens_
  size_t max_length_ = 0;
};

}  // namespace caravan::vocab
