#include "server/event_stream.h"

#include <string>

#include "server/api.h"

namespace caravan::server {

net::awaitable<void> EventStream::write(std::string text) {
  if (!exchange_.response_begun()) {
    http::Response head;
    head.content_type = "text/event-stream";
    head.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
    co_await exchange_.begin_stream(std::move(head));
  }
  co_await exchange_.write_chunk(text);
}

net::awaitable<void> EventStream::send(ServerSentEvent event) {
  std::string text = event.name.empty() ? "" : "event: " + event.name + "\n";
  text += "data: " + to_text(event.data) + "\n\n";
  co_await write(std::move(text));
}

net::awaitable<void> EventStream::ping() {
  std::string text = ":\n\n";
  co_await write(std::move(text));
}

net::awaitable<void> EventStream::fail(engine::ErrorEvent error, std::string_view name) {
  const RequestError failure(error.message, error.kind);
  if (!exchange_.response_begun()) throw failure;
  ServerSentEvent event{std::string(name), Json::parse(error_response(std::make_exception_ptr(failure)).body)};
  co_await send(std::move(event));
}

net::awaitable<void> EventStream::send_done() {
  std::string text = "data: [DONE]\n\n";
  co_await write(std::move(text));
}

net::awaitable<void> EventStream::end() { co_await exchange_.end_stream(); }

}  // namespace caravan::server
