// A request's grammar at work: what may follow in its answer. Compiled grammars are shared between requests, so that
// what one request learned about its masks serves the next.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/grammar_mask.h"
#include "engine/grammar_spec.h"
#include "engine/trigger_pattern.h"
#include "vocab/vocabulary.h"

namespace caravan::engine {

// The grammar of a spec, compiled for a vocabulary. Made by any thread; used by one, the engine's.
class Grammar {
 public:
  // Throws RequestError(invalid) for what is wrong with the text, or a special token that is not in the vocabulary.
  Grammar(const std::string& text, const std::vector<int32_t>& special_tokens, const vocab::Vocabulary& vocabulary,
          std::shared_ptr<const TokenTrie> trie);

 private:
  friend class GrammarConstraint;
  // States and masks that were computed so far; replaced when they take too much memory.
  struct Memory {
    explicit Memory(const Grammar& grammar)
        : machine(grammar.automaton_), masks(machine, *grammar.trie_, grammar.special_tokens_) {}
    GrammarMachine machine;
    GrammarMasks masks;
  };

  const GrammarAutomaton automaton_;
  const std::shared_ptr<const TokenTrie> trie_;  // shared by all grammars of a vocabulary
  const std::vector<std::pair<int32_t, std::string>> special_tokens_;
  std::shared_ptr<Memory> memory_;  // shared by the requests that use it; the engine's thread only
};

// The place of one answer in its grammar. Belongs to the engine's thread.
class GrammarConstraint {
 public:
  // Throws RequestError(invalid) for what is wrong with the spec's triggers. vocabulary must outlive this.
  GrammarConstraint(std::shared_ptr<Grammar> grammar, const GrammarSpec& spec, const vocab::Vocabulary& vocabulary);

  // Whether the answer may go on with the token, or end with it when it is an end-of-generation token. Throws
  // RequestError when the grammar is too ambiguous to be followed.
  bool allows(int32_t token);

  // All tokens that allows() allows; null while a lazy grammar waits for its trigger: then nearly all are, and those
  // that are not (what would complete a trigger and at once go against the grammar) are found only by allows(). Valid
  // until the next call.
  const TokenMask* mask();

  // Adds a token that allows() allows and that does not end the answer.
  void accept(int32_t token);

  // The grammar can end here, but not go on.
  bool is_complete();

  bool waits_for_trigger() const { return waits_; }

 private:
  using State = GrammarMachine::State;

  // Where an answer is with its thought.
  struct ThoughtPlace {
    enum class State : uint8_t { undecided, inside, over } state = State::over;
    size_t searched = 0;    // the thought's end is not before
    size_t words_from = 0;  // once it is over: where words begin to trigger
  };

  ThoughtPlace thought_place(std::string_view answer) const;
  Grammar::Memory& memory();
  std::optional<State> triggered_by(int32_t token);
  std::optional<size_t> trigger_in(std::string_view answer, size_t n_new) const;
  std::string text_of(int32_t token) const;

  std::shared_ptr<Grammar> grammar_;         // shared with other requests of the same grammar
  std::shared_ptr<Grammar::Memory> memory_;  // that state_ belongs to
  State state_ = GrammarMachine::kDead;
  const vocab::Vocabulary* vocabulary_;

  bool waits_ = false;  // for a trigger
  std::vector<int32_t> trigger_tokens_;
  std::vector<std::string> trigger_words_;
  std::vector<TriggerPattern> trigger_patterns_;
  GrammarThought thought_;
  ThoughtPlace place_;  // in the thought
  std::string text_;    // of the answer, while it waits
};

// Compiles grammars and keeps the last ones. Any thread.
class GrammarCompiler {
 public:
  // vocabulary must outlive this.
  explicit GrammarCompiler(const vocab::Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Throws like Grammar and GrammarConstraint, and when triggers do not fit the laziness.
  GrammarConstraint compile(const GrammarSpec& spec);

 private:
  struct Entry {
    std::string text;
    std::vector<int32_t> special_tokens;
    std::shared_ptr<Grammar> grammar;
  };

  const vocab::Vocabulary& vocabulary_;
  std::mutex mutex_;
  std::shared_ptr<const TokenTrie> trie_;  // once it is needed
  std::list<Entry> recent_;                // last used first
};

}  // namespace caravan::engine
