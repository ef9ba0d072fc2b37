// POST /completion and /completions: llama-server's native generation endpoint, as JSON or as server-sent events.
#include <fmt/format.h>

#include <memory>

#include "server/api.h"
#include "server/json.h"
#include "server/params.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

// One prompt of a request and what has been answered so far.
struct Answer {
  size_t index = 0;
  Prompt prompt;
  uint32_t seed = 0;
  std::string content;
  std::vector<int32_t> tokens;
  Json probabilities = Json::array();
};

Json token_probability(const engine::TokenLogprob& p, const vocab::Vocabulary& vocabulary) {
  const std::string piece = vocabulary.piece(p.id, vocab::RenderSpecial::yes);
  Json bytes = Json::array();
  for (const char c : piece) bytes.push_back(static_cast<uint8_t>(c));
  return {{"id", p.id},
          {"token", piece},
          {"bytes", bytes},
          {"logprob", std::max(p.logprob, std::numeric_limits<float>::lowest())}};  // JSON has no -inf
}

Json step_probabilities(const engine::StepProbabilities& step, const vocab::Vocabulary& vocabulary) {
  Json entry = token_probability(step.chosen, vocabulary);
  entry["top_logprobs"] = Json::array();
  for (const engine::TokenLogprob& p : step.top) entry["top_logprobs"].push_back(token_probability(p, vocabulary));
  return entry;
}

Json timings(const engine::Timings& t) {
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

Json partial_event(const Answer& answer, const engine::TokenEvent& event, const vocab::Vocabulary& vocabulary) {
  Json json = {{"index", answer.index},
               {"content", event.text},
               {"tokens", event.tokens},
               {"stop", false},
               {"id_slot", -1},
               {"tokens_predicted", answer.tokens.size()},
               {"tokens_evaluated", answer.prompt.size()}};
  if (!event.probabilities.empty()) {
    json["completion_probabilities"] = Json::array();
    for (const auto& step : event.probabilities)
      json["completion_probabilities"].push_back(step_probabilities(step, vocabulary));
  }
  return json;
}

// The whole answer, or (streaming) its last event, which repeats no content.
Json final_event(const Answer& answer, const engine::FinalEvent& event, const CompletionParams& params,
                 const Api& api) {
  Json json = {{"index", answer.index},
               {"content", params.stream ? "" : answer.content},
               {"tokens", params.return_tokens && !params.stream ? Json(answer.tokens) : Json::array()},
               {"id_slot", -1},
               {"stop", true},
               {"model", api.model.id()},
               {"tokens_predicted", event.timings.predicted_n},
               {"tokens_evaluated", answer.prompt.size()},
               {"generation_settings", generation_settings(params.generate, params.stream, answer.seed)},
               {"prompt", api.vocabulary.detokenize(answer.prompt, vocab::RenderSpecial::yes)},
               {"has_new_line", answer.content.find('\n') != std::string::npos},
               {"truncated", event.truncated},
               {"stop_type", engine::name(event.stop_type)},
               {"stopping_word", event.stopping_word},
               {"tokens_cached", answer.prompt.size() + event.timings.predicted_n},
               {"timings", timings(event.timings)}};
  // What clients of 2024 look at.
  json["stopped_eos"] = event.stop_type == engine::StopType::eos;
  json["stopped_word"] = event.stop_type == engine::StopType::word;
  json["stopped_limit"] = event.stop_type == engine::StopType::limit;
  if (!params.stream && params.generate.sampling.n_probs > 0) json["completion_probabilities"] = answer.probabilities;
  return json;
}

// Only the members that response_fields names; "a/b" is member b of a and keeps its long name.
Json project(const Json& full, const std::vector<std::string>& fields) {
  if (fields.empty()) return full;
  Json chosen = Json::object();
  for (const std::string& field : fields) {
    const Json* value = &full;
    for (size_t begin = 0; value != nullptr && begin <= field.size();) {
      const size_t end = std::min(field.find('/', begin), field.size());
      const auto found = value->is_object() ? value->find(field.substr(begin, end - begin)) : value->end();
      value = found == value->end() ? nullptr : &*found;
      begin = end + 1;
    }
    if (value != nullptr) chosen[field] = *value;
  }
  return chosen;
}

void absorb(Answer& answer, const engine::TokenEvent& event, const vocab::Vocabulary& vocabulary) {
  answer.content += event.text;
  answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
  for (const auto& step : event.probabilities) answer.probabilities.push_back(step_probabilities(step, vocabulary));
}

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const CompletionParams& params, const Api& api) {
  std::vector<Json> results(answers.size());
  while (!reader.finished()) {
    const auto item = co_await reader.next(kPingInterval);
    if (!item) continue;
    Answer& answer = answers[item->index];
    if (const auto* token = std::get_if<engine::TokenEvent>(&item->event)) absorb(answer, *token, api.vocabulary);
    if (const auto* end = std::get_if<engine::FinalEvent>(&item->event))
      results[item->index] = project(final_event(answer, *end, params, api), params.response_fields);
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
      throw RequestError(error->message, error->kind);
  }
  http::Response response = json_response(results.size() == 1 ? results.front() : Json(results));
  co_await exchange.send(std::move(response));
}

// Server-sent events. The head is sent with the first event, so that an error before it is an ordinary HTTP error.
net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                      const CompletionParams& params, const Api& api) {
  while (!reader.finished()) {
    const auto item = co_await reader.next(kPingInterval);
    std::string text = ":\n\n";  // a comment: the connection is alive
    if (item) {
      Answer& answer = answers[item->index];
      Json json;
      if (const auto* token = std::get_if<engine::TokenEvent>(&item->event)) {
        answer.content += token->text;
        answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
        json = partial_event(answer, *token, api.vocabulary);
      } else if (const auto* end = std::get_if<engine::FinalEvent>(&item->event)) {
        json = project(final_event(answer, *end, params, api), params.response_fields);
      } else if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event)) {
        if (!exchange.response_begun()) throw RequestError(error->message, error->kind);
        const http::Response as_response =
            error_response(std::make_exception_ptr(RequestError(error->message, error->kind)));
        json = Json::parse(as_response.body);
      }
      text = "data: " + to_text(json) + "\n\n";
    }
    if (!exchange.response_begun()) {
      http::Response head;
      head.content_type = "text/event-stream";
      head.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
      co_await exchange.begin_stream(std::move(head));
    }
    co_await exchange.write_chunk(text);
    if (item && std::holds_alternative<engine::ErrorEvent>(item->event)) break;
  }
  co_await exchange.end_stream();
}

net::awaitable<void> post_completion(http::Exchange& exchange, const Api& api) {
  if (api.settings.embeddings_only || !api.model.causal)
    throw RequestError(api.model.causal ? "this server was started with --embeddings: it only embeds"
                                        : "this model is an encoder: it embeds, but does not generate",
                       RequestError::Kind::not_supported);
  const Json body = parse_object(exchange.request().body);
  const Json* prompt = find_field(body, "prompt");
  if (prompt == nullptr)
    throw RequestError("Field 'prompt': missing; expected a string, token ids, or an array of prompts");
  const CompletionParams params = parse_completion(body, api);

  std::vector<Answer> answers;
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (Prompt& tokens : parse_prompts(*prompt, "prompt", api.vocabulary)) {
    engine::GenerateParams generate = params.generate;
    generate.prompt = tokens;
    streams.push_back(api.engine.submit(std::move(generate)));
    answers.push_back({answers.size(), std::move(tokens), streams.back()->seed(), {}, {}, Json::array()});
  }
  StreamReader reader(exchange, std::move(streams));
  if (params.stream) {
    co_await answer_streaming(exchange, reader, answers, params, api);
  } else {
    co_await answer_whole(exchange, reader, answers, params, api);
  }
}

}  // namespace

void add_completion_routes(http::Router& router, const Api& api, const std::string& prefix) {
  for (const char* path : {"/completion", "/completions"})
    router.add("POST", prefix + path, [&api](http::Exchange& exchange) { return post_completion(exchange, api); });
}

}  // namespace caravan::server
