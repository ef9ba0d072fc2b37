// A backend as the cluster sees it: something that can be connected, offers memory, makes stages, and may be lost.
// remote_backend.h implements it over the wire; tests implement it in memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <vector>

#include "base/error.h"
#include "remote/activity.h"
#include "stage/profile.h"
#include "stage/stage.h"

namespace caravan::cluster {

// One established connection to a backend. Destroying it ends the connection; its stages are destroyed before.
class Backend {
 public:
  virtual ~Backend() = default;
  // "10.0.0.2:50052", as the user wrote it.
  virtual const std::string& name() const = 0;
  // The same for two connections exactly when they lead to the same process.
  virtual std::string id() const = 0;
  // Bytes that it can hold for us at the moment, once it has freed what it was told to free. May ask it and wait.
  virtual uint64_t memory_free() const = 0;
  virtual std::string numeric_class() const = 0;
  virtual std::unique_ptr<stage::Stage> make_stage() = 0;
  // What crossed the connection, and the round trips of heartbeats.
  virtual remote::LinkTraffic traffic() const { return {}; }
  // How fast it computes and the connection is, measured when it was connected; null: not known.
  struct Speeds {
    stage::DeviceProfile device;
    stage::LinkProfile link;
  };
  virtual const Speeds* speeds() const { return nullptr; }
  // Where other backends find this one (without stage and key); nullopt: nothing can come to it but from us.
  virtual std::optional<stage::PeerRoute> peer_address() const { return std::nullopt; }
  // Has this backend connect to another one, and waits: the round-trip time between the two. Throws Error saying why
  // that one cannot be reached from here.
  virtual std::chrono::microseconds probe(const stage::PeerRoute& other) const {
    throw Error(name() + " cannot connect to " + other.endpoint);
  }
  // Ends the connection, from any thread, without a call of BackendEvents::lost: whoever waits for an answer of the
  // backend or its stages, then or later, waits no more.
  virtual void close() {}
};

// What a connected backend may tell later, from any thread, perhaps while or after the Backend is destroyed.
struct BackendEvents {
  std::function<void(std::string reason)> lost;  // at most once: the connection has ended; reason names the backend
  std::function<void()> leaving;                 // it goes away soon, and serves until then
};

// Connects backends by name.
class BackendConnector {
 public:
  virtual ~BackendConnector() = default;
  // The addresses that a name stands for at the moment, each good for connect(). Throws Error that begins with the name
  // when it does not resolve, and soon when stop is requested.
  virtual std::vector<std::string> addresses(const std::string& name, const std::stop_token& stop) {
    (void)stop;
    return {name};
  }
  // Connects and greets, within timeout. Throws Error naming the backend and the cause: retried when it may be
  // temporary, NotSupportedError or RequestError (versions, tokens) when trying again is of no use; and soon when stop
  // is requested. From several threads at once.
  virtual std::unique_ptr<Backend> connect(const std::string& address, std::chrono::milliseconds timeout,
                                           BackendEvents events, std::stop_token stop) = 0;
};

}  // namespace caravan::cluster
