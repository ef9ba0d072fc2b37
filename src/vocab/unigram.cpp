// The unigram tokenizer of SentencePiece ("t5"; Kudo 2018, arXiv:1804.10959): of all ways to cut the normalised text
// into tokens the one with the highest sum of scores, found by Viterbi's algorithm. Details follow llama.cpp.
#include <algorithm>
#include <limits>

#include "vocab/byte_trie.h"
#include "vocab/charsmap.h"
#include "vocab/tokenizer.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

namespace {

constexpr TokenId kUnknown = -1;
constexpr float kUnknownPenalty = 10;  // how far an unknown character is below the worst token

class UnigramTokenizer final : public Tokenizer {
 public:
  UnigramTokenizer(const TokenTable& tokens, Charsmap charsmap, UnigramOptions options, std::optional<TokenId> unknown)
      : charsmap_(std::move(charsmap)), options_(options), unknown_(unknown), scores_(tokens.size()) {
    float least = std::numeric_limits<float>::max();
    for (size_t i = 0; i < tokens.size(); i++) {
      const auto id = static_cast<TokenId>(i);
      const TokenType type = tokens.type(id);
      if (type == TokenType::normal) least = std::min(least, tokens.score(id));
      if (type != TokenType::normal && type != TokenType::user_defined && type != TokenType::unused) continue;
      // Scores are logarithms of probabilities: 0 makes a user-defined token win over others.
      scores_[i] = type == TokenType::user_defined ? 0.0 : double{tokens.score(id)};
      trie_[tokens.text(id)] = id;
    }
    unknown_score_ = least == std::numeric_limits<float>::max() ? 0.0 : double{least - kUnknownPenalty};
  }

  // Bytes that are not UTF-8 become U+FFFD. Neighbouring unknown characters become one unknown token.
  void tokenize(std::string_view text, PrefixSpace prefix, std::vector<TokenId>& out) const override {
    const std::string normal = normalise(text, prefix);
    const std::vector<Cut> cuts = best_cuts(normal);
    std::vector<TokenId> backwards;
    for (size_t end = normal.size(); end > 0; end = cuts[end].begin) {
      const TokenId token = cuts[end].token;
      if (token == kUnknown && !backwards.empty() && backwards.back() == kUnknown) continue;
      backwards.push_back(token);
    }
    for (auto token = backwards.rbegin(); token != backwards.rend(); ++token) {
      if (*token != kUnknown) {
        out.push_back(*token);
      } else if (unknown_) {
        out.push_back(*unknown_);
      }
    }
  }

  std::string decode(std::string_view stored_text) const override {
    return replace_all(stored_text, kEscapedSpace, " ");
  }

 private:
  // The best way to cut the text up to some place: its last token and its score.
  struct Cut {
    double score = std::numeric_limits<double>::lowest();
    size_t begin = 0;
    TokenId token = kUnknown;
  };

  // What stands for the beginning of text, and how many of its bytes that is.
  std::pair<std::string_view, size_t> normalise_front(std::string_view text) const {
    static constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
    if (const Charsmap::Match match = charsmap_.longest_prefix(text); match.length > 0) {
      return {match.replacement, match.length};
    }
    const Utf8Char c = decode_utf8(text, 0);
    if (c.state != Utf8Char::State::valid) return {kReplacement, 1};
    return {text.substr(0, c.length), c.length};
  }

  // Applies the charsmap and writes spaces as U+2581.
  std::string normalise(std::string_view text, PrefixSpace prefix) const {
    const bool merges_spaces = options_.remove_extra_spaces;
    std::string out;
    out.reserve(text.size() + text.size() / 4 + kEscapedSpace.size());
    bool wants_prefix = options_.add_space_prefix && prefix == PrefixSpace::yes;
    bool in_word = false;
    while (!text.empty()) {
      const auto [normal, n_bytes] = normalise_front(text);
      text.remove_prefix(n_bytes);
      for (const char c : normal) {
        if (c == ' ') {
          in_word = false;
          if (!merges_spaces) out += kEscapedSpace;
          continue;
        }
        // Merged spaces are written with the word behind them, so that none is left at the end.
        if (!in_word && (wants_prefix || merges_spaces)) out += kEscapedSpace;
        if (!in_word) wants_prefix = false;
        in_word = true;
        out += c;
      }
    }
    return out;
  }

  // For each place of text that a character ends at (others are never used) the best cut up to there.
  std::vector<Cut> best_cuts(std::string_view text) const {
    std::vector<Cut> best(text.size() + 1);
    best[0].score = 0;
    const auto offer = [&](size_t begin, size_t end, TokenId token, double score) {
      if (best[begin].score + score > best[end].score) best[end] = {best[begin].score + score, begin, token};
    };
    for (size_t begin = 0, next; begin < text.size(); begin = next) {
      next = begin + decode_utf8(text, begin).length;
      bool has_token = false;  // for the character itself
      int node = ByteTrie::kRoot;
      for (size_t end = begin; end < text.size() && (node = trie_.child(node, text[end])) != ByteTrie::kNone;) {
        end++;
        const TokenId token = trie_.value(node);
        if (token == ByteTrie::kNone) continue;
        has_token |= end == next;
        offer(begin, end, token, scores_[static_cast<size_t>(token)]);
      }
      if (!has_token) offer(begin, next, kUnknown, unknown_score_);
    }
    return best;
  }

  Charsmap charsmap_;
  UnigramOptions options_;
  std::optional<TokenId> unknown_;
  std::vector<double> scores_;  // by id
  double unknown_score_ = 0;
  ByteTrie trie_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_unigram_tokenizer(const TokenTable& tokens, Charsmap charsmap, UnigramOptions options,
                                                  std::optional<TokenId> unknown) {
  return std::make_unique<UnigramTokenizer>(tokens, std::move(charsmap), options, unknown);
}

}  // namespace caravan::vocab
