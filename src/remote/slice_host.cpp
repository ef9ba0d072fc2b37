#include "remote/slice_host.h"

#include "base/error.h"
#include "models/registry.h"
#include "stage/layer_sample.h"

namespace caravan::remote {

namespace {

struct LoadedWeights : ResidentWeights {
  explicit LoadedWeights(std::shared_ptr<const stage::LoadedSlice> s) : slice(std::move(s)) {}
  std::shared_ptr<const stage::LoadedSlice> slice;
};

class DeviceSliceLoad : public SliceLoad {
 public:
  DeviceSliceLoad(device::Device& device, const stage::LoadRequest& request) : loader_(device, request) {}
  std::shared_ptr<const ResidentWeights> run(std::span<weights::WeightSource* const> sources,
                                             const stage::Stage::ProgressFunction& on_progress) override {
    return std::make_shared<LoadedWeights>(loader_.run(sources, on_progress));
  }

 private:
  stage::SliceLoader loader_;
};

}  // namespace

DeviceSliceHost::DeviceSliceHost(std::vector<std::unique_ptr<device::Device>> devices, std::chrono::milliseconds poll)
    : devices_(std::move(devices)), poll_(poll) {
  CARAVAN_ASSERT(!devices_.empty(), "a backend has at least one device");
}

std::vector<device::DeviceInfo> DeviceSliceHost::devices() const {
  std::vector<device::DeviceInfo> infos;
  for (const auto& device : devices_) infos.push_back(device->info());
  return infos;
}

stage::MemoryNeed DeviceSliceHost::need(size_t device, const stage::LoadRequest& request) const {
  const models::Arch& arch = models::find_arch(request.hyperparameters);
  const models::Hyperparameters hp = arch.read(request.hyperparameters);
  return stage::memory_need(arch, hp, models::tensor_map(request.manifest), request.slice, request.cache,
                            *devices_.at(device));
}

std::unique_ptr<SliceLoad> DeviceSliceHost::begin_load(size_t device, const stage::LoadRequest& request) {
  return std::make_unique<DeviceSliceLoad>(*devices_.at(device), request);
}

ReadyStage DeviceSliceHost::make_stage(size_t device, const stage::LoadRequest& request,
                                       std::shared_ptr<const ResidentWeights> weights) {
  const auto& slice = static_cast<const LoadedWeights&>(*weights).slice;
  auto stage = std::make_unique<stage::LocalStage>(*devices_.at(device), poll_);
  stage->use(slice, request.cache);
  ReadyStage ready;
  ready.limits.max_rows = request.cache.max_rows;
  ready.limits.max_outputs = request.cache.max_outputs;
  ready.limits.max_slots = request.cache.max_slots;
  ready.limits.n_vocab = slice->hyperparameters().n_vocab;
  ready.limits.block_tokens = request.cache.block_tokens;
  ready.limits.n_blocks = request.cache.n_blocks;
  ready.n_embd = slice->hyperparameters().n_embd;
  ready.stage = std::move(stage);
  return ready;
}

void DeviceSliceHost::measure(size_t device, std::span<const tensor::DType> types, uint64_t most_bytes,
                              stage::DeviceProfile& profile) {
  stage::measure_profile(*devices_.at(device), types, most_bytes, profile);
}

stage::LayerTimes DeviceSliceHost::measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) {
  return stage::measure_layer(*devices_.at(device), sample, most_bytes);
}

}  // namespace caravan::remote
