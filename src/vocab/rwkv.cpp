// RWKV's "world" tokenizer: at each place the longest token. Tokens are byte strings, stored with backslash escapes.
#include "vocab/byte_trie.h"
#include "vocab/tokenizer.h"

namespace caravan::vocab {

namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The bytes that a stored text stands for: \t, \n, \r, \xNN; a backslash before anything else is dropped.
std::string unescape(std::string_view stored) {
  std::string out;
  for (size_t i = 0; i < stored.size(); i++) {
    if (stored[i] != '\\' || i + 1 == stored.size()) {
      out += stored[i];
      continue;
    }
    const char c = stored[++i];
    const bool has_two_more = i + 2 < stored.size();
    if (c == 'x' && has_two_more && hex_digit(stored[i + 1]) >= 0 && hex_digit(stored[i + 2]) >= 0) {
      out += static_cast<char>(hex_digit(stored[i + 1]) * 16 + hex_digit(stored[i + 2]));
      i += 2;
    } else if (c == 't') {
      out += '\t';
    } else if (c == 'n') {
      out += '\n';
    } else if (c == 'r') {
      out += '\r';
    } else {
      out += c;
    }
  }
  return out;
}

class RwkvTokenizer final : public Tokenizer {
 public:
  RwkvTokenizer(const TokenTable& tokens, std::optional<TokenId> unknown) : unknown_(unknown) {
    for (size_t i = 0; i < tokens.size(); i++) {
      const auto id = static_cast<TokenId>(i);
      const std::string bytes = unescape(tokens.text(id));
      if (!bytes.empty()) trie_[bytes] = id;
    }
  }

  // A byte that begins no token becomes the unknown token, or nothing where the vocabulary has none.
  void tokenize(std::string_view text, PrefixSpace, std::vector<TokenId>& out) const override {
    while (!text.empty()) {
      const ByteTrie::Match match = trie_.longest_prefix(text);
      if (match.length > 0) {
        out.push_back(match.value);
      } else if (unknown_) {
        out.push_back(*unknown_);
      }
      text.remove_prefix(match.length > 0 ? match.length : 1);
    }
  }

  std::string decode(std::string_view stored_text) const override { return unescape(stored_text); }

 private:
  std::optional<TokenId> unknown_;
  ByteTrie trie_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_rwkv_tokenizer(const TokenTable& tokens, std::optional<TokenId> unknown) {
  return std::make_unique<RwkvTokenizer>(tokens, unknown);
}

}  // namespace caravan::vocab
