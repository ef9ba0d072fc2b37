// Choosing a token: candidates, the samplers as functions in a table, and the Sampler of one request, which also says
// which outputs of the model suffice to choose exactly the token that all logits would give.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/request.h"
#include "engine/sampling_params.h"
#include "stage/batch.h"

namespace caravan::engine {

struct Candidate {
  int32_t id = 0;
  float logit = 0;
  bool operator==(const Candidate&) const = default;
};

// The order of candidates everywhere: larger logit first, ties by lowest id.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// What is left to choose from. sorted: items are in the order of before().
struct CandidateList {
  std::vector<Candidate> items;
  bool sorted = false;
  void sort();
};

// How often a token occurs in the part of the history that the penalties look at. Lists of it are sorted by id.
struct TokenCount {
  int32_t id = 0;
  int32_t count = 0;
  bool operator==(const TokenCount&) const = default;
};

// Counts the last n tokens of history (-1: all).
std::vector<TokenCount> count_tokens(std::span<const int32_t> history, int32_t last_n);

// Changes or filters the candidates; at least one is left. No candidate's logit is NaN.
using SamplerFunction = void (*)(CandidateList&, const SamplingParams&, std::span<const TokenCount>);

// For tokens in counts: logit <= 0 is multiplied by repeat_penalty, logit > 0 divided by it; then
// count * frequency_penalty + presence_penalty is subtracted. Source: Keskar et al. 2019, arXiv:1909.05858 (repeat).
void apply_penalties(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts);
// Keeps the top_k first.
void apply_top_k(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts);
// Keeps the shortest prefix whose probabilities add up to top_p, at least min_keep.
// Source: Holtzman et al. 2019, arXiv:1904.09751.
void apply_top_p(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts);
// Keeps candidates at least min_p times as likely as the first, at least min_keep.
// Source: Nguyen et al. 2024, arXiv:2407.01082.
void apply_min_p(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts);
// Divides logits by temperature; <= 0 leaves only the first candidate.
void apply_temperature(CandidateList& list, const SamplingParams& params, std::span<const TokenCount> counts);

// One row per sampler. active: with these parameters it may change something.
struct SamplerRow {
  std::string_view name;
  SamplerFunction apply;
  bool (*active)(const SamplingParams&);
};
std::span<const SamplerRow> sampler_table();

// Draws from the softmax of the candidates, in list order: the first whose running sum exceeds u * total.
int32_t draw(const CandidateList& list, double u);

// The sampler chain of one request: biases, then the active samplers in the request's order, then the draw.
class Sampler {
 public:
  // banned: ids that are never chosen (the model's suppressed tokens, and the end-of-generation ones with ignore_eos).
  // params must be valid for n_vocab.
  Sampler(SamplingParams params, uint32_t seed, std::span<const int32_t> banned, uint32_t n_vocab);

  // The cheapest output from which sample() chooses exactly the token that all logits would give: top candidates
  // with the logits of all biased and penalised ids, or all logits. history: prompt and answer so far. row is left 0.
  stage::OutputRequest need(std::span<const int32_t> history) const;

  struct Choice {
    int32_t token = 0;
    std::optional<StepProbabilities> probabilities;  // when n_probs > 0
  };
  // Chooses the token that follows history. output: logits, or the candidates that need(history) asked for.
  Choice sample(const stage::RowOutput& output, std::span<const int32_t> history) const;

  uint32_t seed() const { return seed_; }

 private:
  std::vector<TokenCount> penalised(std::span<const int32_t> history) const;
  std::vector<int32_t> named_ids(std::span<const TokenCount> counts) const;
  StepProbabilities probabilities(const stage::RowOutput& output, int32_t chosen) const;

  SamplingParams params_;
  uint32_t seed_;
  uint32_t n_vocab_;
  std::vector<LogitBias> biases_;         // by id, each id once
  std::vector<const SamplerRow*> chain_;  // active ones
};

}  // namespace caravan::engine
