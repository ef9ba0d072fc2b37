// SentencePiece's BPE as the "llama" tokenizer model uses it (Kudo & Richardson 2018, arXiv:1808.06226).
#include <algorithm>

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

  // The heap yields the highest score first, of equal ones the leftmost.
  bool operator<(const Candidate& other) const {
    return score < other.score || (score == other.score && left > other.left);
  }
};

// True when no token holds a space behind another character. Then no merge crosses such a place, and the text can be
// cut there: short pieces keep the heap in the cache.
bool words_are_independent(const TokenTable& tokens) {
  for (size_t id = 0; id < tokens.size(); id++) {
    std::string_view text = tokens.text(static_cast<TokenId>(id));
    while (text.starts_with(kEscapedSpace)) text.remove_prefix(kEscapedSpace.size());
    if (text.find(kEscapedSpace) != std::string_view::npos) return false;
  }
  return true;
}

class SpmTokenizer final : public Tokenizer {
 public:
  SpmTokenizer(const TokenTable& tokens, bool add_space_prefix, std::optional<TokenId> unknown)
      : tokens_(tokens),
        byte_tokens_(tokens.byte_tokens()),
        add_space_prefix_(add_space_prefix),
        cuts_words_(words_are_independent(tokens)),
        unknown_(unknown) {}

  void tokenize(std::string_view text, PrefixSpace prefix, std::vector<TokenId>& out) const override {
    std::string escaped;
    if (add_space_prefix_ && prefix == PrefixSpace::yes) escaped += kEscapedSpace;
    escaped += replace_all(text, " ", kEscapedSpace);

    Workspace work;
    for (size_t begin = 0; begin < escaped.size();) {
      const size_t end = cuts_words_ ? end_of_word(escaped, begin) : escaped.size();
      const std::string_view word = std::string_view(escaped).substr(begin, end - begin);
      split_characters(word, work.symbols);
      merge(word, work);
      for (const Symbol& symbol : work.symbols) {
        if (symbol.length > 0) emit(symbol, word, out);
      }
      begin = end;
    }
  }

  std::string decode(std::string_view stored_text) const override {
    return replace_all(stored_text, kEscapedSpace, " ");
  }

 private:
  struct Workspace {
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  // Behind the spaces at begin and what follows them up to the next space.
  static size_t end_of_word(std::string_view text, size_t begin) {
    while (text.substr(begin).starts_with(kEscapedSpace)) begin += kEscapedSpace.size();
    return std::min(text.find(kEscapedSpace, begin), text.size());
  }

  // Bytes that are not UTF-8 become symbols of their own, so that they never swallow part of an escaped space.
  void split_characters(std::string_view text, std::vector<Symbol>& symbols) const {
    symbols.clear();
    for (size_t i = 0; i < text.size();) {
      const Utf8Char c = decode_utf8(text, i);
      const uint32_t length = c.state == Utf8Char::State::valid ? c.length : 1;
      const auto index = static_cast<int32_t>(symbols.size());
      const TokenId token = tokens_.find(text.substr(i, length)).value_or(-1);
      symbols.push_back({static_cast<uint32_t>(i), length, index - 1, index + 1, token});
      i += length;
    }
    if (!symbols.empty()) symbols.back().next = -1;
  }

  // A merged symbol is always a token, so nothing ever has to be split again.
  void merge(std::string_view text, Workspace& work) const {
    std::vector<Symbol>& symbols = work.symbols;
    std::vector<Candidate>& heap = work.heap;
    heap.clear();
    const auto add_candidate = [&](int32_t left, int32_t right) {
      if (left < 0 || right < 0) return;
      const uint32_t length = symbols[left].length + symbols[right].length;
      if (const auto token = tokens_.find(text.substr(symbols[left].begin, length))) {
        heap.push_back({tokens_.score(*token), left, right, length, *token});
        std::push_heap(heap.begin(), heap.end());
      }
    };
    for (size_t i = 1; i < symbols.size(); i++) add_candidate(static_cast<int32_t>(i - 1), static_cast<int32_t>(i));

    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Candidate best = heap.back();
      heap.pop_back();
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
  bool cuts_words_;
  std::optional<TokenId> unknown_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_spm_tokenizer(const TokenTable& tokens, bool add_space_prefix,
                                              std::optional<TokenId> unknown) {
  return std::make_unique<SpmTokenizer>(tokens, add_space_prefix, unknown);
}

}  // namespace caravan::vocab
