#include "engine/grammar_mask.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace caravan::engine {
namespace {

using NodeKind = GrammarAutomaton::NodeKind;
using State = GrammarMachine::State;

constexpr size_t kMaxMasks = 256;                    // whole masks kept: 16 KiB each for 128k tokens
constexpr size_t kMaxLocalBytes = size_t{32} << 20;  // local masks kept
constexpr size_t kMaxChain = 4;                      // frames of a place, beyond the one that takes the byte
constexpr size_t kMaxCallers = 8;                    // a place with more callers is cut there

}  // namespace

void TokenMask::allow_ranks(uint32_t begin, uint32_t end) {
  if (begin >= end) return;
  const uint64_t first = ~uint64_t{0} << (begin % 64), last = ~uint64_t{0} >> (63 - (end - 1) % 64);
  const size_t first_word = begin / 64, last_word = (end - 1) / 64;
  if (first_word == last_word) {
    words_[first_word] |= first & last;
    return;
  }
  words_[first_word] |= first;
  for (size_t word = first_word + 1; word < last_word; ++word) words_[word] = ~uint64_t{0};
  words_[last_word] |= last;
}

void TokenMask::forbid(int32_t token) {
  const uint32_t rank = trie_->rank_of(token);
  words_[rank / 64] &= ~(uint64_t{1} << (rank % 64));
}

uint32_t TokenMask::count() const {
  uint32_t n = 0;
  for (const uint64_t word : words_) n += static_cast<uint32_t>(std::popcount(word));
  return n;
}

GrammarMasks::GrammarMasks(GrammarMachine& machine, const TokenTrie& trie,
                           std::vector<std::pair<int32_t, std::string>> special_tokens)
    : machine_(machine), trie_(trie), special_tokens_(std::move(special_tokens)) {
  const auto eog = trie.end_of_generation();
  std::erase_if(special_tokens_, [&](const auto& special) {
    return trie.has(special.first) || std::binary_search(eog.begin(), eog.end(), special.first);
  });
}

template <typename Found>
void GrammarMasks::run(uint32_t from, State state, const Found& found) {
  const std::vector<TokenTrie::Node>& nodes = trie_.nodes();
  const std::array<uint8_t, 256>& classes = machine_.automaton().byte_classes();
  const uint32_t end = nodes[from].end;
  states_.resize(std::max<size_t>(states_.size(), nodes[from].depth + 1));
  states_[nodes[from].depth] = state;
  for (uint32_t i = from + 1; i < end;) {
    const TokenTrie::Node& node = nodes[i];
    const State next = machine_.step_class(states_[node.depth - 1u], classes[node.byte]);
    if (next == GrammarMachine::kDead) {
      i = node.end;
      continue;
    }
    if (states_.size() <= node.depth) states_.resize(node.depth * 2u);
    states_[node.depth] = next;
    found(i, next);
    ++i;
  }
}

// The tokens from a place on, as far as its callers do not matter.
const GrammarMasks::LocalMask& GrammarMasks::local_mask(State place) {
  const auto known = local_.find(place);
  if (known != local_.end()) return known->second;
  LocalMask mask;
  run(0, place, [&](uint32_t i, State state) {
    const uint32_t begin = trie_.nodes()[i].first_rank, end = trie_.nodes()[i + 1].first_rank;
    if (!mask.allowed.empty() && mask.allowed.back().end == begin) {
      mask.allowed.back().end = end;
    } else if (begin < end) {
      mask.allowed.push_back({begin, end});
    }
    if (trie_.nodes()[i].end > i + 1 && machine_.left(state)) mask.leaves.push_back(i);
  });
  mask.allowed.shrink_to_fit();
  mask.leaves.shrink_to_fit();
  const size_t bytes = mask.allowed.size() * sizeof(RankRange) + mask.leaves.size() * sizeof(uint32_t);
  if (local_bytes_ + bytes > kMaxLocalBytes) {
    local_.clear();
    local_bytes_ = 0;
  }
  local_bytes_ += bytes;
  return local_.emplace(place, std::move(mask)).first->second;
}

// chain: the nodes of a place, the one that takes a byte first, each going on at the next; callers: those of the last.
void GrammarMasks::add_place(TokenMask& mask, const Chain& chain, GrammarMachine::SetId callers) {
  GrammarMachine::SetId place = machine_.unknown_callers();
  for (auto node = chain.rbegin(); node != chain.rend(); ++node) place = machine_.intern({{*node, place}});
  const LocalMask& local = local_mask(place);
  for (const RankRange& range : local.allowed) mask.allow_ranks(range.begin, range.end);
  if (local.leaves.empty()) return;
  const State beyond = machine_.leave_to(callers);
  for (const uint32_t leaf : local.leaves) {
    run(leaf, beyond,
        [&](uint32_t i, State) { mask.allow_ranks(trie_.nodes()[i].first_rank, trie_.nodes()[i + 1].first_rank); });
  }
}

// Divides the frame and its callers into places: from the frame up to the first rule that takes long texts.
void GrammarMasks::add_frame(TokenMask& mask, GrammarMachine::Frame frame) {
  struct Open {
    Chain chain;
    GrammarMachine::SetId callers;
  };
  const GrammarAutomaton& automaton = machine_.automaton();
  std::vector<Open> open{{{frame.node}, frame.callers}};
  while (!open.empty()) {
    const Open item = std::move(open.back());
    open.pop_back();
    const auto callers = machine_.frames(item.callers);
    const auto is_end = [](const GrammarMachine::Frame& caller) { return caller.node >= GrammarMachine::kAccepted; };
    if (automaton.rules()[automaton.node(item.chain.back()).rule].takes_long_texts || item.chain.size() > kMaxChain ||
        callers.size() > kMaxCallers || std::any_of(callers.begin(), callers.end(), is_end)) {
      add_place(mask, item.chain, item.callers);
      continue;
    }
    for (const GrammarMachine::Frame& caller : callers) {
      open.push_back({item.chain, caller.callers});
      open.back().chain.push_back(caller.node);
    }
  }
}

void GrammarMasks::add_token_frame(TokenMask& mask, const GrammarAutomaton::Node& node) const {
  if (!node.negated) {
    mask.allow(node.token);
    return;
  }
  const bool was_allowed = mask.allows(node.token);
  mask.allow_ranks(0, trie_.n_ranked());
  for (const auto& [token, text] : special_tokens_) mask.allow(token);
  if (!was_allowed) mask.forbid(node.token);
}

TokenMask GrammarMasks::compute(State state) {
  TokenMask mask(trie_);
  const auto span = machine_.frames(state);
  const std::vector<GrammarMachine::Frame> frames(span.begin(), span.end());  // the machine's move when it grows
  for (const GrammarMachine::Frame& frame : frames) {
    if (frame.node >= GrammarMachine::kAccepted) continue;
    if (machine_.automaton().node(frame.node).kind == NodeKind::bytes) add_frame(mask, frame);
  }
  for (const auto& [token, text] : special_tokens_)
    if (machine_.step(state, text) != GrammarMachine::kDead) mask.allow(token);
  for (const GrammarMachine::Frame& frame : frames) {
    if (frame.node >= GrammarMachine::kAccepted) continue;
    const GrammarAutomaton::Node& node = machine_.automaton().node(frame.node);
    if (node.kind == NodeKind::token) add_token_frame(mask, node);
  }
  if (machine_.accepts(state))
    for (const int32_t token : trie_.end_of_generation()) mask.allow(token);
  return mask;
}

const TokenMask& GrammarMasks::mask(State state) {
  const auto known = masks_.find(state);
  if (known != masks_.end()) return *known->second;
  auto mask = std::make_unique<const TokenMask>(compute(state));
  if (masks_.size() >= kMaxMasks) masks_.clear();
  return *masks_.emplace(state, std::move(mask)).first->second;
}

State GrammarMasks::after(State state, int32_t token) {
  State next = GrammarMachine::kDead;
  bool is_text = trie_.has(token);
  if (is_text) next = machine_.step(state, trie_.bytes(token));
  for (const auto& [special, text] : special_tokens_) {
    if (special != token) continue;
    is_text = true;
    next = machine_.step(state, text);
  }
  return machine_.either(next, machine_.step_token(state, token, is_text));
}

bool GrammarMasks::allows(State state, int32_t token) {
  if (after(state, token) != GrammarMachine::kDead) return true;
  const auto eog = trie_.end_of_generation();
  return std::binary_search(eog.begin(), eog.end(), token) && machine_.accepts(state);
}

}  // namespace caravan::engine
