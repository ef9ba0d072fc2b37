// The texts of a vocabulary's tokens as a trie in one array, so that a grammar is run over all tokens at once: common
// beginnings are read once, and a beginning that the grammar refuses ends all its tokens. Immutable.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "vocab/vocabulary.h"

namespace caravan::engine {

class TokenTrie {
 public:
  // A node for each distinct beginning, in preorder: the nodes below i are i + 1 .. end - 1. Node 0 is the empty text.
  struct Node {
    uint32_t end = 0;
    uint32_t first_rank = 0;  // ranks of its own tokens: up to first_rank of the next node
    uint16_t depth = 0;       // bytes
    uint8_t byte = 0;         // the last one
  };

  // The tokens that add bytes to the answer and do not end it. Control tokens are not among them.
  explicit TokenTrie(const vocab::Vocabulary& vocabulary);

  // Ends with a node that belongs to no text, so that node i + 1 always exists.
  const std::vector<Node>& nodes() const { return nodes_; }
  // Tokens are ranked by their bytes, so that all that begin alike are neighbours; those not in the trie come last, by
  // id.
  uint32_t n_tokens() const { return static_cast<uint32_t>(rank_of_.size()); }
  uint32_t n_ranked() const { return nodes_.back().first_rank; }
  uint32_t rank_of(int32_t token) const { return rank_of_[static_cast<size_t>(token)]; }
  bool has(int32_t token) const { return rank_of(token) < n_ranked(); }
  int32_t token_at(uint32_t rank) const { return tokens_[rank]; }
  // The bytes of a token; empty for one that is not in the trie.
  std::string_view bytes(int32_t token) const;
  // Ascending.
  std::span<const int32_t> end_of_generation() const { return end_of_generation_; }

 private:
  void build_nodes();

  std::vector<int32_t> tokens_;       // by rank
  std::vector<uint32_t> rank_of_;     // by token
  std::vector<uint32_t> text_begin_;  // by rank, into texts_; one more at the end
  std::string texts_;
  std::vector<Node> nodes_;
  std::vector<int32_t> end_of_generation_;
};

}  // namespace caravan::engine
