// POST /v1/completions: OpenAI's older completion endpoint, as JSON or as server-sent events that end with [DONE].
#include <fmt/format.h>

#include "server/api.h"
#include "server/event_stream.h"
#include "server/generation.h"
#include "server/json.h"
#include "server/openai.h"
#include "server/params.h"
#include "server/probabilities.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

struct OpenAiParams {
  CompletionParams completion;
  bool echo = false;  // the text begins with the prompt
};

OpenAiParams parse_fields(Json body, const Api& api) {
  const auto refuse = [](const std::string& what) { throw RequestError(what, RequestError::Kind::not_supported); };
  OpenAiParams params;
  params.echo = find_bool(body, "echo").value_or(false);
  body.erase("echo");
  if (!find_text(body, "suffix").value_or("").empty())
    refuse("Field 'suffix': not supported here; POST /infill fills in between two texts where the model can");
  params.completion = parse_completion(body, api);
  if (find_integer(body, "best_of").value_or(params.completion.n) != params.completion.n)
    refuse("Field 'best_of': only the value of 'n' is supported: every completion is returned");
  if (params.echo && params.completion.generate.sampling.n_probs > 0)
    refuse("Field 'echo': not supported with logprobs, as the model's probabilities of the prompt are not computed");
  return params;
}

Json choice(size_t index, std::string text, Json logprobs, Json finish_reason) {
  return {{"text", std::move(text)},
          {"index", index},
          {"logprobs", std::move(logprobs)},
          {"finish_reason", std::move(finish_reason)}};
}

std::string echoed_text(const Answer& answer, const OpenAiParams& params, const Api& api) {
  return params.echo ? api.vocabulary.detokenize(answer.prompt, vocab::RenderSpecial::no) : std::string();
}

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const OpenAiParams& params, const Api& api) {
  co_await collect(reader, answers);
  Json choices = Json::array();
  for (const Answer& answer : answers) {
    size_t text_offset = 0;
    Json logprobs;
    if (params.completion.generate.sampling.n_probs > 0)
      logprobs = completion_logprobs(answer.steps, api.vocabulary, text_offset);
    choices.push_back(choice(answer.index, echoed_text(answer, params, api) + answer.content, std::move(logprobs),
                             finish_reason(answer.end->stop_type)));
  }
  Json result = ResponseFrame(api, "text_completion").object(std::move(choices));
  result["usage"] = usage_of(answers, params.completion.n).json();
  result["timings"] = timings_json(answers.back().end->timings);
  http::Response response = json_response(result);
  co_await exchange.send(std::move(response));
}

class ChunkWriter {
 public:
  ChunkWriter(const OpenAiParams& params, const Api& api, size_t n_answers)
      : params_(params),
        api_(api),
        frame_(api, "text_completion"),
        text_offsets_(n_answers, 0),
        begun_(n_answers, false) {}

  Json token(const Answer& answer, const engine::TokenEvent& event) {
    Json logprobs;
    if (!event.probabilities.empty())
      logprobs = completion_logprobs(event.probabilities, api_.vocabulary, text_offsets_[answer.index]);
    Json chunk = one_choice(answer, event.text, std::move(logprobs), nullptr);
    if (params_.completion.timings_per_token) chunk["timings"] = timings_json(event.timings);
    return chunk;
  }
  Json end(const Answer& answer, const engine::FinalEvent& event) {
    Json chunk = one_choice(answer, "", nullptr, finish_reason(event.stop_type));
    chunk["timings"] = timings_json(event.timings);
    return chunk;
  }
  Json usage(const std::vector<Answer>& answers) const {
    Json chunk = frame_.object(Json::array());
    chunk["usage"] = usage_of(answers, params_.completion.n).json();
    return chunk;
  }

 private:
  Json one_choice(const Answer& answer, std::string text, Json logprobs, Json reason) {
    if (!begun_[answer.index]) text = echoed_text(answer, params_, api_) + text;
    begun_[answer.index] = true;
    Json choices = Json::array();
    choices.push_back(choice(answer.index, std::move(text), std::move(logprobs), std::move(reason)));
    return frame_.object(std::move(choices));
  }

  const OpenAiParams& params_;
  const Api& api_;
  const ResponseFrame frame_;
  std::vector<size_t> text_offsets_;
  std::vector<bool> begun_;
};

net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                      const OpenAiParams& params, const Api& api) {
  EventStream stream(exchange);
  ChunkWriter chunks(params, api, answers.size());
  const EventWriter writer = [&](size_t index, const engine::Event& event) -> std::vector<ServerSentEvent> {
    Answer& answer = answers[index];
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) return {{"", chunks.token(answer, *token)}};
    if (const auto* end = std::get_if<engine::FinalEvent>(&event)) {
      answer.end = *end;
      return {{"", chunks.end(answer, *end)}};
    }
    return {};
  };
  const bool complete = co_await stream_answers(stream, reader, params.completion.ping_interval, writer);
  if (complete && params.completion.include_usage) {
    ServerSentEvent usage{"", chunks.usage(answers)};
    co_await stream.send(std::move(usage));
  }
  if (complete) co_await stream.send_done();
  co_await stream.end();
}

net::awaitable<void> post_completion(http::Exchange& exchange, const Api& api) {
  require_generation(api);
  Json body = parse_object(exchange.request().body);
  const Json* prompt = find_field(body, "prompt");
  if (prompt == nullptr)
    throw RequestError("Field 'prompt': missing; expected a string, token ids, or an array of prompts");
  std::vector<Prompt> prompts = parse_prompts(*prompt, "prompt", api.vocabulary);
  body.erase("prompt");
  const OpenAiParams params = parse_fields(std::move(body), api);
  Generation generation = submit(api, params.completion, std::move(prompts));
  StreamReader reader(exchange, std::move(generation.streams));
  if (params.completion.stream) {
    co_await answer_streaming(exchange, reader, generation.answers, params, api);
  } else {
    co_await answer_whole(exchange, reader, generation.answers, params, api);
  }
}

}  // namespace

void add_openai_completion_routes(http::Router& router, const Api& api, const std::string& prefix) {
  router.add("POST", prefix + "/v1/completions",
             [&api](http::Exchange& exchange) { return post_completion(exchange, api); });
}

}  // namespace caravan::server
