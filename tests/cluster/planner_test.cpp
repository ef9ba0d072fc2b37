// Who is chosen for a plan: of backends that leave, failed lately, compute otherwise or have too little memory.
#include "cluster/planner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "cluster/fake_backends.h"
#include "models/registry.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::cluster {
namespace {

using test::FakeMachines;
using Choice = Planner::Choice;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kPlenty = uint64_t{1} << 30, kTooLittle = 4096;

// Machines a, b, ... that are connected by hand; nobody leaves.
class PlannerTest : public ::testing::Test {
 protected:
  PlannerTest()
      : model_(gguf::Model::open(testing::write_tiny_model(folder_.path(), testing::TinyModelOptions()))),
        arch_(models::find_arch(model_.metadata())),
        metadata_(models::hyperparameter_metadata(model_.metadata(), 0)),
        hp_(arch_.read(metadata_)),
        local_(1, select_isa(), 0) {
    options_.n_ctx = 128;
    options_.cache = testing::test_cache(model_, 16, 2);
    options_.cache.n_blocks.clear();
  }

  void add(const std::string& name, uint64_t memory = kPlenty, const Backend::Speeds* speeds = nullptr) {
    machines_.add(name, FakeMachines::State::up, memory);
    if (speeds != nullptr) machines_.set_speeds(name, *speeds);
    Membership::Member member;
    member.name = name;
    member.configured = situation_.members.size();
    member.backend = machines_.connect(name, std::chrono::seconds(1), {}, {});
    situation_.members.push_back(std::move(member));
  }
  Planner make_planner() { return {{model_, metadata_, arch_, hp_}, local_, options_, Planner::Machines::backends}; }
  static std::vector<std::string> devices(const Planner::Candidate& candidate) {
    std::vector<std::string> names;
    for (const plan::PlacedStage& stage : candidate.placement.stages)
      names.push_back(candidate.offers.at(stage.device).name);
    return names;
  }
  static std::vector<plan::InputPath> inputs(const Planner::Candidate& candidate) {
    std::vector<plan::InputPath> inputs;
    for (const plan::PlacedStage& stage : candidate.placement.stages) inputs.push_back(stage.input);
    return inputs;
  }
  // The devices of the plan's stages.
  std::vector<std::string> choose(Choice last = Choice::anybody) {
    return devices(make_planner().choose(situation_, last));
  }

  testing::TemporaryDirectory folder_;
  gguf::Model model_;
  const models::Arch& arch_;
  const gguf::Metadata metadata_;
  const models::Hyperparameters hp_;
  device::cpu::CpuDevice local_;
  FakeMachines machines_;
  PlannerOptions options_;
  Planner::Situation situation_;
};

TEST_F(PlannerTest, UsesThoseThatFailedLatelyOnlyWhereItMust) {
  add("a");
  add("b");
  EXPECT_THAT(choose(), ElementsAre("a", "b"));
  situation_.avoided = {"a"};
  EXPECT_THAT(choose(), ElementsAre("b"));
  situation_.avoided = {"a", "b"};
  EXPECT_THAT(choose(), ElementsAre("a", "b"));
  EXPECT_THROW(choose(Choice::reliable), ResourceError);
}

TEST_F(PlannerTest, UsesAnotherNumericClassOnlyWhereItMust) {
  add("a");
  situation_.numeric_class = "another";
  EXPECT_THROW(choose(Choice::reliable), ResourceError);
  EXPECT_THAT(choose(Choice::any_class), ElementsAre("a"));
}

TEST_F(PlannerTest, CountsWhatThePlanInUseHoldsAsFree) {
  add("a", kTooLittle);
  EXPECT_THROW(choose(), ResourceError);
  const auto connection = std::shared_ptr<const Membership::Connection>();
  situation_.held.push_back({connection, kPlenty});
  EXPECT_THAT(choose(), ElementsAre("a"));
}

TEST_F(PlannerTest, DividesTheShareOfANameAmongItsMachines) {
  for (const char* name : {"a", "b", "c"}) add(name);
  situation_.members[0].configured = situation_.members[1].configured = 0;
  situation_.members[2].configured = 1;
  options_.tensor_split = {1, 0};
  EXPECT_THAT(choose(), ElementsAre("a", "b"));
  situation_.members.resize(0);
  add("d");
  situation_.members[0].configured = 1;
  try {
    choose();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(), HasSubstr("--tensor-split"));
  }
}

TEST_F(PlannerTest, TakesThisMachineWhereItMay) {
  options_.local_memory = kPlenty;
  EXPECT_THAT(choose(), ElementsAre("local"));
  options_.local_memory = 0;
  EXPECT_THROW(choose(), ResourceError);
}

// Three backends of the same speed, of which two together hold the model.
class PlannerHops : public PlannerTest {
 protected:
  PlannerHops() {
    add("whole");
    const uint64_t whole = make_planner().choose(situation_, Choice::anybody).placement.stages[0].need.total();
    situation_.members.clear();
    Backend::Speeds speeds;
    speeds.device.matrices[tensor::DType::f32] = {1e9, 1e10};
    speeds.device.cache_bytes_per_s = 1e9;
    speeds.link = {0.001, 1e9};
    options_.goal = plan::Goal::latency;
    for (const char* name : {"a", "b", "c"}) add(name, whole * 4 / 5, &speeds);
  }
  void let_reach(const std::string& from, const std::string& to, std::chrono::microseconds rtt = kNear) {
    machines_.let_reach(from, to, rtt);
  }
  size_t n_probes() {
    const std::lock_guard lock(machines_.stages().mutex);
    return machines_.stages().n_probes;
  }

  static constexpr std::chrono::microseconds kNear{300}, kFar{20000};
};

TEST_F(PlannerHops, PutsStagesWhereOneReachesTheNext) {
  let_reach("c", "a");
  const auto candidate = make_planner().choose(situation_, Choice::anybody);
  EXPECT_THAT(devices(candidate), ElementsAre("c", "a"));
  EXPECT_THAT(inputs(candidate), ElementsAre(plan::InputPath::server, plan::InputPath::direct));
  EXPECT_TRUE(candidate.relayed.empty());
}

TEST_F(PlannerHops, PutsStagesWhereTheyAreNear) {
  let_reach("b", "a", kFar);
  let_reach("b", "c");
  EXPECT_THAT(choose(), ElementsAre("b", "c"));
}

TEST_F(PlannerHops, SayWhyTheServerRelays) {
  let_reach("c", "a", kFar);  // longer than through the server
  const auto candidate = make_planner().choose(situation_, Choice::anybody);
  ASSERT_THAT(inputs(candidate), ElementsAre(plan::InputPath::server, plan::InputPath::relayed));
  const std::string& why = candidate.relayed.at(1);
  EXPECT_TRUE(why.find("does not reach") != why.npos || why.find("from nobody else") != why.npos) << why;
}

TEST_F(PlannerHops, AreTriedOnceUntilOneFails) {
  for (const char* from : {"a", "b", "c"})
    for (const char* to : {"a", "b", "c"})
      if (from != to) let_reach(from, to);
  Planner planner = make_planner();
  for (int i = 0; i < 3; ++i) planner.choose(situation_, Choice::anybody);
  EXPECT_EQ(n_probes(), 6u);
  situation_.hops_failed = true;
  planner.choose(situation_, Choice::anybody);
  EXPECT_EQ(n_probes(), 12u);
}

TEST_F(PlannerHops, AreNotTriedWhenTheServerIsToRelay) {
  let_reach("c", "a");
  situation_.relays = true;
  const auto candidate = make_planner().choose(situation_, Choice::anybody);
  EXPECT_THAT(inputs(candidate), ElementsAre(plan::InputPath::server, plan::InputPath::relayed));
  EXPECT_TRUE(candidate.relayed.empty());
  EXPECT_EQ(n_probes(), 0u);
}

}  // namespace
}  // namespace caravan::cluster
