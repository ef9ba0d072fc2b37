// SentencePiece's BPE as the "llama" tokenizer model uses it (Kudo & Richardson 2018, arXiv:1808.06226).
#include <queue>

#include "vocab/tokenizer.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

namespace {

// A stretch of the text that is a token, or one character that is none. Symbols form a linked list.
struct Symbol {
  uint32_t begin, length;  // length 0: merged into its left neighbour
  int32_t previous, next;  // -1: none
  TokenId token;           // -1: none
};

// Two neighbours whose concatenation is a token. Outdated once either of them has been merged.
struct Candidate {
  float score;
  int32_t left, right;
  uint32_t length;
  TokenId token;

  // The queue yields the highest score first, of equal ones the leftmost.
  bool operator<(const Candidate& other) const {
    return score < other.score || (score == other.score && left > other.left);
  }
};

class SpmTokenizer final : public Tokenizer {
 public:
  SpmTokenizer(const TokenTable& tokens, bool add_space_prefix, std::optional<TokenId> unknown)
      : tokens_(tokens), byte_tokens_(tokens.byte_tokens()), add_space_prefix_(add_space_prefix), unknown_(unknown) {}

  void tokenize(std::string_view text, PrefixSpace prefix, std::vector<TokenId>& out) const override {
    std::string escaped;
    escaped.reserve(text.size() + text.size() / 2);
    if (add_space_prefix_ && prefix == PrefixSpace::yes) escaped += kEscapedSpace;
    escaped += replace_all(text, " ", kEscapedSpace);

    std::vector<Symbol> symbols = split_characters(escaped);
    merge(escaped, symbols);
    for (const Symbol& symbol : symbols) {
      if (symbol.length > 0) emit(symbol, escaped, out);
    }
  }

  std::string decode(std::string_view stored_text) const override {
    return replace_all(stored_text, kEscapedSpace, " ");
  }

 private:
  // Bytes that are not UTF-8 become symbols of their own, so that they never swallow part of an escaped space.
  std::vector<Symbol> split_characters(std::string_view text) const {
    std::vector<Symbol> symbols;
    symbols.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
      const Utf8Char c = decode_utf8(text, i);
      const uint32_t length = c.state == Utf8Char::State::valid ? c.length : 1;
      const auto index = static_cast<int32_t>(symbols.size());
      const TokenId token = tokens_.find(text.substr(i, length)).value_or(-1);
      symbols.push_back({static_cast<uint32_t>(i), length, index - 1, index + 1, token});
      i += length;
    }
    if (!symbols.empty()) symbols.back().next = -1;
    return symbols;
  }

  // A merged symbol is always a token, so nothing ever has to be split again.
  void merge(std::string_view text, std::vector<Symbol>& symbols) const {
    std::priority_queue<Candidate> queue;
    const auto add_candidate = [&](int32_t left, int32_t right) {
      if (left < 0 || right < 0) return;
      const uint32_t length = symbols[left].length + symbols[right].length;
      if (const auto token = tokens_.find(text.substr(symbols[left].begin, length))) {
        queue.push({tokens_.score(*token), left, right, length, *token});
      }
    };
    for (size_t i = 1; i < symbols.size(); i++) add_candidate(static_cast<int32_t>(i - 1), static_cast<int32_t>(i));

    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol &left = symbols[best.left], &right = symbols[best.right];
      if (left.length == 0 || right.length == 0 || left.length + right.length != best.length) continue;
      left.length = best.length;
      left.token = best.token;
      left.next = right.next;
      right.length = 0;
      if (left.next >= 0) symbols[left.next].previous = best.left;
      add_candidate(left.previous, best.left);
      add_candidate(best.left, left.next);
    }
  }

  // A character without a token becomes byte tokens, or the unknown token where the vocabulary has none for a byte.
  void emit(const Symbol& symbol, std::string_view text, std::vector<TokenId>& out) const {
    if (symbol.token >= 0) {
      out.push_back(symbol.token);
      return;
    }
    for (const char c : text.substr(symbol.begin, symbol.length)) {
      const TokenId token = byte_tokens_[static_cast<uint8_t>(c)];
      if (token >= 0) {
        out.push_back(token);
      } else if (unknown_) {
        out.push_back(*unknown_);
      }
    }
  }

  const TokenTable& tokens_;
  std::vector<TokenId> byte_tokens_;
  bool add_space_prefix_;
  std::optional<TokenId> unknown_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_spm_tokenizer(const TokenTable& tokens, bool add_space_prefix,
                                              std::optional<TokenId> unknown) {
  return std::make_unique<SpmTokenizer>(tokens, add_space_prefix, unknown);
}

}  // namespace caravan::vocab
