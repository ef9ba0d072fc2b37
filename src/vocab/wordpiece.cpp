// WordPiece as BERT uses it (Devlin et al. 2018, arXiv:1810.04805): normalised words, matched longest first.
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "vocab/tokenizer.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

namespace {

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// The ideograph blocks that BERT's tokenizer lists; U+2B820 .. U+2B91F is missing there, too.
bool is_cjk_ideograph(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

bool is_control(utf8proc_category_t category) {
  return category == UTF8PROC_CATEGORY_CC || category == UTF8PROC_CATEGORY_CF || category == UTF8PROC_CATEGORY_CS ||
         category == UTF8PROC_CATEGORY_CO;
}

bool is_mark(utf8proc_category_t category) {
  return category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC || category == UTF8PROC_CATEGORY_ME;
}

bool is_punctuation(utf8proc_category_t category) {
  return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO;
}

bool is_symbol(utf8proc_category_t category) {
  return category >= UTF8PROC_CATEGORY_SM && category <= UTF8PROC_CATEGORY_SO;
}

// Canonical decomposition (NFD) of valid UTF-8.
std::string decompose(std::string_view text) {
  utf8proc_uint8_t* result = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &result, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE));
  if (length < 0) throw RequestError(std::string("the text cannot be normalised: ") + utf8proc_errmsg(length));
  std::string out(reinterpret_cast<const char*>(result), static_cast<size_t>(length));
  std::free(result);
  return out;
}

class WordPieceTokenizer final : public Tokenizer {
 public:
  WordPieceTokenizer(const TokenTable& tokens, WordPieceOptions options, std::optional<TokenId> unknown)
      : tokens_(tokens), options_(options), unknown_(unknown) {}

  // Bytes that are not UTF-8 become U+FFFD, which is dropped like control characters.
  void tokenize(std::string_view text, PrefixSpace, std::vector<TokenId>& out) const override {
    std::string normal = replace_invalid_utf8(text);
    if (options_.strip_accents) normal = decompose(normal);
    std::string word;
    const auto finish_word = [&] {
      if (!word.empty()) match_word(std::string(kEscapedSpace) + word, out);
      word.clear();
    };
    for (size_t i = 0; i < normal.size();) {
      const Utf8Char c = decode_utf8(normal, i);
      i += c.length;
      const auto code_point = static_cast<utf8proc_int32_t>(c.code_point);
      const utf8proc_category_t category = utf8proc_category(code_point);
      if (is_white_space(c.code_point)) {
        finish_word();
        continue;
      }
      if (c.code_point == 0 || c.code_point == kReplacementCharacter || is_control(category)) continue;
      if (options_.strip_accents && is_mark(category)) continue;
      const bool alone =
          is_punctuation(category) || (c.code_point < 0x7F && is_symbol(category)) || is_cjk_ideograph(c.code_point);
      if (alone) finish_word();
      append_utf8(word, options_.lowercase ? static_cast<char32_t>(utf8proc_tolower(code_point)) : c.code_point);
      if (alone) finish_word();
    }
    finish_word();
  }

  std::string decode(std::string_view stored_text) const override {
    return replace_all(stored_text, kEscapedSpace, " ");
  }

 private:
  // A word is unknown as a whole if any rest of it has no token.
  void match_word(std::string_view word, std::vector<TokenId>& out) const {
    const size_t n_before = out.size();
    while (!word.empty()) {
      std::optional<TokenId> token;
      size_t length = std::min(word.size(), tokens_.max_text_length());
      while (length > 0 && !(token = tokens_.find(word.substr(0, length)))) length--;
      if (!token) {
        out.resize(n_before);
        if (unknown_) out.push_back(*unknown_);
        return;
      }
      out.push_back(*token);
      word.remove_prefix(length);
    }
  }

  const TokenTable& tokens_;
  WordPieceOptions options_;
  std::optional<TokenId> unknown_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_wordpiece_tokenizer(const TokenTable& tokens, WordPieceOptions options,
                                                    std::optional<TokenId> unknown) {
  return std::make_unique<WordPieceTokenizer>(tokens, options, unknown);
}

}  // namespace caravan::vocab
