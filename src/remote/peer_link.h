// One backend's connection to another: a stage hands its hidden rows to the next one over it. Also how a backend finds
// out whether it reaches another one.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stop_token>
#include <string>

#include "net/io.h"
#include "remote/backend_link.h"
#include "stage/stage.h"

namespace caravan::remote {

// How this backend connects to others.
struct PeerOptions {
  std::string token;  // that of all links
  std::string name;   // of this backend, for the other's log
  std::chrono::milliseconds timeout{2000};
  std::chrono::milliseconds heartbeat_interval{1000};
  std::chrono::milliseconds heartbeat_timeout{5000};
};

// Connects to the backend at endpoint ("host:port") as a peer; blocks. expected_id: who must be found there.
// Throws Error (see BackendLink::connect), RequestError for an endpoint that is none, Error soon after stop is
// requested.
std::shared_ptr<BackendLink> connect_peer(net::IoThreads& io, const std::string& endpoint,
                                          const std::string& expected_id, const PeerOptions& options,
                                          const std::stop_token& stop = {});

// Connects to a backend and measures the round trip of a small message; blocks, for options.timeout at most.
// Throws as connect_peer(), and Error when no answer comes or stop is requested, soon after.
std::chrono::microseconds probe_peer(net::IoThreads& io, const std::string& endpoint, const std::string& expected_id,
                                     const PeerOptions& options, const std::stop_token& stop);

// The way from a stage to the next one, for one session and epoch.
class PeerLink {
 public:
  // Connects to the backend of the next stage and attaches to the route that has the key; blocks. on_lost is called at
  // most once, from an I/O thread, when the link ends later other than by the destructor. Throws Error naming the
  // backend and the cause, or soon after stop is requested.
  static std::unique_ptr<PeerLink> attach(net::IoThreads& io, const stage::PeerRoute& route, uint64_t session,
                                          uint64_t epoch, const PeerOptions& options, const std::stop_token& stop,
                                          std::function<void(const std::string& reason)> on_lost);
  // Closes.
  ~PeerLink();
  PeerLink(const PeerLink&) = delete;
  PeerLink& operator=(const PeerLink&) = delete;

  // Queues one step for the next stage; never blocks, from any thread. What cannot be delivered is lost with the link.
  //   batch: as encode_batch() made it;  hidden: n_rows x n_embd
  void forward(const stage::Fence& fence, std::span<const uint32_t> compute_us, std::span<const std::byte> batch,
               std::span<const float> hidden);
  // The mean round trip of heartbeats; 0: none yet.
  std::chrono::microseconds mean_rtt() const { return link_->traffic().mean_rtt; }

 private:
  class Answers;
  PeerLink(std::shared_ptr<BackendLink> link, uint32_t stage) : link_(std::move(link)), stage_(stage) {}
  const std::shared_ptr<BackendLink> link_;
  const uint32_t stage_;  // the next stage's number at its backend
};

}  // namespace caravan::remote
