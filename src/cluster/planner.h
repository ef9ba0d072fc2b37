// Where the layers go: from those who are there, what they have and how fast they are, to a placement. Knows nothing of
// the plan in use but what a Situation says of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cluster/hop_map.h"
#include "cluster/membership.h"
#include "device/device.h"
#include "gguf/reader.h"
#include "models/arch.h"
#include "models/work.h"
#include "plan/placement.h"
#include "stage/profile.h"
#include "stage/stage.h"

namespace caravan::cluster {

struct PlannerOptions {
  // Types, sizes and slots of the cache; n_blocks is chosen by placement.
  stage::CacheConfig cache;
  uint32_t n_ctx = 0;  // 0: the largest that fits
  std::optional<uint32_t> n_gpu_layers;
  std::vector<double> tensor_split;  // by configured name
  uint64_t local_memory = 0;         // bytes the server's own stages may take; 0: no local stages beside backends
  std::optional<plan::Goal> goal;    // what layers are placed for, where speeds are known; none: to fill memory alike
};

// Used by one thread at a time.
class Planner {
 public:
  // A model as it is planned for; all of it outlives the planner.
  struct Subject {
    const gguf::Model& model;
    const gguf::Metadata& metadata;  // the hyperparameters' part
    const models::Arch& arch;
    const models::Hyperparameters& hp;
  };
  enum class Machines { local_only, backends };
  // device: this machine's, for stages of its own; outlives the planner.
  Planner(Subject subject, device::Device& device, PlannerOptions options, Machines machines);

  // What a plan is made from, copied: who is there and what is in use may change while it is made.
  struct Situation {
    struct Held {
      std::shared_ptr<const Membership::Connection> connection;
      uint64_t bytes;
    };
    std::vector<Membership::Member> members;
    std::set<std::string> avoided;  // devices that failed lately, by name
    std::string numeric_class;      // of the last plan; empty: none
    std::vector<uint64_t> epochs;   // of the replicas in use
    uint32_t n_ctx = 0;             // of these
    std::vector<Held> held;         // by them on backends
    bool relays = false;            // hidden rows go through this process even where backends reach each other
    bool hops_failed = false;       // between backends that stand, since the last plan
  };

  // Where a plan would put the model.
  struct Candidate {
    plan::Placement placement;
    std::vector<plan::DeviceOffer> offers;
    std::vector<Membership::Member> members;  // parallel to offers; without a backend: this machine
    std::map<size_t, std::string> left_out;   // why offers are not used
    std::set<std::string> avoided;            // devices that failed lately, by name
    std::map<size_t, std::string> relayed;    // why, by stage: InputPath::relayed though nobody asked for it

    // Why it cannot be used any more; empty: it can.
    std::string why_broken() const;
  };

  // Whom a plan may use: everybody but those that leave; or also not who computes in another numeric class, or failed
  // lately.
  enum class Choice { reliable, any_class, anybody };
  static bool is_avoided(const Situation& situation, const Membership::Member& member, Choice choice);

  // The best that the model fits, going no further than the last choice. What the plan in use holds counts as free.
  // Asks backends for their memory, and has them connect to each other, and waits: those who reach the next stage's
  // hand hidden rows on by themselves (InputPath::direct). Throws ResourceError with need and have.
  Candidate choose(const Situation& situation, Choice last);

 private:
  plan::PlacementRequest placement_request() const;
  Candidate choose_from(const Situation& situation, Choice choice);
  void place(const plan::PlacementRequest& request, Candidate& candidate, const HopTable& hops);
  const stage::DeviceProfile& local_profile();

  const Subject subject_;
  device::Device& device_;
  const PlannerOptions options_;
  const Machines machines_;
  const models::ModelWork work_;
  const std::vector<uint32_t> layer_kinds_;
  stage::DeviceProfile local_profile_;  // of this machine; empty until it is needed
  HopMap hops_;
};

}  // namespace caravan::cluster
