// All endpoints, the guard before them, and how errors look.
#include <openssl/crypto.h>

#include <algorithm>
#include <set>

#include "base/log.h"
#include "server/api.h"
#include "server/json.h"

namespace caravan::server {
namespace {

struct ErrorShape {
  int code;
  const char* type;
};

ErrorShape shape_of(RequestError::Kind kind) {
  switch (kind) {
    case RequestError::Kind::invalid:
      return {400, "invalid_request_error"};
    case RequestError::Kind::context_exceeded:
      return {400, "exceed_context_size_error"};
    case RequestError::Kind::unauthorized:
      return {401, "authentication_error"};
    case RequestError::Kind::not_found:
      return {404, "not_found_error"};
    case RequestError::Kind::not_supported:
      return {501, "not_supported_error"};
    case RequestError::Kind::unavailable:
      return {503, "unavailable_error"};
  }
  return {500, "server_error"};
}

const char* type_of_status(int status) {
  if (status == 404) return "not_found_error";
  return status < 500 ? "invalid_request_error" : "server_error";
}

http::Response response_of(const Json& body) {
  http::Response response = json_response(body);
  response.status = body["error"]["code"].get<int>();
  return response;
}

// The key a client sent: "Authorization: Bearer KEY", the bare key there, or "X-Api-Key: KEY".
std::string_view sent_key(const http::Request& request) {
  std::string_view value = request.header("authorization");
  if (value.empty()) return request.header("x-api-key");
  constexpr std::string_view kBearer = "Bearer ";
  if (value.substr(0, kBearer.size()) == kBearer) value.remove_prefix(kBearer.size());
  return value;
}

bool is_form(const http::Request& request) {
  constexpr std::string_view kForm = "multipart/";
  const std::string_view type = request.header("content-type").substr(0, kForm.size());
  return std::equal(type.begin(), type.end(), kForm.begin(), kForm.end(),
                    [](char a, char b) { return (a >= 'A' && a <= 'Z' ? a + 32 : a) == b; });
}

// In time that does not depend on where the texts differ.
bool same_key(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace

void add_routes(http::Router& router, const Api& api, const std::string& prefix) {
  add_completion_routes(router, api, prefix);
  add_openai_completion_routes(router, api, prefix);
  add_chat_routes(router, api, prefix);
  add_embedding_routes(router, api, prefix);
  add_tokenizer_routes(router, api, prefix);
  add_slot_routes(router, api, prefix);
  add_infill_routes(router, api, prefix);
  add_rerank_routes(router, api, prefix);
  add_administration_routes(router, api, prefix);
  add_introspection_routes(router, api, prefix);
  if (api.settings.web_page) add_web_routes(router, prefix);
}

std::function<std::optional<http::Response>(const http::Request&)> make_guard(const Api& api,
                                                                              const std::string& prefix) {
  const auto is_one_of = [prefix](const std::string& path, std::initializer_list<const char*> paths) {
    return std::any_of(paths.begin(), paths.end(), [&](const char* p) { return path == prefix + p; });
  };
  std::set<std::string> web;
  if (api.settings.web_page)
    for (const std::string& path : web_paths()) web.insert(prefix + path);
  return [&api, is_one_of, web = std::move(web)](const http::Request& request) -> std::optional<http::Response> {
    if (is_one_of(request.path, {"/health", "/v1/health", "/livez"}) || web.contains(request.path)) return std::nullopt;
    if (api.engine.status().state == engine::EngineStatus::State::loading)
      return response_of(error_body(503, "unavailable_error", "Loading model"));
    bool known = api.settings.api_keys.empty() || is_one_of(request.path, {"/models", "/v1/models"});
    for (const std::string& key : api.settings.api_keys) known = same_key(sent_key(request), key) || known;
    if (!known) return response_of(error_body(401, "authentication_error", "Invalid API Key"));
    if (is_form(request))
      return response_of(error_body(501, "not_supported_error", "multipart forms are not supported: send JSON"));
    return std::nullopt;
  };
}

http::Response error_response(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const engine::ContextExceededError& e) {
    Json body = error_body(400, "exceed_context_size_error", e.what());
    body["error"]["n_prompt_tokens"] = e.n_prompt_tokens();
    body["error"]["n_ctx"] = e.n_ctx();
    return response_of(body);
  } catch (const RequestError& e) {
    const ErrorShape shape = shape_of(e.kind());
    return response_of(error_body(shape.code, shape.type, e.what()));
  } catch (const http::HttpError& e) {
    return response_of(error_body(e.status(), type_of_status(e.status()), e.what()));
  } catch (const std::exception& e) {
    spdlog::error("http: {}", e.what());
    return response_of(error_body(500, "server_error", e.what()));
  }
}

}  // namespace caravan::server
