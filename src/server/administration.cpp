// POST /props and GET, POST /lora-adapters: settings that clients of llama-server look at and change.
#include <fmt/format.h>

#include "server/api.h"
#include "server/json.h"

namespace caravan::server {
namespace {

net::awaitable<void> post_props(http::Exchange& exchange, const Api& api) {
  if (!api.settings.props_endpoint)
    throw RequestError("settings of the server cannot be changed: start it with --props",
                       RequestError::Kind::not_supported);
  parse_object(exchange.request().body);
  http::Response response = json_response({{"success", true}});  // llama-server has no property to change, either
  co_await exchange.send(std::move(response));
}

net::awaitable<void> get_adapters(http::Exchange& exchange) {
  http::Response response = json_response(Json::array());
  co_await exchange.send(std::move(response));
}

net::awaitable<void> post_adapters(http::Exchange& exchange) {
  const Json list = parse_json(exchange.request().body);
  if (!list.is_array()) throw RequestError("the request body must be an array of {id, scale}");
  for (const Json& entry : list) {
    const auto id = entry.is_object() ? find_integer(entry, "id") : std::nullopt;
    if (!id) throw RequestError("the request body must be an array of {id, scale}");
    throw RequestError(fmt::format("there is no adapter {}: LoRA adapters are not supported", *id));
  }
  http::Response response = json_response({{"success", true}});
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_administration_routes(http::Router& router, const Api& api, const std::string& prefix) {
  router.add("POST", prefix + "/props", [&api](http::Exchange& exchange) { return post_props(exchange, api); });
  router.add("GET", prefix + "/lora-adapters", get_adapters);
  router.add("POST", prefix + "/lora-adapters", post_adapters);
}

}  // namespace caravan::server
