// How many connections a backend takes, in all and from one address, so that nobody keeps others out by opening many.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

namespace caravan::remote {

struct QuotaLimits {
  uint32_t max_connections = 64;  // past their hello
  uint32_t max_connections_per_address = 32;
  uint32_t max_handshakes = 64;  // before it
  uint32_t max_handshakes_per_address = 8;
};

// Whom a peer counts for: its IPv4 address, or the first 64 bits of its IPv6 address, of which one machine may have
// all. peer: "10.0.0.2:4711", "[2001:db8::1]:4711".
std::string quota_address(std::string_view peer);

// Thread-safe.
class ConnectionQuota {
 public:
  explicit ConnectionQuota(const QuotaLimits& limits) : limits_(limits) {}

  // A connection has come. Empty: it may shake hands; otherwise why not, and it does not count.
  std::string begin(const std::string& address);
  // Its hello was good. Empty: it is served; otherwise why not, and it still counts as shaking hands.
  std::string admit(const std::string& address);
  // It has ended.
  enum class State { shaking_hands, served };
  void end(const std::string& address, State state);

  // More than half of the handshakes that are possible are under way: those who dawdle get less time.
  bool is_crowded() const;

 private:
  struct Count {
    uint32_t handshakes = 0, served = 0;
  };
  const QuotaLimits limits_;
  mutable std::mutex mutex_;
  std::map<std::string, Count> by_address_;  // under mutex_; those with connections
  Count all_;                                // under mutex_
};

}  // namespace caravan::remote
