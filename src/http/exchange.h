// One request and the writing of its response, as a handler sees them.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "http/message.h"
#include "net/io.h"

namespace caravan::http {

// Handed to a handler for one request. Everything runs on executor(), the connection's, which is serial.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual const Request& request() const = 0;
  virtual net::Executor executor() const = 0;

  // Sends a complete response. Once per exchange, and not after begin_stream().
  // This and the following throw net::ConnectionError when the client has gone or does not read.
  virtual net::awaitable<void> send(Response response) = 0;

  // Sends the head of a response whose body follows in chunks, then chunks, then the end.
  virtual net::awaitable<void> begin_stream(Response head) = 0;
  virtual net::awaitable<void> write_chunk(std::string_view bytes) = 0;
  virtual net::awaitable<void> end_stream() = 0;

  // True once a response was begun: an error can then no longer change the status.
  virtual bool response_begun() const = 0;

  // Calls hook, on the executor, when the client closes the connection while the handler runs, or has closed it before.
  // One hook; {} clears it.
  virtual void on_client_gone(std::function<void()> hook) = 0;
};

}  // namespace caravan::http
