#include "engine/grammar.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "engine/gbnf.h"

namespace caravan::engine {
namespace {

constexpr size_t kMaxRecentGrammars = 16;
constexpr size_t kMaxTriggers = 256;

TokenNames names_of(const vocab::Vocabulary& vocabulary) {
  const auto find = [&vocabulary](std::string_view text) -> std::optional<int32_t> {
    if (!vocabulary.has_text()) return std::nullopt;
    const auto tokens = vocabulary.tokenize(text, vocab::AddSpecial::no, vocab::ParseSpecial::yes);
    return tokens.size() == 1 ? std::optional<int32_t>(tokens.front()) : std::nullopt;
  };
  return {static_cast<uint32_t>(vocabulary.size()), find};
}

void check_token(int32_t token, const char* what, const vocab::Vocabulary& vocabulary) {
  if (token < 0 || static_cast<size_t>(token) >= vocabulary.size())
    throw RequestError(fmt::format("{}: expected a token id below {}, found {}", what, vocabulary.size(), token));
}

std::vector<std::pair<int32_t, std::string>> rendered(const std::vector<int32_t>& tokens,
                                                      const vocab::Vocabulary& vocabulary) {
  std::vector<std::pair<int32_t, std::string>> texts;
  for (const int32_t token : tokens) {
    check_token(token, "grammar: special tokens", vocabulary);
    texts.emplace_back(token, vocabulary.piece(token, vocab::RenderSpecial::yes));
  }
  return texts;
}

}  // namespace

Grammar::Grammar(const std::string& text, const std::vector<int32_t>& special_tokens,
                 const vocab::Vocabulary& vocabulary, std::shared_ptr<const TokenTrie> trie)
    : automaton_(parse_gbnf(text, names_of(vocabulary))),
      trie_(std::move(trie)),
      special_tokens_(rendered(special_tokens, vocabulary)) {}

GrammarConstraint::GrammarConstraint(std::shared_ptr<Grammar> grammar, const GrammarSpec& spec,
                                     const vocab::Vocabulary& vocabulary)
    : grammar_(std::move(grammar)), vocabulary_(&vocabulary), waits_(spec.lazy), thought_(spec.thought) {
  if (!thought_.end.empty())
    place_.state = thought_.open ? ThoughtPlace::State::inside : ThoughtPlace::State::undecided;
  if (spec.lazy && spec.triggers.empty())
    throw RequestError("Field 'grammar_triggers': a lazy grammar needs at least one trigger");
  if (!spec.lazy && !spec.triggers.empty())
    throw RequestError("Field 'grammar_triggers': only a lazy grammar (grammar_lazy) has triggers");
  if (spec.triggers.size() > kMaxTriggers)
    throw RequestError(fmt::format("Field 'grammar_triggers': at most {} are supported, found {}", kMaxTriggers,
                                   spec.triggers.size()));
  for (const GrammarTrigger& trigger : spec.triggers) {
    if (trigger.kind == GrammarTrigger::Kind::token) {
      check_token(trigger.token, "Field 'grammar_triggers'", vocabulary);
      trigger_tokens_.push_back(trigger.token);
    } else if (trigger.text.empty()) {
      throw RequestError("Field 'grammar_triggers': a trigger's text is empty");
    } else if (trigger.kind == GrammarTrigger::Kind::word) {
      trigger_words_.push_back(trigger.text);
    } else {
      trigger_patterns_.emplace_back(trigger.text, trigger.kind == GrammarTrigger::Kind::pattern_full);
    }
  }
}

// The place after answer, which is a longer one than that of place_.
GrammarConstraint::ThoughtPlace GrammarConstraint::thought_place(std::string_view answer) const {
  using PlaceState = ThoughtPlace::State;
  ThoughtPlace place = place_;
  if (place.state == PlaceState::undecided) {
    const std::string_view begun = answer.substr(std::min(answer.find_first_not_of(" \t\r\n"), answer.size()));
    if (begun.size() < thought_.begin.size() && thought_.begin.starts_with(begun)) return place;
    place.state = begun.starts_with(thought_.begin) ? PlaceState::inside : PlaceState::over;
    place.searched = answer.size() - begun.size();
  }
  if (place.state == PlaceState::inside) {
    const size_t end = answer.find(thought_.end, place.searched);
    place.searched = std::max(place.searched, answer.size() - std::min(answer.size(), thought_.end.size() - 1));
    if (end == answer.npos) return place;
    place.words_from = end + thought_.end.size();
    place.state = PlaceState::over;
  }
  return place;
}

// What the answer shows of the token.
std::string GrammarConstraint::text_of(int32_t token) const {
  for (const auto& [special, text] : grammar_->special_tokens_)
    if (special == token) return text;
  return vocabulary_->piece(token, vocab::RenderSpecial::no);
}

// The shared memory, or this request's way into a new one when the old one grew too large.
Grammar::Memory& GrammarConstraint::memory() {
  std::shared_ptr<Grammar::Memory>& shared = grammar_->memory_;
  if (!shared || (shared->machine.is_large() && (!memory_ || memory_ == shared)))
    shared = std::make_shared<Grammar::Memory>(*grammar_);
  if (!memory_) {
    memory_ = shared;
    state_ = memory_->machine.initial();
  } else if (memory_ != shared) {
    state_ = memory_->machine.copy_state(state_, shared->machine);
    memory_ = shared;
  }
  return *memory_;
}

// The state after the token when it completes a trigger; kDead: the grammar does not go on like that.
std::optional<GrammarMachine::State> GrammarConstraint::triggered_by(int32_t token) {
  GrammarMachine& machine = memory().machine;
  if (std::find(trigger_tokens_.begin(), trigger_tokens_.end(), token) != trigger_tokens_.end()) {
    const State by_text = machine.step(machine.initial(), vocabulary_->piece(token, vocab::RenderSpecial::yes));
    return machine.either(by_text, machine.step_token(machine.initial(), token, false));
  }
  const std::string added = text_of(token);
  if (added.empty()) return std::nullopt;
  text_ += added;
  const std::optional<size_t> begin = trigger_in(text_, added.size());
  std::optional<State> state;
  if (begin) state = machine.step(machine.initial(), std::string_view(text_).substr(*begin));
  text_.resize(text_.size() - added.size());
  return state;
}

// Where the first trigger begins that is complete with the last n_new bytes.
std::optional<size_t> GrammarConstraint::trigger_in(std::string_view answer, size_t n_new) const {
  std::optional<size_t> begin;
  const ThoughtPlace place = thought_place(answer);
  const size_t n_old = answer.size() - n_new;
  for (const std::string& word : trigger_words_) {
    if (place.state != ThoughtPlace::State::over) break;
    const size_t at = answer.find(word, std::max(place.words_from, n_old - std::min(n_old, word.size() - 1)));
    if (at != answer.npos) begin = std::min(at, begin.value_or(at));
  }
  for (const TriggerPattern& pattern : trigger_patterns_) {
    if (begin) break;
    begin = pattern.find(answer);
  }
  return begin;
}

bool GrammarConstraint::allows(int32_t token) {
  if (!waits_) return memory().masks.allows(state_, token);
  if (vocabulary_->is_end_of_generation(token)) return true;
  return triggered_by(token).value_or(memory().machine.initial()) != GrammarMachine::kDead;
}

const TokenMask* GrammarConstraint::mask() { return waits_ ? nullptr : &memory().masks.mask(state_); }

void GrammarConstraint::accept(int32_t token) {
  if (!waits_) {
    state_ = memory().masks.after(state_, token);
  } else if (const std::optional<State> triggered = triggered_by(token)) {
    waits_ = false;
    state_ = *triggered;
    text_.clear();
  } else {
    text_ += text_of(token);
    place_ = thought_place(text_);
  }
  CARAVAN_ASSERT(waits_ || state_ != GrammarMachine::kDead, "only a token that is allowed is accepted");
}

bool GrammarConstraint::is_complete() {
  if (waits_) return false;
  GrammarMachine& machine = memory().machine;
  return machine.accepts(state_) && machine.frames(state_).size() == 1;
}

GrammarConstraint GrammarCompiler::compile(const GrammarSpec& spec) {
  std::shared_ptr<const TokenTrie> trie;
  std::shared_ptr<Grammar> grammar;
  {
    std::lock_guard lock(mutex_);
    const auto known = std::find_if(recent_.begin(), recent_.end(), [&](const Entry& entry) {
      return entry.text == spec.text && entry.special_tokens == spec.special_tokens;
    });
    if (known != recent_.end()) {
      recent_.splice(recent_.begin(), recent_, known);
      grammar = known->grammar;
    }
    if (!trie_) trie_ = std::make_shared<const TokenTrie>(vocabulary_);
    trie = trie_;
  }
  if (!grammar) {
    grammar = std::make_shared<Grammar>(spec.text, spec.special_tokens, vocabulary_, std::move(trie));
    std::lock_guard lock(mutex_);
    recent_.push_front({spec.text, spec.special_tokens, grammar});
    if (recent_.size() > kMaxRecentGrammars) recent_.pop_back();
  }
  return GrammarConstraint(std::move(grammar), spec, vocabulary_);
}

}  // namespace caravan::engine
