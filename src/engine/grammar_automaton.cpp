#include "engine/grammar_automaton.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/error.h"
#include "vocab/utf8.h"

namespace caravan::engine {
namespace {

using Kind = GrammarExpression::Kind;

struct ByteRange {
  uint8_t first = 0, last = 0;
  auto operator<=>(const ByteRange&) const = default;
};
using ByteRanges = std::vector<ByteRange>;  // one per byte of a character

// The UTF-8 forms of range as products of byte ranges: the range is cut where the length of the form changes, then
// until all bytes but the first differing one run through all continuation bytes.
// Source: Thompson's construction in Cox 2010, "Regular Expression Matching in the Wild".
void append_utf8_forms(CodeRange range, std::vector<ByteRanges>& forms) {
  for (const char32_t last_of_length : {0x7Fu, 0x7FFu, 0xFFFFu}) {
    if (range.first <= last_of_length && last_of_length < range.last) {
      append_utf8_forms({range.first, last_of_length}, forms);
      append_utf8_forms({last_of_length + 1, range.last}, forms);
      return;
    }
  }
  if (range.last > 0x7F) {
    for (int n_bits = 6; n_bits <= 18; n_bits += 6) {
      const char32_t low = (char32_t{1} << n_bits) - 1;
      if ((range.first & ~low) == (range.last & ~low)) break;  // the bytes before are the same
      if ((range.first & low) != 0) {
        append_utf8_forms({range.first, range.first | low}, forms);
        append_utf8_forms({(range.first | low) + 1, range.last}, forms);
        return;
      }
      if ((range.last & low) != low) {
        append_utf8_forms({range.first, (range.last & ~low) - 1}, forms);
        append_utf8_forms({range.last & ~low, range.last}, forms);
        return;
      }
    }
  }
  std::string first, last;
  vocab::append_utf8(first, range.first);
  vocab::append_utf8(last, range.last);
  ByteRanges form;
  for (size_t i = 0; i < first.size(); ++i)
    form.push_back({static_cast<uint8_t>(first[i]), static_cast<uint8_t>(last[i])});
  forms.push_back(std::move(form));
}

}  // namespace

// Builds the nodes of expressions from their ends: the node where an expression goes on is known before it is built.
class GrammarAutomaton::Builder {
 public:
  Builder(GrammarAutomaton& automaton, const GrammarRules& rules) : out_(automaton), rules_(rules) {}

  void build() {
    out_.root_ = rules_.root;
    for (const GrammarRule& rule : rules_.rules) out_.rules_.push_back({.name = rule.name});
    for (uint32_t i = 0; i < rules_.rules.size(); ++i) build_rule(i, rules_.rules[i].body);
  }

 private:
  // Repeated expressions of more nodes become a rule of their own, so that a copy costs one node.
  static constexpr size_t kLargestCopy = 2;

  void build_rule(uint32_t rule, const GrammarExpression& body) {
    const uint32_t outer = std::exchange(rule_, rule);
    const NodeId end = add({});
    const NodeId start = build(body, end);
    out_.rules_[rule].start = start;
    rule_ = outer;
  }

  NodeId add(Node node) {
    if (out_.nodes_.size() >= kMaxGrammarNodes)
      throw RequestError(fmt::format("grammar: too large, it needs more than {} states (in rule '{}')",
                                     kMaxGrammarNodes, out_.rules_[rule_].name));
    node.rule = rule_;
    out_.nodes_.push_back(node);
    return static_cast<NodeId>(out_.nodes_.size() - 1);
  }

  NodeId add_choice(const std::vector<NodeId>& nodes) {
    Node node{.kind = NodeKind::choice, .begin = static_cast<uint32_t>(out_.choices_.size())};
    out_.choices_.insert(out_.choices_.end(), nodes.begin(), nodes.end());
    node.end = static_cast<uint32_t>(out_.choices_.size());
    return add(node);
  }

  NodeId add_bytes(const std::vector<ByteEdge>& edges) {
    Node node{.kind = NodeKind::bytes, .begin = static_cast<uint32_t>(out_.edges_.size())};
    out_.edges_.insert(out_.edges_.end(), edges.begin(), edges.end());
    node.end = static_cast<uint32_t>(out_.edges_.size());
    return add(node);
  }

  NodeId build(const GrammarExpression& expression, NodeId next) {
    switch (expression.kind) {
      case Kind::text:
        for (auto c = expression.text.rbegin(); c != expression.text.rend(); ++c)
          next = add_bytes({{static_cast<uint8_t>(*c), static_cast<uint8_t>(*c), next}});
        return next;
      case Kind::character:
        return build_character(expression.ranges, next);
      case Kind::rule:
        return add({.kind = NodeKind::call, .callee = expression.rule, .next = next});
      case Kind::token:
        return add({.kind = NodeKind::token, .negated = expression.negated, .token = expression.token, .next = next});
      case Kind::sequence:
        for (auto child = expression.children.rbegin(); child != expression.children.rend(); ++child)
          next = build(*child, next);
        return next;
      case Kind::choice: {
        std::vector<NodeId> nodes;
        for (const GrammarExpression& child : expression.children) nodes.push_back(build(child, next));
        return add_choice(nodes);
      }
      case Kind::repeat:
        return build_repeat(expression, next);
    }
    CARAVAN_ASSERT(false, "the enum has no other value");
  }

  NodeId build_character(const std::vector<CodeRange>& ranges, NodeId next) {
    std::vector<ByteRanges> forms;
    for (const CodeRange& range : ranges) append_utf8_forms(range, forms);
    std::map<ByteRanges, NodeId> tails;  // where the remaining bytes of a character are taken
    tails[{}] = next;
    std::vector<ByteEdge> first_bytes;
    for (const ByteRanges& form : forms) {
      for (size_t n = 1; n < form.size(); ++n) {
        const ByteRanges tail(form.end() - static_cast<ptrdiff_t>(n), form.end());
        if (tails.count(tail) > 0) continue;
        const NodeId after = tails.at(ByteRanges(tail.begin() + 1, tail.end()));
        const NodeId node = add_bytes({{tail.front().first, tail.front().last, after}});
        tails.emplace(tail, node);
      }
      first_bytes.push_back(
          {form.front().first, form.front().last, tails.at(ByteRanges(form.begin() + 1, form.end()))});
    }
    return add_bytes(first_bytes);
  }

  NodeId build_repeat(const GrammarExpression& repeat, NodeId next) {
    const GrammarExpression* child = &repeat.children.front();
    GrammarExpression call;
    const bool copied = repeat.at_least > 1 || repeat.at_most.value_or(0) > 1;
    if (copied && needs_more_nodes(*child, kLargestCopy)) {
      call.kind = Kind::rule;
      call.rule = static_cast<uint32_t>(out_.rules_.size());
      out_.rules_.push_back({.name = out_.rules_[rule_].name});
      build_rule(call.rule, *child);
      child = &call;
    }
    if (!repeat.at_most) {
      const NodeId loop = add_choice({0, next});
      const NodeId body = build(*child, loop);
      out_.choices_[out_.nodes_[loop].begin] = body;
      next = loop;
    } else {
      const NodeId after = next;
      for (uint32_t i = repeat.at_least; i < *repeat.at_most; ++i) next = add_choice({build(*child, next), after});
    }
    for (uint32_t i = 0; i < repeat.at_least; ++i) next = build(*child, next);
    return next;
  }

  // Whether expression takes more than n nodes. A character class of several byte forms does.
  static bool needs_more_nodes(const GrammarExpression& expression, size_t n) {
    if (expression.kind == Kind::text) return expression.text.size() > n;
    if (expression.kind == Kind::character) return expression.ranges.back().last > 0x7F;
    return expression.kind != Kind::rule && expression.kind != Kind::token;
  }

  GrammarAutomaton& out_;
  const GrammarRules& rules_;
  uint32_t rule_ = 0;  // that is being built
};

GrammarAutomaton::GrammarAutomaton(const GrammarRules& rules) {
  Builder(*this, rules).build();
  find_nullable_rules();
  find_left_order();
  remove_endless_parts();
  find_long_rules();
  find_byte_classes();
}

// From the ends backwards: a choice reaches its rule's end when one of its nodes does, a call when its callee is
// nullable and the node after it does.
void GrammarAutomaton::find_nullable_rules() {
  std::vector<std::vector<NodeId>> before(nodes_.size());  // choices and calls that go on at a node
  std::vector<std::vector<NodeId>> calls(rules_.size());
  std::vector<bool> reaches_end(nodes_.size(), false);
  std::vector<NodeId> open;
  const auto mark = [&](NodeId id) {
    if (!reaches_end[id]) open.push_back(id);
    reaches_end[id] = true;
  };
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (node.kind == NodeKind::end) mark(id);
    if (node.kind == NodeKind::choice) {
      for (const NodeId next : choices(node)) before[next].push_back(id);
    } else if (node.kind == NodeKind::call) {
      before[node.next].push_back(id);
      calls[node.callee].push_back(id);
    }
  }
  while (!open.empty()) {
    const NodeId id = open.back();
    open.pop_back();
    for (const NodeId previous : before[id]) {
      const Node& node = nodes_[previous];
      if (node.kind == NodeKind::choice || rules_[node.callee].nullable) mark(previous);
    }
    Rule& rule = rules_[nodes_[id].rule];
    if (rule.start != id) continue;
    rule.nullable = true;
    for (const NodeId call : calls[nodes_[id].rule])
      if (reaches_end[nodes_[call].next]) mark(call);
  }
}

// The rules that may stand at the beginning of what rule takes.
std::vector<uint32_t> GrammarAutomaton::rules_that_begin(uint32_t rule) const {
  std::set<uint32_t> found;
  std::set<NodeId> seen{rules_[rule].start};
  std::vector<NodeId> open{rules_[rule].start};
  while (!open.empty()) {
    const Node& node = nodes_[open.back()];
    open.pop_back();
    if (node.kind == NodeKind::choice) {
      for (const NodeId next : choices(node))
        if (seen.insert(next).second) open.push_back(next);
    } else if (node.kind == NodeKind::call) {
      found.insert(node.callee);
      if (rules_[node.callee].nullable && seen.insert(node.next).second) open.push_back(node.next);
    }
  }
  return {found.begin(), found.end()};
}

// Depth-first search with an own stack; a rule met again while it is open is left-recursive.
void GrammarAutomaton::find_left_order() {
  enum class Mark : uint8_t { unseen, open, done };
  struct Open {
    uint32_t rule;
    std::vector<uint32_t> begins;
    size_t next = 0;
  };
  std::vector<Mark> marks(rules_.size(), Mark::unseen);
  auto order = static_cast<uint32_t>(rules_.size());
  for (uint32_t first = 0; first < rules_.size(); ++first) {
    std::vector<Open> path;
    const auto enter = [&](uint32_t rule) {
      marks[rule] = Mark::open;
      path.push_back({rule, rules_that_begin(rule)});
    };
    if (marks[first] == Mark::unseen) enter(first);
    while (!path.empty()) {
      Open& top = path.back();
      if (top.next == top.begins.size()) {
        marks[top.rule] = Mark::done;
        rules_[top.rule].left_order = --order;
        path.pop_back();
        continue;
      }
      const uint32_t rule = top.begins[top.next++];
      if (marks[rule] == Mark::unseen) {
        enter(rule);
      } else if (marks[rule] == Mark::open) {
        std::string cycle;
        const auto begin = std::find_if(path.begin(), path.end(), [&](const Open& o) { return o.rule == rule; });
        for (auto at = begin; at != path.end(); ++at) cycle += rules_[at->rule].name + " -> ";
        throw RequestError(fmt::format("grammar: the rule '{}' is left-recursive, which is not supported: {}{}",
                                       rules_[rule].name, cycle, rules_[rule].name));
      }
    }
  }
}

// Leaves out the choices and edges to nodes from which the end of the rule cannot be reached: characters that do not
// exist, recursion without a way out. What remains alive can then always be completed.
void GrammarAutomaton::remove_endless_parts() {
  std::vector<std::vector<NodeId>> before(nodes_.size()), calls(rules_.size());
  std::vector<bool> ends(nodes_.size(), false), rule_ends(rules_.size(), false);
  std::vector<NodeId> open;
  const auto mark = [&](NodeId id) {
    const Node& node = nodes_[id];
    if (ends[id] || (node.kind == NodeKind::call && !(rule_ends[node.callee] && ends[node.next]))) return;
    ends[id] = true;
    open.push_back(id);
  };
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (node.kind == NodeKind::choice) {
      for (const NodeId next : choices(node)) before[next].push_back(id);
    } else if (node.kind == NodeKind::bytes) {
      for (const ByteEdge& edge : edges(node)) before[edge.next].push_back(id);
    } else if (node.kind != NodeKind::end) {
      before[node.next].push_back(id);
    }
    if (node.kind == NodeKind::call) calls[node.callee].push_back(id);
  }
  for (NodeId id = 0; id < nodes_.size(); ++id)
    if (nodes_[id].kind == NodeKind::end) mark(id);
  while (!open.empty()) {
    const NodeId id = open.back();
    open.pop_back();
    for (const NodeId previous : before[id]) mark(previous);
    const uint32_t rule = nodes_[id].rule;
    if (rules_[rule].start != id) continue;
    rule_ends[rule] = true;
    for (const NodeId call : calls[rule]) mark(call);
  }
  if (!rule_ends[root_]) throw RequestError("grammar: no text of the rule 'root' ever ends");
  for (Node& node : nodes_) {
    const auto keep = [&](auto& list, auto&& target) {
      const auto first = list.begin() + node.begin, last = list.begin() + node.end;
      node.end = static_cast<uint32_t>(
          std::remove_if(first, last, [&](const auto& item) { return !ends[target(item)]; }) - list.begin());
    };
    if (node.kind == NodeKind::choice) keep(choices_, [](NodeId next) { return next; });
    if (node.kind == NodeKind::bytes) keep(edges_, [](const ByteEdge& edge) { return edge.next; });
  }
}

// A rule takes long texts when its graph has a cycle or many optional parts, or when it is a part of itself. Cycles of
// choices: a loop's choice node is older than the nodes of its body, and every other edge goes to an older node.
void GrammarAutomaton::find_long_rules() {
  constexpr uint32_t kManyCalls = 8;
  std::vector<std::set<uint32_t>> callees(rules_.size());
  std::vector<uint32_t> n_calls(rules_.size(), 0);
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    Rule& rule = rules_[node.rule];
    if (node.kind == NodeKind::choice) {
      for (const NodeId next : choices(node)) rule.takes_long_texts |= next >= id;
    } else if (node.kind == NodeKind::call) {
      callees[node.rule].insert(node.callee);
      rule.takes_long_texts |= ++n_calls[node.rule] > kManyCalls;
    }
  }
  rules_[root_].takes_long_texts = true;
  // Recursion: what is left when rules that call none that is left are taken away, again and again.
  std::vector<std::vector<uint32_t>> callers(rules_.size());
  std::vector<size_t> n_left(rules_.size());
  std::vector<uint32_t> leaves;
  for (uint32_t rule = 0; rule < rules_.size(); ++rule) {
    n_left[rule] = callees[rule].size();
    for (const uint32_t callee : callees[rule]) callers[callee].push_back(rule);
    if (n_left[rule] == 0) leaves.push_back(rule);
  }
  std::vector<bool> recursive(rules_.size(), true);
  while (!leaves.empty()) {
    const uint32_t rule = leaves.back();
    leaves.pop_back();
    recursive[rule] = false;
    for (const uint32_t caller : callers[rule])
      if (--n_left[caller] == 0) leaves.push_back(caller);
  }
  for (uint32_t rule = 0; rule < rules_.size(); ++rule) rules_[rule].takes_long_texts |= recursive[rule];
}

void GrammarAutomaton::find_byte_classes() {
  std::set<std::pair<uint8_t, uint8_t>> ranges;
  for (const ByteEdge& edge : edges_) ranges.emplace(edge.first, edge.last);
  // Ranges cut the line of bytes into pieces; two pieces are of one class when they lie in the same ranges.
  std::map<std::vector<uint32_t>, uint8_t> classes;
  for (int byte = 0; byte < 256; ++byte) {
    std::vector<uint32_t> inside;
    uint32_t index = 0;
    for (const auto& [first, last] : ranges) {
      if (first <= byte && byte <= last) inside.push_back(index);
      ++index;
    }
    const auto [at, added] = classes.emplace(std::move(inside), static_cast<uint8_t>(examples_.size()));
    if (added) examples_.push_back(static_cast<uint8_t>(byte));
    byte_classes_[static_cast<size_t>(byte)] = at->second;
  }
  n_byte_classes_ = static_cast<uint32_t>(examples_.size());
}

}  // namespace caravan::engine
