// The samplers once more, for tests: plain loops in double precision, written from the definitions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/sampling_params.h"

namespace caravan::engine::test {

struct Option {
  int32_t id;
  double logit;
};
using Options = std::vector<Option>;

// The probabilities of all options, in their order.
std::vector<double> probabilities(const Options& options);

Options reference_penalties(Options options, const SamplingParams& p, const std::vector<int32_t>& history);
// texts: of the tokens of history, in which the breakers are looked for.
Options reference_dry(Options options, const SamplingParams& p, const std::vector<int32_t>& history,
                      const std::vector<std::string>& texts);
Options reference_top_n_sigma(Options options, const SamplingParams& p);
Options reference_top_k(Options options, const SamplingParams& p);
Options reference_typical_p(Options options, const SamplingParams& p);
Options reference_top_p(Options options, const SamplingParams& p);
Options reference_min_p(Options options, const SamplingParams& p);
Options reference_xtc(Options options, const SamplingParams& p, double chance);
Options reference_temperature(Options options, const SamplingParams& p);

// The sampler of this name.
Options reference_sampler(const std::string& name, Options options, const SamplingParams& p,
                          const std::vector<int32_t>& history, const std::vector<std::string>& texts, double chance);

// The id that u draws.
int32_t reference_draw(const Options& options, double u);

// Mirostat: one step from mu, which is updated.
int32_t reference_mirostat(Options options, const SamplingParams& p, uint32_t n_vocab, double u, double& mu);

// adaptive-p: one step after these probabilities of earlier draws, to which the new one is added.
int32_t reference_adaptive(Options options, const SamplingParams& p, double u, std::vector<double>& drawn);

}  // namespace caravan::engine::test
