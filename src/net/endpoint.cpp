#include "net/endpoint.h"

#include <fmt/format.h>

#include <boost/asio/redirect_error.hpp>
#include <charconv>

#include "base/error.h"
#include "net/connection.h"

namespace caravan::net {

namespace {

uint16_t parse_port(std::string_view text, std::string_view whole) {
  unsigned port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc() || end != text.data() + text.size() || port > 65535)
    throw RequestError(fmt::format("endpoint '{}': expected a port from 0 to 65535, found '{}'", whole, text));
  return static_cast<uint16_t>(port);
}

}  // namespace

std::string Endpoint::text() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port) : fmt::format("[{}]:{}", host, port);
}

Endpoint parse_endpoint(std::string_view text, std::optional<uint16_t> default_port) {
  std::string_view host = text, port;
  bool has_port = false;
  if (text.starts_with('[')) {
    const size_t close = text.find(']');
    if (close == std::string_view::npos)
      throw RequestError(fmt::format("endpoint '{}': expected ']' after the IPv6 address", text));
    host = text.substr(1, close - 1);
    const std::string_view rest = text.substr(close + 1);
    if (!rest.empty() && rest[0] != ':')
      throw RequestError(fmt::format("endpoint '{}': expected ':port' after ']', found '{}'", text, rest));
    has_port = !rest.empty();
    if (has_port) port = rest.substr(1);
  } else if (const size_t colon = text.find(':'); colon != std::string_view::npos) {
    if (text.find(':', colon + 1) != std::string_view::npos)
      throw RequestError(fmt::format("endpoint '{}': an IPv6 address is written in brackets, '[address]:port'", text));
    host = text.substr(0, colon);
    port = text.substr(colon + 1);
    has_port = true;
  }
  if (host.empty()) throw RequestError(fmt::format("endpoint '{}': expected host:port, found no host", text));
  if (host.find_first_of(" \t\r\n,/") != std::string_view::npos)
    throw RequestError(fmt::format("endpoint '{}': '{}' is not a host name or address", text, host));
  if (!has_port && !default_port)
    throw RequestError(fmt::format("endpoint '{}': expected host:port, found no port", text));
  return {std::string(host), has_port ? parse_port(port, text) : *default_port};
}

awaitable<std::vector<asio::ip::tcp::endpoint>> resolve(Endpoint endpoint, Duration timeout) {
  // The system's resolver cannot be interrupted, so the coroutine waits for a timer that the answer ends early.
  struct Answer {
    explicit Answer(const Executor& executor) : timer(executor), resolver(executor) {}
    asio::steady_timer timer;
    asio::ip::basic_resolver<asio::ip::tcp, Executor> resolver;
    bool done = false;
    boost::system::error_code code;
    std::vector<asio::ip::tcp::endpoint> addresses;
  };
  const Executor executor = co_await asio::this_coro::executor;
  const auto answer = std::make_shared<Answer>(executor);
  answer->timer.expires_after(timeout);
  answer->resolver.async_resolve(endpoint.host, std::to_string(endpoint.port),
                                 [answer](const boost::system::error_code& code, const auto& results) {
                                   answer->done = true;
                                   answer->code = code;
                                   for (const auto& result : results) answer->addresses.push_back(result.endpoint());
                                   answer->timer.cancel();
                                 });
  boost::system::error_code ignored;
  co_await answer->timer.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
  if (!answer->done)
    throw ConnectionError(ConnectionError::Kind::timed_out,
                          fmt::format("{}: the name '{}' was not resolved within {:.1f} s", endpoint.text(),
                                      endpoint.host, std::chrono::duration<double>(timeout).count()));
  if (answer->code || answer->addresses.empty())
    throw ConnectionError(
        ConnectionError::Kind::unresolved,
        fmt::format("{}: the name '{}' does not resolve ({})", endpoint.text(), endpoint.host, answer->code.message()));
  co_return std::move(answer->addresses);
}

bool is_loopback(const Endpoint& endpoint) {
  boost::system::error_code code;
  const auto address = asio::ip::make_address(endpoint.host, code);
  return code ? endpoint.host == "localhost" : address.is_loopback();
}

}  // namespace caravan::net
