// From a candidate to replicas that compute: reserves memory, has all stages load at the same time, and joins them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "cluster/membership.h"
#include "cluster/planner.h"
#include "cluster/replica.h"
#include "device/device.h"
#include "remote/codec.h"
#include "stage/local_stage.h"
#include "weights/hash_memory.h"

namespace caravan::cluster {

// A plan that is loaded, but for what is in use already.
struct LoadTask {
  Planner::Candidate candidate;
  // Per replica of the candidate: the epoch of one in use that is the same and goes on; 0, or none: it is loaded.
  std::vector<uint64_t> kept;
  std::atomic<bool> cancelled{false};  // from any thread: the load ends soon, with an Error
  // Set by load(), also where it throws.
  std::vector<std::unique_ptr<Replica>> replicas;  // null: kept
  std::string device;                              // that was being loaded
};

// Those of members that may have weights which one of them is to load, and are likely to answer: neither those that
// leave nor the avoided ones, which are given by name.
std::vector<Membership::Member> weight_givers(std::vector<Membership::Member> members,
                                              const Membership::Member& receiver, const std::set<std::string>& avoided);

struct PlanLoaderOptions {
  uint64_t session = 0;  // names this server's use of the stages
  int n_hash_threads = 1;
  std::filesystem::path hash_folder;                     // where hashes of models are remembered; empty: nowhere
  std::chrono::milliseconds poll = stage::kDefaultPoll;  // of the server's own stages, see stage::LocalStage
};

// Used by one thread at a time.
class PlanLoader {
 public:
  // Makes what takes the outputs of one stage of a replica.
  using MakeSink = std::function<std::unique_ptr<stage::OutputSink>(Replica& replica, size_t stage)>;
  // device: this machine's, for stages of its own; outlives the loader and what it loads.
  PlanLoader(Planner::Subject subject, device::Device& device, PlanLoaderOptions options, MakeSink make_sink);

  // Loads and opens the replicas of the task's candidate that are not kept. membership: who may have weights to give;
  // null where no stage is on a backend. Throws ResourceError (memory was taken meanwhile), remote::StalledError (a
  // backend stands still), or what else loading or opening a stage threw.
  void load(LoadTask& task, const Membership* membership);

 private:
  std::unique_ptr<Replica> make_replica(const Planner::Candidate& candidate, size_t index);
  void open_stages(LoadTask& task, Replica& replica);
  stage::LoadRequest load_request(const plan::PlacedStage& placed, const plan::Placement& placement,
                                  const std::string& name);
  void load_stages(LoadTask& task, const std::vector<ReplicaPart*>& parts, std::vector<stage::LoadRequest> requests);
  void load_stage(stage::LoadRequest request, stage::Stage& stage, const std::function<void(uint64_t)>& on_progress);
  weights::Manifest manifest_of(const stage::Slice& slice, bool hashed);

  const Planner::Subject subject_;
  device::Device& device_;
  const PlanLoaderOptions options_;
  const MakeSink make_sink_;
  weights::ModelHashes hashes_;  // of the model's tensors, computed when a backend first needs them
  std::mutex rehash_mutex_;      // held while they are computed again
  uint64_t epoch_ = 0;           // of the replica that was opened last
};

}  // namespace caravan::cluster
