// What a backend service needs of its machine: devices that slices are loaded on. DeviceSliceHost is the real one;
// tests put their own in its place.
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "stage/loaded_slice.h"
#include "stage/local_stage.h"
#include "stage/profile.h"
#include "stage/stage.h"

namespace caravan::remote {

// Weights on a device, shared by all stages that use them. Destroying the last reference frees them.
class ResidentWeights {
 public:
  virtual ~ResidentWeights() = default;
};

// A load under way. One that threw may run again, and goes on where it was, unless the request itself was at fault.
class SliceLoad {
 public:
  virtual ~SliceLoad() = default;
  // Loads the weights; blocks. Throws as Stage::load() says.
  virtual std::shared_ptr<const ResidentWeights> run(std::span<weights::WeightSource* const> sources,
                                                     const stage::Stage::ProgressFunction& on_progress) = 0;
};

// A stage that is ready to be opened, and the numbers its messages are checked against.
struct ReadyStage {
  std::unique_ptr<stage::Stage> stage;
  stage::BatchLimits limits;
  uint32_t n_embd = 0;
};

class SliceHost {
 public:
  virtual ~SliceHost() = default;

  // The devices; memory_total is what this backend may use of each. Thread-safe, as everything here.
  virtual std::vector<device::DeviceInfo> devices() const = 0;
  // What a request would take. Throws FormatError or NotSupportedError for a request that cannot be loaded.
  virtual stage::MemoryNeed need(size_t device, const stage::LoadRequest& request) const = 0;
  // Allocates the weights, which are to be loaded. Throws as Stage::load() says.
  virtual std::unique_ptr<SliceLoad> begin_load(size_t device, const stage::LoadRequest& request) = 0;
  // A stage with its own KV cache over loaded weights.
  virtual ReadyStage make_stage(size_t device, const stage::LoadRequest& request,
                                std::shared_ptr<const ResidentWeights> weights) = 0;
  // Adds to profile the types it lacks, see stage::measure_profile().
  virtual void measure(size_t device, std::span<const tensor::DType> types, uint64_t most_bytes,
                       stage::DeviceProfile& profile) = 0;
  // As stage::measure_layer().
  virtual stage::LayerTimes measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) = 0;
};

// Slices on the devices of this machine.
class DeviceSliceHost : public SliceHost {
 public:
  // poll: of the stages, see stage::LocalStage.
  explicit DeviceSliceHost(std::vector<std::unique_ptr<device::Device>> devices,
                           std::chrono::milliseconds poll = stage::kDefaultPoll);

  std::vector<device::DeviceInfo> devices() const override;
  stage::MemoryNeed need(size_t device, const stage::LoadRequest& request) const override;
  std::unique_ptr<SliceLoad> begin_load(size_t device, const stage::LoadRequest& request) override;
  ReadyStage make_stage(size_t device, const stage::LoadRequest& request,
                        std::shared_ptr<const ResidentWeights> weights) override;
  void measure(size_t device, std::span<const tensor::DType> types, uint64_t most_bytes,
               stage::DeviceProfile& profile) override;
  stage::LayerTimes measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) override;

 private:
  std::vector<std::unique_ptr<device::Device>> devices_;
  const std::chrono::milliseconds poll_;
};

}  // namespace caravan::remote
