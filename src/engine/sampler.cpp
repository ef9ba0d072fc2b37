#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "engine/random.h"

namespace caravan::engine {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int32_t kMaxTopK = 256;       // above, all logits are fetched
constexpr size_t kMaxCandidates = 512;  // the same, with room for penalised and biased ids

bool penalties_active(const SamplingParams& p) {
  return p.repeat_last_n != 0 && (p.repeat_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0);
}

constexpr std::array<SamplerRow, 5> kTable = {{
    {"penalties", apply_penalties, penalties_active},
    {"top_k", apply_top_k, [](const SamplingParams& p) { return p.top_k > 0; }},
    {"top_p", apply_top_p, [](const SamplingParams& p) { return p.top_p < 1; }},
    {"min_p", apply_min_p, [](const SamplingParams& p) { return p.min_p > 0; }},
    {"temperature", apply_temperature, [](const SamplingParams& p) { return p.temperature != 1; }},
}};

// A NaN would break every order below it; it is never chosen.
float usable(float logit) { return std::isnan(logit) ? kMinusInfinity : logit; }

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

template <typename Entry>
const Entry* find_by_id(std::span<const Entry> entries, int32_t id, int32_t Entry::* member) {
  const auto at = std::lower_bound(entries.begin(), entries.end(), id,
                                   [member](const Entry& entry, int32_t wanted) { return entry.*member < wanted; });
  return at != entries.end() && (*at).*member == id ? &*at : nullptr;
}

float max_logit(const CandidateList& list) {
  float max = kMinusInfinity;
  for (const Candidate& candidate : list.items) max = std::max(max, candidate.logit);
  return max;
}

double log_sum_exp(std::span<const float> logits) {
  float max = kMinusInfinity;
  for (const float logit : logits) max = std::max(max, usable(logit));
  if (max == kMinusInfinity) return kMinusInfinity;
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(usable(logit)) - max);
  return max + std::log(sum);
}

}  // namespace

void CandidateList::sort() {
  if (sorted) return;
  std::sort(items.begin(), items.end(), before);
  sorted = true;
}

std::vector<TokenCount> count_tokens(std::span<const int32_t> history, int32_t last_n) {
  const size_t n = last_n < 0 ? history.size() : std::min(history.size(), static_cast<size_t>(last_n));
  std::vector<int32_t> tokens(history.end() - static_cast<ptrdiff_t>(n), history.end());
  std::sort(tokens.begin(), tokens.end());
  std::vector<TokenCount> counts;
  for (const int32_t token : tokens) {
    if (counts.empty() || counts.back().id != token) counts.push_back({token, 0});
    ++counts.back().count;
  }
  return counts;
}

void apply_penalties(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts) {
  for (Candidate& candidate : list.items) {
    const TokenCount* seen = find_by_id(counts, candidate.id, &TokenCount::id);
    if (!seen) continue;
    float& logit = candidate.logit;
    logit = logit <= 0 ? logit * params.repeat_penalty : logit / params.repeat_penalty;
    logit = usable(logit - (static_cast<float>(seen->count) * params.frequency_penalty + params.presence_penalty));
    list.sorted = false;
  }
}

void apply_top_k(CandidateList& list, const SamplingParams& params, std::span<const TokenCount>) {
  const size_t k = std::min(list.items.size(), static_cast<size_t>(params.top_k));
  if (!list.sorted) {
    std::partial_sort(list.items.begin(), list.items.begin() + static_cast<ptrdiff_t>(k), list.items.end(), before);
  }
  list.items.resize(k);
  list.sorted = true;
}

void apply_top_p(CandidateList& list, const SamplingParams& params, std::span<const TokenCount>) {
  list.sort();
  const float max = list.items.front().logit;
  if (max == kMinusInfinity) return;
  float total = 0;
  for (const Candidate& candidate : list.items) total += std::exp(candidate.logit - max);
  float sum = 0;
  size_t keep = 0;
  while (keep < list.items.size() && (keep == 0 || sum < params.top_p)) {
    sum += std::exp(list.items[keep++].logit - max) / total;
  }
  keep = std::max(keep, std::min(list.items.size(), static_cast<size_t>(params.min_keep)));
  list.items.resize(keep);
}

void apply_min_p(CandidateList& list, const SamplingParams& params, std::span<const TokenCount>) {
  const float threshold = max_logit(list) + std::log(params.min_p);
  const auto likely = [threshold](const Candidate& candidate) { return candidate.logit >= threshold; };
  const auto n_likely = static_cast<size_t>(std::count_if(list.items.begin(), list.items.end(), likely));
  const size_t min_keep = std::min(list.items.size(), static_cast<size_t>(std::max(params.min_keep, 1)));
  if (n_likely >= min_keep) {
    std::erase_if(list.items, [&](const Candidate& candidate) { return !likely(candidate); });
  } else {
    list.sort();
    list.items.resize(min_keep);
  }
}

void apply_temperature(CandidateList& list, const SamplingParams& params, std::span<const TokenCount>) {
  if (params.temperature <= 0) {
    list.items = {*std::min_element(list.items.begin(), list.items.end(), before)};
    list.sorted = true;
    return;
  }
  for (Candidate& candidate : list.items) candidate.logit /= params.temperature;
  // Rounding may make neighbours equal although their ids descend; later samplers must see ties by lowest id.
  list.sorted = std::is_sorted(list.items.begin(), list.items.end(), before);
}

std::span<const SamplerRow> sampler_table() { return kTable; }

int32_t draw(const CandidateList& list, double u) {
  CARAVAN_ASSERT(!list.items.empty(), "every sampler leaves a candidate");
  const float max = max_logit(list);
  if (max == kMinusInfinity) return std::min_element(list.items.begin(), list.items.end(), before)->id;
  double total = 0;
  for (const Candidate& candidate : list.items) total += static_cast<double>(std::exp(candidate.logit - max));
  const double target = u * total;
  double sum = 0;
  int32_t last_possible = list.items.front().id;
  for (const Candidate& candidate : list.items) {
    const auto p = static_cast<double>(std::exp(candidate.logit - max));
    if (p > 0) last_possible = candidate.id;
    sum += p;
    if (sum > target) return candidate.id;
  }
  return last_possible;
}

Sampler::Sampler(SamplingParams params, uint32_t seed, std::span<const int32_t> banned, uint32_t n_vocab)
    : params_(std::move(params)), seed_(seed), n_vocab_(n_vocab), biases_(params_.logit_bias) {
  for (const int32_t id : banned) {
    if (static_cast<uint32_t>(id) < n_vocab) biases_.push_back({id, kMinusInfinity});
  }
  std::sort(biases_.begin(), biases_.end(), [](const LogitBias& a, const LogitBias& b) { return a.token < b.token; });
  std::vector<LogitBias> merged;
  for (const LogitBias& bias : biases_) {
    if (!merged.empty() && merged.back().token == bias.token) {
      merged.back().bias += bias.bias;
    } else {
      merged.push_back(bias);
    }
  }
  biases_ = std::move(merged);
  for (const std::string& name : params_.samplers) {
    for (const SamplerRow& row : kTable) {
      if (row.name == name && row.active(params_)) chain_.push_back(&row);
    }
  }
}

std::vector<TokenCount> Sampler::penalised(std::span<const int32_t> history) const {
  const bool used =
      std::any_of(chain_.begin(), chain_.end(), [](const SamplerRow* row) { return row->apply == apply_penalties; });
  return used ? count_tokens(history, params_.repeat_last_n) : std::vector<TokenCount>{};
}

std::vector<int32_t> Sampler::named_ids(std::span<const TokenCount> counts) const {
  std::vector<int32_t> ids;
  for (const LogitBias& bias : biases_) ids.push_back(bias.token);
  for (const TokenCount& seen : counts) ids.push_back(seen.id);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

// Why candidates suffice: biases and leading penalties change only named ids. Whatever they become, the first k of the
// changed list holds at most k unchanged ids, and those are among the first k + n_named of the raw order. What follows
// sees the same list: either top_k cuts it to these k, or the filters in between keep the first and greedy takes it.
stage::OutputRequest Sampler::need(std::span<const int32_t> history) const {
  stage::OutputRequest all_logits{0, stage::OutputKind::logits, 0, {}};
  const auto is_penalties = [](const SamplerRow* row) { return row->apply == apply_penalties; };
  auto rest = chain_.begin();
  while (rest != chain_.end() && is_penalties(*rest)) ++rest;
  const bool greedy = params_.temperature <= 0 &&
                      std::any_of(rest, chain_.end(), [](auto* row) { return row->apply == apply_temperature; }) &&
                      std::none_of(rest, chain_.end(), is_penalties);
  const bool cut_first = rest != chain_.end() && (*rest)->apply == apply_top_k && params_.top_k <= kMaxTopK;
  if (!greedy && !cut_first) return all_logits;
  const std::vector<int32_t> named = named_ids(penalised(history));
  const size_t k = greedy ? 1 : static_cast<size_t>(params_.top_k);
  const size_t top = std::max(k + named.size(), static_cast<size_t>(params_.n_probs));
  if (top > kMaxCandidates || top >= n_vocab_) return all_logits;
  return {0, stage::OutputKind::candidates, static_cast<uint32_t>(top), named};
}

StepProbabilities Sampler::probabilities(const stage::RowOutput& output, int32_t chosen) const {
  const bool all = output.kind == stage::OutputKind::logits;
  const double normaliser = all ? log_sum_exp(output.values) : static_cast<double>(output.log_sum_exp);
  const auto logprob = [normaliser](float logit) {
    return static_cast<float>(static_cast<double>(logit) - normaliser);
  };
  CandidateList list = candidates_of(output, {});
  StepProbabilities result;
  const size_t n = std::min(list.items.size(), static_cast<size_t>(params_.n_probs));
  std::partial_sort(list.items.begin(), list.items.begin() + static_cast<ptrdiff_t>(n), list.items.end(), before);
  for (size_t i = 0; i < n; ++i) result.top.push_back({list.items[i].id, logprob(list.items[i].logit)});
  result.chosen = {chosen, kMinusInfinity};
  for (const Candidate& candidate : list.items) {
    if (candidate.id == chosen) result.chosen.logprob = logprob(candidate.logit);
  }
  return result;
}

Sampler::Choice Sampler::sample(const stage::RowOutput& output, std::span<const int32_t> history) const {
  const std::vector<TokenCount> counts = penalised(history);
  const std::vector<int32_t> named = named_ids(counts);
  CandidateList list = candidates_of(output, named);
  if (!biases_.empty()) {
    for (Candidate& candidate : list.items) {
      const LogitBias* bias = find_by_id(std::span<const LogitBias>(biases_), candidate.id, &LogitBias::token);
      if (bias) candidate.logit = usable(candidate.logit + bias->bias);
    }
  }
  for (const SamplerRow* sampler : chain_) sampler->apply(list, params_, counts);
  Choice choice;
  choice.token = draw(list, uniform(seed_, history.size()));
  if (params_.n_probs > 0) {
    choice.probabilities = probabilities(output, choice.token);
    if (output.kind == stage::OutputKind::candidates) {
      for (size_t i = 0; i < named.size(); ++i) {
        if (named[i] != choice.token) continue;
        choice.probabilities->chosen.logprob = output.values[output.ids.size() + i] - output.log_sum_exp;
      }
    }
  }
  return choice;
}

}  // namespace caravan::engine
