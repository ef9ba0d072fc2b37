// The vocabulary of a model: text to token ids and back, special tokens, end-of-generation rules. Built from GGUF
// metadata; docs/gguf.md lists the keys. Models: "llama" (SentencePiece BPE), "gpt2" (byte-level BPE), "gemma4"
// (BPE on raw UTF-8), "bert" (WordPiece), "t5" (SentencePiece unigram), "rwkv" (longest match), "no_vocab".
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/metadata.h"

namespace caravan::vocab {

using TokenId = int32_t;

// Numbers are GGUF's.
enum class TokenType : int32_t { undefined, normal, unknown, control, user_defined, unused, byte };

enum class AddSpecial { no, yes };     // BOS, EOS, CLS, SEP as the model wants them
enum class ParseSpecial { no, yes };   // control tokens are recognised in the text
enum class RenderSpecial { no, yes };  // control tokens are rendered as their text

class Tokenizer;
class SpecialTokenMatcher;
class TokenTable;

// Immutable after load(); every member function may be called from several threads at once.
class Vocabulary {
 public:
  // Throws FormatError when a key is missing, has the wrong type or an impossible value, and NotSupportedError (which
  // lists what is supported) for an unknown tokenizer model or pre-tokenizer.
  static std::unique_ptr<const Vocabulary> load(const gguf::Metadata& metadata);
  ~Vocabulary();
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;

  // The tokenizer model: "llama", "gpt2", "gemma4", "bert", "t5", "rwkv" or "no_vocab".
  std::string_view model_name() const { return model_name_; }
  // False for "no_vocab": tokenize() then throws, pieces render as "[id]".
  bool has_text() const;
  // Number of tokens; valid ids are 0 .. size() - 1. Functions that take an id throw RequestError for any other.
  size_t size() const;

  // The tokens of text, which should be UTF-8: bytes that are not become U+FFFD (llama: byte tokens, rwkv: kept).
  // User-defined tokens are always recognised in the text; control and unknown ones only with ParseSpecial::yes. Throws
  // RequestError when the model has no vocabulary.
  std::vector<TokenId> tokenize(std::string_view text, AddSpecial add_special, ParseSpecial parse_special) const;

  // The token's text as the vocabulary stores it, e.g. "▁the" or "Ġthe".
  std::string_view text(TokenId token) const;
  TokenType type(TokenId token) const;
  // The token with this stored text.
  std::optional<TokenId> find(std::string_view text) const;

  // The bytes that this token adds to the output; they may be a part of a UTF-8 character. Control and unknown tokens
  // are empty unless rendered; unused and undefined ones are always empty.
  std::string piece(TokenId token, RenderSpecial render) const;
  // The concatenated pieces, without any clean-up of spaces: what llama-server's /detokenize answers.
  std::string detokenize(std::span<const TokenId> tokens, RenderSpecial render) const;

  bool is_end_of_generation(TokenId token) const;
  // Sorted by id.
  const std::vector<TokenId>& end_of_generation_tokens() const { return end_of_generation_; }
  // Tokens whose logits the model's author wants at minus infinity; usually none. Sorted by id.
  const std::vector<TokenId>& suppressed_tokens() const { return suppressed_; }

  // Special tokens, from the metadata, the model kind's defaults, or (eot, eom, fim_*) found by their text.
  std::optional<TokenId> bos() const { return special_.bos; }
  std::optional<TokenId> eos() const { return special_.eos; }
  std::optional<TokenId> eot() const { return special_.eot; }
  std::optional<TokenId> eom() const { return special_.eom; }
  std::optional<TokenId> unknown() const { return special_.unknown; }
  std::optional<TokenId> sep() const { return special_.sep; }
  std::optional<TokenId> pad() const { return special_.pad; }
  std::optional<TokenId> cls() const { return special_.cls; }
  std::optional<TokenId> mask() const { return special_.mask; }
  // Fill in the middle: prefix, suffix, middle, padding, repository and file separator.
  std::optional<TokenId> fim_pre() const { return special_.fim_pre; }
  std::optional<TokenId> fim_suf() const { return special_.fim_suf; }
  std::optional<TokenId> fim_mid() const { return special_.fim_mid; }
  std::optional<TokenId> fim_pad() const { return special_.fim_pad; }
  std::optional<TokenId> fim_rep() const { return special_.fim_rep; }
  std::optional<TokenId> fim_sep() const { return special_.fim_sep; }

  // Whether AddSpecial::yes puts BOS (bert: CLS) in front and EOS (bert: see adds_sep) at the end.
  bool adds_bos() const { return adds_bos_; }
  bool adds_eos() const { return adds_eos_; }
  // bert: SEP ends the text. Others: a pair of texts (reranking) is separated by SEP.
  bool adds_sep() const { return adds_sep_; }

  // The chat template of the model; with a name ("tool_use", "rerank") the one of that name.
  std::optional<std::string> chat_template(std::string_view name = {}) const;

 private:
  struct SpecialTokens {
    std::optional<TokenId> bos, eos, eot, eom, unknown, sep, pad, cls, mask;
    std::optional<TokenId> fim_pre, fim_suf, fim_mid, fim_pad, fim_rep, fim_sep;
  };
  class Loader;

  Vocabulary();
  // Throws RequestError unless token is an id of this vocabulary.
  void check(TokenId token) const;

  std::string model_name_;
  std::unique_ptr<TokenTable> tokens_;
  std::unique_ptr<Tokenizer> tokenizer_;                          // null: no_vocab
  std::array<std::unique_ptr<SpecialTokenMatcher>, 2> matchers_;  // [ParseSpecial]
  SpecialTokens special_;
  bool adds_bos_ = false, adds_eos_ = false, adds_sep_ = false;
  std::vector<TokenId> end_of_generation_, suppressed_;
  std::vector<std::pair<std::string, std::string>> chat_templates_;  // name (empty: the default one), template
};

// Turns tokens into text one by one and never emits half a UTF-8 character. One object per sequence and thread.
class IncrementalDetokenizer {
 public:
  // The vocabulary must outlive this object.
  explicit IncrementalDetokenizer(const Vocabulary& vocabulary, RenderSpecial render)
      : vocabulary_(&vocabulary), render_(render) {}

  // The characters that are complete with this token; bytes that can no longer become one are U+FFFD.
  std::string push(TokenId token);
  // The end of the output: what was held back is U+FFFD. The object is then as new.
  std::string finish();

 private:
  const Vocabulary* vocabulary_;
  RenderSpecial render_;
  std::string held_back_;  // the beginning of a character, at most 3 bytes
};

}  // namespace caravan::vocab
