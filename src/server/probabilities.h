// Probabilities of tokens as JSON: the one place where every endpoint that shows them gets their form.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "engine/request.h"
#include "server/json.h"
#include "vocab/vocabulary.h"

namespace caravan::server {

// One step: {"id", "token", "bytes", "logprob", "top_logprobs": [{"id", "token", "bytes", "logprob"}]}; for the
// distribution after sampling "prob" and "top_probs" instead. This is llama-server's native form and an entry of
// OpenAI's for chats. A logarithm of zero is the lowest finite float, as JSON has no infinity.
Json step_probabilities(const engine::StepProbabilities& step, const vocab::Vocabulary& vocabulary);

// OpenAI's "logprobs" of a chat choice: {"content": [...]}.
Json chat_logprobs(std::span<const engine::StepProbabilities> steps, const vocab::Vocabulary& vocabulary);

// "logprobs" of a /v1/completions choice: the form of chats, as llama-server answers it, and beside it OpenAI's own:
// "tokens", "token_logprobs", "top_logprobs" and "text_offset". text_offset: characters of the text before the first
// step; it is moved on to the end of the last.
Json completion_logprobs(std::span<const engine::StepProbabilities> steps, const vocab::Vocabulary& vocabulary,
                         size_t& text_offset);

}  // namespace caravan::server
