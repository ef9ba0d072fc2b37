#include "remote/connection_quota.h"

#include <fmt/format.h>

#include <boost/asio/ip/address.hpp>

namespace caravan::remote {

std::string quota_address(std::string_view peer) {
  std::string_view host = peer.substr(0, peer.rfind(':'));
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  boost::system::error_code code;
  const auto address = boost::asio::ip::make_address(std::string(host), code);
  if (code) return std::string(host);
  if (address.is_v4()) return address.to_string();
  const auto bytes = address.to_v6().to_bytes();
  if (address.to_v6().is_v4_mapped()) return fmt::format("{}.{}.{}.{}", bytes[12], bytes[13], bytes[14], bytes[15]);
  std::string prefix;
  for (size_t i = 0; i < 8; ++i) prefix += fmt::format("{:02x}", bytes[i]);
  return prefix + "/64";
}

std::string ConnectionQuota::begin(const std::string& address) {
  const std::lock_guard lock(mutex_);
  if (all_.served >= limits_.max_connections)
    return fmt::format("{} connections are open, the most that are accepted", all_.served);
  if (all_.handshakes >= limits_.max_handshakes)
    return fmt::format("{} peers are shaking hands, the most that may at a time", all_.handshakes);
  const auto found = by_address_.find(address);
  if (found != by_address_.end() && found->second.handshakes >= limits_.max_handshakes_per_address)
    return fmt::format("{} peers at {} are shaking hands, the most that may at a time", found->second.handshakes,
                       address);
  if (found != by_address_.end() && found->second.served >= limits_.max_connections_per_address)
    return fmt::format("{} connections from {} are open, the most that are accepted", found->second.served, address);
  ++all_.handshakes;
  ++by_address_[address].handshakes;
  return {};
}

std::string ConnectionQuota::admit(const std::string& address) {
  const std::lock_guard lock(mutex_);
  Count& count = by_address_[address];
  if (all_.served >= limits_.max_connections || count.served >= limits_.max_connections_per_address)
    return fmt::format("{} connections are open, {} of them from {}: no more are accepted", all_.served, count.served,
                       address);
  --all_.handshakes;
  --count.handshakes;
  ++all_.served;
  ++count.served;
  return {};
}

void ConnectionQuota::end(const std::string& address, State state) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(address);
  for (Count* count : {&all_, &found->second}) --(state == State::served ? count->served : count->handshakes);
  if (found->second.handshakes == 0 && found->second.served == 0) by_address_.erase(found);
}

bool ConnectionQuota::is_crowded() const {
  const std::lock_guard lock(mutex_);
  return all_.handshakes > limits_.max_handshakes / 2;
}

}  // namespace caravan::remote
