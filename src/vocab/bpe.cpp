// Byte-pair encoding over the words of a pre-tokenizer: byte-level (GPT-2; Radford et al. 2019) or on plain UTF-8.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <queue>
#include <unordered_map>

#include "base/error.h"
#include "vocab/flat_map.h"
#include "vocab/pre_tokenizer.h"
#include "vocab/tokenizer.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

namespace {

// GPT-2's spelling of bytes as printable characters: bytes that are printable in Latin-1 stand for themselves, the
// other 68 are U+0100 upwards in order.
class ByteSpelling {
 public:
  ByteSpelling() {
    char32_t next = 0x100;
    for (size_t byte = 0; byte < 256; byte++) {
      const bool printable =
          (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
      character_[byte] = printable ? static_cast<char32_t>(byte) : next++;
    }
    byte_.fill(-1);
    for (size_t byte = 0; byte < 256; byte++) byte_[character_[byte]] = static_cast<int16_t>(byte);
  }

  std::string character(uint8_t byte) const {
    std::string out;
    append_utf8(out, character_[byte]);
    return out;
  }

  // The bytes that spelled stands for; characters that spell no byte stand for themselves.
  std::string decode(std::string_view spelled) const {
    std::string out;
    for (size_t i = 0; i < spelled.size();) {
      const Utf8Char c = decode_utf8(spelled, i);
      const int byte = c.state == Utf8Char::State::valid && c.code_point < byte_.size() ? byte_[c.code_point] : -1;
      if (byte >= 0) {
        out += static_cast<char>(byte);
      } else {
        out += spelled.substr(i, c.length);
      }
      i += c.length;
    }
    return out;
  }

 private:
  std::array<char32_t, 256> character_{};
  std::array<int16_t, 0x144> byte_{};
};

// Ids of the texts that merges speak of. A token's text has the token's id; a text that is not a token (rare) has an id
// from the number of tokens on.
using SymbolId = int32_t;
constexpr SymbolId kNoSymbol = -1;

struct Merge {
  int32_t rank = 0;
  SymbolId result = kNoSymbol;
};

constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();

// A stretch of a word.
struct Part {
  SymbolId symbol;
  uint32_t begin, length;  // bytes in the word
};

uint64_t pair_key(SymbolId left, SymbolId right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

class MergeTable {
 public:
  MergeTable(const TokenTable& tokens, const std::vector<std::string>& merges, const std::string& source)
      : tokens_(tokens), merges_(merges.size()) {
    for (size_t rank = 0; rank < merges.size(); rank++) {
      const std::string_view merge = merges[rank];
      const size_t space = merge.find(' ', 1);
      if (space == std::string_view::npos || space + 1 == merge.size()) {
        throw FormatError(
            fmt::format("{}: tokenizer.ggml.merges[{}]: expected two texts and a space between them, "
                        "found '{}'",
                        source, rank, merge));
      }
      const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
      const SymbolId result = intern(std::string(left) + std::string(right));
      merges_.insert(pair_key(intern(left), intern(right)), {static_cast<int32_t>(rank), result});
    }
  }

  // The symbol of text, which gets a new id if it is neither a token nor known from a merge.
  SymbolId intern(std::string_view text) {
    if (const auto token = tokens_.find(text)) return *token;
    const auto next = static_cast<SymbolId>(tokens_.size() + others_.size());
    return others_.try_emplace(std::string(text), next).first->second;
  }

  std::optional<SymbolId> find_symbol(const std::string& text) const {
    if (const auto token = tokens_.find(text)) return token;
    const auto found = others_.find(text);
    return found == others_.end() ? std::nullopt : std::optional(found->second);
  }

  // The merge of two neighbours, or null.
  const Merge* find(SymbolId left, SymbolId right) const {
    if (left == kNoSymbol || right == kNoSymbol) return nullptr;
    return merges_.find(pair_key(left, right));
  }

 private:
  const TokenTable& tokens_;
  std::unordered_map<std::string, SymbolId> others_;
  FlatMap<Merge> merges_;
};

// Merges by looking for the lowest rank again and again: quadratic, and the fastest for words of usual length.
void merge_short_word(const MergeTable& table, std::vector<Part>& parts, std::vector<Merge>& scratch) {
  const auto merge_at = [&](size_t i) {
    const Merge* merge = i + 1 < parts.size() ? table.find(parts[i].symbol, parts[i + 1].symbol) : nullptr;
    return merge ? *merge : Merge{kNoRank, kNoSymbol};
  };
  scratch.clear();  // per part: the merge with its right neighbour
  for (size_t i = 0; i < parts.size(); i++) scratch.push_back(merge_at(i));
  while (true) {
    size_t best = 0;
    for (size_t i = 1; i < parts.size(); i++) {
      if (scratch[i].rank < scratch[best].rank) best = i;
    }
    if (scratch[best].rank == kNoRank) return;
    parts[best].symbol = scratch[best].result;
    parts[best].length += parts[best + 1].length;
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(best) + 1);
    scratch.erase(scratch.begin() + static_cast<ptrdiff_t>(best) + 1);
    scratch[best] = merge_at(best);
    if (best > 0) scratch[best - 1] = merge_at(best - 1);
  }
}

// The same with a linked list and a queue: n log n, for words of any length.
void merge_long_word(const MergeTable& table, std::vector<Part>& parts) {
  struct Link {
    int32_t previous, next;
  };
  struct Candidate {
    int32_t rank, left, right;
    SymbolId left_symbol, right_symbol, result;
    bool operator<(const Candidate& other) const {  // the queue yields the lowest rank first, then the leftmost
      return rank > other.rank || (rank == other.rank && left > other.left);
    }
  };
  const auto n = static_cast<int32_t>(parts.size());
  std::vector<Link> links(parts.size());
  for (int32_t i = 0; i < n; i++) links[i] = {i - 1, i + 1 < n ? i + 1 : -1};

  std::priority_queue<Candidate> queue;
  const auto add_candidate = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    if (const Merge* merge = table.find(parts[left].symbol, parts[right].symbol)) {
      queue.push({merge->rank, left, right, parts[left].symbol, parts[right].symbol, merge->result});
    }
  };
  for (int32_t i = 1; i < n; i++) add_candidate(i - 1, i);

  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Part &left = parts[best.left], &right = parts[best.right];
    const bool outdated = left.length == 0 || right.length == 0 || links[best.left].next != best.right ||
                          left.symbol != best.left_symbol || right.symbol != best.right_symbol;
    if (outdated) continue;
    left.symbol = best.result;
    left.length += right.length;
    right.length = 0;
    links[best.left].next = links[best.right].next;
    if (links[best.left].next >= 0) links[links[best.left].next].previous = best.left;
    add_candidate(links[best.left].previous, best.left);
    add_candidate(best.left, links[best.left].next);
  }
  std::erase_if(parts, [](const Part& part) { return part.length == 0; });
}

constexpr size_t kShortWord = 32;  // parts

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(const TokenTable& tokens, const std::vector<std::string>& merges,
               std::unique_ptr<const PreTokenizer> pre_tokenizer, BpeOptions options, const std::string& source)
      : tokens_(tokens),
        merges_(tokens, merges, source),
        pre_tokenizer_(std::move(pre_tokenizer)),
        options_(options),
        byte_tokens_(options.byte_level ? std::vector<TokenId>(256, -1) : tokens.byte_tokens()) {
    if (!options_.byte_level) return;
    for (size_t byte = 0; byte < 256; byte++) {
      const std::string character = spelling_.character(static_cast<uint8_t>(byte));
      byte_symbols_[byte] = merges_.intern(character);
      byte_tokens_[byte] = tokens.find(character).value_or(-1);
    }
    if (options_.ignore_merges) {
      std::vector<std::string> decoded;
      decoded.reserve(tokens.size());
      for (size_t id = 0; id < tokens.size(); id++) {
        decoded.push_back(spelling_.decode(tokens.text(static_cast<TokenId>(id))));
      }
      words_ = std::make_unique<TextIndex>(decoded);
    }
  }

  // Bytes that are not UTF-8 become U+FFFD, as the regular expressions are defined on characters.
  void tokenize(std::string_view text, PrefixSpace, std::vector<TokenId>& out) const override {
    std::string changed;
    if (!is_valid_utf8(text)) text = changed = replace_invalid_utf8(text);
    if (!options_.byte_level) text = changed = replace_all(text, " ", kEscapedSpace);
    std::vector<Part> parts;
    std::vector<Merge> scratch;
    for (const std::string_view word : pre_tokenizer_->split(text)) {
      if (const auto token = whole_word(word)) {
        out.push_back(*token);
        continue;
      }
      split_into_symbols(word, parts);
      if (parts.size() <= kShortWord) {
        merge_short_word(merges_, parts, scratch);
      } else {
        merge_long_word(merges_, parts);
      }
      for (const Part& part : parts) emit(part, word, out);
    }
  }

  std::string decode(std::string_view stored_text) const override {
    return options_.byte_level ? spelling_.decode(stored_text) : replace_all(stored_text, kEscapedSpace, " ");
  }

 private:
  // The token that a word is without merging, if the vocabulary has this rule.
  std::optional<TokenId> whole_word(std::string_view word) const {
    if (!options_.byte_level) {
      // Runs of newlines are tokens of their own in these vocabularies.
      return options_.ignore_merges || word[0] == '\n' ? tokens_.find(word) : std::nullopt;
    }
    return words_ ? words_->find(word) : std::nullopt;
  }

  // Byte-level: one part per byte. Otherwise one per character.
  void split_into_symbols(std::string_view word, std::vector<Part>& parts) const {
    parts.clear();
    if (options_.byte_level) {
      for (uint32_t i = 0; i < word.size(); i++) parts.push_back({byte_symbols_[static_cast<uint8_t>(word[i])], i, 1});
      return;
    }
    for (uint32_t i = 0; i < word.size();) {
      const uint32_t length = decode_utf8(word, i).length;
      parts.push_back({merges_.find_symbol(std::string(word.substr(i, length))).value_or(kNoSymbol), i, length});
      i += length;
    }
  }

  // A part that is no token is emitted byte by byte; bytes without a token are dropped.
  void emit(const Part& part, std::string_view word, std::vector<TokenId>& out) const {
    if (part.symbol != kNoSymbol && static_cast<size_t>(part.symbol) < tokens_.size()) {
      out.push_back(part.symbol);
      return;
    }
    for (const char c : word.substr(part.begin, part.length)) {
      if (byte_tokens_[static_cast<uint8_t>(c)] >= 0) out.push_back(byte_tokens_[static_cast<uint8_t>(c)]);
    }
  }

  const TokenTable& tokens_;
  MergeTable merges_;
  std::unique_ptr<const PreTokenizer> pre_tokenizer_;
  BpeOptions options_;
  ByteSpelling spelling_;
  std::array<SymbolId, 256> byte_symbols_{};
  std::vector<TokenId> byte_tokens_;
  std::unique_ptr<const TextIndex> words_;  // tokens by the bytes they stand for; with byte_level and ignore_merges
};

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(const TokenTable& tokens, const std::vector<std::string>& merges,
                                              std::unique_ptr<const PreTokenizer> pre_tokenizer, BpeOptions options,
                                              const std::string& source) {
  return std::make_unique<BpeTokenizer>(tokens, merges, std::move(pre_tokenizer), options, source);
}

}  // namespace caravan::vocab
