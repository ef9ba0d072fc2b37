// What stages have done, counted for metrics.
#pragma once

#include <cstdint>
#include <string>

#include "stage/stage.h"

namespace caravan::remote {

// Sums since a stage, or the backend, began.
struct Activity {
  uint64_t n_tickets = 0;  // batches computed
  double compute_seconds = 0;
  uint64_t bytes_in = 0, bytes_out = 0;  // of batches, hidden rows and outputs

  Activity& operator+=(const Activity& other) {
    n_tickets += other.n_tickets;
    compute_seconds += other.compute_seconds;
    bytes_in += other.bytes_in;
    bytes_out += other.bytes_out;
    return *this;
  }
};

// One stage of a peer, as of now.
struct StageStatus {
  std::string peer;                         // "10.0.0.5:4711"
  uint32_t stage = 0;                       // its number there
  uint32_t layer_begin = 0, layer_end = 0;  // 0, 0 until it is loaded
  stage::MemoryNeed held;                   // 0 until it is loaded
  uint64_t n_queued = 0;                    // batches that came and are not delivered
  Activity activity;
};

}  // namespace caravan::remote
