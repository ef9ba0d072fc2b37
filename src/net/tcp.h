// TCP connections: connecting, and the Connection over a socket. Nagle is off, keepalive is on.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <memory>

#include "net/connection.h"
#include "net/endpoint.h"

namespace caravan::net {

using Socket = asio::basic_stream_socket<asio::ip::tcp, Executor>;

class TcpConnection : public Connection {
 public:
  // Takes an open socket whose executor is a strand.
  explicit TcpConnection(Socket socket);

  Executor executor() const override { return executor_; }
  awaitable<size_t> read_some(std::span<std::byte> buffer) override;
  awaitable<void> write(std::span<const ConstBuffer> buffers) override;
  awaitable<void> shutdown() override;
  void close() noexcept override;
  void abort() noexcept override;
  const std::string& peer() const override { return peer_; }

  // The first bytes the peer sends, at most buffer.size(), left in the stream; 0 when it ends without any.
  awaitable<size_t> peek(std::span<std::byte> buffer);
  // Gives the socket up, for a layer above (TLS).
  Socket release() { return std::move(socket_); }

 private:
  Executor executor_;
  Socket socket_;
  std::string peer_;
  bool closed_ = false;
  bool write_failed_ = false;
};

// Resolves and connects, trying each address in turn within timeout; the connection's strand is the one this coroutine
// runs on (run it on IoThreads::make_strand()). Throws ConnectionError naming the endpoint.
awaitable<std::unique_ptr<TcpConnection>> connect_tcp(Endpoint endpoint, Duration timeout);

// Makes the next close of a socket a reset.
void reset_on_close(Socket& socket) noexcept;

// Translates a system error of a connection with peer into a ConnectionError.
ConnectionError connection_error(const std::string& peer, const boost::system::error_code& code, bool closed_here);

}  // namespace caravan::net
