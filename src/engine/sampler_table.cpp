#include "engine/sampler_table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace caravan::engine {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kMajority = 0.5f;  // at most one candidate is likelier than this, and xtc drops none of one

template <typename Entry>
const Entry* find_by_id(std::span<const Entry> entries, int32_t id) {
  const auto at = std::lower_bound(entries.begin(), entries.end(), id,
                                   [](const Entry& entry, int32_t wanted) { return entry.id < wanted; });
  return at != entries.end() && at->id == id ? &*at : nullptr;
}

bool penalties_active(const SamplingParams& p) {
  return p.repeat_last_n != 0 && (p.repeat_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0);
}
bool dry_active(const SamplingParams& p) { return p.dry_multiplier != 0 && p.dry_penalty_last_n != 0; }
bool temperature_active(const SamplingParams& p) { return p.temperature != 1 || p.dynatemp_range > 0; }
bool xtc_active(const SamplingParams& p) { return p.xtc_probability > 0 && p.xtc_threshold <= kMajority; }

constexpr std::array<SamplerRow, 10> kTable = {{
    {"penalties", 'e', SamplerEffect::named, apply_penalties, penalties_active},
    {"dry", 'd', SamplerEffect::named, apply_dry, dry_active},
    {"top_n_sigma", 's', SamplerEffect::keeps_first, apply_top_n_sigma,
     [](const SamplingParams& p) { return p.top_n_sigma > 0; }},
    {"top_k", 'k', SamplerEffect::keeps_first, apply_top_k, [](const SamplingParams& p) { return p.top_k > 0; }},
    {"typ_p", 'y', SamplerEffect::any, apply_typical_p, [](const SamplingParams& p) { return p.typical_p < 1; }},
    {"top_p", 'p', SamplerEffect::keeps_first, apply_top_p, [](const SamplingParams& p) { return p.top_p < 1; }},
    {"min_p", 'm', SamplerEffect::keeps_first, apply_min_p, [](const SamplingParams& p) { return p.min_p > 0; }},
    {"xtc", 'x', SamplerEffect::any, apply_xtc, xtc_active},
    {"temperature", 't', SamplerEffect::keeps_first, apply_temperature, temperature_active},
    {"adaptive_p", 'a', SamplerEffect::any, nullptr, [](const SamplingParams& p) { return p.adaptive_target >= 0; }},
}};

// In nats.
double entropy(std::span<const double> probabilities) {
  double sum = 0;
  for (const double p : probabilities)
    if (p > 0) sum -= p * std::log(p);
  return sum;
}

double dynamic_temperature(CandidateList& list, const SamplingParams& params) {
  const double low =
      std::max(0.0, static_cast<double>(params.temperature) - static_cast<double>(params.dynatemp_range));
  const double high = static_cast<double>(params.temperature) + static_cast<double>(params.dynatemp_range);
  list.sort();  // the sum over probabilities then has one order
  const std::vector<double> p = list.probabilities();
  if (p.empty()) return 1;
  const double part = entropy(p) / std::log(static_cast<double>(p.size()));
  return low + (high - low) * std::pow(part, static_cast<double>(params.dynatemp_exponent));
}

}  // namespace

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

void apply_penalties(CandidateList& list, const SamplingParams& params, const SamplerStep& step) {
  for (Candidate& candidate : list.items) {
    const TokenCount* seen = find_by_id(step.counts, candidate.id);
    if (!seen) continue;
    float& logit = candidate.logit;
    logit = logit <= 0 ? logit * params.repeat_penalty : logit / params.repeat_penalty;
    logit = usable(logit - (static_cast<float>(seen->count) * params.frequency_penalty + params.presence_penalty));
    list.sorted = false;
  }
}

void apply_dry(CandidateList& list, const SamplingParams&, const SamplerStep& step) {
  for (Candidate& candidate : list.items) {
    const TokenPenalty* repeated = find_by_id(step.dry, candidate.id);
    if (!repeated) continue;
    candidate.logit = usable(candidate.logit - repeated->penalty);
    list.sorted = false;
  }
}

void apply_top_n_sigma(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
  double n = 0, sum = 0;
  for (const Candidate& candidate : list.items) {
    if (!std::isfinite(candidate.logit)) continue;
    ++n;
    sum += static_cast<double>(candidate.logit);
  }
  if (n == 0) return;
  const double mean = sum / n;
  double squares = 0;
  for (const Candidate& candidate : list.items) {
    if (!std::isfinite(candidate.logit)) continue;
    const double deviation = static_cast<double>(candidate.logit) - mean;
    squares += deviation * deviation;
  }
  const double threshold =
      static_cast<double>(list.max_logit()) - static_cast<double>(params.top_n_sigma) * std::sqrt(squares / n);
  for (Candidate& candidate : list.items)
    if (static_cast<double>(candidate.logit) < threshold) candidate.logit = kMinusInfinity;
  list.check_order();
}

void apply_top_k(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
  list.keep_first(static_cast<size_t>(params.top_k));
}

void apply_typical_p(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
  list.sort();
  const std::vector<double> p = list.probabilities();
  if (p.empty()) return;
  const double expected = entropy(p);
  const auto distance = [&](size_t i) { return std::abs(-std::log(p[i]) - expected); };
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const double x = distance(a), y = distance(b);
    return x < y || (x == y && a < b);
  });
  const size_t least = std::max<size_t>(1, static_cast<size_t>(params.min_keep));
  size_t n = 0;
  double sum = 0;
  while (n < order.size() && (n < least || sum <= static_cast<double>(params.typical_p))) sum += p[order[n++]];
  order.resize(n);
  std::sort(order.begin(), order.end());
  std::vector<Candidate> kept;
  for (const size_t i : order) kept.push_back(list.items[i]);
  list.items = std::move(kept);
}

void apply_top_p(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
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

void apply_min_p(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
  const float threshold = list.max_logit() + std::log(params.min_p);
  const auto likely = [threshold](const Candidate& candidate) { return candidate.logit >= threshold; };
  const auto n_likely = static_cast<size_t>(std::count_if(list.items.begin(), list.items.end(), likely));
  const size_t min_keep = std::min(list.items.size(), static_cast<size_t>(std::max(params.min_keep, 1)));
  if (n_likely >= min_keep) {
    std::erase_if(list.items, [&](const Candidate& candidate) { return !likely(candidate); });
  } else {
    list.keep_first(min_keep);
  }
}

void apply_xtc(CandidateList& list, const SamplingParams& params, const SamplerStep& step) {
  if (step.xtc_chance >= static_cast<double>(params.xtc_probability)) return;
  list.sort();
  const std::vector<double> p = list.probabilities();
  size_t n_likely = 0;
  while (n_likely < p.size() && p[n_likely] >= static_cast<double>(params.xtc_threshold)) ++n_likely;
  if (n_likely < 2) return;
  const size_t n_dropped = n_likely - 1;
  if (list.items.size() - n_dropped < static_cast<size_t>(params.min_keep)) return;
  list.items.erase(list.items.begin(), list.items.begin() + static_cast<ptrdiff_t>(n_dropped));
}

void apply_temperature(CandidateList& list, const SamplingParams& params, const SamplerStep&) {
  if (params.dynatemp_range > 0 && list.items.size() < 2) return;  // one candidate has no entropy to go by
  const float temperature =
      params.dynatemp_range > 0 ? static_cast<float>(dynamic_temperature(list, params)) : params.temperature;
  if (temperature <= 0) {
    list.keep_first(1);
    return;
  }
  for (Candidate& candidate : list.items) candidate.logit = usable(candidate.logit / temperature);
  // Rounding may make neighbours equal although their ids descend; later samplers must see ties by lowest id.
  list.check_order();
}

std::span<const SamplerRow> sampler_table() { return kTable; }

}  // namespace caravan::engine
