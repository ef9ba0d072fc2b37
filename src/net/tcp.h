// TCP connections: connecting, and the Connection over a socket. Nagle is off, keepalive is on.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <memory>

#include "net/endpoint.h"
#include "net/socket_connection.h"

namespace caravan::net {

using Socket = asio::basic_stream_socket<asio::ip::tcp, Executor>;

class TcpConnection : public SocketConnection<Socket> {
 public:
  // Takes an open socket whose executor is serial.
  explicit TcpConnection(Socket socket);

  void abort() noexcept override;

  // The first bytes the peer sends, at most buffer.size(), left in the stream; 0 when it ends without any.
  awaitable<size_t> peek(std::span<std::byte> buffer);
  // Gives the socket up, for a layer above (TLS).
  Socket release() { return std::move(socket()); }
};

// Resolves and connects, trying each address in turn within timeout; the connection's executor is the one this
// coroutine runs on (run it on IoThreads::next_executor()). Throws ConnectionError naming the endpoint.
awaitable<std::unique_ptr<TcpConnection>> connect_tcp(Endpoint endpoint, Duration timeout);

// Makes the next close of a socket a reset.
void reset_on_close(Socket& socket) noexcept;

}  // namespace caravan::net
