// Grammar rules as an automaton over bytes: per rule a graph whose edges take a byte, a token or the text of another
// rule. Characters become the byte ranges of their UTF-8 forms, so that a token may end inside a character. Immutable.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/gbnf.h"

namespace caravan::engine {

// Nodes of all rules together; a grammar beyond is refused.
constexpr uint32_t kMaxGrammarNodes = 400'000;

class GrammarAutomaton {
 public:
  using NodeId = uint32_t;

  enum class NodeKind : uint8_t {
    choice,  // goes on at any of choices(), without taking anything
    bytes,   // takes a byte of one of edges()
    token,   // takes the token, or any other one that is text
    call,    // takes what rule takes, then goes on at next
    end,     // the rule is complete
  };
  struct Node {
    NodeKind kind = NodeKind::end;
    bool negated = false;         // token
    uint32_t rule = 0;            // that the node belongs to
    uint32_t begin = 0, end = 0;  // of its choices or edges
    uint32_t callee = 0;          // call: the rule
    int32_t token = 0;
    NodeId next = 0;  // token, call
  };
  struct ByteEdge {
    uint8_t first = 0, last = 0;
    NodeId next = 0;
  };
  struct Rule {
    std::string name;
    NodeId start = 0;
    bool nullable = false;          // matches the empty text
    bool takes_long_texts = false;  // holds a loop: worth a token mask of its own
    uint32_t left_order = 0;        // a rule that may begin with another one has the smaller number
  };

  // Parts from which no text ever ends are left out. Throws RequestError: a left-recursive rule (named), too many
  // nodes, or no text at all.
  explicit GrammarAutomaton(const GrammarRules& rules);

  const Node& node(NodeId id) const { return nodes_[id]; }
  std::span<const NodeId> choices(const Node& node) const {
    return std::span(choices_).subspan(node.begin, node.end - node.begin);
  }
  std::span<const ByteEdge> edges(const Node& node) const {
    return std::span(edges_).subspan(node.begin, node.end - node.begin);
  }
  const std::vector<Rule>& rules() const { return rules_; }
  uint32_t root() const { return root_; }
  uint32_t n_nodes() const { return static_cast<uint32_t>(nodes_.size()); }

  // Bytes that no edge tells apart are of the same class.
  uint32_t n_byte_classes() const { return n_byte_classes_; }
  uint32_t byte_class(uint8_t byte) const { return byte_classes_[byte]; }
  const std::array<uint8_t, 256>& byte_classes() const { return byte_classes_; }
  // A byte of the class.
  uint8_t example_of(uint32_t byte_class) const { return examples_[byte_class]; }

 private:
  class Builder;
  void find_nullable_rules();
  void find_left_order();
  void remove_endless_parts();
  void find_long_rules();
  void find_byte_classes();
  std::vector<uint32_t> rules_that_begin(uint32_t rule) const;

  std::vector<Node> nodes_;
  std::vector<NodeId> choices_;
  std::vector<ByteEdge> edges_;
  std::vector<Rule> rules_;
  uint32_t root_ = 0;
  uint32_t n_byte_classes_ = 0;
  std::array<uint8_t, 256> byte_classes_{};
  std::vector<uint8_t> examples_;
};

}  // namespace caravan::engine
