// Where the stage before one, on another backend, delivers: known by a key that the server gave to both.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "remote/channel.h"

namespace caravan::remote {

// A secret for a route: kRouteKeyBytes random bytes.
std::string make_route_key();

// One route into a stage for one session and epoch; one peer may use it. Shared by the stage and the peer's connection,
// which end in any order, hence shared_ptr. Thread-safe.
class Inlet {
 public:
  // The stage. Called with the inlet's lock held: must not call back.
  class Receiver {
   public:
    virtual ~Receiver() = default;
    // Throws ProtocolError or FormatError for a step that cannot be right.
    virtual void receive(const pb::Forward& header, std::vector<std::byte> payload) = 0;
    virtual void peer_lost(uint64_t session, uint64_t epoch, const std::string& reason) = 0;
    virtual uint64_t max_forward_bytes() const = 0;
  };

  Inlet(Receiver& receiver, uint32_t stage, uint64_t session, uint64_t epoch)
      : receiver_(&receiver), stage_(stage), session_(session), epoch_(epoch) {}

  // Gives the route to a peer that knew the key. Throws ProtocolError when it names another stage, session or epoch, or
  // the route is taken.
  void attach(const pb::Attach& message, std::shared_ptr<Channel> peer);
  // A step from the peer. False: it is of another session or epoch, or the stage has gone on, and it was dropped.
  // Throws what the receiver throws, and ProtocolError for another stage.
  bool forward(const pb::Forward& header, std::vector<std::byte> payload);
  // The peer's connection has ended.
  void detach(const std::string& reason);
  // Longest payload of a Forward that the stage takes; 0 once it has gone on.
  uint64_t max_forward_bytes() const;

  // The stage takes no more over this route; the receiver is not called afterwards. Ends the peer's connection.
  void close(const std::string& reason);

 private:
  mutable std::mutex mutex_;
  Receiver* receiver_;  // under mutex_; null: closed
  const uint32_t stage_;
  const uint64_t session_, epoch_;
  bool taken_ = false;             // under mutex_
  std::shared_ptr<Channel> peer_;  // under mutex_
};

// The routes that a backend has open, by key. Thread-safe.
class InletTable {
 public:
  void add(const std::string& key, const std::shared_ptr<Inlet>& inlet);
  // The route with this key; null when there is none (any more).
  std::shared_ptr<Inlet> find(const std::string& key) const;

 private:
  mutable std::mutex mutex_;
  // By the key's hash: how long a look-up takes says nothing about a key.
  std::map<Digest, std::weak_ptr<Inlet>> inlets_;  // under mutex_
};

}  // namespace caravan::remote
