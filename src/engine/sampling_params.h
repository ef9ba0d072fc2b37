// How the next token is chosen: the sampling settings of one request. Names, defaults and order are llama-server's.
#pragma once

#include <cstdint>
#include <optional>
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

// The names that the characters of a sequence like "edskypmxt" stand for. Throws RequestError for any other character.
std::vector<std::string> sampler_names(std::string_view characters);

// The name of the sampler that a text means: the name itself, with '-' for '_', or a common other one ("typical",
// "nucleus", "temp"). A text that means none is returned as it is; validate() refuses it.
std::string sampler_name(std::string_view text);

struct SamplingParams {
  float temperature = 0.8f;     // <= 0: greedy, ties by lowest id
  float dynatemp_range = 0;     // > 0: the temperature lies within +- this, by how unsure the model is
  float dynatemp_exponent = 1;  // of the entropy's part of its maximum
  int32_t top_k = 40;           // <= 0: off
  float top_p = 0.95f;          // >= 1: off
  float min_p = 0.05f;          // <= 0: off
  float top_n_sigma = -1;       // <= 0: off
  float typical_p = 1;          // >= 1: off
  float xtc_probability = 0;    // <= 0: off
  float xtc_threshold = 0.1f;   // > 0.5: off
  int32_t min_keep = 0;         // top_p, min_p, typ_p and xtc leave at least this many candidates
  float repeat_penalty = 1;     // 1: off
  int32_t repeat_last_n = 64;   // tokens of prompt and answer that the penalties look back on; 0: off, -1: all
  float frequency_penalty = 0;
  float presence_penalty = 0;
  float dry_multiplier = 0;         // 0: off
  float dry_base = 1.75f;           // >= 1
  int32_t dry_allowed_length = 2;   // repetitions up to this many tokens, less one, are free
  int32_t dry_penalty_last_n = 64;  // tokens that dry looks back on; 0: off, -1: all
  std::vector<std::string> dry_sequence_breakers = {"\n", ":", "\"", "*"};  // texts that end every repetition
  int32_t mirostat = 0;          // 1, 2: that version of mirostat after the temperature instead of all other samplers
  float mirostat_tau = 5;        // target surprise, bits
  float mirostat_eta = 0.1f;     // learning rate
  float adaptive_target = -1;    // < 0: off; the target probability of "adaptive_p"
  float adaptive_decay = 0.9f;   // of its memory, 0 to 0.99
  std::optional<uint32_t> seed;  // unset: chosen at random; the one used is TokenStream::seed()
  std::vector<LogitBias> logit_bias;
  bool ignore_eos = false;  // every end-of-generation token is banned
  int32_t n_probs = 0;      // > 0: events carry the log-probability of each token and of the n_probs most likely ones
  bool post_sampling_probs = false;  // of the distribution that the token was drawn from instead of the model's
  // Applied in this order; those left out are off. "adaptive_p" may be added and always comes last.
  std::vector<std::string> samplers = default_sampler_order();
  bool operator==(const SamplingParams&) const = default;
};

// Checks ranges, token ids against n_vocab, and sampler names. Throws RequestError(invalid) that names the field, what
// was expected and found.
void validate(const SamplingParams& params, uint32_t n_vocab);

}  // namespace caravan::engine
