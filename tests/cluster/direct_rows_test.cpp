// A row of stages on real backends over loopback, which hand on by themselves: what the server sees of it, and who is
// blamed when it stands still.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <future>

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

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kMemory = uint64_t{64} << 20;

// A device whose stages take batches and never compute them while it hangs, and whose loads never end while they are
// held.
class HangingHost : public remote::SliceHost {
 public:
  explicit HangingHost(remote::SliceHost& host) : host_(host) {}
  void hold_loads(bool hold) {
    holds_loads = hold;
    holds_loads.notify_all();
  }
  std::vector<device::DeviceInfo> devices() const override { return host_.devices(); }
  stage::MemoryNeed need(size_t device, const stage::LoadRequest& request) const override {
    return host_.need(device, request);
  }
  std::unique_ptr<remote::SliceLoad> begin_load(size_t device, const stage::LoadRequest& request) override {
    if (holds_loads) is_held = true;
    is_held.notify_all();
    holds_loads.wait(true);
    return host_.begin_load(device, request);
  }
  remote::ReadyStage make_stage(size_t device, const stage::LoadRequest& request,
                                std::shared_ptr<const remote::ResidentWeights> weights) override {
    remote::ReadyStage ready = host_.make_stage(device, request, std::move(weights));
    ready.stage = std::make_unique<HangingStage>(std::move(ready.stage), hangs);
    return ready;
  }
  void measure(size_t device, std::span<const tensor::DType> types, uint64_t most_bytes,
               stage::DeviceProfile& profile) override {
    host_.measure(device, types, most_bytes, profile);
  }
  stage::LayerTimes measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) override {
    return host_.measure_layer(device, sample, most_bytes);
  }
  std::atomic<bool> hangs{false}, holds_loads{false}, is_held{false};

 private:
  struct HangingStage : stage::Stage {
    HangingStage(std::unique_ptr<stage::Stage> stage, std::atomic<bool>& hangs_now)
        : inner(std::move(stage)), hangs(hangs_now) {}
    void load(const stage::LoadRequest&, std::span<weights::WeightSource* const>, const ProgressFunction&) override {}
    void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) override { inner->open(session, epoch, sink); }
    void enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch,
                 std::vector<float> input) override {
      if (!hangs) inner->enqueue(fence, std::move(batch), std::move(input));
    }
    std::string numeric_class() const override { return inner->numeric_class(); }
    std::unique_ptr<stage::Stage> inner;
    std::atomic<bool>& hangs;
  };
  remote::SliceHost& host_;
};

struct Machine {
  explicit Machine(net::IoThreads& io) : inner(devices()), host(inner), service(io, host, options()) {}
  static std::vector<std::unique_ptr<device::Device>> devices() {
    std::vector<std::unique_ptr<device::Device>> devices;
    devices.push_back(std::make_unique<device::cpu::CpuDevice>(1, select_isa(), kMemory));
    return devices;
  }
  static remote::BackendOptions options() {
    remote::BackendOptions options;
    options.endpoint = {"127.0.0.1", 0};
    return options;
  }
  std::string name() const { return service.endpoint().text(); }
  ~Machine() { host.hold_loads(false); }
  remote::DeviceSliceHost inner;
  HangingHost host;
  remote::BackendService service;
};

class DirectRow : public ::testing::Test {
 protected:
  DirectRow()
      : model_(gguf::Model::open(testing::write_tiny_model(folder_.path(), tiny(), "model"))),
        local_(1, select_isa(), 0),
        connector_(make_remote_connector(io_, remote_options())) {
    spdlog::set_level(spdlog::level::off);
    for (int i = 0; i < 3; ++i) machines_.push_back(std::make_unique<Machine>(io_));
    for (const auto& machine : machines_) options_.backends.push_back(machine->name());
    options_.tensor_split = {1, 1, 1};
    options_.retry_interval = milliseconds(5);
    options_.n_ctx = 128;
    options_.cache = testing::test_cache(model_, 16, 2);
    options_.cache.n_blocks.clear();
  }
  ~DirectRow() override { spdlog::set_level(spdlog::level::info); }

  void start() {
    pipeline_ = std::make_unique<ClusterPipeline>(model_, local_, connector_.get(), options_);
    pipeline_->start();
  }
  static RemoteOptions remote_options(seconds stage_patience = seconds(1)) {
    RemoteOptions options;
    options.stage_patience = stage_patience;
    return options;
  }
  static testing::TinyModelOptions tiny() {
    testing::TinyModelOptions options;
    options.n_layer = 6;
    return options;
  }
  template <typename T>
  T expect_event() {
    const auto end = std::chrono::steady_clock::now() + seconds(30);
    std::optional<engine::PipelineEvent> event;
    while (!event && std::chrono::steady_clock::now() < end) event = pipeline_->poll(milliseconds(100));
    if (!event || !std::holds_alternative<T>(*event)) throw std::runtime_error("the event did not come");
    if (const auto* ready = std::get_if<engine::PlanReady>(&*event)) replica_ = ready->plan.replicas.front().id;
    return std::get<T>(std::move(*event));
  }
  stage::Batch batch() const {
    const models::Arch& arch = models::find_arch(model_.metadata());
    stage::CacheConfig cache = testing::test_cache(model_, 16, 2);
    testing::BatchBuilder builder(arch.cache_groups(arch.read(model_.metadata())), cache);
    stage::Batch batch;
    const std::vector<int32_t> tokens = {1, 70, 71};
    builder.add(batch, 0, tokens, stage::OutputKind::none);
    batch.outputs.push_back({2, stage::OutputKind::logits, 0, {}});
    return batch;
  }

  testing::TemporaryDirectory folder_;
  gguf::Model model_;
  device::cpu::CpuDevice local_;
  net::IoThreads io_{2};
  std::vector<std::unique_ptr<Machine>> machines_;
  std::unique_ptr<BackendConnector> connector_;
  ClusterOptions options_;
  std::unique_ptr<ClusterPipeline> pipeline_;
  uint64_t replica_ = 0;  // of the plan that was taken last
};

TEST_F(DirectRow, IsPlannedWithoutTheStageThatHangsWhereverItIs) {
  options_.ticket_patience = options_.first_ticket_patience = milliseconds(600);
  start();
  ASSERT_EQ(expect_event<engine::PlanReady>().plan.stages.size(), 3u);
  pipeline_->submit(batch(), replica_);
  const auto rows = expect_event<engine::Completion>().rows;
  for (const size_t hanging : {1, 2}) {
    SCOPED_TRACE(hanging);
    Machine& machine = *machines_[hanging];
    machine.host.hangs = true;
    pipeline_->submit(batch(), replica_);
    EXPECT_THAT(expect_event<engine::PlanLost>().reason,
                AllOf(HasSubstr(machine.name()), HasSubstr("has not answered")));
    const engine::PlanSummary plan = expect_event<engine::PlanReady>().plan;
    EXPECT_EQ(plan.stages.size(), 3 - hanging);
    for (const engine::StageSummary& stage : plan.stages) EXPECT_NE(stage.device, machine.name());
    pipeline_->submit(batch(), replica_);
    EXPECT_EQ(expect_event<engine::Completion>().rows.at(0).values, rows.at(0).values);
  }
}

TEST_F(DirectRow, IsPlannedWithoutABackendThatNeverLoads) {
  machines_[1]->host.hold_loads(true);
  start();
  const engine::PlanSummary plan = expect_event<engine::PlanReady>().plan;
  ASSERT_EQ(plan.stages.size(), 2u);
  EXPECT_EQ(plan.stages[0].device, machines_[0]->name());
  EXPECT_EQ(plan.stages[1].device, machines_[2]->name());
  pipeline_->submit(batch(), replica_);
  EXPECT_EQ(expect_event<engine::Completion>().rows.size(), 1u);
}

TEST_F(DirectRow, EndsAlsoWhileABackendDoesNotLoad) {
  connector_ = make_remote_connector(io_, remote_options(seconds(60)));
  start();
  expect_event<engine::PlanReady>();
  machines_[1]->host.hold_loads(true);
  machines_[0].reset();
  machines_[1]->host.is_held.wait(false);
  auto ended = std::async(std::launch::async, [&] { pipeline_.reset(); });
  EXPECT_EQ(ended.wait_for(seconds(20)), std::future_status::ready);
}

TEST_F(DirectRow, ShowsItsBackendsAndWhereItsBatchesAre) {
  options_.ticket_patience = options_.first_ticket_patience = seconds(60);
  start();
  EXPECT_EQ(pipeline_->status().epoch, expect_event<engine::PlanReady>().plan.epoch);
  machines_[1]->host.hangs = true;
  pipeline_->submit(batch(), replica_);
  const auto end = std::chrono::steady_clock::now() + seconds(30);
  while (pipeline_->status().queues.at(1) < 1 && std::chrono::steady_clock::now() < end) {
    EXPECT_FALSE(pipeline_->poll(milliseconds(5)));  // until the next heartbeat
  }
  const engine::PipelineStatus status = pipeline_->status();
  EXPECT_THAT(status.queues, ElementsAre(0, 1, 0));
  ASSERT_EQ(status.machines.size(), 3u);
  for (const engine::PipelineStatus::Machine& machine : status.machines) {
    EXPECT_GT(machine.rtt_seconds, 0);
    EXPECT_GT(machine.mean_rtt_seconds, 0);
    EXPECT_GT(machine.received_bytes, 100u);
    EXPECT_GT(machine.sent_bytes, 1000u);
  }
}

}  // namespace
}  // namespace caravan::cluster
