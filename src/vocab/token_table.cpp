#include "vocab/token_table.h"

#include <algorithm>
#include <charconv>
#include <functional>

namespace caravan::vocab {

TextIndex::TextIndex(const std::vector<std::string>& texts) {
  size_t n_bytes = 0;
  for (const std::string& text : texts) n_bytes += text.size();
  block_.reserve(n_bytes);
  offsets_.reserve(texts.size() + 1);
  offsets_.push_back(0);
  for (const std::string& text : texts) {
    block_ += text;
    offsets_.push_back(block_.size());
    max_length_ = std::max(max_length_, text.size());
  }

  size_t capacity = 16;
  while (capacity < texts.size() * 2) capacity *= 2;
  places_.assign(capacity, -1);
  for (size_t id = 0; id < texts.size(); id++) {
    size_t i = std::hash<std::string_view>{}(text(id)) & (capacity - 1);
    while (places_[i] >= 0 && text(static_cast<size_t>(places_[i])) != text(id)) i = (i + 1) & (capacity - 1);
    places_[i] = static_cast<TokenId>(id);
  }
}

std::optional<TokenId> TextIndex::find(std::string_view wanted) const {
  if (wanted.size() > max_length_) return std::nullopt;
  const size_t mask = places_.size() - 1;
  for (size_t i = std::hash<std::string_view>{}(wanted)&mask; places_[i] >= 0; i = (i + 1) & mask) {
    if (text(static_cast<size_t>(places_[i])) == wanted) return places_[i];
  }
  return std::nullopt;
}

std::optional<uint8_t> parse_byte_token(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  uint8_t value = 0;
  const auto [end, error] = std::from_chars(text.data() + 3, text.data() + 5, value, 16);
  if (error != std::errc() || end != text.data() + 5) return std::nullopt;
  return value;
}

std::vector<TokenId> TokenTable::byte_tokens() const {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::vector<TokenId> tokens(256, -1);
  for (size_t byte = 0; byte < 256; byte++) {
    const char spelled[] = {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
    const char raw = static_cast<char>(byte);
    auto token = find({spelled, sizeof spelled});
    if (!token) token = find({&raw, 1});
    if (token) tokens[byte] = *token;
  }
  return tokens;
}

}  // namespace caravan::vocab
