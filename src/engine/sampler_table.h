// The samplers: functions that change or filter the candidates for the next token, and the table of them.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "engine/candidates.h"
#include "engine/dry.h"
#include "engine/sampling_params.h"

namespace caravan::engine {

// How often a token occurs in the part of the history that the penalties look at. Lists of it are sorted by id.
struct TokenCount {
  int32_t id = 0;
  int32_t count = 0;
  bool operator==(const TokenCount&) const = default;
};

// Counts the last n tokens of history (-1: all).
std::vector<TokenCount> count_tokens(std::span<const int32_t> history, int32_t last_n);

// What the samplers know of the step beside the candidates.
struct SamplerStep {
  std::span<const TokenCount> counts = {};  // for penalties
  std::span<const TokenPenalty> dry = {};   // for dry
  double xtc_chance = 1;                    // a uniform number in [0, 1): xtc acts when it is below xtc_probability
};

// Changes or filters the candidates; at least one is left.
using SamplerFunction = void (*)(CandidateList&, const SamplingParams&, const SamplerStep&);

// For tokens in counts: logit <= 0 is multiplied by repeat_penalty, logit > 0 divided by it; then
// count * frequency_penalty + presence_penalty is subtracted. Source: Keskar et al. 2019, arXiv:1909.05858 (repeat).
void apply_penalties(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Subtracts step.dry.
void apply_dry(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Makes impossible what lies more than top_n_sigma standard deviations of the finite logits below the largest.
// Source: Tang et al. 2024, arXiv:2411.07641.
void apply_top_n_sigma(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Keeps the top_k first.
void apply_top_k(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Keeps the candidates whose surprise is closest to the entropy until their probabilities add up to more than
// typical_p, at least min_keep. Source: Meister et al. 2022, arXiv:2202.00666.
void apply_typical_p(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Keeps the shortest prefix whose probabilities add up to top_p, at least min_keep.
// Source: Holtzman et al. 2019, arXiv:1904.09751.
void apply_top_p(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Keeps candidates at least min_p times as likely as the first, at least min_keep.
// Source: Nguyen et al. 2024, arXiv:2407.01082.
void apply_min_p(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// With probability xtc_probability drops every candidate at least xtc_threshold likely but the least likely of these,
// unless fewer than min_keep would be left. Source: p-e-w 2024, oobabooga/text-generation-webui pull request 6335.
void apply_xtc(CandidateList& list, const SamplingParams& params, const SamplerStep& step);
// Divides logits by temperature; <= 0 leaves only the first candidate. With dynatemp_range the temperature lies between
// temperature - range (at least 0) and temperature + range, by (entropy / largest possible entropy) ^ exponent.
// Source: Zhu et al. 2023, arXiv:2309.02772 (dynamic).
void apply_temperature(CandidateList& list, const SamplingParams& params, const SamplerStep& step);

// What a sampler may do, as far as it decides which outputs of the model suffice.
enum class SamplerEffect : uint8_t {
  named,        // changes the logits of ids that are known beforehand, and nothing else
  keeps_first,  // the first candidate stays the first
  any,
};

// One row per sampler. active: with these parameters it may change something. apply is null for adaptive_p, which is
// not a step before the draw but replaces it (final_draw.h).
struct SamplerRow {
  std::string_view name;
  char character;  // in a sampler sequence
  SamplerEffect effect;
  SamplerFunction apply;
  bool (*active)(const SamplingParams&);
};
std::span<const SamplerRow> sampler_table();

}  // namespace caravan::engine
