// POST /v1/chat/completions (and /chat/completions, /apply-template, .../input_tokens): OpenAI's chats.
#include <fmt/format.h>

#include "server/api.h"
#include "server/chat_request.h"
#include "server/chat_routes.h"
#include "server/event_stream.h"
#include "server/generation.h"
#include "server/openai.h"
#include "server/probabilities.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

const char* chat_finish_reason(engine::StopType type, const chat::ParsedMessage& message) {
  return type != engine::StopType::limit && !message.calls.empty() ? "tool_calls" : finish_reason(type);
}

Json message_json(const chat::ParsedMessage& message) {
  Json json = {{"role", "assistant"}};
  json["content"] = message.content.empty() && !message.calls.empty() ? Json(nullptr) : Json(message.content);
  if (!message.reasoning.empty()) json["reasoning_content"] = message.reasoning;
  if (!message.calls.empty()) {
    json["tool_calls"] = Json::array();
    for (const chat::ToolCall& call : message.calls)
      json["tool_calls"].push_back(
          {{"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}, {"id", call.id}});
  }
  return json;
}

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const ChatRequest& request, const Api& api) {
  co_await collect(reader, answers);
  Json choices = Json::array();
  for (const Answer& answer : answers) {
    ChatAnswer parsed(request);
    parsed.push(answer.content);
    parsed.finish();
    Json choice = {{"finish_reason", chat_finish_reason(answer.end->stop_type, parsed.message())},
                   {"index", answer.index},
                   {"message", message_json(parsed.message())}};
    if (request.completion.generate.sampling.n_probs > 0)
      choice["logprobs"] = chat_logprobs(answer.steps, api.vocabulary);
    choices.push_back(std::move(choice));
  }
  Json result = ResponseFrame(api, "chat.completion").object(std::move(choices));
  result["usage"] = usage_of(answers, answers.size()).json();
  result["timings"] = timings_json(answers.front().end->timings);
  http::Response response = json_response(result);
  co_await exchange.send(std::move(response));
}

Json delta_json(const chat::Delta& delta) {
  switch (delta.kind) {
    case chat::Delta::Kind::content:
      return {{"content", delta.text}};
    case chat::Delta::Kind::reasoning:
      return {{"reasoning_content", delta.text}};
    case chat::Delta::Kind::call:
      return {{"tool_calls", Json::array({{{"index", delta.index},
                                           {"id", delta.id},
                                           {"type", "function"},
                                           {"function", {{"name", delta.text}, {"arguments", ""}}}}})}};
    case chat::Delta::Kind::arguments:
      break;
  }
  return {{"tool_calls", Json::array({{{"index", delta.index}, {"function", {{"arguments", delta.text}}}}})}};
}

// The chunks of a streamed response.
class ChunkWriter {
 public:
  ChunkWriter(const ChatRequest& request, const Api& api, size_t n_answers)
      : request_(request), api_(api), frame_(api, "chat.completion.chunk"), states_(n_answers, State(request)) {}

  std::vector<ServerSentEvent> token(const Answer& answer, const engine::TokenEvent& event) {
    State& state = states_[answer.index];
    std::vector<ServerSentEvent> chunks = begin(answer);
    for (const auto& step : event.probabilities) state.steps.push_back(step);
    for (const chat::Delta& delta : state.parsed.push(event.text))
      chunks.push_back({"", chunk(answer, delta_json(delta))});
    if (request_.completion.timings_per_token && chunks.size() > (state.n_events == 0 ? 1u : 0u))
      chunks.back().data["timings"] = timings_json(event.timings);
    ++state.n_events;
    return chunks;
  }

  std::vector<ServerSentEvent> end(const Answer& answer, const engine::FinalEvent& event) {
    State& state = states_[answer.index];
    std::vector<ServerSentEvent> chunks = begin(answer);
    for (const chat::Delta& delta : state.parsed.finish()) chunks.push_back({"", chunk(answer, delta_json(delta))});
    Json last = chunk(answer, Json::object());
    last["choices"][0]["finish_reason"] = chat_finish_reason(event.stop_type, state.parsed.message());
    if (!request_.completion.include_usage) last["timings"] = timings_json(event.timings);
    chunks.push_back({"", std::move(last)});
    return chunks;
  }

  Json usage(const std::vector<Answer>& answers) const {
    Json json = frame_.object(Json::array());
    json["usage"] = usage_of(answers, answers.size()).json();
    json["timings"] = timings_json(answers.front().end->timings);
    return json;
  }

 private:
  struct State {
    explicit State(const ChatRequest& request) : parsed(request) {}
    ChatAnswer parsed;
    bool begun = false;
    size_t n_events = 0;
    std::vector<engine::StepProbabilities> steps;  // that no chunk has shown yet
  };

  // The chunk with the role, before the first other one of an answer.
  std::vector<ServerSentEvent> begin(const Answer& answer) {
    std::vector<ServerSentEvent> chunks;
    if (!std::exchange(states_[answer.index].begun, true))
      chunks.push_back({"", frame_.object(Json::array({{{"finish_reason", nullptr},
                                                        {"index", answer.index},
                                                        {"delta", {{"role", "assistant"}, {"content", nullptr}}}}}))});
    return chunks;
  }

  Json chunk(const Answer& answer, Json delta) {
    Json choice = {{"finish_reason", nullptr}, {"index", answer.index}, {"delta", std::move(delta)}};
    std::vector<engine::StepProbabilities> steps = std::exchange(states_[answer.index].steps, {});
    if (!steps.empty()) choice["logprobs"] = chat_logprobs(steps, api_.vocabulary);
    return frame_.object(Json::array({std::move(choice)}));
  }

  const ChatRequest& request_;
  const Api& api_;
  const ResponseFrame frame_;
  std::vector<State> states_;
};

net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                      const ChatRequest& request, const Api& api) {
  EventStream stream(exchange);
  ChunkWriter chunks(request, api, answers.size());
  const EventWriter writer = [&](size_t index, const engine::Event& event) -> std::vector<ServerSentEvent> {
    Answer& answer = answers[index];
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) return chunks.token(answer, *token);
    if (const auto* end = std::get_if<engine::FinalEvent>(&event)) {
      answer.end = *end;
      return chunks.end(answer, *end);
    }
    return {};
  };
  const bool complete = co_await stream_answers(stream, reader, request.completion.ping_interval, writer);
  if (complete && request.completion.include_usage) {
    ServerSentEvent usage{"", chunks.usage(answers)};
    co_await stream.send(std::move(usage));
  }
  if (complete) co_await stream.send_done();
  co_await stream.end();
}

net::awaitable<void> post_chat(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format, const Api& api) {
  require_generation(api);
  const ChatRequest request = parse_chat_request(parse_object(exchange.request().body), *format, api);
  Generation generation = submit_chat(request, api);
  StreamReader reader(exchange, std::move(generation.streams));
  if (request.completion.stream) {
    co_await answer_streaming(exchange, reader, generation.answers, request, api);
  } else {
    co_await answer_whole(exchange, reader, generation.answers, request, api);
  }
}

net::awaitable<void> apply_template(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format,
                                    const Api& api) {
  const Json body = parse_object(exchange.request().body);
  http::Response response = json_response({{"prompt", render_chat(body, *format, api).text}});
  co_await exchange.send(std::move(response));
}

net::awaitable<void> count_tokens(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format, const Api& api) {
  const Json body = parse_object(exchange.request().body);
  const Prompt prompt = tokenize_prompt(render_chat(body, *format, api).text, api);
  http::Response response = json_response({{"input_tokens", prompt.size()}, {"object", "response.input_tokens"}});
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_chat_routes(http::Router& router, const Api& api, const std::string& prefix) {
  const auto format = std::make_shared<const ChatFormat>(api.settings.chat, api.vocabulary);
  for (const char* path : {"/v1/chat/completions", "/chat/completions"}) {
    router.add("POST", prefix + path,
               [format, &api](http::Exchange& exchange) { return post_chat(exchange, format, api); });
    router.add("POST", prefix + path + "/input_tokens",
               [format, &api](http::Exchange& exchange) { return count_tokens(exchange, format, api); });
  }
  router.add("POST", prefix + "/apply-template",
             [format, &api](http::Exchange& exchange) { return apply_template(exchange, format, api); });
  add_messages_routes(router, api, format, prefix);
  add_responses_routes(router, api, format, prefix);
}

}  // namespace caravan::server
