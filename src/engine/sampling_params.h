// How the next token is chosen: the sampling settings of one request. Names, defaults and order are llama-server's.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::engine {

// Added to the logit of a token before anything else; minus infinity bans the token.
struct LogitBias {
  int32_t token = 0;
  float bias = 0;
  bool operator==(const LogitBias&) const = default;
};

// "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature": the order when a request
// gives none.
std::vector<std::string> default_sampler_order();

struct SamplingParams {
  float temperature = 0.8f;  // <= 0: greedy, ties by lowest id
  int32_t top_k = 40;        // <= 0: off
  float top_p = 0.95f;       // >= 1: off
  float min_p = 0.05f;       // <= 0: off
  int32_t min_keep = 0;      // top_p and min_p leave at least this many candidates
  float repeat_penalty = 1.0f;
  int32_t repeat_last_n = 64;  // tokens of prompt and answer that the penalties look back on; 0: off, -1: all
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  std::optional<uint32_t> seed;  // unset: chosen at random; the one used is TokenStream::seed()
  std::vector<LogitBias> logit_bias;
  bool ignore_eos = false;  // every end-of-generation token is banned
  int32_t n_probs = 0;      // > 0: events carry the log-probability of each token and of the n_probs most likely ones
  std::vector<std::string> samplers = default_sampler_order();  // applied in this order; those left out are off
  bool operator==(const SamplingParams&) const = default;
};

// Names of the samplers that do something here: "penalties", "top_k", "top_p", "min_p", "temperature".
std::span<const std::string_view> supported_samplers();

// Names that may stand in SamplingParams::samplers although they do nothing: the caller refuses their parameters unless
// these are off ("dry", "top_n_sigma", "typ_p", "xtc").
std::span<const std::string_view> inert_samplers();

// Checks ranges, token ids against n_vocab, and sampler names. Throws RequestError(invalid) that names the field, what
// was expected and found.
void validate(const SamplingParams& params, uint32_t n_vocab);

}  // namespace caravan::engine
