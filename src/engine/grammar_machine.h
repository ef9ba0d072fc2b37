// Runs a grammar automaton over bytes as a push-down automaton: all ways to read the bytes so far at once, as interned
// states whose transitions are remembered. After the first text of a kind, a byte costs a table look-up.
//
// A state is a set of frames: a node where a byte or token is expected, and the set of frames where its rule's callers
// go on. Sets are interned: equal sets have equal ids, and a set's parts have smaller ids than itself. All calls of a
// rule at one place of the text share one set of callers, so that ambiguity multiplies nothing (the graph-structured
// stack of Tomita 1985; the collection of callers before they are known follows Scott & Johnstone 2010, "GLL Parsing").
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "engine/grammar_automaton.h"

namespace caravan::engine {

// Not thread-safe: states are made while it runs.
class GrammarMachine {
 public:
  using NodeId = GrammarAutomaton::NodeId;
  using SetId = uint32_t;
  using State = SetId;

  // Nothing can follow; the text is not of the grammar.
  static constexpr State kDead = 0;
  // Frames of these are complete texts: of the grammar, and of what enter_alone() began.
  static constexpr NodeId kAccepted = 0xFFFFFFFE, kLeft = 0xFFFFFFFF;

  struct Frame {
    NodeId node = 0;
    SetId callers = 0;
    auto operator<=>(const Frame&) const = default;
  };

  // automaton must outlive the machine.
  explicit GrammarMachine(const GrammarAutomaton& automaton);

  const GrammarAutomaton& automaton() const { return automaton_; }

  // Before the first byte.
  State initial() const { return initial_; }
  // After one more byte, or bytes. Throws RequestError when the grammar is so ambiguous that its states need too much
  // memory.
  State step(State state, uint8_t byte) { return step_class(state, automaton_.byte_class(byte)); }
  State step_class(State state, uint32_t byte_class) {
    const uint32_t row = rows_[state];
    if (row == kNoRow) return compute_step(state, byte_class);
    const State next = transitions_[row + byte_class];
    return next == kUnknown ? compute_step(state, byte_class) : next;
  }
  State step(State state, std::string_view bytes);
  // After one more token that is taken by its id alone; is_text: other than what a negated token excludes it may be.
  State step_token(State state, int32_t token, bool is_text);
  // The grammar may end here.
  bool accepts(State state) const;
  // The text of a rule that was entered by enter_alone() is complete here.
  bool left(State state) const;

  // Where the callers in `callers` go on.
  State leave_to(SetId callers);
  // The state of one frame alone, with callers that are not known: instead of going on there, kLeft.
  SetId unknown_callers() const { return unknown_callers_; }
  SetId intern(std::vector<Frame> frames);
  State either(State a, State b);

  std::span<const Frame> frames(SetId set) const {
    return std::span(frames_).subspan(begins_[set], begins_[set + 1] - begins_[set]);
  }

  // Memory for states and transitions is above what should be kept from token to token.
  bool is_large() const;
  // The same state in another machine of the same automaton.
  State copy_state(State state, GrammarMachine& to) const;
  size_t n_states() const { return rows_.size(); }

 private:
  static constexpr uint32_t kNoRow = 0xFFFFFFFF, kUnknown = 0xFFFFFFFF;

  // Where a rule's text goes on: a set, or (with kPending) the callers of a rule that are being collected.
  using Context = uint32_t;
  static constexpr Context kPending = 0x80000000;
  struct Item {
    NodeId node;
    Context context;
  };
  struct PendingRule {
    std::vector<Item> callers;
    bool completed = false;  // its end was reached without a byte
    bool entered = false;
  };
  // Pairs that were seen: a hash set that is cheap to empty.
  class SeenPairs {
   public:
    bool insert(uint64_t key);
    void clear();

   private:
    void grow();
    std::vector<uint64_t> slots_ = std::vector<uint64_t>(64, kEmpty);
    std::vector<uint32_t> used_;
    static constexpr uint64_t kEmpty = ~uint64_t{0};
  };

  State compute_step(State state, uint32_t byte_class);
  void add(NodeId node, Context context);
  void call(const GrammarAutomaton::Node& node, Context context);
  void complete(Context context);
  State close();
  void clear_scratch();
  void resolve_pending();
  SetId resolved(Context context) const;
  uint64_t hash_of(std::span<const Frame> frames) const;
  void grow_table();

  const GrammarAutomaton& automaton_;
  // Sets: the frames of set s are frames_[begins_[s] .. begins_[s + 1]).
  std::vector<Frame> frames_;
  std::vector<uint32_t> begins_;
  std::vector<SetId> table_;    // open addressing by hash; kDead: empty
  std::vector<uint32_t> rows_;  // by set: where its transitions begin
  std::vector<State> transitions_;
  SetId unknown_callers_ = 0;
  State initial_ = 0;
  size_t large_frames_ = size_t{1} << 20;

  // Scratch of close().
  std::vector<Item> open_, taken_;
  SeenPairs seen_;
  std::vector<PendingRule> pending_;     // by rule
  std::vector<uint32_t> pending_rules_;  // those in use
  std::vector<SetId> pending_sets_;      // by rule, once resolved
};

}  // namespace caravan::engine
