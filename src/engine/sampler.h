// Choosing a token: the Sampler of one request, which also says which outputs of the model suffice to choose exactly
// the token that all logits would give. The samplers themselves are in sampler_table.h.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/dry.h"
#include "engine/final_draw.h"
#include "engine/grammar.h"
#include "engine/random.h"
#include "engine/request.h"
#include "engine/sampler_table.h"
#include "engine/sampling_params.h"
#include "stage/batch.h"

namespace caravan::vocab {
class Vocabulary;
}

namespace caravan::engine {

// The sampler chain of one request: biases, then the active samplers in the request's order, then the draw. What it
// remembers of a sequence (where a sequence breaker was, mirostat's and adaptive-p's averages) depends on nothing but
// the sequence so far.
class Sampler {
 public:
  // banned: ids that are never chosen (the model's suppressed tokens, and the end-of-generation ones with ignore_eos).
  // params must be valid for n_vocab. vocabulary gives the texts of tokens, among which dry finds its sequence
  // breakers; it must outlive this object, and may be null where dry is off and there is no grammar.
  Sampler(SamplingParams params, uint32_t seed, std::span<const int32_t> banned, uint32_t n_vocab,
          const vocab::Vocabulary* vocabulary);

  // Every token that is chosen from now on is one that the grammar allows at its place: the chain draws as without it,
  // and only when the grammar refuses what was drawn, it draws once more from the tokens that are allowed.
  void constrain(GrammarConstraint grammar);

  // The cheapest output from which sample() chooses exactly the token that all logits would give: top candidates
  // with the logits of all biased and penalised ids, or all logits. history: prompt and answer so far, that of the
  // former call and perhaps more. row is left 0.
  stage::OutputRequest need(std::span<const int32_t> history);

  struct Choice {
    enum class Kind : uint8_t {
      token,
      all_logits_needed,  // too few of the candidates are allowed: need() now asks for all logits of the same row
      end,                // the grammar is complete, and the model's end-of-generation tokens are banned or missing
    };
    Kind kind = Kind::token;
    int32_t token = 0;
    std::optional<StepProbabilities> probabilities;  // when n_probs > 0
  };
  // Chooses the token that follows history: to be called until there is one for every token of the answer. output:
  // logits, or the candidates that need(history) asked for. Throws RequestError when the grammar allows no token, or
  // cannot be followed any more.
  Choice sample(const stage::RowOutput& output, std::span<const int32_t> history);

  // Whether sample() may answer all_logits_needed.
  bool may_need_all_logits() const { return grammar_.has_value(); }

  uint32_t seed() const { return seed_; }

 private:
  // Ids whose logits the samplers change, and how.
  struct Changes {
    std::vector<TokenCount> counts;
    std::vector<TokenPenalty> dry;
    std::vector<int32_t> named_ids;  // of these and of the biases, sorted
  };
  Changes changes(std::span<const int32_t> history);
  void track_breakers(std::span<const int32_t> history);
  std::optional<size_t> n_leading() const;
  bool allowed(int32_t token);
  int32_t draw_from(CandidateList& list, const Changes& changes, uint64_t position, RandomStream stream);
  std::optional<CandidateList> allowed_candidates(const stage::RowOutput& output, const Changes& changes,
                                                  std::span<const int32_t> refused);
  Choice draw_allowed(const stage::RowOutput& output, const Changes& changes, uint64_t position, int32_t refused,
                      CandidateList& list);
  bool uses(SamplerFunction function) const;
  CandidateList biased_candidates(const stage::RowOutput& output, std::span<const int32_t> named_ids) const;
  StepProbabilities model_probabilities(const stage::RowOutput& output, std::span<const int32_t> named_ids,
                                        int32_t chosen) const;
  StepProbabilities drawn_probabilities(CandidateList list, int32_t chosen) const;

  SamplingParams params_;
  uint32_t seed_;
  uint32_t n_vocab_;
  const vocab::Vocabulary* vocabulary_;
  std::vector<LogitBias> biases_;         // by id, each id once
  std::vector<const SamplerRow*> chain_;  // active ones
  BreakerTracker breakers_;
  size_t n_tracked_ = 0;  // tokens of the history that breakers_ has seen
  FinalDraw final_draw_;
  std::optional<GrammarConstraint> grammar_;
  uint32_t n_full_rows_ = 0;  // tokens for which all logits are asked for, after the grammar needed them
};

}  // namespace caravan::engine
