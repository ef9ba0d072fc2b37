// The Connection over a stream socket of any kind.
#pragma once

#include <boost/asio/read.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <string>
#include <utility>
#include <vector>

#include "net/connection.h"

namespace caravan::net {

// Translates a system error of a connection with peer into a ConnectionError.
ConnectionError connection_error(const std::string& peer, const boost::system::error_code& code, bool closed_here);

template <typename Socket>
class SocketConnection : public Connection {
 public:
  // Takes an open socket whose executor is serial.
  SocketConnection(std::string peer, Socket&& socket)
      : executor_(socket.get_executor()), socket_(std::move(socket)), peer_(std::move(peer)) {}

  Executor executor() const override { return executor_; }
  const std::string& peer() const override { return peer_; }

  awaitable<size_t> read_some(std::span<std::byte> buffer) override {
    boost::system::error_code code;
    const size_t n = co_await socket_.async_read_some(asio::buffer(buffer.data(), buffer.size()),
                                                      asio::redirect_error(asio::use_awaitable, code));
    if (code == asio::error::eof) co_return 0;
    if (code) throw connection_error(peer_, code, closed_);
    co_return n;
  }

  awaitable<void> write(std::span<const ConstBuffer> buffers) override {
    // Asio would wait for a dead socket to become writable: for ever.
    if (write_failed_) throw connection_error(peer_, asio::error::broken_pipe, closed_);
    boost::system::error_code code;
    // std::vector: a span is not a buffer sequence for Boost 1.81
    const std::vector<ConstBuffer> sequence(buffers.begin(), buffers.end());
    co_await asio::async_write(socket_, sequence, asio::redirect_error(asio::use_awaitable, code));
    write_failed_ = static_cast<bool>(code);
    if (code) throw connection_error(peer_, code, closed_);
  }

  awaitable<void> shutdown() override {
    boost::system::error_code ignored;
    socket_.shutdown(asio::socket_base::shutdown_send, ignored);
    co_return;
  }

  void close() noexcept override {
    closed_ = true;
    boost::system::error_code ignored;
    socket_.close(ignored);
  }

 protected:
  Socket& socket() { return socket_; }
  bool is_closed() const { return closed_; }

 private:
  Executor executor_;
  Socket socket_;
  std::string peer_;
  bool closed_ = false;
  bool write_failed_ = false;
};

}  // namespace caravan::net
