#include "net/tcp.h"

#include <fmt/format.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/redirect_error.hpp>

namespace caravan::net {

namespace {

std::string describe(const asio::ip::tcp::endpoint& address) {
  return Endpoint{address.address().to_string(), address.port()}.text();
}

// Nagle off: a token's frame must leave at once. Keepalive finds peers that vanished between two requests.
void set_options(Socket& socket) {
  boost::system::error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);
  const int idle_seconds = 30, interval_seconds = 10, probes = 3;
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &idle_seconds, sizeof idle_seconds);
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPINTVL, &interval_seconds, sizeof interval_seconds);
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

std::string peer_of(const Socket& socket) {
  boost::system::error_code code;
  const auto address = socket.remote_endpoint(code);
  return code ? "a peer that left" : describe(address);
}

}  // namespace

ConnectionError connection_error(const std::string& peer, const boost::system::error_code& code, bool closed_here) {
  using Kind = ConnectionError::Kind;
  if (closed_here) return {Kind::closed_here, fmt::format("{}: closed here", peer)};
  if (code == asio::error::connection_refused || code == asio::error::host_unreachable ||
      code == asio::error::network_unreachable)
    return {Kind::unreachable, fmt::format("{}: {}", peer, code.message())};
  if (code == asio::error::timed_out) return {Kind::timed_out, fmt::format("{}: {}", peer, code.message())};
  if (code == asio::error::connection_reset || code == asio::error::broken_pipe)
    return {Kind::lost, fmt::format("{} closed the connection", peer)};
  return {Kind::lost, fmt::format("{}: {}", peer, code.message())};
}

TcpConnection::TcpConnection(Socket open_socket) : SocketConnection(peer_of(open_socket), std::move(open_socket)) {
  set_options(socket());
}

void TcpConnection::abort() noexcept {
  reset_on_close(socket());
  close();
}

void reset_on_close(Socket& socket) noexcept {
  boost::system::error_code ignored;
  socket.set_option(asio::socket_base::linger(true, 0), ignored);
}

awaitable<size_t> TcpConnection::peek(std::span<std::byte> buffer) {
  boost::system::error_code code;
  const size_t n =
      co_await socket().async_receive(asio::buffer(buffer.data(), buffer.size()), asio::socket_base::message_peek,
                                      asio::redirect_error(asio::use_awaitable, code));
  if (code == asio::error::eof) co_return 0;
  if (code) throw connection_error(peer(), code, is_closed());
  co_return n;
}

awaitable<std::unique_ptr<TcpConnection>> connect_tcp(Endpoint endpoint, Duration timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  const Executor executor = co_await asio::this_coro::executor;
  const auto addresses = co_await resolve(endpoint, timeout);
  boost::system::error_code last = asio::error::timed_out;
  for (const auto& address : addresses) {
    struct Attempt {
      explicit Attempt(const Executor& e) : socket(e), timer(e) {}
      Socket socket;
      asio::steady_timer timer;
    };
    // Shared with the timer's handler, which may run after the attempt has ended.
    const auto attempt = std::make_shared<Attempt>(executor);
    attempt->timer.expires_at(until);
    attempt->timer.async_wait([attempt](const boost::system::error_code& code) {
      boost::system::error_code ignored;
      if (!code) attempt->socket.close(ignored);
    });
    boost::system::error_code code;
    co_await attempt->socket.async_connect(address, asio::redirect_error(asio::use_awaitable, code));
    attempt->timer.cancel();
    if (!code && attempt->socket.is_open()) co_return std::make_unique<TcpConnection>(std::move(attempt->socket));
    last = std::chrono::steady_clock::now() >= until ? asio::error::timed_out : code;
    if (last == asio::error::timed_out) break;
  }
  if (last == asio::error::timed_out)
    throw ConnectionError(ConnectionError::Kind::timed_out,
                          fmt::format("{}: no connection within {:.1f} s", endpoint.text(),
                                      std::chrono::duration<double>(timeout).count()));
  throw connection_error(endpoint.text(), last, false);
}

}  // namespace caravan::net
