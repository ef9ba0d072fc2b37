// Host and port as users write them, and the addresses they stand for.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "net/io.h"

namespace caravan::net {

// A host name or address, and a port (0: any free one, for listening).
struct Endpoint {
  std::string host;
  uint16_t port = 0;
  // "host:port"; "[::1]:80" for IPv6.
  std::string text() const;
  bool operator==(const Endpoint&) const = default;
};

// Reads "host:port", "[IPv6]:port" or, with a default port, "host". Throws RequestError that quotes the text and says
// what is expected.
Endpoint parse_endpoint(std::string_view text, std::optional<uint16_t> default_port = std::nullopt);

// All addresses of a host name, without blocking a thread of ours. Throws ConnectionError (unresolved, timed_out).
awaitable<std::vector<asio::ip::tcp::endpoint>> resolve(Endpoint endpoint, Duration timeout);

// True for 127.0.0.0/8, ::1 and "localhost".
bool is_loopback(const Endpoint& endpoint);

}  // namespace caravan::net
