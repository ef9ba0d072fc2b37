// How long stages take on devices whose speed is known, and how to cut a model for speed. Pure functions, tested on
// simulated clusters.
//
// A step of r rows takes on a stage as long as its layers were measured to take, and a fixed cost. Layers that a device
// did not measure take, per type of their matrices, the longer of streaming the weights once and multiplying them with
// r rows; then the keys and values that the rows attend to are read. Hidden rows travel between stages in the time the
// link needs. Prompts flow through the stages in chunks, and many sequences are divided into as many groups as there
// are stages, so that all stages work at the same time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "models/work.h"
#include "stage/profile.h"

namespace caravan::plan {

// A device's run of layers.
struct StageSpan {
  size_t device = 0;  // index into the devices
  uint32_t begin = 0, end = 0;
  bool operator==(const StageSpan&) const = default;
};

// Tokens per second that a placement is expected to reach.
struct Prediction {
  double prompt = 0;      // a prompt of kTypicalPrompt tokens
  double generation = 0;  // one sequence
  double streams = 0;     // all sequences together, when as many run as there are slots
};

// What a plan is chosen for: one request that runs alone, as many as there are slots, or both alike.
enum class Goal : uint8_t { latency, throughput, automatic };

// The request that speeds are weighed with: so many tokens in, so many out.
inline constexpr uint32_t kTypicalPrompt = 512, kTypicalAnswer = 128;

class CostModel {
 public:
  struct Input {
    models::ModelWork work;
    std::vector<uint32_t> layer_kinds;   // per layer, see DeviceProfile::layers; none: from work alone
    std::vector<double> layer_kv_bytes;  // per layer: of one token
    uint32_t n_embd = 0;
    uint32_t n_slots = 1;
    double context = kTypicalPrompt;  // tokens that a row attends to
    std::vector<stage::DeviceProfile> devices;
    std::vector<stage::LinkProfile> links;  // per device
    // Seconds from each device straight to each other; nullopt: hidden rows go through the server. Empty: all reach
    // each other, in the time of the longer way to the server.
    std::vector<std::vector<std::optional<double>>> hops;
  };
  explicit CostModel(Input input);

  size_t n_devices() const { return input_.devices.size(); }
  uint32_t n_layer() const { return static_cast<uint32_t>(input_.work.layers.size()); }
  uint32_t n_slots() const { return input_.n_slots; }
  // The same for another number of slots.
  CostModel with_slots(uint32_t n_slots) const {
    CostModel other = *this;
    other.input_.n_slots = n_slots;
    return other;
  }

  // How long runs of layers take on one device for a number of rows. Valid as long as the model.
  class StageTimes {
   public:
    double operator()(uint32_t begin, uint32_t end) const {
      return step_ + (*sums_)[end] - (*sums_)[begin] + (end + 1 == sums_->size() ? output_ : 0);
    }

   private:
    friend class CostModel;
    const std::vector<double>* sums_ = nullptr;  // prefix sums over layers
    double step_ = 0, output_ = 0;
  };
  // n_outputs: rows that go through the output matrix, on the stage that holds the last layer.
  StageTimes stage_times(size_t device, uint32_t n_rows, uint32_t n_outputs) const;
  double stage_seconds(const StageSpan& stage, uint32_t n_rows, uint32_t n_outputs) const {
    return stage_times(stage.device, n_rows, n_outputs)(stage.begin, stage.end);
  }
  // Sending the hidden rows of a step from one device to another; nullopt: the server, to which no hidden rows go.
  double hop_seconds(std::optional<size_t> from, std::optional<size_t> to, uint32_t n_rows) const;

  // Stages cover all layers in order.
  Prediction predict(std::span<const StageSpan> stages) const;
  // The larger the better: tokens per second of typical requests.
  static double score(const Prediction& prediction, Goal goal);

 private:
  const std::vector<double>& layer_seconds(size_t device, uint32_t n_rows) const;
  double seconds(size_t device, const models::WorkByType& work, uint32_t n_rows) const;

  Input input_;
  // Prefix sums over layers, per device and number of rows, made when first asked for.
  mutable std::map<std::pair<size_t, uint32_t>, std::vector<double>> layer_seconds_;
};

// The stages with the best score found for layers [begin, end), each device at most once and left out where it would
// slow things down; fits says whether a device's memory holds a run of layers. The order of devices is chosen, too, but
// for `first`: stages that are fixed and come before. nullopt: nothing fits. Not thread-safe per model.
std::optional<std::vector<StageSpan>> fastest_stages(const CostModel& model, std::vector<StageSpan> first,
                                                     uint32_t begin, const std::vector<size_t>& devices,
                                                     const std::function<bool(const StageSpan&)>& fits, Goal goal);

}  // namespace caravan::plan
