// The HTTP/1.1 server: accepts connections, parses requests within limits, runs handlers, keeps connections alive.
// Over TCP, TLS or Unix domain sockets. A connection costs no thread. Beast parses; heads and chunks are written by
// hand.
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
#include "net/tls.h"
#include "net/unix_socket.h"

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
  // Access-Control-Allow-Origin: "*" reflects the request's origin; "" sends no CORS headers; "localhost" reflects
  // those of this machine, any port; otherwise a comma list of origins of which the request's is reflected.
  std::string cors_origins = "*";
  // Set: TCP connections speak TLS.
  std::shared_ptr<const net::TlsCertificate> certificate;  // shared with handshakes under way
};

class Server {
 public:
  // Does not listen yet. io and router outlive the server.
  Server(net::IoThreads& io, const Router& router, ServerOptions options);
  // stop() without patience.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Binds and starts to accept, once. Throws SystemError or RequestError naming the endpoint.
  void listen(const net::Endpoint& endpoint);
  // The same on the path of a Unix domain socket.
  void listen_unix(const std::string& path);
  // The port bound to; 0 on a Unix domain socket.
  uint16_t port() const;

  // Serves a connection that was made elsewhere, on its own executor, until it ends.
  void serve(std::unique_ptr<net::Connection> connection);

  // Accepts no more connections, lets running exchanges finish for at most grace, closes what is left.
  void stop(std::chrono::milliseconds grace);

  // Exchanges that a handler is working on.
  size_t active_exchanges() const { return active_exchanges_.load(); }

 private:
  class Session;
  template <typename Listener>
  net::awaitable<void> accept_loop(Listener& listener);
  net::awaitable<void> serve_tls(std::unique_ptr<net::TcpConnection> connection);

  net::IoThreads& io_;
  const Router& router_;
  const ServerOptions options_;
  std::unique_ptr<net::Listener> listener_;           // at most one
  std::unique_ptr<net::UnixListener> unix_listener_;  // of these two
  std::atomic<bool> stopping_{false};
  std::atomic<size_t> active_exchanges_{0};
  mutable std::mutex mutex_;  // guards sessions_
  std::set<Session*> sessions_;
  std::atomic<size_t> n_tasks_{0};  // the accept loop and sessions: they refer to this object
};

}  // namespace caravan::http
