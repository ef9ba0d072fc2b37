#include "remote/inlet.h"

#include <fmt/format.h>
#include <openssl/rand.h>

#include "base/error.h"

namespace caravan::remote {

std::string make_route_key() {
  std::string key(kRouteKeyBytes, '\0');
  CARAVAN_ASSERT(RAND_bytes(reinterpret_cast<unsigned char*>(key.data()), static_cast<int>(key.size())) == 1,
                 "OpenSSL's generator is seeded");
  return key;
}

void Inlet::attach(const pb::Attach& message, std::shared_ptr<Channel> peer) {
  const std::lock_guard lock(mutex_);
  if (receiver_ == nullptr) throw ProtocolError("Attach: the route is closed");
  if (message.stage() != stage_)
    throw ProtocolError(fmt::format("Attach: the route leads to stage {}, not {}", stage_, message.stage()));
  if (message.session() != session_ || message.epoch() != epoch_)
    throw ProtocolError(fmt::format("Attach: the route is of another session or epoch than {:x}, {}", message.session(),
                                    message.epoch()));
  if (taken_) throw ProtocolError("Attach: the route is taken");
  taken_ = true;
  peer_ = std::move(peer);
}

bool Inlet::forward(const pb::Forward& header, std::vector<std::byte> payload) {
  const std::lock_guard lock(mutex_);
  if (receiver_ == nullptr) return false;
  if (header.stage() != stage_)
    throw ProtocolError(fmt::format("Forward: the route leads to stage {}, not {}", stage_, header.stage()));
  if (header.fence().session() != session_ || header.fence().epoch() != epoch_) return false;
  receiver_->receive(header, std::move(payload));
  return true;
}

void Inlet::detach(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  peer_.reset();
  if (receiver_ != nullptr) receiver_->peer_lost(session_, epoch_, reason);
}

uint64_t Inlet::max_forward_bytes() const {
  const std::lock_guard lock(mutex_);
  return receiver_ != nullptr ? receiver_->max_forward_bytes() : 0;
}

void Inlet::close(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  receiver_ = nullptr;
  if (peer_) peer_->close(reason);
  peer_.reset();
}

void InletTable::add(const std::string& key, const std::shared_ptr<Inlet>& inlet) {
  const Digest digest = sha256(std::as_bytes(std::span(key)));
  const std::lock_guard lock(mutex_);
  std::erase_if(inlets_, [](const auto& entry) { return entry.second.expired(); });
  inlets_[digest] = inlet;
}

std::shared_ptr<Inlet> InletTable::find(const std::string& key) const {
  const Digest digest = sha256(std::as_bytes(std::span(key)));
  const std::lock_guard lock(mutex_);
  const auto found = inlets_.find(digest);
  return found != inlets_.end() ? found->second.lock() : nullptr;
}

}  // namespace caravan::remote
