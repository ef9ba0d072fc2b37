// DRY ("don't repeat yourself"): finds the tokens that would continue a repetition of what was said before.
// Source: p-e-w 2024, https://github.com/oobabooga/text-generation-webui/pull/5677.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/sampling_params.h"

namespace caravan::engine {

// Subtracted from a token's logit. Lists of it are sorted by id.
struct TokenPenalty {
  int32_t id = 0;
  float penalty = 0;
  bool operator==(const TokenPenalty&) const = default;
};

// Finds, as a text grows token by token, where the last sequence breaker ended. A breaker may lie within a token or
// across several.
class BreakerTracker {
 public:
  // Empty strings are ignored.
  explicit BreakerTracker(std::vector<std::string> breakers);

  // Adds the text of the next token.
  void push(std::string_view piece);
  // Tokens since the one in which a breaker ended, without it; all of them when there was none.
  size_t tokens_since() const { return tokens_since_; }

 private:
  std::vector<std::string> breakers_;
  size_t longest_ = 0;
  std::string tail_;  // the last longest_ - 1 bytes of the text, or all of it
  size_t tokens_since_ = 0;
};

// The penalties of the tokens that would continue a repetition: dry_multiplier * dry_base ^ (n - dry_allowed_length)
// for a repetition of n >= dry_allowed_length tokens, the longest one for each token. history: prompt and answer;
// only its last dry_penalty_last_n tokens count, and a repetition is at most tokens_since_breaker long.
std::vector<TokenPenalty> dry_penalties(std::span<const int32_t> history, size_t tokens_since_breaker,
                                        const SamplingParams& params);

}  // namespace caravan::engine
