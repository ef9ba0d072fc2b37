#include "net/listener.h"

#include <fmt/format.h>

#include <boost/asio/redirect_error.hpp>

#include "base/log.h"

namespace caravan::net {

Listener::Listener(IoThreads& io, const Endpoint& endpoint)
    : io_(io), executor_(io.next_executor()), acceptor_(executor_), endpoint_(endpoint) {
  const auto check = [&](const char* call, const boost::system::error_code& code) {
    if (code) throw SystemError(fmt::format("{} {}", call, endpoint.text()), code.value());
  };
  boost::system::error_code code;
  asio::ip::tcp::resolver resolver(executor_);
  const auto addresses =
      resolver.resolve(endpoint.host, std::to_string(endpoint.port), asio::ip::resolver_base::passive, code);
  if (code || addresses.empty())
    throw RequestError(
        fmt::format("cannot listen on {}: '{}' does not resolve ({})", endpoint.text(), endpoint.host, code.message()));
  const asio::ip::tcp::endpoint address = addresses.begin()->endpoint();
  acceptor_.open(address.protocol(), code);
  check("open a socket for", code);
  acceptor_.set_option(asio::socket_base::reuse_address(true), code);
  check("set SO_REUSEADDR for", code);
  acceptor_.bind(address, code);
  check("bind", code);
  acceptor_.listen(asio::socket_base::max_listen_connections, code);
  check("listen on", code);
  endpoint_.port = acceptor_.local_endpoint(code).port();
  check("name the port of", code);
}

awaitable<std::unique_ptr<TcpConnection>> Listener::accept() {
  while (acceptor_.is_open()) {
    boost::system::error_code code;
    Socket socket =
        co_await acceptor_.async_accept(io_.next_executor(), asio::redirect_error(asio::use_awaitable, code));
    if (!code) co_return std::make_unique<TcpConnection>(std::move(socket));
    if (!acceptor_.is_open()) break;
    if (code == asio::error::connection_aborted) continue;  // the peer left while it waited in the backlog
    spdlog::warn("accepting a connection on {}: {}; trying again", endpoint_.text(), code.message());
    co_await sleep_for(std::chrono::milliseconds(100));
  }
  co_return nullptr;
}

void Listener::close() noexcept {
  boost::system::error_code ignored;
  acceptor_.close(ignored);
}

}  // namespace caravan::net
