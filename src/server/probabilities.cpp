#include "server/probabilities.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace caravan::server {
namespace {

std::string piece_of(int32_t token, const vocab::Vocabulary& vocabulary) {
  return vocabulary.piece(token, vocab::RenderSpecial::yes);
}

float finite(float logprob) { return std::max(logprob, std::numeric_limits<float>::lowest()); }

Json token_probability(const engine::TokenLogprob& p, bool post_sampling, const vocab::Vocabulary& vocabulary) {
  const std::string piece = piece_of(p.id, vocabulary);
  Json bytes = Json::array();
  for (const char c : piece) bytes.push_back(static_cast<uint8_t>(c));
  Json entry = {{"id", p.id}, {"token", piece}, {"bytes", bytes}};
  if (post_sampling) {
    entry["prob"] = std::exp(static_cast<double>(p.logprob));
  } else {
    entry["logprob"] = finite(p.logprob);
  }
  return entry;
}

// UTF-8 characters that begin in text.
size_t n_characters(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; }));
}

}  // namespace

Json step_probabilities(const engine::StepProbabilities& step, const vocab::Vocabulary& vocabulary) {
  Json entry = token_probability(step.chosen, step.post_sampling, vocabulary);
  Json top = Json::array();
  for (const engine::TokenLogprob& p : step.top) top.push_back(token_probability(p, step.post_sampling, vocabulary));
  entry[step.post_sampling ? "top_probs" : "top_logprobs"] = std::move(top);
  return entry;
}

Json chat_logprobs(std::span<const engine::StepProbabilities> steps, const vocab::Vocabulary& vocabulary) {
  Json content = Json::array();
  for (const engine::StepProbabilities& step : steps) content.push_back(step_probabilities(step, vocabulary));
  return {{"content", std::move(content)}};
}

Json completion_logprobs(std::span<const engine::StepProbabilities> steps, const vocab::Vocabulary& vocabulary,
                         size_t& text_offset) {
  Json logprobs = chat_logprobs(steps, vocabulary);
  Json tokens = Json::array(), token_logprobs = Json::array(), top_logprobs = Json::array(), offsets = Json::array();
  for (const engine::StepProbabilities& step : steps) {
    const std::string piece = piece_of(step.chosen.id, vocabulary);
    tokens.push_back(piece);
    token_logprobs.push_back(finite(step.chosen.logprob));
    Json top = Json::object();
    for (const engine::TokenLogprob& p : step.top) top[piece_of(p.id, vocabulary)] = finite(p.logprob);
    top_logprobs.push_back(std::move(top));
    offsets.push_back(text_offset);
    text_offset += n_characters(piece);
  }
  logprobs["tokens"] = std::move(tokens);
  logprobs["token_logprobs"] = std::move(token_logprobs);
  logprobs["top_logprobs"] = std::move(top_logprobs);
  logprobs["text_offset"] = std::move(offsets);
  return logprobs;
}

}  // namespace caravan::server
