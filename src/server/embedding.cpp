// POST /embedding and /embeddings: vectors of texts, in llama-server's native shape.
#include <fmt/format.h>

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

void check_encoding_format(const Json& body) {
  const auto format = find_text(body, "encoding_format");
  if (!format || *format == "float") return;
  throw RequestError("Field 'encoding_format': only \"float\" is supported by this version",
                     *format == "base64" ? RequestError::Kind::not_supported : RequestError::Kind::invalid);
}

// Pooled vectors are normalised; those of single tokens are raw.
Json vectors_json(std::vector<std::vector<float>> vectors, engine::Pooling pooling, int32_t normalisation) {
  Json list = Json::array();
  for (auto& vector : vectors) {
    if (pooling != engine::Pooling::none) engine::normalise(vector, normalisation);
    list.push_back(vector);
  }
  return list;
}

net::awaitable<void> post_embedding(http::Exchange& exchange, const Api& api) {
  const Json body = parse_object(exchange.request().body);
  const char* field = find_field(body, "content") != nullptr ? "content" : "input";
  const Json* input = find_field(body, field);
  if (input == nullptr) throw RequestError("one of the fields 'content' and 'input' is needed");
  check_encoding_format(body);
  const auto normalisation = find_integer(body, "embd_normalize").value_or(kEuclidean);
  if (normalisation < -1 || normalisation > kLargestNorm)
    throw RequestError(fmt::format("Field 'embd_normalize': Value must be in [-1, {}]", kLargestNorm));

  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (Prompt& tokens : parse_prompts(*input, field, api.vocabulary)) {
    if (tokens.empty()) throw RequestError("Input content cannot be empty");
    streams.push_back(api.engine.embed({std::move(tokens), api.model.pooling}));
  }
  Json results = Json::array();
  for (size_t i = 0; i < streams.size(); ++i) results.push_back({{"index", i}, {"embedding", nullptr}});
  StreamReader reader(exchange, std::move(streams));
  while (!reader.finished()) {
    auto item = co_await reader.next(kPollInterval);
    if (!item) continue;
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
      throw RequestError(error->message, error->kind);
    if (auto* done = std::get_if<engine::EmbeddingEvent>(&item->event))
      results[item->index]["embedding"] =
          vectors_json(std::move(done->vectors), api.model.pooling, static_cast<int32_t>(normalisation));
  }
  http::Response response = json_response(results);
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_embedding_routes(http::Router& router, const Api& api, const std::string& prefix) {
  for (const char* path : {"/embedding", "/embeddings"})
    router.add("POST", prefix + path, [&api](http::Exchange& exchange) { return post_embedding(exchange, api); });
}

}  // namespace caravan::server
