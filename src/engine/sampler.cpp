#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "engine/random.h"
#include "vocab/vocabulary.h"

namespace caravan::engine {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int32_t kMaxTopK = 256;       // above, all logits are fetched
constexpr size_t kMaxCandidates = 512;  // the same, with room for penalised and biased ids
// With a grammar: so many candidates are fetched that most often some are allowed; and after a row where none were, all
// logits for some tokens, because a model that goes against the grammar does so again.
constexpr size_t kGrammarCandidates = 256;
constexpr uint32_t kFullRows = 32;
constexpr size_t kMaxRefusals = 1000;  // tokens tried at one place of a lazy grammar

CandidateList candidates_of(const stage::RowOutput& output, std::span<const int32_t> named_ids) {
  CandidateList list;
  if (output.kind == stage::OutputKind::logits) {
    list.items.resize(output.values.size());
    for (size_t i = 0; i < output.values.size(); ++i) {
      list.items[i] = {static_cast<int32_t>(i), usable(output.values[i])};
    }
    return list;
  }
  list.items.reserve(output.values.size());
  for (size_t i = 0; i < output.ids.size(); ++i) list.items.push_back({output.ids[i], usable(output.values[i])});
  std::vector<int32_t> top_ids = output.ids;
  std::sort(top_ids.begin(), top_ids.end());
  for (size_t i = 0; i < named_ids.size(); ++i) {
    if (std::binary_search(top_ids.begin(), top_ids.end(), named_ids[i])) continue;
    list.items.push_back({named_ids[i], usable(output.values[output.ids.size() + i])});
  }
  return list;
}

double log_sum_exp(std::span<const float> logits) {
  float max = kMinusInfinity;
  for (const float logit : logits) max = std::max(max, usable(logit));
  if (max == kMinusInfinity) return kMinusInfinity;
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(usable(logit)) - max);
  return max + std::log(sum);
}

// By id, each id once: several biases of one token add up.
std::vector<LogitBias> merged(std::vector<LogitBias> biases) {
  std::sort(biases.begin(), biases.end(), [](const LogitBias& a, const LogitBias& b) { return a.token < b.token; });
  std::vector<LogitBias> result;
  for (const LogitBias& bias : biases) {
    if (!result.empty() && result.back().token == bias.token) {
      result.back().bias += bias.bias;
    } else {
      result.push_back(bias);
    }
  }
  return result;
}

std::vector<const SamplerRow*> active_chain(const SamplingParams& params) {
  std::vector<const SamplerRow*> chain;
  for (const std::string& name : params.samplers) {
    for (const SamplerRow& row : sampler_table()) {
      if (row.name == name && row.apply != nullptr && row.active(params)) chain.push_back(&row);
    }
  }
  if (params.mirostat == 0) return chain;
  chain.clear();
  for (const SamplerRow& row : sampler_table()) {
    if (row.apply == apply_temperature && row.active(params)) chain.push_back(&row);
  }
  return chain;
}

}  // namespace

Sampler::Sampler(SamplingParams params, uint32_t seed, std::span<const int32_t> banned, uint32_t n_vocab,
                 const vocab::Vocabulary* vocabulary)
    : params_(std::move(params)),
      seed_(seed),
      n_vocab_(n_vocab),
      vocabulary_(vocabulary),
      chain_(active_chain(params_)),
      breakers_(params_.dry_sequence_breakers),
      final_draw_(params_, n_vocab) {
  CARAVAN_ASSERT(vocabulary_ != nullptr || !uses(apply_dry), "who allows dry gives the texts of tokens");
  std::vector<LogitBias> biases = params_.logit_bias;
  for (const int32_t id : banned) {
    if (static_cast<uint32_t>(id) < n_vocab) biases.push_back({id, kMinusInfinity});
  }
  biases_ = merged(std::move(biases));
}

void Sampler::constrain(GrammarConstraint grammar) {
  CARAVAN_ASSERT(vocabulary_ != nullptr, "who has a grammar gives the texts of tokens");
  grammar_ = std::move(grammar);
}

bool Sampler::uses(SamplerFunction function) const {
  return std::any_of(chain_.begin(), chain_.end(), [=](const SamplerRow* row) { return row->apply == function; });
}

void Sampler::track_breakers(std::span<const int32_t> history) {
  for (; n_tracked_ < history.size(); ++n_tracked_) {
    const int32_t token = history[n_tracked_];
    const bool has_text = token >= 0 && static_cast<size_t>(token) < vocabulary_->size();
    breakers_.push(has_text ? vocabulary_->piece(token, vocab::RenderSpecial::yes) : std::string());
  }
}

Sampler::Changes Sampler::changes(std::span<const int32_t> history) {
  Changes changes;
  if (uses(apply_penalties)) changes.counts = count_tokens(history, params_.repeat_last_n);
  if (uses(apply_dry)) {
    track_breakers(history);
    changes.dry = dry_penalties(history, breakers_.tokens_since(), params_);
  }
  std::vector<int32_t>& ids = changes.named_ids;
  for (const LogitBias& bias : biases_) ids.push_back(bias.token);
  for (const TokenCount& seen : changes.counts) ids.push_back(seen.id);
  for (const TokenPenalty& repeated : changes.dry) ids.push_back(repeated.id);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return changes;
}

// Why candidates suffice: biases and the leading samplers that change named ids change nothing else. Whatever these
// become, the first k of the changed list holds at most k unchanged ids, and those are among the first k + n_named of
// the raw order. What follows sees the same list: either top_k cuts it to these k, or the samplers in between keep the
// first and a temperature of 0 takes it.
//
// The count k of such a prefix; nullopt: all logits may matter.
std::optional<size_t> Sampler::n_leading() const {
  auto rest = chain_.begin();
  while (rest != chain_.end() && (*rest)->effect == SamplerEffect::named) ++rest;
  const bool takes_first = params_.temperature <= 0 && params_.dynatemp_range <= 0;
  const auto temperature =
      std::find_if(rest, chain_.end(), [](const SamplerRow* row) { return row->apply == apply_temperature; });
  const bool greedy = takes_first && temperature != chain_.end() && std::all_of(rest, temperature, [](auto* row) {
                        return row->effect == SamplerEffect::keeps_first;
                      });
  const bool cut_first = rest != chain_.end() && (*rest)->apply == apply_top_k && params_.top_k <= kMaxTopK;
  if (!greedy && !cut_first) return std::nullopt;
  return greedy ? 1 : static_cast<size_t>(params_.top_k);
}

stage::OutputRequest Sampler::need(std::span<const int32_t> history) {
  const stage::OutputRequest all_logits{0, stage::OutputKind::logits, 0, {}};
  const std::optional<size_t> k = n_leading();
  if (!k || n_full_rows_ > 0) return all_logits;
  std::vector<int32_t> named = changes(history).named_ids;
  size_t top = std::max(*k + named.size(), static_cast<size_t>(params_.n_probs));
  if (grammar_) top = std::max(top, kGrammarCandidates);
  if (top > kMaxCandidates || top >= n_vocab_) return all_logits;
  return {0, stage::OutputKind::candidates, static_cast<uint32_t>(top), std::move(named)};
}

CandidateList Sampler::biased_candidates(const stage::RowOutput& output, std::span<const int32_t> named_ids) const {
  CandidateList list = candidates_of(output, named_ids);
  if (biases_.empty()) return list;
  for (Candidate& candidate : list.items) {
    const auto bias = std::lower_bound(biases_.begin(), biases_.end(), candidate.id,
                                       [](const LogitBias& entry, int32_t id) { return entry.token < id; });
    if (bias != biases_.end() && bias->token == candidate.id) candidate.logit = usable(candidate.logit + bias->bias);
  }
  return list;
}

StepProbabilities Sampler::model_probabilities(const stage::RowOutput& output, std::span<const int32_t> named_ids,
                                               int32_t chosen) const {
  const bool all = output.kind == stage::OutputKind::logits;
  const double normaliser = all ? log_sum_exp(output.values) : static_cast<double>(output.log_sum_exp);
  const auto logprob = [normaliser](float logit) {
    return static_cast<float>(static_cast<double>(logit) - normaliser);
  };
  CandidateList list = candidates_of(output, named_ids);
  StepProbabilities result;
  result.chosen = {chosen, kMinusInfinity};
  for (const Candidate& candidate : list.items) {
    if (candidate.id == chosen) result.chosen.logprob = logprob(candidate.logit);
  }
  list.keep_first(static_cast<size_t>(params_.n_probs));
  for (const Candidate& candidate : list.items) result.top.push_back({candidate.id, logprob(candidate.logit)});
  return result;
}

StepProbabilities Sampler::drawn_probabilities(CandidateList list, int32_t chosen) const {
  list.sort();
  const std::vector<double> p = list.probabilities();
  StepProbabilities result;
  result.post_sampling = true;
  result.chosen = {chosen, kMinusInfinity};
  for (size_t i = 0; i < p.size(); ++i) {
    const TokenLogprob entry{list.items[i].id, static_cast<float>(std::log(p[i]))};
    if (entry.id == chosen) result.chosen = entry;
    if (p[i] > 0 && i < static_cast<size_t>(params_.n_probs)) result.top.push_back(entry);
  }
  return result;
}

int32_t Sampler::draw_from(CandidateList& list, const Changes& changes, uint64_t position, RandomStream stream) {
  const SamplerStep step{changes.counts, changes.dry, uniform(seed_, position, RandomStream::xtc)};
  for (const SamplerRow* sampler : chain_) sampler->apply(list, params_, step);
  return final_draw_.draw_from(list, uniform(seed_, position, stream));
}

// The candidates that the grammar allows, biases applied, without those that can never be drawn; refused: those that
// are known not to be allowed while a lazy grammar waits. nullopt: fewer than the chain looks at, and others may be
// allowed.
std::optional<CandidateList> Sampler::allowed_candidates(const stage::RowOutput& output, const Changes& changes,
                                                         std::span<const int32_t> refused) {
  CandidateList list = biased_candidates(output, changes.named_ids);
  const TokenMask* mask = grammar_->mask();
  std::erase_if(list.items, [&](const Candidate& candidate) {
    if (static_cast<size_t>(candidate.id) >= vocabulary_->size()) return true;  // the output matrix has more rows
    if (mask != nullptr) return !mask->allows(candidate.id);
    return std::find(refused.begin(), refused.end(), candidate.id) != refused.end();
  });
  if (output.kind == stage::OutputKind::candidates && (mask == nullptr || mask->count() > list.items.size())) {
    const auto n_named = std::count_if(list.items.begin(), list.items.end(), [&](const Candidate& candidate) {
      return std::binary_search(changes.named_ids.begin(), changes.named_ids.end(), candidate.id);
    });
    if (list.items.size() - static_cast<size_t>(n_named) < n_leading().value_or(n_vocab_)) return std::nullopt;
  }
  std::erase_if(list.items, [](const Candidate& candidate) { return candidate.logit == kMinusInfinity; });
  return list;
}

bool Sampler::allowed(int32_t token) {
  return static_cast<size_t>(token) < vocabulary_->size() && grammar_->allows(token);
}

// The second draw: refused was drawn, and the grammar does not allow it. list becomes what was drawn from.
Sampler::Choice Sampler::draw_allowed(const stage::RowOutput& output, const Changes& changes, uint64_t position,
                                      int32_t refused, CandidateList& list) {
  const FinalDraw before = final_draw_;
  std::vector<int32_t> all_refused{refused};
  while (all_refused.size() <= kMaxRefusals) {
    std::optional<CandidateList> left = allowed_candidates(output, changes, all_refused);
    if (!left) {
      n_full_rows_ = kFullRows;
      return {.kind = Choice::Kind::all_logits_needed, .probabilities = {}};
    }
    if (left->items.empty()) {
      if (grammar_->is_complete()) return {.kind = Choice::Kind::end, .probabilities = {}};
      throw RequestError("the grammar allows none of the model's tokens here");
    }
    list = std::move(*left);
    final_draw_ = before;
    const int32_t token = draw_from(list, changes, position, RandomStream::masked);
    if (allowed(token)) return {.token = token, .probabilities = {}};
    CARAVAN_ASSERT(grammar_->waits_for_trigger(), "only the mask's tokens were left");
    all_refused.push_back(token);
  }
  throw RequestError("the answer comes to a trigger of the grammar in no way that the grammar allows");
}

Sampler::Choice Sampler::sample(const stage::RowOutput& output, std::span<const int32_t> history) {
  const Changes changes = this->changes(history);
  const uint64_t position = history.size();
  CandidateList list = biased_candidates(output, changes.named_ids);
  const FinalDraw before = final_draw_;
  Choice choice;
  choice.token = draw_from(list, changes, position, RandomStream::token);
  if (grammar_ && !allowed(choice.token)) {
    final_draw_ = before;
    choice = draw_allowed(output, changes, position, choice.token, list);
    if (choice.kind != Choice::Kind::token) return choice;
  }
  if (n_full_rows_ > 0) --n_full_rows_;
  if (grammar_ && !vocabulary_->is_end_of_generation(choice.token)) grammar_->accept(choice.token);
  if (params_.n_probs > 0) {
    choice.probabilities = params_.post_sampling_probs ? drawn_probabilities(std::move(list), choice.token)
                                                       : model_probabilities(output, changes.named_ids, choice.token);
  }
  return choice;
}

}  // namespace caravan::engine
