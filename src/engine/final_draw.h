// The last step of sampling: the draw from the candidates that are left, plain or with feedback from earlier draws
// (mirostat, adaptive-p).
#pragma once

#include <cstdint>

#include "engine/candidates.h"
#include "engine/sampling_params.h"

namespace caravan::engine {

// What remembers earlier draws of one sequence. Its state depends on nothing but the parameters and the candidates that
// it saw, in order: one call per token of the answer.
class FinalDraw {
 public:
  // n_vocab: tokens of the model, which mirostat 1 reckons with.
  FinalDraw(const SamplingParams& params, uint32_t n_vocab);

  // The id of the drawn candidate; list becomes the distribution that it was drawn from. u: uniform in [0, 1).
  int32_t draw_from(CandidateList& list, double u);

  // Mirostat: the limit of a token's surprise, in bits.
  double mu() const { return mu_; }

 private:
  enum class Kind : uint8_t { plain, mirostat_1, mirostat_2, adaptive };
  static Kind kind_of(const SamplingParams& params);
  int32_t draw_mirostat(CandidateList& list, double u);
  int32_t draw_adaptive(CandidateList& list, double u);

  Kind kind_;
  uint32_t n_vocab_;
  double tau_, eta_, mu_;
  double target_, decay_;
  double weighted_sum_, total_weight_;  // of the probabilities of the drawn tokens, the latest with weight 1
};

}  // namespace caravan::engine
