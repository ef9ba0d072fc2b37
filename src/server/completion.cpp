// POST /completion and /completions: llama-server's native generation endpoint, as JSON or as server-sent events.
#include "server/completion.h"

#include <fmt/format.h>

#include "server/api.h"
#include "server/event_stream.h"
#include "server/generation.h"
#include "server/json.h"
#include "server/params.h"
#include "server/probabilities.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

Json steps_json(std::span<const engine::StepProbabilities> steps, const vocab::Vocabulary& vocabulary) {
  Json list = Json::array();
  for (const engine::StepProbabilities& step : steps) list.push_back(step_probabilities(step, vocabulary));
  return list;
}

Json partial_event(const Answer& answer, uint32_t slot) {
  return {{"index", answer.index},
          {"content", ""},
          {"tokens", Json::array()},
          {"stop", false},
          {"id_slot", slot},
          {"tokens_predicted", answer.tokens.size()},
          {"tokens_evaluated", answer.prompt.size()}};
}

Json token_event(const Answer& answer, const engine::TokenEvent& event, const CompletionParams& params,
                 const Api& api) {
  Json json = partial_event(answer, event.slot);
  json["content"] = event.text;
  json["tokens"] = event.tokens;
  if (!event.probabilities.empty()) json["completion_probabilities"] = steps_json(event.probabilities, api.vocabulary);
  if (params.timings_per_token) json["timings"] = timings_json(event.timings);
  return json;
}

Json progress_event(const Answer& answer, const engine::ProgressEvent& event) {
  Json json = partial_event(answer, event.slot);
  json["prompt_progress"] = {{"total", event.n_prompt_tokens},
                             {"cache", event.n_cached},
                             {"processed", event.n_computed},
                             {"time_ms", event.elapsed_ms}};
  return json;
}

// The whole answer, or (streaming) its last event, which repeats no content.
Json final_event(const Answer& answer, const engine::FinalEvent& event, const CompletionParams& params,
                 const Api& api) {
  Json json = {{"index", answer.index},
               {"content", params.stream ? "" : answer.content},
               {"tokens", params.return_tokens && !params.stream ? Json(answer.tokens) : Json::array()},
               {"id_slot", event.slot},
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
               {"timings", timings_json(event.timings)}};
  json["generation_settings"]["timings_per_token"] = params.timings_per_token;
  // What clients of 2024 look at.
  json["stopped_eos"] = event.stop_type == engine::StopType::eos;
  json["stopped_word"] = event.stop_type == engine::StopType::word;
  json["stopped_limit"] = event.stop_type == engine::StopType::limit;
  if (!params.stream && params.generate.sampling.n_probs > 0)
    json["completion_probabilities"] = steps_json(answer.steps, api.vocabulary);
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

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const CompletionParams& params, const Api& api) {
  co_await collect(reader, answers);
  Json results = Json::array();
  for (const Answer& answer : answers)
    results.push_back(project(final_event(answer, *answer.end, params, api), params.response_fields));
  http::Response response = json_response(results.size() == 1 ? results.front() : results);
  co_await exchange.send(std::move(response));
}

net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                      const CompletionParams& params, const Api& api) {
  EventStream stream(exchange);
  const EventWriter writer = [&](size_t index, const engine::Event& event) -> std::vector<ServerSentEvent> {
    Answer& answer = answers[index];
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) {
      answer.content += token->text;
      answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
      return {{"", token_event(answer, *token, params, api)}};
    }
    if (const auto* progress = std::get_if<engine::ProgressEvent>(&event))
      return {{"", progress_event(answer, *progress)}};
    if (const auto* end = std::get_if<engine::FinalEvent>(&event))
      return {{"", project(final_event(answer, *end, params, api), params.response_fields)}};
    return {};
  };
  co_await stream_answers(stream, reader, params.ping_interval, writer);
  co_await stream.end();
}

net::awaitable<void> post_completion(http::Exchange& exchange, const Api& api) {
  require_generation(api);
  const Json body = parse_object(exchange.request().body);
  const Json* prompt = find_field(body, "prompt");
  if (prompt == nullptr)
    throw RequestError("Field 'prompt': missing; expected a string, token ids, or an array of prompts");
  const CompletionParams params = parse_completion(body, api);
  std::vector<Prompt> prompts = parse_prompts(*prompt, "prompt", api.vocabulary);
  co_await complete(exchange, api, params, std::move(prompts));
}

}  // namespace

net::awaitable<void> complete(http::Exchange& exchange, const Api& api, const CompletionParams& params,
                              std::vector<Prompt> prompts) {
  Generation generation = submit(api, params, std::move(prompts));
  StreamReader reader(exchange, std::move(generation.streams));
  if (params.stream) {
    co_await answer_streaming(exchange, reader, generation.answers, params, api);
  } else {
    co_await answer_whole(exchange, reader, generation.answers, params, api);
  }
}

void add_completion_routes(http::Router& router, const Api& api, const std::string& prefix) {
  for (const char* path : {"/completion", "/completions"})
    router.add("POST", prefix + path, [&api](http::Exchange& exchange) { return post_completion(exchange, api); });
}

}  // namespace caravan::server
