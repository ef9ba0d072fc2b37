// Server-sent events of one response.
#pragma once

#include <string>
#include <string_view>

#include "engine/request.h"
#include "http/exchange.h"
#include "server/json.h"

namespace caravan::server {

struct ServerSentEvent {
  std::string name;  // empty: the event has none
  Json data;
};

// The head goes out with the first event, so that an error before it is an ordinary HTTP error. Used on the exchange's
// executor.
class EventStream {
 public:
  explicit EventStream(http::Exchange& exchange) : exchange_(exchange) {}

  // "event: NAME" where it has one, and "data: JSON".
  net::awaitable<void> send(ServerSentEvent event);
  // A comment: the connection is alive.
  net::awaitable<void> ping();
  // A failure of the engine: throws RequestError when nothing has been sent, else sends {"error": ...} as the last
  // event, of that name.
  net::awaitable<void> fail(engine::ErrorEvent error, std::string_view name);
  // "data: [DONE]".
  net::awaitable<void> send_done();
  // The end of the response.
  net::awaitable<void> end();

 private:
  net::awaitable<void> write(std::string text);

  http::Exchange& exchange_;
};

}  // namespace caravan::server
