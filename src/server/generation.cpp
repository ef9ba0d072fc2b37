#include "server/generation.h"

#include <fmt/format.h>

namespace caravan::server {

void require_generation(const Api& api) {
  if (!api.settings.embeddings_only && api.model.causal) return;
  throw RequestError(api.model.causal ? "this server was started with --embeddings: it only embeds"
                                      : "this model is an encoder: it embeds, but does not generate",
                     RequestError::Kind::not_supported);
}

Generation submit(const Api& api, const CompletionParams& params, std::vector<Prompt> prompts) {
  const uint32_t n_slots = api.engine.status().slots_total;
  if (n_slots > 0 && params.n > n_slots)
    throw RequestError(fmt::format("Field 'n': Value must be at most {}, the number of slots (-np)", n_slots));
  Generation generation;
  for (const Prompt& prompt : prompts) {
    for (uint32_t i = 0; i < params.n; ++i) {
      engine::GenerateParams generate = params.generate;
      generate.prompt = prompt;
      if (generate.sampling.seed) *generate.sampling.seed += i;  // modulo 2^32
      generation.streams.push_back(api.engine.submit(std::move(generate)));
      Answer answer;
      answer.index = generation.answers.size();
      answer.prompt = prompt;
      answer.seed = generation.streams.back()->seed();
      generation.answers.push_back(std::move(answer));
    }
  }
  return generation;
}

net::awaitable<void> collect(StreamReader& reader, std::vector<Answer>& answers) {
  while (!reader.finished()) {
    auto item = co_await reader.next(kPingInterval);
    if (!item) continue;
    Answer& answer = answers[item->index];
    if (auto* token = std::get_if<engine::TokenEvent>(&item->event)) {
      answer.content += token->text;
      answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
      for (auto& step : token->probabilities) answer.steps.push_back(std::move(step));
    }
    if (const auto* end = std::get_if<engine::FinalEvent>(&item->event)) answer.end = *end;
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
      throw RequestError(error->message, error->kind);
  }
}

net::awaitable<bool> stream_answers(EventStream& stream, StreamReader& reader, net::Duration ping_interval,
                                    const EventWriter& writer, std::string_view error_name) {
  while (!reader.finished()) {
    const auto item = co_await reader.next(ping_interval);
    if (!item) {
      co_await stream.ping();
      continue;
    }
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event)) {
      engine::ErrorEvent failure = *error;
      co_await stream.fail(std::move(failure), error_name);
      co_return false;
    }
    std::vector<ServerSentEvent> events = writer(item->index, item->event);
    for (ServerSentEvent& event : events) co_await stream.send(std::move(event));
  }
  co_return true;
}

Json timings_json(const engine::Timings& t) {
  const auto rate = [](double n, double ms) { return ms > 0 ? n * 1000.0 / ms : 0.0; };
  const auto per_token = [](double n, double ms) { return n > 0 ? ms / n : 0.0; };
  return {{"cache_n", t.cache_n},
          {"prompt_n", t.prompt_n},
          {"prompt_ms", t.prompt_ms},
          {"prompt_per_token_ms", per_token(t.prompt_n, t.prompt_ms)},
          {"prompt_per_second", rate(t.prompt_n, t.prompt_ms)},
          {"predicted_n", t.predicted_n},
          {"predicted_ms", t.predicted_ms},
          {"predicted_per_token_ms", per_token(t.predicted_n, t.predicted_ms)},
          {"predicted_per_second", rate(t.predicted_n, t.predicted_ms)}};
}

}  // namespace caravan::server
