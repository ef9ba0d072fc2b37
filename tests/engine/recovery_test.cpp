// What the engine does while a plan is lost and after the next one came: requests wait and go on exactly.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <random>

#include "engine/engine.h"
#include "engine/engine_support.h"
#include "engine/fake_pipeline.h"

namespace caravan::engine::test {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr const char* kReason = "backend 127.0.0.1:50052 closed the connection";

class Recovery : public testing::Test {
 protected:
  Recovery() { spdlog::set_level(spdlog::level::off); }
  ~Recovery() override { spdlog::set_level(spdlog::level::info); }
  void start(PlanSummary plan, EngineOptions options = {}) {
    plan_ = plan;
    pipeline_.ready(std::move(plan));
    engine_.emplace(pipeline_, *vocabulary_, options);
    ASSERT_TRUE(engine_->wait_until_ready(kLong));
  }
  void TearDown() override {
    engine_.reset();
    EXPECT_THAT(pipeline_.errors(), IsEmpty());
  }
  std::vector<int32_t> expected(const GenerateParams& params) { return expected_tokens(plan_, params, *vocabulary_); }
  void wait_until_lost() {
    while (engine_->status().state != EngineStatus::State::no_plan) std::this_thread::yield();
  }
  static void expect_error(const Answer& answer, RequestError::Kind kind, const std::string& text) {
    ASSERT_TRUE(answer.error);
    EXPECT_EQ(answer.error->kind, kind);
    EXPECT_THAT(answer.error->message, HasSubstr(text));
  }

  FakePipeline pipeline_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_ = make_vocabulary();
  PlanSummary plan_;
  std::optional<Engine> engine_;
};

GenerateParams endless(std::vector<int32_t> prompt, int32_t n_predict) {
  GenerateParams params = greedy(std::move(prompt), n_predict);
  params.sampling.ignore_eos = true;
  return params;
}

TEST_F(Recovery, RunningWaitingAndNewRequestsGetExactlyTheirTokensOnceThereIsAPlanAgain) {
  pipeline_.close_gate();
  EngineOptions options;
  options.n_parallel = 1;
  start(make_plan({full_group(64)}), options);
  GenerateParams sampled = endless({1, 2}, 20);
  sampled.sampling.temperature = 1;
  auto running = engine_->submit(sampled);
  auto waiting = engine_->submit(endless({3, 4}, 5));
  pipeline_.release(7);
  pipeline_.wait_for_batches(8);  // the token of the eighth is not sampled yet
  pipeline_.lose(kReason);
  wait_until_lost();
  EXPECT_THAT(engine_->status().reason, HasSubstr("127.0.0.1:50052"));
  EXPECT_FALSE(engine_->status().plan);
  auto late = engine_->submit(endless({5, 6}, 5));
  pipeline_.open_gate();
  plan_.epoch = 2;
  pipeline_.ready(plan_);
  const Answer first = collect(*running);
  EXPECT_EQ(first.tokens, expected(sampled));
  EXPECT_EQ(first.final->timings.predicted_n, 20u);
  EXPECT_EQ(collect(*waiting).tokens, expected(endless({3, 4}, 5)));
  EXPECT_EQ(collect(*late).tokens, expected(endless({5, 6}, 5)));
  const EngineCounters counters = engine_->status().counters;
  EXPECT_EQ(counters.plans_lost, 1u);
  EXPECT_EQ(counters.failed, 0u);
  EXPECT_GE(counters.recomputed_tokens, 8u);
  EXPECT_EQ(counters.predicted_tokens, 30u);
}

// Everything that a request may carry through a loss: grammars, penalties, mirostat, probabilities, shifts, embeddings.
TEST_F(Recovery, LossesAtRandomMomentsChangeNoAnswer) {
  const std::vector<std::vector<GroupLimits>> shapes = {
      {full_group(256)}, {full_group(40)}, {full_group(64), window_group(6, 40)}, {window_group(5, 64)}};
  for (size_t shape = 0; shape < shapes.size(); ++shape) {
    SCOPED_TRACE(shape);
    std::mt19937 random(static_cast<uint32_t>(shape));
    std::vector<GenerateParams> requests;
    for (int i = 0; i < 12; ++i) {
      requests.push_back(random_request(random));
      requests.back().n_predict = 25;
      requests.back().sampling.n_probs = i % 3;
      if (!requests.back().grammar) requests.back().sampling.ignore_eos = true;
    }
    EngineOptions options;
    options.context_shift = true;
    const PlanSummary plan = make_plan(shapes[shape], 40, 5, 3);
    std::vector<Answer> undisturbed;
    {
      FakePipeline pipeline;
      pipeline.ready(plan);
      Engine engine(pipeline, *vocabulary_, options);
      ASSERT_TRUE(engine.wait_until_ready(kLong));
      for (const GenerateParams& request : requests) undisturbed.push_back(collect(*engine.submit(request)));
      undisturbed.push_back(collect(*engine.embed({.tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9}, .pooling = Pooling::none})));
    }
    FakePipeline pipeline;
    pipeline.ready(plan);
    Engine engine(pipeline, *vocabulary_, options);
    ASSERT_TRUE(engine.wait_until_ready(kLong));
    std::vector<std::shared_ptr<TokenStream>> streams;
    for (const GenerateParams& request : requests) streams.push_back(engine.submit(request));
    streams.push_back(engine.embed({.tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9}, .pooling = Pooling::none}));
    size_t n_batches = 0;
    for (uint64_t round = 1; round <= 12; ++round) {
      pipeline.wait_for_batches(n_batches += random() % 5);
      n_batches = std::max(n_batches, pipeline.batches().size());
      if (random() % 3 > 0) pipeline.lose(kReason);  // else it is replaced without a pause
      PlanSummary next = make_plan(shapes[shape], 40, 1 + random() % 9, 1 + random() % 4);
      next.epoch = 1 + round;
      next.stages.resize(1 + random() % 3);
      pipeline.ready(next);
    }
    for (size_t i = 0; i < streams.size(); ++i) {
      SCOPED_TRACE(i);
      const Answer answer = collect(*streams[i]);
      EXPECT_FALSE(answer.error.has_value()) << answer.error->message;
      EXPECT_EQ(answer.tokens, undisturbed[i].tokens);
      EXPECT_EQ(answer.text, undisturbed[i].text);
      ASSERT_EQ(answer.probabilities.size(), undisturbed[i].probabilities.size());
      for (size_t t = 0; t < answer.probabilities.size(); ++t) {
        EXPECT_EQ(answer.probabilities[t].chosen.logprob, undisturbed[i].probabilities[t].chosen.logprob);
        EXPECT_EQ(answer.probabilities[t].top.size(), undisturbed[i].probabilities[t].top.size());
      }
      ASSERT_EQ(answer.embedding.has_value(), undisturbed[i].embedding.has_value());
      if (answer.embedding) {
        EXPECT_EQ(answer.embedding->vectors, undisturbed[i].embedding->vectors);
      }
    }
    engine.shutdown(std::chrono::milliseconds(0));
    EXPECT_THAT(pipeline.errors(), IsEmpty());
  }
}

TEST_F(Recovery, TheProgressOfAPromptNeverGoesBack) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}, 256, 4));
  GenerateParams params = endless(std::vector<int32_t>(20, 7), 2);
  params.report_progress = true;
  auto stream = engine_->submit(params);
  pipeline_.release(3);
  pipeline_.wait_for_batches(4);
  pipeline_.lose(kReason);
  pipeline_.open_gate();
  pipeline_.ready(plan_);
  const Answer answer = collect(*stream);
  std::vector<uint32_t> computed;
  for (const ProgressEvent& event : answer.progress) computed.push_back(event.n_computed);
  EXPECT_EQ(computed, (std::vector<uint32_t>{4, 8, 12, 16, 20}));
}

TEST_F(Recovery, WhatFindsNoPlanForTooLongEndsWithTheReason) {
  EngineOptions options;
  options.recovery_timeout = std::chrono::milliseconds(1);
  pipeline_.close_gate();
  start(make_plan({full_group(64)}), options);
  auto stream = engine_->submit(endless({1, 2}, 5));
  pipeline_.wait_for_batches(1);
  pipeline_.lose(kReason);
  expect_error(collect(*stream), RequestError::Kind::unavailable, kReason);
  // Those that come now wait as long.
  const Answer late = collect(*engine_->submit(endless({1, 2}, 5)));
  expect_error(late, RequestError::Kind::unavailable, "--recovery-timeout");
  pipeline_.open_gate();
  pipeline_.ready(plan_);
  ASSERT_TRUE(engine_->wait_until_ready(kLong));
  EXPECT_EQ(collect(*engine_->submit(endless({1, 2}, 5))).tokens, expected(endless({1, 2}, 5)));
  EXPECT_EQ(engine_->status().counters.failed, 2u);
}

TEST_F(Recovery, TheTimeInWhichTheNextPlanLoadsDoesNotCount) {
  EngineOptions options;
  options.recovery_timeout = std::chrono::milliseconds(0);
  pipeline_.close_gate();
  start(make_plan({full_group(64)}), options);
  auto stream = engine_->submit(endless({1, 2}, 5));
  pipeline_.wait_for_batches(1);
  pipeline_.set_loading(true);
  pipeline_.lose(kReason);
  wait_until_lost();
  pipeline_.wake();  // the engine looks at who has waited
  EXPECT_EQ(stream->next(std::chrono::milliseconds(20)), std::nullopt);
  pipeline_.set_loading(false);
  pipeline_.wake();
  expect_error(collect(*stream), RequestError::Kind::unavailable, kReason);
}

TEST_F(Recovery, ASmallerContextEndsOnlyWhatDoesNotFitIt) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  auto fits = engine_->submit(endless({1, 2, 3}, 15));
  auto too_long = engine_->submit(endless(std::vector<int32_t>(50, 1), 100));
  auto grows_too_long = engine_->submit(endless({1, 2, 3}, 100));
  pipeline_.release(2);
  pipeline_.wait_for_batches(3);
  PlanSummary smaller = make_plan({full_group(10)}, 40, 5, 2, 8);
  smaller.epoch = 2;
  pipeline_.lose(kReason);
  pipeline_.open_gate();
  pipeline_.ready(smaller);
  EXPECT_EQ(collect(*fits).tokens, expected(endless({1, 2, 3}, 15)));
  expect_error(collect(*too_long), RequestError::Kind::context_exceeded, "with less room");
  const Answer grown = collect(*grows_too_long);
  expect_error(grown, RequestError::Kind::unavailable, "more than the 40 tokens of context");
  EXPECT_GT(grown.tokens.size(), 30u);  // but for what may be a part of a character
  std::vector<int32_t> tokens = expected(endless({1, 2, 3}, 37));
  tokens.resize(grown.tokens.size());
  EXPECT_EQ(grown.tokens, tokens);
  EXPECT_EQ(engine_->status().plan->epoch, 2u);
}

TEST_F(Recovery, TheQueueIsBoundedWhileThereIsNoPlan) {
  EngineOptions options;
  options.max_queue = 2;
  options.n_parallel = 1;
  pipeline_.close_gate();
  start(make_plan({full_group(64)}), options);
  auto running = engine_->submit(endless({1}, 5));
  pipeline_.wait_for_batches(1);
  pipeline_.lose(kReason);
  wait_until_lost();
  auto second = engine_->submit(endless({2}, 5)), third = engine_->submit(endless({3}, 5));
  EXPECT_THROW(engine_->submit(endless({4}, 5)), RequestError);
  EXPECT_THROW(engine_->submit(endless(std::vector<int32_t>(300, 1), 5)), RequestError) << "too long for the last plan";
}

TEST_F(Recovery, ClientsThatLeaveAndAShutdownDoNotWaitForAPlan) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  auto leaves = engine_->submit(endless({1}, 5));
  auto stays = engine_->submit(endless({2}, 5));
  pipeline_.wait_for_batches(1);
  pipeline_.lose(kReason);
  wait_until_lost();
  leaves->cancel();
  while (engine_->status().counters.cancelled == 0) std::this_thread::yield();
  engine_->shutdown(std::chrono::milliseconds(1));
  expect_error(collect(*stays), RequestError::Kind::unavailable, "shutting down");
}

TEST_F(Recovery, TheTokensOfSlotsStayAndAreNotReadMeanwhile) {
  start(make_plan({full_group(64)}));
  GenerateParams params = endless({1, 2, 3}, 5);
  params.slot = 1;
  collect(*engine_->submit(params));
  const std::vector<int32_t> left = engine_->slot_tokens(1);
  EXPECT_EQ(left.size(), 7u);
  pipeline_.lose(kReason);
  wait_until_lost();
  EXPECT_THROW(engine_->slot_tokens(1), RequestError);
  EXPECT_EQ(engine_->slots().size(), 4u);
  plan_.epoch = 2;
  pipeline_.ready(plan_);
  ASSERT_TRUE(engine_->wait_until_ready(kLong));
  EXPECT_EQ(engine_->slot_tokens(1), left);
}

}  // namespace
}  // namespace caravan::engine::test
