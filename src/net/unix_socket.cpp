#include "net/unix_socket.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <boost/asio/redirect_error.hpp>

#include "base/log.h"
#include "net/socket_connection.h"

namespace caravan::net {
namespace {

using UnixSocket = asio::basic_stream_socket<asio::local::stream_protocol, Executor>;

// A socket file that was left behind by a process that is gone refuses connections.
bool nobody_listens(IoThreads& io, const std::string& path) {
  boost::system::error_code code;
  asio::local::stream_protocol::socket probe(io.next_executor());
  probe.connect(asio::local::stream_protocol::endpoint(path), code);
  return code == asio::error::connection_refused;
}

bool is_socket(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode);
}

}  // namespace

UnixListener::UnixListener(IoThreads& io, std::string path)
    : io_(io), executor_(io.next_executor()), acceptor_(executor_), path_(std::move(path)) {
  if (path_.size() >= sizeof(sockaddr_un::sun_path))
    throw RequestError(fmt::format("cannot listen on '{}': the path of a Unix socket has fewer than {} bytes", path_,
                                   sizeof(sockaddr_un::sun_path)));
  const auto check = [&](const char* call, const boost::system::error_code& code) {
    if (code) throw SystemError(fmt::format("{} {}", call, path_), code.value());
  };
  if (is_socket(path_) && nobody_listens(io, path_)) ::unlink(path_.c_str());
  boost::system::error_code code;
  acceptor_.open(asio::local::stream_protocol(), code);
  check("open a socket for", code);
  acceptor_.bind(asio::local::stream_protocol::endpoint(path_), code);
  check("bind", code);
  acceptor_.listen(asio::socket_base::max_listen_connections, code);
  check("listen on", code);
}

UnixListener::~UnixListener() { ::unlink(path_.c_str()); }

awaitable<std::unique_ptr<Connection>> UnixListener::accept() {
  while (acceptor_.is_open()) {
    boost::system::error_code code;
    UnixSocket socket(io_.next_executor());
    co_await acceptor_.async_accept(socket, asio::redirect_error(asio::use_awaitable, code));
    if (!code) co_return std::make_unique<SocketConnection<UnixSocket>>("a client of " + path_, std::move(socket));
    if (!acceptor_.is_open()) break;
    spdlog::warn("accepting a connection on {}: {}; trying again", path_, code.message());
    co_await sleep_for(std::chrono::milliseconds(100));
  }
  co_return nullptr;
}

void UnixListener::close() noexcept {
  boost::system::error_code ignored;
  acceptor_.close(ignored);
}

}  // namespace caravan::net
