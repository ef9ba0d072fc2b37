// Vectors of texts: POST /v1/embeddings in OpenAI's shape, POST /embedding and /embeddings in llama-server's own.
#include <fmt/format.h>

#include <bit>
#include <cstring>

#include "base/base64.h"
#include "engine/pooling.h"
#include "server/api.h"
#include "server/json.h"
#include "server/params.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

constexpr auto kPollInterval = std::chrono::seconds(30);
constexpr int64_t kEuclidean = 2;
constexpr int64_t kLargestNorm = 100;  // a p-norm beyond is that of the largest value for all that f32 can tell

struct EmbeddingFields {
  bool openai_shape = false;
  bool base64 = false;
  int32_t normalisation = kEuclidean;
  std::string model;  // as the request names it
  std::vector<Prompt> inputs;
};

EmbeddingFields parse_fields(const Json& body, const Api& api, bool openai_path) {
  const bool has_content = find_field(body, "content") != nullptr;
  const char* field = has_content ? "content" : "input";
  const Json* input = find_field(body, field);
  if (input == nullptr) throw RequestError("one of the fields 'content' and 'input' is needed");
  EmbeddingFields fields;
  fields.openai_shape = openai_path && !has_content;
  if (fields.openai_shape && api.model.pooling == engine::Pooling::none)
    throw RequestError("this server gives one vector per token (--pooling none): POST /embeddings has a form for that");
  const std::string format = find_text(body, "encoding_format").value_or("float");
  if (format != "float" && format != "base64")
    throw RequestError("Field 'encoding_format': Value must be \"float\" or \"base64\"");
  fields.base64 = format == "base64";
  const auto normalisation = find_integer(body, "embd_normalize").value_or(kEuclidean);
  if (normalisation < -1 || normalisation > kLargestNorm)
    throw RequestError(fmt::format("Field 'embd_normalize': Value must be in [-1, {}]", kLargestNorm));
  fields.normalisation = static_cast<int32_t>(normalisation);
  if (find_integer(body, "dimensions").value_or(api.model.n_embd) != api.model.n_embd)
    throw RequestError(fmt::format("Field 'dimensions': only the model's own, {}, is supported", api.model.n_embd),
                       RequestError::Kind::not_supported);
  fields.model = find_text(body, "model").value_or(api.model.id());
  fields.inputs = parse_prompts(*input, field, api.vocabulary);
  for (const Prompt& tokens : fields.inputs)
    if (tokens.empty()) throw RequestError("Input content cannot be empty");
  return fields;
}

// An array of numbers, or the base64 text of the values as little-endian f32.
Json vector_json(const std::vector<float>& vector, bool base64) {
  if (!base64) return vector;
  std::string bytes;
  for (const float value : vector) {
    const auto bits = std::bit_cast<uint32_t>(value);
    for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(bits >> shift & 0xff);
  }
  return base64_encode(bytes);
}

// One result per input: the vectors of its tokens, or the one of the whole.
using Vectors = std::vector<std::vector<float>>;

Json native_json(const std::vector<Vectors>& results, const EmbeddingFields& fields) {
  Json list = Json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    Json vectors = Json::array();
    for (const auto& vector : results[i]) vectors.push_back(vector_json(vector, fields.base64));
    list.push_back({{"index", i}, {"embedding", std::move(vectors)}});
  }
  return list;
}

Json openai_json(const std::vector<Vectors>& results, const EmbeddingFields& fields) {
  Json data = Json::array();
  size_t n_tokens = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    Json entry = {{"embedding", vector_json(results[i].front(), fields.base64)}, {"index", i}, {"object", "embedding"}};
    if (fields.base64) entry["encoding_format"] = "base64";
    data.push_back(std::move(entry));
    n_tokens += fields.inputs[i].size();
  }
  return {{"model", fields.model},
          {"object", "list"},
          {"usage", {{"prompt_tokens", n_tokens}, {"total_tokens", n_tokens}}},
          {"data", std::move(data)}};
}

net::awaitable<void> post_embedding(http::Exchange& exchange, const Api& api, bool openai_path) {
  const EmbeddingFields fields = parse_fields(parse_object(exchange.request().body), api, openai_path);
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (const Prompt& tokens : fields.inputs) streams.push_back(api.engine.embed({tokens, api.model.pooling}));
  std::vector<Vectors> results(streams.size());
  StreamReader reader(exchange, std::move(streams));
  while (!reader.finished()) {
    auto item = co_await reader.next(kPollInterval);
    if (!item) continue;
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
      throw RequestError(error->message, error->kind);
    auto* done = std::get_if<engine::EmbeddingEvent>(&item->event);
    if (done == nullptr) continue;
    // Pooled vectors are normalised; those of single tokens are raw.
    if (api.model.pooling != engine::Pooling::none)
      for (auto& vector : done->vectors) engine::normalise(vector, fields.normalisation);
    results[item->index] = std::move(done->vectors);
  }
  const Json answer = fields.openai_shape ? openai_json(results, fields) : native_json(results, fields);
  http::Response response = json_response(answer);
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_embedding_routes(http::Router& router, const Api& api, const std::string& prefix) {
  const std::pair<const char*, bool> kPaths[] = {
      {"/embedding", false}, {"/embeddings", false}, {"/v1/embeddings", true}};
  for (const auto& [path, openai] : kPaths)
    router.add("POST", prefix + path,
               [&api, openai = openai](http::Exchange& exchange) { return post_embedding(exchange, api, openai); });
}

}  // namespace caravan::server
