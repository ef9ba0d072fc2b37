// Which tokens a grammar allows at a place: the automaton run over the trie of the vocabulary.
//
// What a token does within the rule that expects it does not depend on where that rule was called from. It is computed
// once per place in the rule; only tokens that go on beyond the rule's end are run again with the callers at hand.
// Source of the division: Dong et al. 2024, "XGrammar", arXiv:2411.15100.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/grammar_machine.h"
#include "engine/token_trie.h"

namespace caravan::engine {

// One bit per token, in the order of the trie's ranks.
class TokenMask {
 public:
  explicit TokenMask(const TokenTrie& trie) : trie_(&trie), words_((trie.n_tokens() + 63) / 64, 0) {}

  bool allows(int32_t token) const { return allows_rank(trie_->rank_of(token)); }
  bool allows_rank(uint32_t rank) const { return (words_[rank / 64] >> (rank % 64) & 1) != 0; }
  void allow(int32_t token) { allow_ranks(trie_->rank_of(token), trie_->rank_of(token) + 1); }
  void allow_ranks(uint32_t begin, uint32_t end);
  void forbid(int32_t token);
  uint32_t count() const;  // of allowed tokens
  uint32_t n_tokens() const { return trie_->n_tokens(); }
  bool operator==(const TokenMask& other) const { return words_ == other.words_; }

 private:
  const TokenTrie* trie_;  // outlives the mask
  std::vector<uint64_t> words_;
};

// The masks of one grammar, vocabulary and set of special tokens. Not thread-safe.
class GrammarMasks {
 public:
  // machine and trie must outlive this. special_tokens: control tokens that are matched by their text, with it.
  GrammarMasks(GrammarMachine& machine, const TokenTrie& trie,
               std::vector<std::pair<int32_t, std::string>> special_tokens);

  // The tokens after which the grammar can go on or end; an end-of-generation token where the grammar can end, or names
  // it. Valid until the next call. Throws RequestError when the machine runs out of memory.
  const TokenMask& mask(GrammarMachine::State state);

  // Whether mask(state) allows the token.
  bool allows(GrammarMachine::State state, int32_t token);
  // The state after a token. kDead: it is not allowed, or ends the text.
  GrammarMachine::State after(GrammarMachine::State state, int32_t token);

 private:
  struct RankRange {
    uint32_t begin, end;
  };
  // What is known of a place without its callers.
  struct LocalMask {
    std::vector<RankRange> allowed;
    std::vector<uint32_t> leaves;  // trie nodes where the rule may be complete while tokens go on
  };
  using Chain = std::vector<GrammarMachine::NodeId>;

  TokenMask compute(GrammarMachine::State state);
  void add_frame(TokenMask& mask, GrammarMachine::Frame frame);
  void add_place(TokenMask& mask, const Chain& chain, GrammarMachine::SetId callers);
  void add_token_frame(TokenMask& mask, const GrammarAutomaton::Node& node) const;
  const LocalMask& local_mask(GrammarMachine::State place);
  // Runs the tokens below a trie node; calls found(node, state) for every node that is reached alive.
  template <typename Found>
  void run(uint32_t from, GrammarMachine::State state, const Found& found);

  GrammarMachine& machine_;
  const TokenTrie& trie_;
  std::vector<std::pair<int32_t, std::string>> special_tokens_;
  std::unordered_map<GrammarMachine::State, LocalMask> local_;
  size_t local_bytes_ = 0;
  std::unordered_map<GrammarMachine::State, std::unique_ptr<const TokenMask>> masks_;
  std::vector<GrammarMachine::State> states_;  // by depth: scratch of run()
};

}  // namespace caravan::engine
