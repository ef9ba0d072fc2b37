// A trie over byte strings: for each node the child of a byte and one number. Its edges are in one hash map.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "vocab/flat_map.h"

namespace caravan::vocab {

// Filled first, then only read, by several threads at once.
class ByteTrie {
 public:
  static constexpr int kRoot = 0, kNone = -1;

  explicit ByteTrie(size_t expected_edges = 0) : edges_(expected_edges), values_{kNone} {}

  // The number at the end of text, for the caller to set; kNone where nothing was set yet.
  int& operator[](std::string_view text) {
    int node = kRoot;
    for (const char byte : text) {
      node = edges_.insert(edge(node, byte), static_cast<int>(values_.size()));
      if (node == static_cast<int>(values_.size())) values_.push_back(kNone);
    }
    return values_[static_cast<size_t>(node)];
  }

  // The node below this one, or kNone.
  int child(int node, char byte) const {
    const int* next = edges_.find(edge(node, byte));
    return next ? *next : kNone;
  }
  // The number at this node, or kNone.
  int value(int node) const { return values_[static_cast<size_t>(node)]; }

  // The longest beginning of text that has a number: that number (or kNone) and its length in bytes.
  struct Match {
    int value = kNone;
    size_t length = 0;
  };
  Match longest_prefix(std::string_view text) const {
    Match found;
    int node = kRoot;
    for (size_t i = 0; i < text.size() && (node = child(node, text[i])) != kNone; i++) {
      if (value(node) != kNone) found = {value(node), i + 1};
    }
    return found;
  }

 private:
  static uint64_t edge(int node, char byte) { return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte); }

  FlatMap<int> edges_;  // node << 8 | byte -> node
  std::vector<int> values_;
};

}  // namespace caravan::vocab
