// POST /rerank and its other names: how well documents answer a query, for models with a ranking head. Takes and
// answers the form of Jina's API ("documents") and that of Hugging Face's text-embeddings-inference ("texts").
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "server/api.h"
#include "server/json.h"
#include "server/params.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

using vocab::AddSpecial, vocab::ParseSpecial;

struct RerankRequest {
  bool tei = false;  // the form of text-embeddings-inference
  std::string query;
  std::vector<std::string> documents;
  size_t top_n = 0;
  bool return_text = false;
};

RerankRequest parse_request(const Json& body) {
  RerankRequest request;
  request.tei = find_field(body, "texts") != nullptr;
  const auto query = find_text(body, "query");
  if (!query) throw RequestError("Field 'query': missing; expected a string");
  request.query = *query;
  const char* field = request.tei ? "texts" : "documents";
  const Json* documents = find_field(body, field);
  if (documents == nullptr || !documents->is_array() || documents->empty())
    throw RequestError(fmt::format("Field '{}': expected an array of at least one string", field));
  for (const Json& document : *documents) {
    if (!document.is_string() || document.get_ref<const std::string&>().empty())
      throw RequestError(fmt::format("Field '{}': expected strings that are not empty", field));
    request.documents.push_back(document.get<std::string>());
  }
  const int64_t n_documents = static_cast<int64_t>(request.documents.size());
  const int64_t top_n = find_integer(body, "top_n").value_or(n_documents);
  if (top_n < 0) throw RequestError("Field 'top_n': Value must be >= 0");
  request.top_n = static_cast<size_t>(std::min(top_n, n_documents));
  request.return_text = find_bool(body, "return_text").value_or(false);
  return request;
}

std::string replaced(std::string text, std::string_view placeholder, const std::string& value) {
  for (size_t at = text.find(placeholder); at != std::string::npos; at = text.find(placeholder, at + value.size()))
    text.replace(at, placeholder.size(), value);
  return text;
}

// By the model's own template, or: BOS query EOS SEP document EOS, as far as the model wants these tokens.
Prompt pair_prompt(const vocab::Vocabulary& vocabulary, const std::string& query, const std::string& document) {
  if (const auto form = vocabulary.chat_template("rerank")) {
    const size_t at = form->find("{document}");
    const std::string before = replaced(form->substr(0, at), "{query}", query);
    const std::string after =
        at == std::string::npos ? ""
                                : replaced(form->substr(at + std::string_view("{document}").size()), "{query}", query);
    return vocabulary.tokenize(at == std::string::npos ? before : before + document + after, AddSpecial::yes,
                               ParseSpecial::yes);
  }
  Prompt tokens;
  const auto special = [&](bool wanted, std::optional<vocab::TokenId> token) {
    if (wanted && token) tokens.push_back(*token);
  };
  const auto text = [&](const std::string& part) {
    const Prompt more = vocabulary.tokenize(part, AddSpecial::no, ParseSpecial::no);
    tokens.insert(tokens.end(), more.begin(), more.end());
  };
  const auto begin = vocabulary.bos() ? vocabulary.bos() : vocabulary.cls();
  const auto end = vocabulary.eos() ? vocabulary.eos() : vocabulary.sep();
  special(vocabulary.adds_bos(), begin);
  text(query);
  special(vocabulary.adds_eos(), end);
  special(vocabulary.adds_sep(), vocabulary.sep());
  text(document);
  special(vocabulary.adds_eos(), end);
  return tokens;
}

Json answer_json(const RerankRequest& request, const std::vector<float>& scores, size_t n_tokens, const Api& api) {
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); });
  order.resize(request.top_n);
  Json results = Json::array();
  for (const size_t index : order) {
    Json result = {{"index", index}, {request.tei ? "score" : "relevance_score", scores[index]}};
    if (request.tei && request.return_text) result["text"] = request.documents[index];
    results.push_back(std::move(result));
  }
  if (request.tei) return results;
  return {{"model", api.model.id()},
          {"object", "list"},
          {"usage", {{"prompt_tokens", n_tokens}, {"total_tokens", n_tokens}}},
          {"results", results}};
}

net::awaitable<void> post_rerank(http::Exchange& exchange, const Api& api) {
  if (!api.model.ranking_head)
    throw RequestError("this model has no ranking head, or the server was started without --reranking",
                       RequestError::Kind::not_supported);
  const RerankRequest request = parse_request(parse_object(exchange.request().body));
  const engine::Pooling pooling = api.model.causal ? engine::Pooling::last : engine::Pooling::cls;
  size_t n_tokens = 0;
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (const std::string& document : request.documents) {
    Prompt tokens = pair_prompt(api.vocabulary, request.query, document);
    n_tokens += tokens.size();
    streams.push_back(api.engine.embed({std::move(tokens), pooling}));
  }
  std::vector<float> scores(streams.size());
  StreamReader reader(exchange, std::move(streams));
  while (!reader.finished()) {
    auto item = co_await reader.next(kPingInterval);
    if (!item) continue;
    if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
      throw RequestError(error->message, error->kind);
    if (const auto* done = std::get_if<engine::EmbeddingEvent>(&item->event))
      scores[item->index] = api.model.ranking_head->score(done->vectors.front());
  }
  http::Response response = json_response(answer_json(request, scores, n_tokens, api));
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_rerank_routes(http::Router& router, const Api& api, const std::string& prefix) {
  for (const char* path : {"/rerank", "/reranking", "/v1/rerank", "/v1/reranking"})
    router.add("POST", prefix + path, [&api](http::Exchange& exchange) { return post_rerank(exchange, api); });
}

}  // namespace caravan::server
