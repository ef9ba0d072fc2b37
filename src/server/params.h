// JSON fields of a request -> parameters of the engine. The only place where the generation fields are read.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "engine/request.h"
#include "net/connection.h"
#include "server/api.h"
#include "server/json.h"

namespace caravan::server {

// Time without an event after which a stream gets a comment, so that proxies keep the connection.
constexpr auto kPingInterval = std::chrono::seconds(30);

// One prompt as the request gave it, in tokens.
using Prompt = std::vector<int32_t>;

// The prompts of a field: a string, an array of token ids, a mixed array, or an array of those (then several prompts).
// A leading string gets the special tokens that the model wants. Throws RequestError naming the field.
std::vector<Prompt> parse_prompts(const Json& value, const char* field, const vocab::Vocabulary& vocabulary);

struct CompletionParams {
  engine::GenerateParams generate;  // without the prompt
  uint32_t n = 1;                   // completions of every prompt
  bool stream = false;
  bool include_usage = false;  // OpenAI's endpoints: a last event with the usage
  bool return_tokens = false;
  bool timings_per_token = false;
  std::vector<std::string> response_fields;
  net::Duration ping_interval = kPingInterval;  // after so much silence a stream gets a comment
};

// All fields of POST /completion but the prompt, over the server's defaults. Out-of-range values throw
// RequestError(invalid) of the form "Field 'x': Value must be ..."; known fields without support throw
// RequestError(not_supported) unless they have the value that turns them off. Unknown fields are ignored.
CompletionParams parse_completion(const Json& body, const Api& api);

// The settings in the form of llama-server's generation_settings.
Json generation_settings(const engine::GenerateParams& params, bool stream, uint32_t seed);

}  // namespace caravan::server
