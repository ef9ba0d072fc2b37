// What the kinds of tokenizers have in common: each turns text without special tokens into token ids, and the stored
// text of a token back into output bytes.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "vocab/token_table.h"

namespace caravan::vocab {

inline constexpr std::string_view kEscapedSpace = "\xE2\x96\x81";  // U+2581, how SentencePiece writes a space

enum class PrefixSpace { no, yes };

// Immutable, used by several threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Appends the tokens of one stretch of text between special tokens. Any bytes are accepted.
  //   prefix: the stretch is the first one or follows a special token
  virtual void tokenize(std::string_view text, PrefixSpace prefix, std::vector<TokenId>& out) const = 0;

  // The bytes that a normal token with this stored text stands for.
  virtual std::string decode(std::string_view stored_text) const = 0;
};

// SentencePiece BPE ("llama"): the neighbours whose concatenation is the token with the highest score are merged first.
//   add_space_prefix: a stretch with PrefixSpace::yes gets a leading space
std::unique_ptr<Tokenizer> make_spm_tokenizer(const TokenTable& tokens, bool add_space_prefix,
                                              std::optional<TokenId> unknown);

// WordPiece ("bert"): words matched longest first; word-initial tokens begin with U+2581.
struct WordPieceOptions {
  bool lowercase = true;
  bool strip_accents = true;
};
std::unique_ptr<Tokenizer> make_wordpiece_tokenizer(const TokenTable& tokens, WordPieceOptions options,
                                                    std::optional<TokenId> unknown);

class Charsmap;

// Unigram ("t5"): the cut of the normalised text with the highest sum of scores.
//   add_space_prefix: a stretch with PrefixSpace::yes gets a leading space
//   remove_extra_spaces: runs of spaces are one space, none is left at the end, and the first word gets one, too
struct UnigramOptions {
  bool add_space_prefix = false;
  bool remove_extra_spaces = false;
};
std::unique_ptr<Tokenizer> make_unigram_tokenizer(const TokenTable& tokens, Charsmap charsmap, UnigramOptions options,
                                                  std::optional<TokenId> unknown);

// RWKV: the longest token at each place. Stored texts have backslash escapes.
std::unique_ptr<Tokenizer> make_rwkv_tokenizer(const TokenTable& tokens, std::optional<TokenId> unknown);

class PreTokenizer;

// BPE ("gpt2", "gemma4"): words from a pre-tokenizer, then the neighbours with the lowest rank are merged first.
struct BpeOptions {
  // The vocabulary spells bytes as GPT-2 does; otherwise it holds plain UTF-8 with U+2581 for spaces, and <0xNN>.
  bool byte_level = true;
  // A word that is a token as a whole is not merged from its parts.
  bool ignore_merges = false;
};
// merges: "left right" by rank; source: named in errors. Throws FormatError for a merge without a space.
std::unique_ptr<Tokenizer> make_bpe_tokenizer(const TokenTable& tokens, const std::vector<std::string>& merges,
                                              std::unique_ptr<const PreTokenizer> pre_tokenizer, BpeOptions options,
                                              const std::string& source);

// text with every `from` replaced by `to`.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace caravan::vocab
