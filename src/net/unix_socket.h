// Unix domain sockets: a listener on a path, for programs of the same machine.
#pragma once

#include <boost/asio/local/stream_protocol.hpp>
#include <memory>
#include <string>

#include "net/connection.h"
#include "net/io.h"

namespace caravan::net {

// Accepts connections on a path, on the threads of io in turn. accept() and close() are called on executor().
class UnixListener {
 public:
  // Binds and listens. A socket file that nobody listens on any more is replaced. Throws SystemError naming the path,
  // RequestError when it is too long or somebody else's.
  UnixListener(IoThreads& io, std::string path);
  // Removes the socket file.
  ~UnixListener();
  UnixListener(const UnixListener&) = delete;
  UnixListener& operator=(const UnixListener&) = delete;

  Executor executor() const { return executor_; }
  const std::string& path() const { return path_; }
  // The next connection; nullptr after close().
  awaitable<std::unique_ptr<Connection>> accept();
  void close() noexcept;

 private:
  IoThreads& io_;
  Executor executor_;
  asio::basic_socket_acceptor<asio::local::stream_protocol, Executor> acceptor_;
  std::string path_;
};

}  // namespace caravan::net
