// Two servers on the same two backends, over loopback, with memory limits of all sizes: whatever they plan at the same
// time, no backend ever holds more than it may.
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <random>
#include <thread>

#include "base/error.h"
#include "cluster/cluster_pipeline.h"
#include "cluster/remote_backend.h"
#include "device/cpu/cpu_device.h"
#include "remote/backend_service.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::cluster {
namespace {

// Counts what is really held, beside the backend's own books.
class CountingHost : public remote::SliceHost {
 public:
  CountingHost(remote::SliceHost& host, uint64_t limit) : host_(host), limit_(limit) {}
  std::vector<device::DeviceInfo> devices() const override { return host_.devices(); }
  stage::MemoryNeed need(size_t device, const stage::LoadRequest& request) const override {
    return host_.need(device, request);
  }
  std::unique_ptr<remote::SliceLoad> begin_load(size_t device, const stage::LoadRequest& request) override {
    auto held = hold(need(device, request).weights);
    return std::make_unique<CountedLoad>(host_.begin_load(device, request), std::move(held));
  }
  remote::ReadyStage make_stage(size_t device, const stage::LoadRequest& request,
                                std::shared_ptr<const remote::ResidentWeights> weights) override {
    const stage::MemoryNeed need = this->need(device, request);
    auto held = hold(need.kv_cache + need.scratch);
    remote::ReadyStage ready = host_.make_stage(device, request, std::move(weights));
    ready.stage = std::make_unique<HeldStage>(std::move(ready.stage), std::move(held));
    return ready;
  }
  void measure(size_t device, std::span<const tensor::DType> types, uint64_t most_bytes,
               stage::DeviceProfile& profile) override {
    host_.measure(device, types, most_bytes, profile);
  }
  stage::LayerTimes measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) override {
    return host_.measure_layer(device, sample, most_bytes);
  }
  bool exceeded() const { return exceeded_.load(); }

 private:
  struct CountedLoad : remote::SliceLoad {
    CountedLoad(std::unique_ptr<remote::SliceLoad> load, std::shared_ptr<void> bytes)
        : held(std::move(bytes)), inner(std::move(load)) {}
    std::shared_ptr<const remote::ResidentWeights> run(std::span<weights::WeightSource* const> sources,
                                                       const stage::Stage::ProgressFunction& on_progress) override {
      auto weights = inner->run(sources, on_progress);
      const auto* loaded = weights.get();
      return {loaded, [weights, bytes = held](const remote::ResidentWeights*) mutable {
                weights.reset();
                bytes.reset();
              }};
    }
    std::shared_ptr<void> held;
    std::unique_ptr<remote::SliceLoad> inner;
  };

  struct HeldStage : stage::Stage {
    HeldStage(std::unique_ptr<stage::Stage> stage, std::shared_ptr<void> bytes)
        : held(std::move(bytes)), inner(std::move(stage)) {}
    void load(const stage::LoadRequest&, std::span<weights::WeightSource* const>, const ProgressFunction&) override {}
    void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) override { inner->open(session, epoch, sink); }
    void enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch,
                 std::vector<float> input) override {
      inner->enqueue(fence, std::move(batch), std::move(input));
    }
    std::string numeric_class() const override { return inner->numeric_class(); }
    std::shared_ptr<void> held;
    std::unique_ptr<stage::Stage> inner;
  };

  std::shared_ptr<void> hold(uint64_t bytes) {
    if (held_bytes_.fetch_add(bytes) + bytes > limit_) exceeded_ = true;
    return {this, [bytes](void* self) { static_cast<CountingHost*>(self)->held_bytes_ -= bytes; }};
  }

  remote::SliceHost& host_;
  const uint64_t limit_;
  std::atomic<uint64_t> held_bytes_{0};
  std::atomic<bool> exceeded_{false};
};

struct LimitedBackend {
  LimitedBackend(net::IoThreads& io, uint64_t limit)
      : inner(devices(limit)), host(inner, limit), service(io, host, options()) {}
  static std::vector<std::unique_ptr<device::Device>> devices(uint64_t limit) {
    std::vector<std::unique_ptr<device::Device>> devices;
    devices.push_back(std::make_unique<device::cpu::CpuDevice>(1, select_isa(), limit));
    return devices;
  }
  static remote::BackendOptions options() {
    remote::BackendOptions options;
    options.endpoint = {"127.0.0.1", 0};
    return options;
  }
  remote::DeviceSliceHost inner;
  CountingHost host;
  remote::BackendService service;
};

TEST(SharedBackends, HoldNoMoreThanTheyMayWhateverTwoServersPlanAtOnce) {
  spdlog::set_level(spdlog::level::off);
  const testing::TemporaryDirectory folder;
  testing::TinyModelOptions tiny;
  tiny.n_layer = 4;
  const auto model = gguf::Model::open(testing::write_tiny_model(folder.path(), tiny, "model"));
  tiny.seed += 1;
  const auto other = gguf::Model::open(testing::write_tiny_model(folder.path(), tiny, "other"));
  net::IoThreads io(2);
  std::mt19937 random(1);
  int n_served = 0, n_refused = 0;
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(round);
    // From too little for one server to plenty for two.
    LimitedBackend first(io, (uint64_t{200} << 10) + random() % (uint64_t{3} << 20));
    LimitedBackend second(io, (uint64_t{200} << 10) + random() % (uint64_t{3} << 20));
    const auto serve = [&](const gguf::Model& served) {
      device::cpu::CpuDevice local(1, select_isa(), 0);
      const auto connector = make_remote_connector(io, {});
      ClusterOptions options;
      options.backends = {first.service.endpoint().text(), second.service.endpoint().text()};
      options.rpc_wait = std::chrono::seconds(20);
      options.retry_interval = std::chrono::milliseconds(5);
      options.n_ctx = 128;
      options.cache = testing::test_cache(served, 16, 2);
      options.cache.n_blocks.clear();
      ClusterPipeline pipeline(served, local, connector.get(), options);
      try {
        pipeline.start();
        return true;
      } catch (const ResourceError&) {
        return false;
      }
    };
    std::atomic<int> served{0};
    std::thread one([&] { served += serve(model) ? 1 : 0; });
    std::thread two([&] { served += serve(round % 2 ? model : other) ? 1 : 0; });
    one.join();
    two.join();
    EXPECT_FALSE(first.host.exceeded() || second.host.exceeded());
    n_served += served;
    n_refused += 2 - served;
  }
  spdlog::set_level(spdlog::level::info);
  // Both happen; how often depends on who comes first.
  EXPECT_GT(n_served, 5);
  EXPECT_GT(n_refused, 5);
}

}  // namespace
}  // namespace caravan::cluster
