// The answers to the prompts of one request: submitted together, gathered from the engine's events.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "server/api.h"
#include "server/event_stream.h"
#include "server/json.h"
#include "server/params.h"
#include "server/stream_reader.h"

namespace caravan::server {

// One completion and what has come of it so far.
struct Answer {
  size_t index = 0;  // within the request
  Prompt prompt;
  uint32_t seed = 0;
  std::string content;
  std::vector<int32_t> tokens;
  std::vector<engine::StepProbabilities> steps;  // gathered by collect() only
  std::optional<engine::FinalEvent> end;
};

struct Generation {
  std::vector<Answer> answers;
  std::vector<std::shared_ptr<engine::TokenStream>> streams;  // one per answer
};

// Throws RequestError(not_supported) when this server or its model does not generate.
void require_generation(const Api& api);

// Submits params.n completions of every prompt; with a seed, the completions of one prompt have seed, seed + 1, ...
// When one is refused, all are cancelled and the error goes on.
Generation submit(const Api& api, const CompletionParams& params, std::vector<Prompt> prompts);

// Waits until every answer is complete. Throws RequestError for a failure of the engine.
net::awaitable<void> collect(StreamReader& reader, std::vector<Answer>& answers);

// What an event of answer `index` means to the client. It is never an ErrorEvent.
using EventWriter = std::function<std::vector<ServerSentEvent>(size_t index, const engine::Event& event)>;

// Sends what writer makes of each event until every answer is complete, and comments after ping_interval without one.
// False after a failure of the engine, which is then the last event (error_name: EventStream::fail()). The response is
// left open.
net::awaitable<bool> stream_answers(EventStream& stream, StreamReader& reader, net::Duration ping_interval,
                                    const EventWriter& writer, std::string_view error_name = {});

// llama-server's "timings".
Json timings_json(const engine::Timings& timings);

}  // namespace caravan::server
