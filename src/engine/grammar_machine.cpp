#include "engine/grammar_machine.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "engine/random.h"

namespace caravan::engine {
namespace {

using NodeKind = GrammarAutomaton::NodeKind;

constexpr size_t kLargeTransitions = size_t{1} << 23;                              // kept: 40 MiB
constexpr size_t kMaxFrames = size_t{1} << 23, kMaxTransitions = size_t{1} << 26;  // for one token: 320 MiB

}  // namespace

bool GrammarMachine::SeenPairs::insert(uint64_t key) {
  if ((used_.size() + 1) * 2 > slots_.size()) grow();
  size_t i = mix64(key) & (slots_.size() - 1);
  while (slots_[i] != kEmpty) {
    if (slots_[i] == key) return false;
    i = (i + 1) & (slots_.size() - 1);
  }
  slots_[i] = key;
  used_.push_back(static_cast<uint32_t>(i));
  return true;
}

void GrammarMachine::SeenPairs::clear() {
  for (const uint32_t i : used_) slots_[i] = kEmpty;
  used_.clear();
}

void GrammarMachine::SeenPairs::grow() {
  std::vector<uint64_t> old(slots_.size() * 2, kEmpty);
  old.swap(slots_);
  used_.clear();
  for (const uint64_t key : old) {
    if (key == kEmpty) continue;
    size_t i = mix64(key) & (slots_.size() - 1);
    while (slots_[i] != kEmpty) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = key;
    used_.push_back(static_cast<uint32_t>(i));
  }
}

GrammarMachine::GrammarMachine(const GrammarAutomaton& automaton)
    : automaton_(automaton),
      begins_{0, 0},  // set 0 is empty: kDead
      table_(1024, kDead),
      rows_{kNoRow},
      pending_(automaton.rules().size()),
      pending_sets_(automaton.rules().size()) {
  unknown_callers_ = intern({{kLeft, 0}});
  add(automaton_.rules()[automaton_.root()].start, intern({{kAccepted, 0}}));
  initial_ = close();
}

uint64_t GrammarMachine::hash_of(std::span<const Frame> frames) const {
  uint64_t hash = frames.size();
  for (const Frame& frame : frames) hash = mix64(hash ^ (uint64_t{frame.node} << 32 | frame.callers)) + frame.node;
  return hash;
}

void GrammarMachine::grow_table() {
  std::vector<SetId> table(table_.size() * 2, kDead);
  for (SetId set = 1; set + 1 < begins_.size(); ++set) {
    size_t i = hash_of(frames(set)) & (table.size() - 1);
    while (table[i] != kDead) i = (i + 1) & (table.size() - 1);
    table[i] = set;
  }
  table_ = std::move(table);
}

GrammarMachine::SetId GrammarMachine::intern(std::vector<Frame> frames) {
  if (frames.empty()) return kDead;
  std::sort(frames.begin(), frames.end());
  frames.erase(std::unique(frames.begin(), frames.end()), frames.end());
  size_t i = hash_of(frames) & (table_.size() - 1);
  for (; table_[i] != kDead; i = (i + 1) & (table_.size() - 1)) {
    const auto known = this->frames(table_[i]);
    if (std::equal(known.begin(), known.end(), frames.begin(), frames.end())) return table_[i];
  }
  if (frames_.size() + frames.size() > kMaxFrames)
    throw RequestError("grammar: it is too ambiguous: the ways to read the answer need too much memory");
  const auto set = static_cast<SetId>(rows_.size());
  frames_.insert(frames_.end(), frames.begin(), frames.end());
  begins_.push_back(static_cast<uint32_t>(frames_.size()));
  rows_.push_back(kNoRow);
  table_[i] = set;
  if (rows_.size() * 2 > table_.size()) grow_table();
  return set;
}

void GrammarMachine::add(NodeId node, Context context) {
  if (seen_.insert(uint64_t{node} << 32 | context)) open_.push_back({node, context});
}

// A call as the last part of a rule hands the rule's own callers on: its frame is the rule's end node, for which
// resolve_pending() puts the callers themselves. So repetition by recursion needs no memory.
void GrammarMachine::call(const GrammarAutomaton::Node& node, Context context) {
  PendingRule& callee = pending_[node.callee];
  if (!callee.entered) {
    callee.entered = true;
    pending_rules_.push_back(node.callee);
    add(automaton_.rules()[node.callee].start, kPending | node.callee);
  }
  callee.callers.push_back({node.next, context});
  if (callee.completed) add(node.next, context);
}

void GrammarMachine::complete(Context context) {
  if ((context & kPending) == 0) {
    for (const Frame& frame : frames(context)) {
      if (frame.node == kAccepted || frame.node == kLeft) {
        taken_.push_back({frame.node, frame.callers});
      } else {
        add(frame.node, frame.callers);
      }
    }
    return;
  }
  PendingRule& rule = pending_[context & ~kPending];
  if (rule.completed) return;
  rule.completed = true;
  for (const Item& caller : rule.callers) add(caller.node, caller.context);
}

// Follows what takes no byte from all open items, and interns what then expects one.
GrammarMachine::State GrammarMachine::close() {
  struct Cleaner {
    GrammarMachine& machine;
    ~Cleaner() { machine.clear_scratch(); }
  } const cleaner{*this};  // also when memory runs out in between: others use the machine, too
  while (!open_.empty()) {
    const Item item = open_.back();
    open_.pop_back();
    const GrammarAutomaton::Node& node = automaton_.node(item.node);
    switch (node.kind) {
      case NodeKind::choice:
        for (const NodeId next : automaton_.choices(node)) add(next, item.context);
        break;
      case NodeKind::bytes:
      case NodeKind::token:
        taken_.push_back(item);
        break;
      case NodeKind::call:
        call(node, item.context);
        break;
      case NodeKind::end:
        complete(item.context);
        break;
    }
  }
  resolve_pending();
  for (Item& item : taken_) item.context = resolved(item.context);
  // One frame per node: its callers are those of all.
  std::sort(taken_.begin(), taken_.end(), [](const Item& a, const Item& b) {
    return a.node < b.node || (a.node == b.node && a.context < b.context);
  });
  std::vector<Frame> state;
  for (size_t i = 0; i < taken_.size();) {
    size_t end = i + 1;
    while (end < taken_.size() && taken_[end].node == taken_[i].node) ++end;
    SetId callers = taken_[i].context;
    if (taken_[end - 1].context != callers) {
      std::vector<Frame> all;
      for (size_t j = i; j < end; ++j) {
        const auto more = frames(taken_[j].context);
        all.insert(all.end(), more.begin(), more.end());
      }
      callers = intern(std::move(all));
    }
    state.push_back({taken_[i].node, callers});
    i = end;
  }
  return intern(std::move(state));
}

void GrammarMachine::clear_scratch() {
  for (const uint32_t rule : pending_rules_) {
    pending_[rule].callers.clear();
    pending_[rule].completed = pending_[rule].entered = false;
  }
  pending_rules_.clear();
  open_.clear();
  taken_.clear();
  seen_.clear();
}

// Interns the callers of all rules that were entered. A rule's callers belong to rules that may begin with it, which
// come first in left order, so that their own callers are known.
void GrammarMachine::resolve_pending() {
  std::sort(pending_rules_.begin(), pending_rules_.end(), [this](uint32_t a, uint32_t b) {
    return automaton_.rules()[a].left_order < automaton_.rules()[b].left_order;
  });
  for (const uint32_t rule : pending_rules_) {
    std::vector<Frame> frames;
    for (const Item& caller : pending_[rule].callers) {
      const SetId callers = resolved(caller.context);
      if (automaton_.node(caller.node).kind == NodeKind::end) {
        const auto own = this->frames(callers);
        frames.insert(frames.end(), own.begin(), own.end());
      } else {
        frames.push_back({caller.node, callers});
      }
    }
    pending_sets_[rule] = intern(std::move(frames));
  }
}

GrammarMachine::SetId GrammarMachine::resolved(Context context) const {
  return (context & kPending) != 0 ? pending_sets_[context & ~kPending] : context;
}

GrammarMachine::State GrammarMachine::compute_step(State state, uint32_t byte_class) {
  const uint8_t byte = automaton_.example_of(byte_class);
  for (const Frame& frame : frames(state)) {
    if (frame.node == kAccepted || frame.node == kLeft) continue;
    const GrammarAutomaton::Node& node = automaton_.node(frame.node);
    if (node.kind != NodeKind::bytes) continue;
    for (const GrammarAutomaton::ByteEdge& edge : automaton_.edges(node))
      if (edge.first <= byte && byte <= edge.last) add(edge.next, frame.callers);
  }
  const State next = close();
  if (rows_[state] == kNoRow) {
    if (transitions_.size() + automaton_.n_byte_classes() > kMaxTransitions)
      throw RequestError("grammar: the ways to read the answer need too much memory");
    rows_[state] = static_cast<uint32_t>(transitions_.size());
    transitions_.resize(transitions_.size() + automaton_.n_byte_classes(), kUnknown);
  }
  transitions_[rows_[state] + byte_class] = next;
  return next;
}

GrammarMachine::State GrammarMachine::step(State state, std::string_view bytes) {
  for (const char c : bytes) {
    if (state == kDead) break;
    state = step(state, static_cast<uint8_t>(c));
  }
  return state;
}

GrammarMachine::State GrammarMachine::step_token(State state, int32_t token, bool is_text) {
  for (const Frame& frame : frames(state)) {
    if (frame.node == kAccepted || frame.node == kLeft) continue;
    const GrammarAutomaton::Node& node = automaton_.node(frame.node);
    if (node.kind != NodeKind::token) continue;
    if (node.negated ? is_text && node.token != token : node.token == token) add(node.next, frame.callers);
  }
  return close();
}

bool GrammarMachine::accepts(State state) const {
  const auto all = frames(state);
  return std::any_of(all.begin(), all.end(), [](const Frame& frame) { return frame.node == kAccepted; });
}

bool GrammarMachine::left(State state) const { return state != kDead && frames(state).back().node == kLeft; }

GrammarMachine::State GrammarMachine::leave_to(SetId callers) {
  complete(callers);
  return close();
}

GrammarMachine::State GrammarMachine::either(State a, State b) {
  if (a == b || b == kDead) return a;
  if (a == kDead) return b;
  for (const State state : {a, b})
    for (const Frame& frame : frames(state)) taken_.push_back({frame.node, frame.callers});
  return close();
}

bool GrammarMachine::is_large() const {
  return frames_.size() > large_frames_ || transitions_.size() > kLargeTransitions;
}

// Sets in ascending order: the parts of a set come before it.
GrammarMachine::State GrammarMachine::copy_state(State state, GrammarMachine& to) const {
  std::vector<bool> needed(state + 1, false);
  needed[state] = true;
  for (SetId set = state; set > 0; --set) {
    if (!needed[set]) continue;
    for (const Frame& frame : frames(set)) needed[frame.callers] = true;
  }
  std::vector<SetId> copies(state + 1, kDead);
  for (SetId set = 1; set <= state; ++set) {
    if (!needed[set]) continue;
    std::vector<Frame> copy;
    for (const Frame& frame : frames(set)) copy.push_back({frame.node, copies[frame.callers]});
    copies[set] = to.intern(std::move(copy));
  }
  // A state that is large itself is not copied with every token.
  to.large_frames_ = std::max(to.large_frames_, 2 * to.frames_.size());
  return copies[state];
}

}  // namespace caravan::engine
