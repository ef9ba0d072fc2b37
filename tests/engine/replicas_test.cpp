// Several replicas of the model: which of them computes what, and what a lost or a new one changes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <random>
#include <set>

#include "engine/dispatcher.h"
#include "engine/engine.h"
#include "engine/engine_support.h"
#include "engine/fake_pipeline.h"

namespace caravan::engine::test {
namespace {

using testing::IsEmpty;

PlanSummary with_replicas(PlanSummary plan, const std::vector<ReplicaSummary>& replicas) {
  plan.replicas = replicas;
  plan.stages.assign(replicas.size(), {});
  for (uint32_t i = 0; i < replicas.size(); ++i) plan.stages[i].replica = i;
  return plan;
}

GenerateParams endless(std::vector<int32_t> prompt, int32_t n_predict) {
  GenerateParams params = greedy(std::move(prompt), n_predict);
  params.sampling.ignore_eos = true;
  return params;
}

std::unique_ptr<Sequence> sequence(uint64_t id, std::optional<uint32_t> wanted_slot = std::nullopt) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = id;
  sequence->tokens = {1, 2, 3};
  sequence->wanted_slot = wanted_slot;
  sequence->embedding.emplace();
  return sequence;
}

// Sequences per replica.
std::map<uint64_t, int> spread(const Dispatcher& dispatcher) {
  std::map<uint64_t, int> n;
  for (const auto& [id, sequence] : dispatcher.sequences())
    if (sequence->slot) ++n[sequence->replica];
  return n;
}

TEST(Dispatcher, SpreadsSequencesBySpeedOverSlotsThatAllShare) {
  Dispatcher dispatcher(0, 0);
  const PlanSummary plan = make_plan({full_group(64)}, 64, 16, 8);
  dispatcher.set_plan(with_replicas(plan, {{1, 30}, {2, 10}}));
  for (uint64_t id = 1; id <= 10; ++id) dispatcher.add(sequence(id));
  dispatcher.admit();
  EXPECT_EQ(spread(dispatcher), (std::map<uint64_t, int>{{1, 6}, {2, 2}}));
  EXPECT_EQ(dispatcher.n_waiting(), 2u) << "slots are those of all replicas together";
  std::set<stage::Slot> slots;
  for (const auto& [id, sequence] : dispatcher.sequences())
    if (sequence->slot) slots.insert(*sequence->slot);
  EXPECT_EQ(slots.size(), 8u) << "none serves two";
}

TEST(Dispatcher, LeavesSequencesWhereTheyAreWhenOtherReplicasComeAndGo) {
  Dispatcher dispatcher(0, 0);
  const PlanSummary plan = make_plan({full_group(64)}, 64, 16, 8);
  dispatcher.set_plan(with_replicas(plan, {{1}, {2}}));
  for (uint64_t id = 1; id <= 4; ++id) dispatcher.add(sequence(id));
  dispatcher.admit();
  std::map<uint64_t, uint32_t> incarnations;
  for (const auto& [id, sequence] : dispatcher.sequences()) incarnations[id] = sequence->incarnation;
  dispatcher.set_plan(with_replicas(plan, {{2}, {3}}));
  EXPECT_EQ(spread(dispatcher), (std::map<uint64_t, int>{{2, 2}}));
  dispatcher.admit();
  EXPECT_EQ(spread(dispatcher), (std::map<uint64_t, int>{{2, 2}, {3, 2}}));
  for (const auto& [id, sequence] : dispatcher.sequences())
    EXPECT_EQ(sequence->incarnation == incarnations[id], sequence->replica == 2);
  dispatcher.lose_plan();
  EXPECT_EQ(dispatcher.n_waiting(), 4u);
}

TEST(Dispatcher, ComparesReplicasThatGoOnBySpeedsOfTheNewPlan) {
  Dispatcher dispatcher(0, 0);
  const PlanSummary plan = make_plan({full_group(64)}, 64, 16, 8);
  dispatcher.set_plan(with_replicas(plan, {{1}}));
  dispatcher.set_plan(with_replicas(plan, {{1, 30}, {2, 10}}));
  for (uint64_t id = 1; id <= 8; ++id) dispatcher.add(sequence(id));
  dispatcher.admit();
  EXPECT_EQ(spread(dispatcher), (std::map<uint64_t, int>{{1, 6}, {2, 2}}));
}

TEST(Dispatcher, LetsOnlySequencesThatWaitForASlotBeOvertaken) {
  Dispatcher dispatcher(2, 0);
  dispatcher.set_plan(with_replicas(make_plan({full_group(64)}, 64, 16, 8), {{1}, {2}}));
  dispatcher.add(sequence(1, 1));
  dispatcher.add(sequence(2, 1));
  dispatcher.add(sequence(3));
  dispatcher.add(sequence(4));
  dispatcher.admit();
  const auto& sequences = dispatcher.sequences();
  EXPECT_EQ(sequences.at(1)->slot, 1u);
  EXPECT_FALSE(sequences.at(2)->slot);
  EXPECT_EQ(sequences.at(3)->slot, 0u);
  EXPECT_FALSE(sequences.at(4)->slot);
  EXPECT_NE(sequences.at(1)->replica, sequences.at(3)->replica);
}

class EngineReplicas : public testing::Test {
 protected:
  EngineReplicas() { spdlog::set_level(spdlog::level::off); }
  ~EngineReplicas() override { spdlog::set_level(spdlog::level::info); }
  void start(const PlanSummary& plan) {
    plan_ = plan;
    pipeline_.ready(plan);
    engine_.emplace(pipeline_, *vocabulary_);
    ASSERT_TRUE(engine_->wait_until_ready(kLong));
  }
  void TearDown() override {
    engine_.reset();
    EXPECT_THAT(pipeline_.errors(), IsEmpty());
  }
  std::vector<int32_t> expected(const GenerateParams& params) { return expected_tokens(plan_, params, *vocabulary_); }

  FakePipeline pipeline_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_ = make_vocabulary();
  PlanSummary plan_;
  std::optional<Engine> engine_;
};

TEST_F(EngineReplicas, WorkAtTheSameTime) {
  pipeline_.close_gate();
  start(with_replicas(make_plan({full_group(64)}, 256, 64, 8), {{1}, {2}, {3}}));
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 6; ++i) streams.push_back(engine_->submit(endless({1, 10 + i}, 8)));
  while (pipeline_.n_batches().size() < 3) std::this_thread::yield();  // none has answered
  pipeline_.open_gate();
  for (int32_t i = 0; i < 6; ++i) EXPECT_EQ(collect(*streams[i]).tokens, expected(endless({1, 10 + i}, 8)));
  EXPECT_GE(pipeline_.max_in_flight(), 3u);
}

TEST_F(EngineReplicas, LoseOnlyTheirOwnSequences) {
  pipeline_.close_gate();
  start(with_replicas(make_plan({full_group(64)}, 256, 64, 8), {{1}, {2}}));
  auto stays = engine_->submit(endless({1, 2, 3}, 20));
  while (engine_->status().slots_busy < 1) std::this_thread::yield();
  auto moves = engine_->submit(endless({4, 5}, 20));
  pipeline_.release(9);
  pipeline_.wait_for_batches(11);
  const size_t before = pipeline_.n_batches().at(1);
  pipeline_.ready(with_replicas(plan_, {{1}}));
  pipeline_.open_gate();
  EXPECT_EQ(collect(*stays).tokens, expected(endless({1, 2, 3}, 20)));
  EXPECT_EQ(collect(*moves).tokens, expected(endless({4, 5}, 20)));
  EXPECT_GT(pipeline_.n_batches().at(1), before);
  const EngineCounters counters = engine_->status().counters;
  EXPECT_EQ(counters.plans_lost, 0u) << "nobody waited";
  EXPECT_GT(counters.recomputed_tokens, 0u);
  EXPECT_LE(counters.recomputed_tokens, 8u) << "what the other one had computed";
}

TEST_F(EngineReplicas, GetWhatTheyHaveCachedUnlessTheyAreFarBusier) {
  start(with_replicas(make_plan({full_group(256)}, 256, 64, 8), {{1}, {2}}));
  std::mt19937 random(3);
  const std::vector<int32_t> text = random_tokens(random, 40);
  collect(*engine_->submit(endless(text, 1)));
  const auto n_batches = [&](uint64_t replica) {
    const auto all = pipeline_.n_batches();
    const auto at = all.find(replica);
    return at == all.end() ? size_t{0} : at->second;
  };
  ASSERT_EQ(n_batches(2), 0u);
  pipeline_.close_gate();
  std::vector<std::shared_ptr<TokenStream>> streams;
  const auto submit = [&](std::vector<int32_t> prompt) {
    streams.push_back(engine_->submit(endless(std::move(prompt), 2)));
    while (engine_->status().slots_busy < streams.size()) std::this_thread::yield();
  };
  submit(text);
  submit(text);
  EXPECT_EQ(n_batches(2), 0u) << "the first is not busy enough";
  submit(text);
  while (n_batches(2) == 0) std::this_thread::yield();
  pipeline_.open_gate();
  for (const auto& stream : streams) EXPECT_EQ(collect(*stream).tokens, expected(endless(text, 2)));
}

// Everything that a request may carry through the loss of a replica, of all, and the coming of others.
TEST_F(EngineReplicas, ComeAndGoAtRandomMomentsWithoutChangingAnyAnswer) {
  const std::vector<std::vector<GroupLimits>> shapes = {
      {full_group(256)}, {full_group(40)}, {full_group(64), window_group(6, 40)}, {window_group(5, 64)}};
  for (size_t shape = 0; shape < shapes.size(); ++shape) {
    SCOPED_TRACE(shape);
    std::mt19937 random(static_cast<uint32_t>(shape) + 20);
    std::vector<GenerateParams> requests;
    for (int i = 0; i < 16; ++i) {
      requests.push_back(random_request(random));
      requests.back().n_predict = 25;
      if (!requests.back().grammar) requests.back().sampling.ignore_eos = true;
    }
    const PlanSummary plan = make_plan(shapes[shape], 64, 5, 6);
    FakePipeline pipeline;
    std::vector<ReplicaSummary> replicas = {{1, 1}, {2, 2}};
    uint64_t next_id = 3;
    pipeline.ready(with_replicas(plan, replicas));
    Engine engine(pipeline, *vocabulary_);
    ASSERT_TRUE(engine.wait_until_ready(kLong));
    std::vector<std::shared_ptr<TokenStream>> streams;
    for (const GenerateParams& request : requests) streams.push_back(engine.submit(request));
    auto embedding = engine.embed({.tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9}, .pooling = Pooling::none});
    size_t n_batches = 0;
    for (int round = 0; round < 20; ++round) {
      pipeline.wait_for_batches(n_batches += random() % 5);
      n_batches = std::max(n_batches, pipeline.batches().size());
      std::erase_if(replicas, [&](const ReplicaSummary&) { return random() % 3 == 0; });
      if (replicas.empty()) pipeline.lose("all are gone");
      while (replicas.empty() || (replicas.size() < 3 && random() % 2)) replicas.push_back({next_id++, 1});
      pipeline.ready(with_replicas(plan, replicas));
    }
    for (size_t i = 0; i < streams.size(); ++i) {
      SCOPED_TRACE(i);
      const Answer answer = collect(*streams[i]);
      EXPECT_FALSE(answer.error.has_value()) << answer.error->message;
      EXPECT_EQ(answer.tokens, expected_tokens(plan, requests[i], *vocabulary_));
    }
    EXPECT_TRUE(collect(*embedding).embedding);
    EXPECT_THAT(pipeline.errors(), IsEmpty());
  }
}

}  // namespace
}  // namespace caravan::engine::test
