// A row of stages that hold the whole model, and the batches under way there.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cluster/membership.h"
#include "engine/pipeline.h"
#include "stage/stage.h"

namespace caravan::cluster {

// How long a batch may take that is predicted to take so long, before its stage counts as failed: that, and patience or
// ten times as long, whichever is longer.
inline std::chrono::duration<double> longest_wait(double predicted_seconds, std::chrono::milliseconds patience) {
  constexpr double kOverdueFactor = 10;
  const std::chrono::duration<double> predicted(predicted_seconds);
  return predicted + std::max<std::chrono::duration<double>>(patience, kOverdueFactor * predicted);
}

// A stage of a replica.
struct ReplicaPart {
  std::string device;
  stage::Slice slice;
  uint64_t held_bytes = 0;                  // on the device
  Membership::Member member;                // keeps the connection
  std::unique_ptr<stage::OutputSink> sink;  // of the stage, which is destroyed before
  std::unique_ptr<stage::Stage> stage;
  stage::DirectStage* direct = nullptr;  // the stage, if it is on a backend
  bool hands_on = false;                 // its hidden rows go straight to the next part's backend
  double predicted_per_row = 0;          // seconds; 0: not known
  double seconds_per_row = 0;            // under the replica's mutex; running mean; 0: nothing was computed yet
  std::shared_ptr<engine::StageCounters> counters = std::make_shared<engine::StageCounters>();
};

// The stages of a replica and the batches under way there. Stages are destroyed first to last: one that still delivers
// finds the next alive.
struct Replica {
  // A batch under way.
  struct Flight {
    std::shared_ptr<const stage::Batch> batch;
    size_t stage = 0;  // that computes it, or hands it on to who does
    std::chrono::steady_clock::time_point since;
    std::vector<double> stage_seconds;  // of each part, as far as they are done
  };
  ~Replica() {
    for (ReplicaPart& part : parts) part.stage.reset();
  }

  // The part whose output comes to us when a step is started at this one.
  size_t end_of_row(size_t part) const {
    while (parts[part].hands_on) ++part;
    return part;
  }

  uint64_t epoch = 0;  // of its stages; the engine knows it by this
  double speed = 0;    // engine::ReplicaSummary::speed
  std::vector<engine::StageSummary> summary;
  std::vector<ReplicaPart> parts;
  std::mutex mutex;
  std::map<uint64_t, Flight> in_flight;  // under mutex; by ticket
  bool retired = false;                  // its results no longer count; under a mutex of the pipeline
};

}  // namespace caravan::cluster
