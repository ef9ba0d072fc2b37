// POST /tokenize and /detokenize.
#include "server/api.h"
#include "server/json.h"
#include "server/params.h"
#include "vocab/utf8.h"

namespace caravan::server {
namespace {

// A piece as a string, or as its bytes where they are not valid UTF-8.
Json piece_json(const std::string& piece) {
  if (vocab::is_valid_utf8(piece)) return piece;
  Json bytes = Json::array();
  for (const char c : piece) bytes.push_back(static_cast<uint8_t>(c));
  return bytes;
}

Json tokenize(const Json& body, const vocab::Vocabulary& vocabulary) {
  const auto content = find_text(body, "content");
  const bool add_special = find_bool(body, "add_special").value_or(false);
  const bool parse_special = find_bool(body, "parse_special").value_or(true);
  const bool with_pieces = find_bool(body, "with_pieces").value_or(false);
  if (!content) throw RequestError("Field 'content': missing; expected a string");
  const auto tokens = vocabulary.tokenize(*content, add_special ? vocab::AddSpecial::yes : vocab::AddSpecial::no,
                                          parse_special ? vocab::ParseSpecial::yes : vocab::ParseSpecial::no);
  if (!with_pieces) return {{"tokens", tokens}};
  Json list = Json::array();
  for (const vocab::TokenId id : tokens)
    list.push_back({{"id", id}, {"piece", piece_json(vocabulary.piece(id, vocab::RenderSpecial::yes))}});
  return {{"tokens", list}};
}

Json detokenize(const Json& body, const vocab::Vocabulary& vocabulary) {
  const Json* tokens = find_field(body, "tokens");
  if (tokens == nullptr || !tokens->is_array()) throw RequestError("Field 'tokens': expected an array of token ids");
  std::vector<vocab::TokenId> ids;
  for (const Json& token : *tokens) {
    if (!token.is_number_integer()) throw RequestError("Field 'tokens': expected an array of token ids");
    const auto id = token.get<int64_t>();
    if (id < 0 || static_cast<uint64_t>(id) >= vocabulary.size())
      throw RequestError("Field 'tokens': token id " + std::to_string(id) + " is not in the vocabulary");
    ids.push_back(static_cast<vocab::TokenId>(id));
  }
  return {{"content", vocabulary.detokenize(ids, vocab::RenderSpecial::yes)}};
}

using Function = Json (*)(const Json& body, const vocab::Vocabulary& vocabulary);

net::awaitable<void> answer(http::Exchange& exchange, Function function, const vocab::Vocabulary& vocabulary) {
  http::Response response = json_response(function(parse_object(exchange.request().body), vocabulary));
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_tokenizer_routes(http::Router& router, const Api& api, const std::string& prefix) {
  router.add("POST", prefix + "/tokenize",
             [&api](http::Exchange& exchange) { return answer(exchange, tokenize, api.vocabulary); });
  router.add("POST", prefix + "/detokenize",
             [&api](http::Exchange& exchange) { return answer(exchange, detokenize, api.vocabulary); });
}

}  // namespace caravan::server
