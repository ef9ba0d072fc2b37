// The tokens of a vocabulary: text, score and type by id, and the id by text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "vocab/vocabulary.h"

namespace caravan::vocab {

// Numbered strings in one block of memory with a hash index over them.
class TextIndex {
 public:
  // Of several equal texts the last one is found.
  explicit TextIndex(const std::vector<std::string>& texts);

  size_t size() const { return offsets_.size() - 1; }
  std::string_view text(size_t id) const {
    return std::string_view(block_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
  }
  std::optional<TokenId> find(std::string_view text) const;
  // Bytes of the longest text.
  size_t max_length() const { return max_length_; }

 private:
  std::string block_;
  std::vector<size_t> offsets_;
  std::vector<TokenId> places_;  // open addressing, -1 is empty
  size_t max_length_ = 0;
};

// Types may be corrected while a vocabulary is loaded; everything else is fixed.
class TokenTable {
 public:
  // scores and types: as many as texts.
  TokenTable(const std::vector<std::string>& texts, std::vector<float> scores, std::vector<TokenType> types)
      : texts_(texts), scores_(std::move(scores)), types_(std::move(types)) {}

  size_t size() const { return types_.size(); }
  std::string_view text(TokenId token) const { return texts_.text(static_cast<size_t>(token)); }
  float score(TokenId token) const { return scores_[static_cast<size_t>(token)]; }
  TokenType type(TokenId token) const { return types_[static_cast<size_t>(token)]; }
  void set_type(TokenId token, TokenType type) { types_[static_cast<size_t>(token)] = type; }
  std::optional<TokenId> find(std::string_view text) const { return texts_.find(text); }
  size_t max_text_length() const { return texts_.max_length(); }

  // The tokens "<0x00>" .. "<0xFF>"; where there is none, the token whose text is that byte; else -1.
  std::vector<TokenId> byte_tokens() const;

 private:
  TextIndex texts_;
  std::vector<float> scores_;
  std::vector<TokenType> types_;
};

// The byte that a text of the form "<0x1F>" stands for.
std::optional<uint8_t> parse_byte_token(std::string_view text);

}  // namespace caravan::vocab
