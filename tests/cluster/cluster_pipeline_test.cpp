// The pipeline over backends that are late, missing, refused, lost and brought back, with real stages in memory.
#include "cluster/cluster_pipeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <future>
#include <latch>
#include <map>

#include "base/error.h"
#include "base/file.h"
#include "cluster/fake_backends.h"
#include "remote/remote_stage.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::cluster {
namespace {

using engine::Completion;
using engine::PipelineEvent;
using engine::PlanLost;
using engine::PlanReady;
using engine::TicketFailed;
using std::chrono::milliseconds;
using std::chrono::seconds;
using test::FakeMachines;
using test::StageBehaviour;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr auto kForever = seconds(30);      // a defect ends the test, it does not hang it
constexpr auto kMoment = milliseconds(50);  // in which something that must not come would come
const std::vector<int32_t> kTokens = {1, 70, 71, 72, 73};

std::vector<std::string> devices(const engine::PlanSummary& plan) {
  std::vector<std::string> names;
  for (const auto& stage : plan.stages) names.push_back(stage.device);
  return names;
}

template <typename E>
std::string message_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

class Cluster : public ::testing::Test {
 protected:
  Cluster() : model_(gguf::Model::open(testing::write_tiny_model(folder_.path(), tiny()))), local_(1, select_isa(), 0) {
    spdlog::set_level(spdlog::level::off);
    options_.backends = {"a", "b"};
    options_.rpc_wait = seconds(0);
    options_.retry_interval = milliseconds(2);
    options_.n_ctx = 128;
    options_.cache = testing::test_cache(model_, 16, 2);
    options_.cache.n_blocks.clear();
  }
  ~Cluster() override { spdlog::set_level(spdlog::level::info); }

  static testing::TinyModelOptions tiny() {
    testing::TinyModelOptions options;
    options.n_layer = 4;
    return options;
  }

  template <typename T>
  T expect_event(engine::Pipeline& pipeline) {
    const auto end = std::chrono::steady_clock::now() + kForever;
    std::optional<PipelineEvent> event;
    while (!event && std::chrono::steady_clock::now() < end) event = pipeline.poll(milliseconds(100));
    if (!event || !std::holds_alternative<T>(*event)) {
      ADD_FAILURE() << (event ? "another event came, of kind " + std::to_string(event->index()) : "no event came");
      throw std::runtime_error("the test cannot go on");
    }
    if (const auto* ready = std::get_if<PlanReady>(&*event)) replicas_[&pipeline] = ready->plan.replicas;
    return std::get<T>(std::move(*event));
  }
  // Passes over the plans on the way to one on these devices, and over the losses between them.
  engine::PlanSummary expect_plan_on(engine::Pipeline& pipeline, const std::vector<std::string>& wanted) {
    const auto end = std::chrono::steady_clock::now() + kForever;
    while (std::chrono::steady_clock::now() < end) {
      const std::optional<PipelineEvent> event = pipeline.poll(milliseconds(100));
      if (!event || std::holds_alternative<PlanLost>(*event)) continue;
      if (!std::holds_alternative<PlanReady>(*event)) break;
      const engine::PlanSummary& plan = std::get<PlanReady>(*event).plan;
      replicas_[&pipeline] = plan.replicas;
      if (devices(plan) == wanted) return plan;
    }
    ADD_FAILURE() << "no plan came on " << ::testing::PrintToString(wanted);
    throw std::runtime_error("the test cannot go on");
  }
  // To a replica of the plan that was taken last.
  uint64_t submit(engine::Pipeline& pipeline, stage::Batch batch, size_t replica = 0) {
    return pipeline.submit(std::move(batch), replicas_.at(&pipeline).at(replica).id);
  }

  std::unique_ptr<ClusterPipeline> make_pipeline() {
    return std::make_unique<ClusterPipeline>(model_, local_, &machines_, options_);
  }
  // A pipeline on machines a and b whose first plan was taken.
  std::unique_ptr<ClusterPipeline> make_started() {
    machines_.add("a");
    machines_.add("b");
    auto pipeline = make_pipeline();
    pipeline->start();
    epoch_ = expect_event<PlanReady>(*pipeline).plan.epoch;
    return pipeline;
  }

  // One batch with the prompt of a new sequence, asking for the logits of its last token.
  stage::Batch batch() const {
    const models::Arch& arch = models::find_arch(model_.metadata());
    testing::BatchBuilder builder(arch.cache_groups(arch.read(model_.metadata())), options_.cache);
    stage::Batch batch;
    builder.add(batch, 0, kTokens, stage::OutputKind::none);
    batch.outputs.push_back({static_cast<uint32_t>(kTokens.size()) - 1, stage::OutputKind::logits, 0, {}});
    return batch;
  }
  // The logits of the batch, which must be the next event.
  std::vector<float> logits(engine::Pipeline& pipeline, const stage::Batch& batch, size_t replica = 0) {
    const uint64_t ticket = submit(pipeline, batch, replica);
    const auto completion = expect_event<Completion>(pipeline);
    EXPECT_EQ(completion.ticket, ticket);
    return completion.rows.at(0).values;
  }
  // What the model gives without any backend.
  std::vector<float> expected_logits() {
    ClusterOptions options = options_;
    options.backends.clear();
    options.tensor_split.clear();
    options.local_memory = uint64_t{1} << 30;
    ClusterPipeline local(model_, local_, nullptr, options);
    local.start();
    expect_event<PlanReady>(local);
    return logits(local, batch());
  }
  void hold_outputs(bool hold) {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().hold_outputs = hold;
  }
  void refuse_next_load(const std::string& machine) {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().refuses = machine;
  }
  void wait_for_held(size_t n) {
    test::StageBehaviour& stages = machines_.stages();
    std::unique_lock lock(stages.mutex);
    stages.changed.wait(lock, [&] { return stages.n_held >= n; });
  }

  testing::TemporaryDirectory folder_;
  gguf::Model model_;
  device::cpu::CpuDevice local_;
  FakeMachines machines_;
  ClusterOptions options_;
  uint64_t epoch_ = 0;
  std::map<const engine::Pipeline*, std::vector<engine::ReplicaSummary>> replicas_;
};

TEST_F(Cluster, ComputesOnTwoBackendsWhatOneMachineComputes) {
  const auto pipeline = make_started();
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, DividesTheLayersInTheOrderOfTheBackends) {
  machines_.add("a");
  machines_.add("b");
  auto pipeline = make_pipeline();
  pipeline->start();
  const engine::PlanSummary plan = expect_event<PlanReady>(*pipeline).plan;
  ASSERT_THAT(devices(plan), ElementsAre("a", "b"));
  EXPECT_TRUE(plan.stages[0].embeds && plan.stages[1].outputs);
  EXPECT_EQ(plan.stages[0].layer_end, plan.stages[1].layer_begin);
  EXPECT_EQ(plan.n_ctx, 128u);
}

// The speeds of a machine behind a link of this latency, relative to an ordinary one.
Backend::Speeds speeds_of(double factor, double latency_seconds) {
  Backend::Speeds speeds;
  for (const tensor::DType type : {tensor::DType::f32, tensor::DType::f16, tensor::DType::q8_0})
    speeds.device.matrices[type] = {factor * 1e6, factor * 1e7};
  speeds.device.cache_bytes_per_s = factor * 1e6;
  speeds.link = {latency_seconds, 1e8};
  return speeds;
}

TEST_F(Cluster, LeavesOutABackendThatWouldSlowThingsDown) {
  machines_.add("a");
  machines_.add("b");
  machines_.set_speeds("a", speeds_of(0.001, 0.2));
  machines_.set_speeds("b", speeds_of(1, 1e-5));
  options_.goal = plan::Goal::latency;
  auto pipeline = make_pipeline();
  const auto proposal = pipeline->propose();
  ASSERT_EQ(proposal.placement.stages.size(), 1u);
  EXPECT_EQ(proposal.offers.at(proposal.placement.stages[0].device).name, "b");
  ASSERT_EQ(proposal.left_out.size(), 1u);
  EXPECT_THAT(proposal.left_out.begin()->second, HasSubstr("slow things down"));
  ASSERT_TRUE(proposal.placement.prediction);
  EXPECT_GT(proposal.placement.prediction->generation, 0);

  auto started = make_pipeline();
  started->start();
  EXPECT_EQ(devices(expect_event<PlanReady>(*started).plan), std::vector<std::string>{"b"});
  EXPECT_EQ(logits(*started, batch()), expected_logits());
  EXPECT_TRUE(started->prediction());
}

// Machines a, b and more of the same speed, whose plan is made for many sequences.
class Replicas : public Cluster {
 protected:
  void add(const std::string& name, FakeMachines::State state = FakeMachines::State::up) {
    machines_.add(name, state);
    machines_.set_speeds(name, speeds_of(1, 1e-3));
  }
  std::unique_ptr<ClusterPipeline> make_replicated() {
    add("a");
    add("b");
    options_.goal = plan::Goal::throughput;
    auto pipeline = make_pipeline();
    pipeline->start();
    plan_ = expect_event<PlanReady>(*pipeline).plan;
    EXPECT_THAT(devices(plan_), ElementsAre("a", "b"));
    return pipeline;
  }
  engine::PlanSummary plan_;
};

TEST_F(Replicas, EachHoldTheWholeModelAndComputeTheSame) {
  const auto pipeline = make_replicated();
  ASSERT_EQ(plan_.replicas.size(), 2u);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(plan_.stages[i].replica, i);
    EXPECT_TRUE(plan_.stages[i].embeds && plan_.stages[i].outputs);
    EXPECT_GT(plan_.replicas[i].speed, 0);
    EXPECT_EQ(logits(*pipeline, batch(), i), expected_logits());
  }
  EXPECT_EQ(pipeline->status().queues.size(), 2u);
  EXPECT_EQ(pipeline->status().epoch, plan_.epoch);
}

TEST_F(Replicas, AreLostAloneAndTakenInAgain) {
  const auto pipeline = make_replicated();
  hold_outputs(true);
  submit(*pipeline, batch(), 1);
  wait_for_held(1);
  hold_outputs(false);
  machines_.cut("b");
  const engine::PlanSummary rest = expect_event<PlanReady>(*pipeline).plan;
  EXPECT_THAT(devices(rest), ElementsAre("a"));
  EXPECT_NE(rest.epoch, plan_.epoch);
  ASSERT_EQ(rest.replicas.size(), 1u);
  EXPECT_EQ(rest.replicas[0].id, plan_.replicas[0].id) << "it goes on";
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  machines_.set_state("b", FakeMachines::State::up);
  const engine::PlanSummary again = expect_plan_on(*pipeline, {"a", "b"});
  ASSERT_EQ(again.replicas.size(), 2u);
  EXPECT_EQ(again.replicas[0].id, plan_.replicas[0].id) << "nor does the return of the other disturb it";
  EXPECT_NE(again.replicas[1].id, plan_.replicas[1].id);
  EXPECT_EQ(logits(*pipeline, batch(), 1), expected_logits());
  EXPECT_EQ(pipeline->n_stale(), 1u) << "what the lost one delivered late";
  const engine::RecoveryCounters recovery = pipeline->status().recovery;
  EXPECT_EQ(recovery.losses, (std::map<std::string, uint64_t>{{"b", 1}}));
  EXPECT_EQ(recovery.replicas_lost, 1u);
  EXPECT_EQ(recovery.recoveries, 1u) << "at the other";
  EXPECT_EQ(recovery.seconds, 0) << "there was a plan";
}

TEST_F(Replicas, TakeInABackendThatComesLateAsOneMore) {
  options_.backends = {"a", "b", "c"};
  options_.cache.max_slots = 6;
  add("c", FakeMachines::State::down);
  const auto pipeline = make_replicated();
  machines_.set_state("c", FakeMachines::State::up);
  const engine::PlanSummary plan = expect_plan_on(*pipeline, {"a", "b", "c"});
  ASSERT_EQ(plan.replicas.size(), 3u);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(plan.replicas[i].id, plan_.replicas[i].id);
  EXPECT_EQ(logits(*pipeline, batch(), 2), expected_logits());
}

TEST_F(Replicas, ThatGoOnAreComparedWithNewOnesByOnePrediction) {
  options_.backends = {"c", "d"};
  options_.goal = plan::Goal::throughput;
  add("c");
  add("d", FakeMachines::State::down);
  const auto pipeline = make_pipeline();
  pipeline->start();
  const engine::PlanSummary alone = expect_event<PlanReady>(*pipeline).plan;
  machines_.set_state("d", FakeMachines::State::up);
  const engine::PlanSummary both = expect_plan_on(*pipeline, {"c", "d"});
  ASSERT_EQ(both.replicas.size(), 2u);
  EXPECT_EQ(both.replicas[0].id, alone.replicas[0].id);
  EXPECT_GT(both.replicas[0].speed, 0);
  EXPECT_EQ(both.replicas[0].speed, both.replicas[1].speed) << "they are equal machines";
}

TEST_F(Replicas, AreLostAtOnceAlsoWhileAnotherFinishesItsStep) {
  // Outlive the pipeline, whose stages tell when they end.
  std::promise<void> ending, goes;
  const std::shared_future<void> gone = goes.get_future().share();
  std::atomic<bool> first{true};
  std::atomic<int> n_asked{0};
  const auto pipeline = make_replicated();
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().ends = [&](const std::string&) {
      if (!first.exchange(false)) return;
      ending.set_value();
      gone.wait();
    };
    machines_.stages().asks_memory = [&](const std::string&) { ++n_asked; };
  }
  machines_.cut("a");
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  ending.get_future().wait();
  machines_.cut("b", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  EXPECT_EQ(n_asked, 0) << "memory that is not free yet is not planned with";
  goes.set_value();
  expect_plan_on(*pipeline, {"b"});
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Replicas, AreLostAtOnceAlsoWhileAPlanIsBeingMade) {
  options_.backends = {"a", "b", "c"};
  options_.cache.max_slots = 6;
  add("c", FakeMachines::State::down);
  std::promise<void> asked, answers;
  std::atomic<bool> first{true};
  const auto pipeline = make_replicated();
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().asks_memory = [&](const std::string& machine) {
      if (machine != "c" || !first.exchange(false)) return;
      asked.set_value();
      answers.get_future().wait_for(2 * kForever);
    };
  }
  machines_.set_state("c", FakeMachines::State::up);
  asked.get_future().wait();
  machines_.cut("b");
  const engine::PlanSummary rest = expect_event<PlanReady>(*pipeline).plan;
  EXPECT_THAT(devices(rest), ElementsAre("a"));
  answers.set_value();
  EXPECT_EQ(expect_plan_on(*pipeline, {"a", "c"}).replicas[0].id, plan_.replicas[0].id);
  EXPECT_EQ(logits(*pipeline, batch(), 1), expected_logits());
}

TEST_F(Replicas, GoOnWhereABackendLeaves) {
  const auto pipeline = make_replicated();
  machines_.leave("a");
  const engine::PlanSummary plan = expect_plan_on(*pipeline, {"b"});
  ASSERT_EQ(plan.replicas.size(), 1u);
  EXPECT_EQ(plan.replicas[0].id, plan_.replicas[1].id);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Replicas, AreWaitedForWhenAllAreLost) {
  const auto pipeline = make_replicated();
  machines_.cut("a");
  machines_.cut("b");
  const auto end = std::chrono::steady_clock::now() + kForever;
  for (bool lost = false; !lost && std::chrono::steady_clock::now() < end;) {
    const auto event = pipeline->poll(milliseconds(100));
    lost = event && std::holds_alternative<PlanLost>(*event);
  }
  machines_.set_state("b", FakeMachines::State::up);
  expect_plan_on(*pipeline, {"b"});
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Replicas, FailAloneWhenOneDoesNotAnswer) {
  options_.ticket_patience = options_.first_ticket_patience = milliseconds(100);
  const auto pipeline = make_replicated();
  EXPECT_EQ(logits(*pipeline, batch(), 1), expected_logits());  // now it is known how long that takes
  hold_outputs(true);
  submit(*pipeline, batch(), 1);
  wait_for_held(1);
  const engine::PlanSummary rest = expect_event<PlanReady>(*pipeline).plan;
  hold_outputs(false);
  ASSERT_THAT(devices(rest), ElementsAre("a"));
  EXPECT_EQ(rest.replicas[0].id, plan_.replicas[0].id);
}

TEST_F(Cluster, FillsMemoryAlikeWhereTheSpeedOfOneIsNotKnown) {
  machines_.add("a");
  machines_.add("b");
  machines_.set_speeds("b", speeds_of(1, 1e-5));
  options_.goal = plan::Goal::latency;
  const auto proposal = make_pipeline()->propose();
  EXPECT_EQ(proposal.placement.stages.size(), 2u);
  EXPECT_FALSE(proposal.placement.prediction);
}

TEST_F(Cluster, PredictsForMemoryAlikeAndForShares) {
  machines_.add("a");
  machines_.add("b");
  for (const char* name : {"a", "b"}) machines_.set_speeds(name, speeds_of(1, 1e-5));
  EXPECT_TRUE(make_pipeline()->propose().placement.prediction);
  options_.goal = plan::Goal::latency;
  options_.tensor_split = {3, 1};
  const auto proposal = make_pipeline()->propose();
  ASSERT_EQ(proposal.placement.stages.size(), 2u);
  EXPECT_EQ(proposal.placement.stages[0].slice.layer_end, 3u);
  EXPECT_TRUE(proposal.placement.prediction);
}

TEST_F(Cluster, WaitsForABackendThatComesLate) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::down);
  options_.rpc_wait = seconds(30);
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("b", 3);
  EXPECT_EQ(machines_.n_connections("a"), 1u) << "one that is connected stays so";
  machines_.set_state("b", FakeMachines::State::up);
  started.get();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a", "b"));
}

TEST_F(Cluster, ConnectsAgainToABackendThatIsLostWhileOthersAreWaitedFor) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::down);
  options_.rpc_wait = seconds(30);
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  while (machines_.n_connections("a") == 0) std::this_thread::yield();
  machines_.cut("a", FakeMachines::State::up);
  machines_.wait_for_attempts("b", 2);
  machines_.set_state("b", FakeMachines::State::up);
  started.get();
  EXPECT_EQ(machines_.n_connections("a"), 2u);
  expect_event<PlanReady>(*pipeline);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, NamesAllBackendsAndReasonsWhenNoneAnswers) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b", FakeMachines::State::down);
  auto pipeline = make_pipeline();
  EXPECT_THAT(message_of<Error>([&] { pipeline->start(); }),
              AllOf(HasSubstr("a: connection refused"), HasSubstr("b: connection refused")));
}

TEST_F(Cluster, WaitsOnForTheFirstToAnswerIfTold) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b", FakeMachines::State::down);
  options_.waits_on = true;
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("a", 3);
  machines_.set_state("b", FakeMachines::State::up);
  started.get();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
}

TEST_F(Cluster, WaitsOnForANameThatDoesNotResolveYet) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("10.0.0.1");
  machines_.name("b", {});
  options_.waits_on = true;
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("a", 3);
  machines_.name("b", {"10.0.0.1"});
  started.get();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("10.0.0.1"));
}

TEST_F(Cluster, WaitsOnForTheMissingBackendsWhenTheOthersAreTooSmall) {
  machines_.add("a", FakeMachines::State::up, 4096);
  machines_.add("b", FakeMachines::State::down);
  options_.waits_on = true;
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("b", 3);
  machines_.set_state("b", FakeMachines::State::up);
  started.get();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
}

TEST_F(Cluster, WaitsOnForTheOtherMachinesOfANameWhenTooFewAreUp) {
  machines_.add("pod1", FakeMachines::State::up, 4096);
  machines_.add("pod2", FakeMachines::State::down);
  machines_.name("pods", {"pod1", "pod2"});
  options_.backends = {"pods"};
  EXPECT_THAT(message_of<ResourceError>([&] { make_pipeline()->start(); }), HasSubstr("need"));
  options_.waits_on = true;
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("pod2", 3);
  machines_.set_state("pod2", FakeMachines::State::up);
  started.get();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("pod2"));
}

TEST_F(Cluster, DoesNotWaitOnForABackendThatRefusesForGood) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b", FakeMachines::State::down);
  options_.waits_on = true;
  auto pipeline = make_pipeline();
  auto started = std::async(std::launch::async, [&] { pipeline->start(); });
  machines_.wait_for_attempts("a", 3);
  machines_.set_state("b", FakeMachines::State::refuses);
  EXPECT_THAT(message_of<NotSupportedError>([&] { started.get(); }), HasSubstr("b: speaks another"));
}

TEST_F(Cluster, GoesOnWithoutAMissingBackendIfTheModelFits) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b");
  auto pipeline = make_pipeline();
  pipeline->start();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, NamesTheMissingBackendsWhenTheOthersAreTooSmall) {
  machines_.add("a", FakeMachines::State::up, 4096);
  machines_.add("b", FakeMachines::State::down);
  auto pipeline = make_pipeline();
  EXPECT_THAT(message_of<ResourceError>([&] { pipeline->start(); }),
              AllOf(HasSubstr("missing backends b"), HasSubstr("does not fit"), HasSubstr("4.0 KiB")));
}

TEST_F(Cluster, DoesNotWaitForABackendThatRefusesForGood) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::refuses);
  options_.rpc_wait = std::chrono::hours(1);
  auto pipeline = make_pipeline();
  EXPECT_THAT(message_of<NotSupportedError>([&] { pipeline->start(); }), HasSubstr("b: speaks another"));
}

TEST_F(Cluster, RefusesSharesThatDoNotMatchTheBackends) {
  options_.tensor_split = {1};
  EXPECT_THAT(message_of<RequestError>([&] { make_pipeline(); }),
              AllOf(HasSubstr("--tensor-split"), HasSubstr("1 shares for 2 backends")));
}

TEST_F(Cluster, GivesTheSharesOfMissingBackendsToNobodyElseByPosition) {
  options_.backends = {"a", "b", "c"};
  options_.tensor_split = {5, 1, 3};
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b");
  machines_.add("c");
  auto pipeline = make_pipeline();
  pipeline->start();
  const engine::PlanSummary plan = expect_event<PlanReady>(*pipeline).plan;
  ASSERT_THAT(devices(plan), ElementsAre("b", "c"));
  EXPECT_EQ(plan.stages[0].layer_end, 1u);  // 1 : 3 of four layers
}

TEST_F(Cluster, LeavesOutBackendsWithoutAShareAlsoWhenOthersAreMissing) {
  options_.tensor_split = {1, 0};
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b");
  auto pipeline = make_pipeline();
  EXPECT_THAT(message_of<ResourceError>([&] { pipeline->start(); }),
              AllOf(HasSubstr("--tensor-split"), HasSubstr("missing backends a")));
}

TEST_F(Cluster, ReportsALossThenServesFromTheReturnedBackendInANewEpoch) {
  const auto pipeline = make_started();
  const auto before = logits(*pipeline, batch());
  machines_.cut("b", FakeMachines::State::up);
  EXPECT_THAT(expect_event<PlanLost>(*pipeline).reason, HasSubstr("backend b: connection lost"));
  const engine::PlanSummary plan = expect_plan_on(*pipeline, {"a", "b"});
  EXPECT_GT(plan.epoch, epoch_);
  EXPECT_EQ(machines_.n_connections("a"), 1u) << "the other backend keeps its connection";
  const engine::RecoveryCounters recovery = pipeline->status().recovery;
  EXPECT_EQ(recovery.losses, (std::map<std::string, uint64_t>{{"b", 1}}));
  EXPECT_EQ(recovery.recoveries, 1u) << "once, whatever plans were tried";
  EXPECT_GT(recovery.seconds, 0);
  EXPECT_EQ(logits(*pipeline, batch()), before) << "with empty block tables";
}

TEST_F(Cluster, DropsWhatTheOldPlanDeliversLate) {
  const auto pipeline = make_started();
  hold_outputs(true);
  const uint64_t late = submit(*pipeline, batch());
  submit(*pipeline, batch());
  wait_for_held(2);
  hold_outputs(false);
  machines_.cut("b", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  expect_plan_on(*pipeline, {"a", "b"});
  const uint64_t next = submit(*pipeline, batch());
  EXPECT_GT(next, late);
  EXPECT_EQ(expect_event<Completion>(*pipeline).ticket, next);
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
}

TEST_F(Cluster, CountsACompletionOfALostPlanAsStale) {
  options_.backends = {"a"};  // one stage: what it delivers late is the result itself
  machines_.add("a");
  auto pipeline = make_pipeline();
  pipeline->start();
  expect_event<PlanReady>(*pipeline);
  hold_outputs(true);
  submit(*pipeline, batch());
  wait_for_held(1);
  hold_outputs(false);
  machines_.cut("a", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  expect_event<PlanReady>(*pipeline);
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  EXPECT_EQ(pipeline->n_stale(), 1u);
}

TEST_F(Cluster, DoesNotComputeBatchesForAPlanThatWasNotAnnouncedYet) {
  const auto pipeline = make_started();
  test::StageBehaviour& stages = machines_.stages();
  const auto n_opened = [&] {
    const std::lock_guard lock(stages.mutex);
    return stages.n_opened;
  };
  const size_t goal = n_opened() + 1;
  machines_.cut("b", FakeMachines::State::up);
  while (n_opened() < goal) std::this_thread::yield();
  // The new plan is open, or about to be; the engine has not heard of the loss and goes on.
  for (int i = 0; i < 100; ++i) submit(*pipeline, batch());
  expect_event<PlanLost>(*pipeline);
  expect_plan_on(*pipeline, {"a", "b"});
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
}

TEST_F(Cluster, TakesALostBackendInAgainWhenItReturns) {
  const auto pipeline = make_started();
  machines_.cut("b");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  machines_.set_state("b", FakeMachines::State::up);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a", "b")) << "without an outage";
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, ComputesWithTheOldPlanWhileOneWithALateBackendLoads) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::down);
  auto pipeline = make_pipeline();
  pipeline->start();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  std::promise<void> loading, go_on;
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().loads = [&](const std::string& machine) {
      if (machine != "b") return;
      loading.set_value();
      go_on.get_future().wait();
    };
  }
  machines_.set_state("b", FakeMachines::State::up);
  loading.get_future().wait();
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  hold_outputs(true);
  submit(*pipeline, batch());
  wait_for_held(1);
  hold_outputs(false);
  go_on.set_value();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a", "b"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt) << "what was in flight went with its plan";
}

TEST_F(Cluster, PausesWhereThereIsNoRoomForTwoPlansAtOnce) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::down);
  auto pipeline = make_pipeline();
  pipeline->start();
  expect_event<PlanReady>(*pipeline);
  refuse_next_load("a");
  machines_.set_state("b", FakeMachines::State::up);
  EXPECT_THAT(expect_event<PlanLost>(*pipeline).reason, HasSubstr("placed anew"));
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a", "b"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  EXPECT_EQ(pipeline->status().recovery.replicas_lost, 0u) << "nobody failed";
  EXPECT_EQ(pipeline->status().recovery.recoveries, 0u);
}

TEST_F(Cluster, PlansAgainWhenAnotherServerTookTheMemory) {
  refuse_next_load("b");
  const auto pipeline = make_started();
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  refuse_next_load("a");
  machines_.cut("b");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, KeepsThePlanWhenABackendWithoutLayersIsLost) {
  options_.tensor_split = {1, 0};
  const auto pipeline = make_started();
  machines_.cut("b");
  machines_.wait_for_attempts("b", 2);
  machines_.set_state("b", FakeMachines::State::up);
  machines_.wait_for_attempts("b", 1);
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, MovesAwayFromABackendThatLeaves) {
  const auto pipeline = make_started();
  machines_.leave("b");
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a")) << "without an outage";
  machines_.cut("b");
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, StaysOnABackendThatLeavesWhileTheOthersAreTooSmall) {
  machines_.add("a", FakeMachines::State::up, 4096);
  machines_.add("b");
  auto pipeline = make_pipeline();
  pipeline->start();
  expect_event<PlanReady>(*pipeline);
  machines_.leave("b");
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, FailsAStageThatDoesNotAnswerABatchAndPlansWithoutIt) {
  options_.ticket_patience = options_.first_ticket_patience = milliseconds(100);
  const auto pipeline = make_started();
  hold_outputs(true);
  submit(*pipeline, batch());
  wait_for_held(1);
  EXPECT_THAT(expect_event<PlanLost>(*pipeline).reason, AllOf(HasSubstr("a "), HasSubstr("has not answered")));
  hold_outputs(false);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, PlansWithoutABackendThatCannotLoad) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::down);
  auto pipeline = make_pipeline();
  pipeline->start();
  expect_event<PlanReady>(*pipeline);
  std::atomic<int> n_tries{0};
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().loads = [&](const std::string& machine) {
      if (machine != "b") return;
      ++n_tries;
      throw Error("the disk is full");
    };
  }
  machines_.set_state("b", FakeMachines::State::up);
  while (n_tries == 0) std::this_thread::yield();
  machines_.cut("a", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, StartsWithoutABackendWhoseLoadStandsStill) {
  machines_.add("a");
  machines_.add("b");
  std::string stands_still = "b";
  machines_.stages().loads = [&](const std::string& machine) {
    if (machine == stands_still) throw remote::StalledError(machine + " stands still");
  };
  auto pipeline = make_pipeline();
  pipeline->start();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  options_.backends = {"b"};
  EXPECT_THAT(message_of<remote::StalledError>([&] { make_pipeline()->start(); }), HasSubstr("b stands still"));
}

TEST_F(Cluster, CountsNoMoreOnALoadThatStoodStill) {
  const auto pipeline = make_started();
  std::vector<bool> counted_on;
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().loads = [&](const std::string&) {
      counted_on.push_back(pipeline->plan_is_loading());
      if (counted_on.size() < 3) throw remote::StalledError("it stands still");
    };
  }
  machines_.cut("a");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  EXPECT_THAT(counted_on, ElementsAre(true, false, false));
  machines_.cut("b", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  expect_plan_on(*pipeline, {"b"});
  EXPECT_THAT(counted_on, ElementsAre(true, false, false, true)) << "it has loaded since, and is another connection";
}

TEST_F(Cluster, PlansWithoutABackendWhoseStageCannotBeOpened) {
  machines_.add("a", FakeMachines::State::down);
  machines_.add("b");
  StageBehaviour& stages = machines_.stages();
  stages.fails_to_open = "a";
  auto pipeline = make_pipeline();
  pipeline->start();
  expect_event<PlanReady>(*pipeline);
  machines_.set_state("a", FakeMachines::State::up);
  for (bool failed = false; !failed; std::this_thread::yield()) {
    const std::lock_guard lock(stages.mutex);
    failed = stages.n_open_failures > 0;
  }
  machines_.cut("b", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, LoadsAllStagesAtTheSameTime) {
  machines_.add("a");
  machines_.add("b");
  std::latch both(2);
  std::atomic<bool> together{true};
  machines_.stages().loads = [&](const std::string&) {
    both.count_down();
    const auto deadline = std::chrono::steady_clock::now() + kForever;
    while (!both.try_wait() && together)
      if (std::chrono::steady_clock::now() > deadline) together = false;
  };
  auto pipeline = make_pipeline();
  pipeline->start();
  EXPECT_TRUE(together);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a", "b"));
}

TEST_F(Cluster, PlansWithoutABackendThatDoesNotReturn) {
  const auto pipeline = make_started();
  machines_.cut("b");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("a"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, PlansWithoutABackendThatReturnsAndRefuses) {
  const auto pipeline = make_started();
  machines_.cut("a", FakeMachines::State::refuses);
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
}

TEST_F(Cluster, ServesFromItsOwnMemoryWhenAllBackendsAreLost) {
  options_.local_memory = uint64_t{1} << 30;
  const auto pipeline = make_started();
  machines_.set_state("a", FakeMachines::State::down);
  machines_.set_state("b", FakeMachines::State::down);
  machines_.cut("a");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  machines_.cut("b");
  expect_event<PlanLost>(*pipeline);
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("local"));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, WaitsOnWhenTheOthersAreTooSmall) {
  machines_.add("a", FakeMachines::State::up, 4096);
  machines_.add("b");
  auto pipeline = make_pipeline();
  pipeline->start();
  EXPECT_THAT(devices(expect_event<PlanReady>(*pipeline).plan), ElementsAre("b"));
  machines_.cut("b");
  expect_event<PlanLost>(*pipeline);
  machines_.wait_for_attempts("b", 3);
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
  machines_.set_state("b", FakeMachines::State::up);
  expect_event<PlanReady>(*pipeline);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, PlansAgainWhenABackendIsLostWhileItLoads) {
  const auto pipeline = make_started();
  std::atomic<bool> cut{false};
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().loads = [&](const std::string& machine) {
      if (machine == "b" && !cut.exchange(true)) machines_.cut("b", FakeMachines::State::up);
    };
  }
  machines_.cut("b", FakeMachines::State::up);
  expect_event<PlanLost>(*pipeline);
  expect_plan_on(*pipeline, {"a", "b"});
  EXPECT_EQ(machines_.n_connections("b"), 3u);
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, RecoversFromTheLossOfAllBackends) {
  const auto pipeline = make_started();
  machines_.cut("a");
  machines_.cut("b");
  machines_.wait_for_attempts("a", 2);
  machines_.wait_for_attempts("b", 2);
  machines_.set_state("a", FakeMachines::State::up);
  machines_.set_state("b", FakeMachines::State::up);
  expect_plan_on(*pipeline, {"a", "b"});
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
  EXPECT_EQ(pipeline->poll(kMoment), std::nullopt);
}

TEST_F(Cluster, LosesTheSameBackendAgainAndAgain) {
  const auto pipeline = make_started();
  const auto expected = expected_logits();
  for (int i = 0; i < 10; ++i) {
    machines_.cut(i % 2 ? "a" : "b", FakeMachines::State::up);
    expect_event<PlanLost>(*pipeline);
    const uint64_t epoch = expect_plan_on(*pipeline, {"a", "b"}).epoch;
    EXPECT_GT(epoch, epoch_);
    epoch_ = epoch;
    EXPECT_EQ(logits(*pipeline, batch()), expected);
  }
}

TEST_F(Cluster, FailsTheTicketOfABadBatchAndKeepsThePlan) {
  const auto pipeline = make_started();
  stage::Batch bad = batch();
  bad.tokens[0] = 1'000'000;
  const uint64_t ticket = submit(*pipeline, bad);
  const auto failed = expect_event<TicketFailed>(*pipeline);
  EXPECT_EQ(failed.ticket, ticket);
  EXPECT_THAT(failed.reason, HasSubstr("a: "));
  EXPECT_EQ(logits(*pipeline, batch()), expected_logits());
}

TEST_F(Cluster, EndsAPollEarlyWhenItIsWoken) {
  const auto pipeline = make_started();
  pipeline->wake();
  EXPECT_EQ(pipeline->poll(kForever), std::nullopt) << "woken before";
  std::thread waker([&] { pipeline->wake(); });
  EXPECT_EQ(pipeline->poll(kForever), std::nullopt);
  waker.join();
}

TEST_F(Cluster, EndsWithoutHavingStarted) {
  machines_.add("a");
  machines_.add("b");
  make_pipeline();
  EXPECT_EQ(machines_.n_connections("a"), 0u);
}

TEST_F(Cluster, EndsWithBatchesUnderWay) {
  auto pipeline = make_started();
  for (int i = 0; i < 20; ++i) submit(*pipeline, batch());
  pipeline.reset();
}

TEST_F(Cluster, EndsWithOutputsThatArriveMeanwhile) {
  auto pipeline = make_started();
  hold_outputs(true);
  for (int i = 0; i < 5; ++i) submit(*pipeline, batch());
  wait_for_held(5);
  hold_outputs(false);
  pipeline.reset();  // the first stage delivers now, and the second computes
}

TEST_F(Cluster, EndsWhileItWaitsForAReturn) {
  auto pipeline = make_started();
  machines_.cut("a");
  machines_.cut("b");
  machines_.wait_for_attempts("b", 2);
  pipeline.reset();
}

TEST_F(Cluster, EndsWhileItLoadsANewPlan) {
  auto pipeline = make_started();
  std::promise<void> loading, go_on;
  std::atomic<bool> first{true};
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().loads = [&](const std::string&) {
      if (!first.exchange(false)) return;
      loading.set_value();
      go_on.get_future().wait();
    };
  }
  machines_.cut("b", FakeMachines::State::up);
  loading.get_future().wait();
  auto ended = std::async(std::launch::async, [&] { pipeline.reset(); });
  EXPECT_EQ(ended.wait_for(kMoment), std::future_status::timeout) << "a load cannot be left alone";
  go_on.set_value();
  EXPECT_EQ(ended.wait_for(kForever), std::future_status::ready);
}

TEST_F(Cluster, EndsWhileItMakesANewPlan) {
  auto pipeline = make_started();
  std::promise<void> asked, answers;
  std::atomic<bool> first{true};
  {
    const std::lock_guard lock(machines_.stages().mutex);
    machines_.stages().asks_memory = [&](const std::string&) {
      if (!first.exchange(false)) return;
      asked.set_value();
      answers.get_future().wait();
    };
  }
  machines_.cut("b", FakeMachines::State::up);
  asked.get_future().wait();
  auto ended = std::async(std::launch::async, [&] { pipeline.reset(); });
  EXPECT_EQ(ended.wait_for(kMoment), std::future_status::timeout) << "a thread cannot be left alone";
  answers.set_value();
  EXPECT_EQ(ended.wait_for(kForever), std::future_status::ready);
}

TEST_F(Cluster, EndsWhileABackendIsBeingLost) {
  for (int i = 0; i < 20; ++i) {
    auto pipeline = make_started();
    submit(*pipeline, batch());
    std::thread cutter([&] { machines_.cut("b", FakeMachines::State::up); });
    pipeline.reset();
    cutter.join();
  }
}

}  // namespace
}  // namespace caravan::cluster
