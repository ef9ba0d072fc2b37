// Raw bytes as the HTTP server gets them from a client: Beast's parser, the limits, routing, keep-alive.
// The input is all that one connection sends, in pieces of at most the size that its first byte says.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "http/server.h"
#include "net/memory_connection.h"

namespace {

using namespace caravan;

class Target {
 public:
  Target() : io_(1), server_(io_, router_, options()) {
    const auto echo = [](http::Exchange& exchange) -> net::awaitable<void> {
      http::Response response;
      response.body = exchange.request().body + std::string(exchange.request().header("x"));
      co_await exchange.send(std::move(response));
    };
    router_.add("GET", "/", echo);
    router_.add("POST", "/", echo);
    router_.add("POST", "/a/{id}", echo);
    router_.add("GET", "/stream", [](http::Exchange& exchange) -> net::awaitable<void> {
      http::Response head;
      co_await exchange.begin_stream(std::move(head));
      co_await exchange.write_chunk("chunk");
      co_await exchange.end_stream();
    });
  }

  // Sends the bytes and reads the responses to the end.
  void run(size_t piece, std::string bytes) {
    const net::Executor executor = io_.next_executor();
    net::run_blocking(executor, exchange(executor, piece, std::move(bytes)));
  }

 private:
  static http::ServerOptions options() {
    http::ServerOptions options;
    options.max_body_bytes = 4096;
    options.max_header_bytes = 1024;
    options.error_response = [](std::exception_ptr error) {
      http::Response response;
      try {
        std::rethrow_exception(error);
      } catch (const http::HttpError& http_error) {
        response.status = http_error.status();
      }
      return response;
    };
    return options;
  }

  net::awaitable<void> exchange(net::Executor executor, size_t piece, std::string bytes) {
    net::Faults in_pieces;
    in_pieces.max_read = piece;
    in_pieces.capacity = bytes.size() + 1;
    auto [client, server] = net::make_memory_pair(executor, in_pieces);
    server_.serve(std::move(server));
    const std::unique_ptr<net::Connection> connection = std::move(client);
    co_await connection->write_text(bytes);
    co_await connection->shutdown();
    std::array<std::byte, 4096> buffer;
    try {
      while (co_await connection->read_some(buffer) > 0) {
      }
    } catch (const net::ConnectionError&) {
      // the server ends a connection that it cannot read
    }
  }

  net::IoThreads io_;
  http::Router router_;
  http::Server server_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Target target;
  if (size < 2) return 0;
  target.run(1 + data[0], std::string(reinterpret_cast<const char*>(data + 1), size - 1));
  return 0;
}
