// A listening TCP socket.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <memory>

#include "net/endpoint.h"
#include "net/io.h"
#include "net/tcp.h"

namespace caravan::net {

// Accepts connections, on the threads of io in turn. accept() and close() are called on executor().
class Listener {
 public:
  // Resolves the host (blocking), binds and listens. Throws SystemError naming the endpoint ("address in use"),
  // RequestError when the host is not an address of this machine.
  Listener(IoThreads& io, const Endpoint& endpoint);

  Executor executor() const { return executor_; }
  // With the port chosen by the system when 0 was asked for.
  const Endpoint& endpoint() const { return endpoint_; }
  uint16_t port() const { return endpoint_.port; }
  // The next connection; nullptr after close(). A temporary failure (too many open files) is logged and waited out.
  awaitable<std::unique_ptr<TcpConnection>> accept();
  // accept() returns nullptr from now on. From any thread: asio::post(executor(), ...) first.
  void close() noexcept;

 private:
  IoThreads& io_;
  Executor executor_;
  asio::basic_socket_acceptor<asio::ip::tcp, Executor> acceptor_;
  Endpoint endpoint_;
};

}  // namespace caravan::net
