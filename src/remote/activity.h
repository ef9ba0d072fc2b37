// What stages and links do, counted for metrics.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "stage/stage.h"

namespace caravan::remote {

// Sums since a stage, or the backend, began.
struct Activity {
  uint64_t n_tickets = 0;  // batches computed
  double compute_seconds = 0;
  uint64_t bytes_in = 0, bytes_out = 0;  // of batches, hidden rows and outputs
  uint64_t n_failed = 0;                 // batches that ended with an error
  uint64_t n_hops_lost = 0;              // connections to the next stage or from the one before

  Activity& operator+=(const Activity& other) {
    n_tickets += other.n_tickets;
    compute_seconds += other.compute_seconds;
    bytes_in += other.bytes_in;
    bytes_out += other.bytes_out;
    n_failed += other.n_failed;
    n_hops_lost += other.n_hops_lost;
    return *this;
  }
};

// What crossed a link since it was connected, and how long heartbeats take.
struct LinkTraffic {
  std::chrono::microseconds rtt{0}, mean_rtt{0};  // the latest, and a running mean; 0: none yet
  uint64_t received_bytes = 0, sent_bytes = 0;
};

// Batches that came to a stage and are not computed.
struct StageQueue {
  uint32_t n_tickets = 0;
  uint64_t oldest_ticket = 0;
  std::chrono::milliseconds oldest_age{0};  // since it came
};

// One stage of a peer, as of now.
struct StageStatus {
  std::string peer;                         // "10.0.0.5:4711"
  uint32_t stage = 0;                       // its number there
  uint32_t layer_begin = 0, layer_end = 0;  // 0, 0 until it is loaded
  stage::MemoryNeed held;                   // 0 until it is loaded
  uint64_t n_queued = 0;                    // batches that came and are not delivered
  // Mean round trips, as the other side measured them to the server, and we to the next stage; 0: none yet.
  std::chrono::microseconds server_rtt{0}, next_rtt{0};
  Activity activity;
};

}  // namespace caravan::remote
