#include "engine/token_trie.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace caravan::engine {

TokenTrie::TokenTrie(const vocab::Vocabulary& vocabulary) : end_of_generation_(vocabulary.end_of_generation_tokens()) {
  std::vector<std::pair<std::string, int32_t>> texts;
  std::vector<int32_t> others;
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    const auto token = static_cast<int32_t>(i);
    std::string text;
    if (vocabulary.has_text() && !vocabulary.is_end_of_generation(token))
      text = vocabulary.piece(token, vocab::RenderSpecial::no);
    if (text.empty() || text.size() > std::numeric_limits<uint16_t>::max()) {
      others.push_back(token);
    } else {
      texts.emplace_back(std::move(text), token);
    }
  }
  std::sort(texts.begin(), texts.end());
  rank_of_.resize(vocabulary.size());
  for (const auto& [text, token] : texts) {
    text_begin_.push_back(static_cast<uint32_t>(texts_.size()));
    texts_ += text;
    rank_of_[static_cast<size_t>(token)] = static_cast<uint32_t>(tokens_.size());
    tokens_.push_back(token);
  }
  text_begin_.push_back(static_cast<uint32_t>(texts_.size()));
  build_nodes();
  for (const int32_t token : others) {
    rank_of_[static_cast<size_t>(token)] = static_cast<uint32_t>(tokens_.size());
    tokens_.push_back(token);
  }
}

// The texts come sorted; each adds the nodes beyond what it shares with the one before.
void TokenTrie::build_nodes() {
  std::vector<uint32_t> path{0};  // node by depth, of the last text
  nodes_.push_back({});
  std::string_view last;
  const auto n_texts = static_cast<uint32_t>(tokens_.size());
  const auto close_below = [&](size_t depth) {
    for (; path.size() > depth + 1; path.pop_back()) nodes_[path.back()].end = static_cast<uint32_t>(nodes_.size());
  };
  for (uint32_t rank = 0; rank < n_texts; ++rank) {
    const std::string_view text =
        std::string_view(texts_).substr(text_begin_[rank], text_begin_[rank + 1] - text_begin_[rank]);
    const auto differs = std::mismatch(text.begin(), text.end(), last.begin(), last.end()).first;
    const auto n_shared = static_cast<size_t>(differs - text.begin());
    close_below(n_shared);
    for (size_t depth = n_shared; depth < text.size(); ++depth) {
      path.push_back(static_cast<uint32_t>(nodes_.size()));
      nodes_.push_back(
          {.first_rank = rank, .depth = static_cast<uint16_t>(depth + 1), .byte = static_cast<uint8_t>(text[depth])});
    }
    last = text;
  }
  close_below(0);
  nodes_[0].end = static_cast<uint32_t>(nodes_.size());
  nodes_.push_back({.end = static_cast<uint32_t>(nodes_.size()) + 1, .first_rank = n_texts});
}

std::string_view TokenTrie::bytes(int32_t token) const {
  const uint32_t rank = rank_of(token);
  if (rank >= n_ranked()) return {};
  return std::string_view(texts_).substr(text_begin_[rank], text_begin_[rank + 1] - text_begin_[rank]);
}

}  // namespace caravan::engine
