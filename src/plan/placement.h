// Placement: which device holds which layers, how often the model is held, and how much context fits. Pure functions of
// sizes; knows no network.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan/cost_model.h"
#include "stage/loaded_slice.h"
#include "stage/stage.h"

namespace caravan::plan {

// A device that may take layers, in the order in which activations pass through them.
struct DeviceOffer {
  std::string name;          // "10.0.0.2:50052" or "local"
  uint64_t memory_free = 0;  // bytes for weights, KV cache and scratch together
  bool local = false;        // the server's own processor: used for what the backends may not or cannot take
};

// What the model needs and what the user asked for.
struct PlacementRequest {
  uint32_t n_layer = 0;
  uint32_t n_ctx_train = 0;
  // For a cache of exactly one block in each group and the final numbers of rows and slots: KV bytes scale from here.
  stage::LayerNeeds needs;
  // Per cache group of the model: the layers in it, and its window (0: full; nullopt: no cache).
  struct Group {
    std::vector<uint32_t> layers;
    std::optional<uint32_t> window;
  };
  std::vector<Group> groups;
  // What is fixed already: types, block_tokens, max_slots, max_rows, max_outputs; n_blocks is chosen here.
  stage::CacheConfig cache;

  uint32_t n_ctx = 0;                    // 0: the largest that fits, at least 4096 (or what the model was trained for)
  std::optional<uint32_t> n_gpu_layers;  // -ngl: most layers on backends; unset: as many as fit
  std::vector<double> tensor_split;      // shares of the backends' layers, in order; empty: by free memory
};

// How the hidden rows come to a stage: straight from the machine of the stage before, or through the server.
enum class InputPath : uint8_t { server, direct, relayed };
std::string_view input_name(InputPath input);

struct PlacedStage {
  size_t device = 0;   // index into the offers
  size_t replica = 0;  // of the model: each has all layers, and a cache of n_blocks
  stage::Slice slice;
  stage::MemoryNeed need;
  InputPath input = InputPath::server;  // set by who has tried: relayed where it would better be direct
  double row_seconds = 0;               // predicted for a step of one row; 0: not known
};

// How fast the devices are, and what the plan is chosen for; nullopt: as without speeds, but with a prediction. The
// model's devices are the offers.
struct Speed {
  const CostModel& model;
  std::optional<Goal> goal = Goal::automatic;
};

struct Placement {
  std::vector<PlacedStage> stages;  // replica by replica, in the order of layers
  stage::CacheConfig cache;         // with n_blocks
  uint32_t n_ctx = 0;
  std::optional<Prediction> prediction;  // where speeds are known
  std::vector<double> replica_speeds;    // where there are several: Replica::speed of each

  size_t n_replicas() const { return stages.empty() ? 0 : stages.back().replica + 1; }
  std::span<const PlacedStage> replica(size_t index) const;
};

// Places all layers, contiguous per device. The context is settled first: what is asked for, or the largest that fits.
// Without tensor_split and speed every device, in the order of offers, is filled to the same share of its free memory,
// as far as whole layers allow; where speeds are known, backends are ordered, filled and left out for the goal. Local
// offers come in only as n_gpu_layers demands, where there is no other, or where the others do not suffice.
// A model that backends hold alone, and without tensor_split, is placed several times where that scores higher for the
// goal (never for latency, nor with one slot); a context that was not asked for may become shorter for it if the goal
// is throughput, down to 4096. Throws ResourceError with a table of need and have per device when the model does not
// fit, RequestError for a tensor_split that does not match the offers.
Placement place(const PlacementRequest& request, const std::vector<DeviceOffer>& offers,
                const std::optional<Speed>& speed = std::nullopt);

// Why each device that has no stage in the placement was left out, by its index in offers.
std::map<size_t, std::string> left_out(const PlacementRequest& request, const std::vector<DeviceOffer>& offers,
                                       const Placement& placement);

// Blocks per group for sequences of n_ctx tokens in all: what place() chooses.
std::vector<uint32_t> blocks_for_context(const PlacementRequest& request, uint32_t n_ctx);

// The table that `caravan server` logs: device, layers, input, weights, KV cache, scratch, free; then what is left out
// and why, and the predicted speeds where there are any.
std::string describe(const Placement& placement, const std::vector<DeviceOffer>& offers,
                     const std::map<size_t, std::string>& left_out);

}  // namespace caravan::plan
