// A backend: accepts servers, loads slices for them, computes their batches. Specification: docs/protocol.md.
//
//   net::IoThreads io(2);
//   remote::DeviceSliceHost host(std::move(devices));
//   remote::BackendService service(io, host, {.endpoint = {"0.0.0.0", 50052}, .token = token});
//   ... service.stop();
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "net/connection.h"
#include "net/endpoint.h"
#include "remote/activity.h"
#include "remote/connection_quota.h"
#include "remote/local_weights.h"
#include "remote/slice_host.h"

namespace caravan::remote {

struct BackendOptions {
  net::Endpoint endpoint{"127.0.0.1", 50052};  // port 0: any free one
  std::string token;                           // empty: no TLS, anybody may connect
  std::string name;                            // for logs at the peer; empty: the host's name
  std::chrono::seconds keep_alive{300};        // unused weights stay that long
  std::chrono::milliseconds heartbeat_interval{1000};
  std::chrono::milliseconds heartbeat_timeout{5000};
  std::chrono::milliseconds handshake_timeout{5000};
  QuotaLimits quota;
  // Where weights are looked for before others are asked, and what these are given; null: nowhere. They outlive the
  // service.
  weights::ModelLibrary* library = nullptr;
  weights::ChunkCache* cache = nullptr;
  // How long a load waits to connect to another backend that may have weights; the server has everything.
  std::chrono::milliseconds others_timeout{1000};
  std::string advertise;  // host:port by which other backends reach this one; empty: as servers do
};

// What a service is doing at the moment, for logs and tests.
struct BackendStatus {
  uint32_t n_connections = 0;                       // past their hello
  uint32_t n_stages = 0;                            // reserved or loaded
  uint64_t n_accepted = 0;                          // since the start
  uint64_t n_refused = 0;                           // connections that did not get past the handshake
  uint64_t n_stale = 0;                             // frames of another session or epoch that were dropped
  size_t n_resident = 0;                            // sets of weights, used or kept
  std::vector<uint64_t> memory_free, memory_total;  // per device
  WeightOrigins origins;                            // of the weights loaded since the start
  uint64_t given_bytes = 0;                         // weights given to other backends since the start
  Activity activity;                                // of all stages since the start
  std::vector<StageStatus> stages;
};

class BackendService {
 public:
  // Listens from now on. io and host outlive the service. Throws SystemError (cannot bind), RequestError (bad host).
  BackendService(net::IoThreads& io, SliceHost& host, BackendOptions options);
  // Stops.
  ~BackendService();

  // Serves a connection that somebody else has accepted, as one without TLS whatever the token: for tests. Returns at
  // once.
  void serve(std::unique_ptr<net::Connection> connection);
  // With the port that was bound.
  const net::Endpoint& endpoint() const;
  BackendStatus status() const;
  // Tells every peer that this backend is about to leave, takes no more connections, and serves on until no peer has a
  // stage here, for at most timeout; then stops. Blocks; not from an I/O thread.
  void drain(std::chrono::milliseconds timeout);
  // Tells every peer that this backend stops, closes the connections and frees what they held. Blocks; idempotent; not
  // from an I/O thread.
  void stop();

  class State;

 private:
  std::shared_ptr<State> state_;  // shared with the coroutines that serve
};

}  // namespace caravan::remote
