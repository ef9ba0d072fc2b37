// The HTTP/1.1 server: accepts connections, parses requests within limits, runs handlers, keeps connections alive.
// A connection costs no thread. Beast parses; heads and chunks are written by hand.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "http/router.h"
#include "net/connection.h"
#include "net/listener.h"

namespace caravan::http {

struct ServerOptions {
  uint64_t max_body_bytes = uint64_t{64} << 20;
  uint32_t max_header_bytes = 64 * 1024;
  size_t max_connections = 8192;
  std::chrono::seconds idle_timeout{600};   // between requests, and for the arrival of one
  std::chrono::seconds write_timeout{600};  // for a client that does not read
  // Runs before the handler of any known or unknown path: a response here ends the exchange (loading, wrong key).
  std::function<std::optional<Response>(const Request&)> guard;
  // The response for what a handler, the router or the parser threw.
  std::function<Response(std::exception_ptr)> error_response;
  // Access-Control-Allow-Origin: "*" reflects the request's origin; "" sends no CORS headers; otherwise a comma list of
  // origins of which the request's is reflected.
  std::string cors_origins = "*";
};

class Server {
 public:
  // Does not listen yet. io and router outlive the server.
  Server(net::IoThreads& io, const Router& router, ServerOptions options);
  // stop() without patience.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Binds and starts to accept. Throws SystemError or RequestError naming the endpoint.
  void listen(const net::Endpoint& endpoint);
  // The port bound to.
  uint16_t port() const;

  // Accepts no more connections, lets running exchanges finish for at most grace, closes what is left.
  void stop(std::chrono::milliseconds grace);

  // Exchanges that a handler is working on.
  size_t active_exchanges() const { return active_exchanges_.load(); }

 private:
  class Session;
  net::awaitable<void> accept_loop();

  net::IoThreads& io_;
  const Router& router_;
  const ServerOptions options_;
  std::unique_ptr<net::Listener> listener_;
  std::atomic<bool> stopping_{false};
  std::atomic<size_t> active_exchanges_{0};
  mutable std::mutex mutex_;  // guards sessions_
  std::set<Session*> sessions_;
  std::atomic<size_t> n_tasks_{0};  // the accept loop and sessions: they refer to this object
};

}  // namespace caravan::http
