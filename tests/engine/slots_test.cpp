// Slots as clients see them, and the shift of a full context.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "engine/engine_support.h"
#include "engine/fake_pipeline.h"

namespace caravan::engine::test {
namespace {

using testing::IsEmpty;
using testing::SizeIs;

class SlotsTest : public testing::Test {
 protected:
  void start(PlanSummary plan, EngineOptions options = {}) {
    plan_ = plan;
    pipeline_.ready(std::move(plan));
    engine_.emplace(pipeline_, *vocabulary_, options);
    ASSERT_TRUE(engine_->wait_until_ready(kLong));
  }
  Answer answer(const GenerateParams& params) { return collect(*engine_->submit(params)); }
  // Ends when the engine's thread has taken everything in.
  void wait_for_slots(const std::function<bool(const std::vector<SlotStatus>&)>& predicate) {
    while (!predicate(engine_->slots())) std::this_thread::yield();
  }
  void TearDown() override {
    engine_.reset();
    EXPECT_THAT(pipeline_.errors(), IsEmpty());
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

TEST_F(SlotsTest, ARequestRunsInTheSlotItAsksFor) {
  start(make_plan({full_group(64)}));
  GenerateParams params = endless({1, 2, 3}, 4);
  for (const uint32_t wanted : {2u, 0u, 3u, 6u}) {
    params.slot = wanted;
    EXPECT_EQ(answer(params).final->slot, wanted % 4);
  }
}

TEST_F(SlotsTest, ARequestWaitsForItsSlotAndOthersDoNotWaitForIt) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  GenerateParams params = endless({1, 2, 3}, 4);
  params.slot = 1;
  auto first = engine_->submit(params);
  pipeline_.wait_for_batches(1);
  auto second = engine_->submit(params);
  GenerateParams other = endless({7, 8, 9}, 2);
  auto third = engine_->submit(other);
  pipeline_.release(2);
  pipeline_.wait_until([](const auto& batches) {
    for (const stage::Batch& batch : batches)
      if (std::count(batch.tokens.begin(), batch.tokens.end(), 7) > 0) return true;
    return false;
  });
  wait_for_slots([](const auto& slots) { return slots[0].processing && slots[1].processing; });
  EXPECT_EQ(engine_->status().queue_length, 1u);
  pipeline_.open_gate();
  EXPECT_EQ(collect(*first).final->slot, 1u);
  EXPECT_EQ(collect(*second).final->slot, 1u);
  EXPECT_EQ(collect(*third).tokens, expected_tokens(plan_, other, *vocabulary_));
}

TEST_F(SlotsTest, AnOldRequestThatWaitedForItsSlotTakesItsBlocksFromYoungerOnes) {
  pipeline_.close_gate();
  start(make_plan({full_group(10)}, 256, 1, 2));  // one row per batch, 40 tokens
  GenerateParams first = endless({1, 2, 3}, 3), second = endless({4, 5, 6}, 20), third = endless({7, 8, 9}, 20);
  first.slot = second.slot = 0;
  std::vector<std::shared_ptr<TokenStream>> streams = {engine_->submit(first), engine_->submit(second),
                                                       engine_->submit(third)};
  pipeline_.open_gate();
  EXPECT_EQ(collect(*streams[0]).tokens, expected_tokens(plan_, first, *vocabulary_));
  EXPECT_EQ(collect(*streams[1]).tokens, expected_tokens(plan_, second, *vocabulary_));
  EXPECT_EQ(collect(*streams[2]).tokens, expected_tokens(plan_, third, *vocabulary_));
}

TEST_F(SlotsTest, TellsWhatRunsInEachSlotAndWhatRanThereLast) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  EXPECT_THAT(engine_->slots(), SizeIs(4));
  EXPECT_FALSE(engine_->slots()[0].task);
  GenerateParams params = endless({1, 2, 3, 4, 5}, 6);
  params.slot = 2;
  auto stream = engine_->submit(params);
  pipeline_.release(3);
  wait_for_slots([](const auto& slots) { return slots[2].task && slots[2].task->n_predicted == 3; });
  const SlotStatus running = engine_->slots()[2];
  EXPECT_TRUE(running.processing);
  EXPECT_EQ(running.id, 2u);
  EXPECT_EQ(running.task->n_prompt, 5u);
  EXPECT_EQ(running.task->n_prompt_computed, 5u);
  EXPECT_EQ(running.task->params->n_predict, 6);
  EXPECT_FALSE(engine_->slots()[1].processing);
  EXPECT_THROW(engine_->slot_tokens(2), RequestError);
  pipeline_.open_gate();
  const Answer done = collect(*stream);
  const SlotStatus ended = engine_->slots()[2];
  EXPECT_FALSE(ended.processing);
  EXPECT_EQ(ended.task->n_predicted, 6u);
  std::vector<int32_t> tokens = params.prompt;
  tokens.insert(tokens.end(), done.tokens.begin(), done.tokens.end() - 1);  // the last was sampled, not computed
  EXPECT_EQ(engine_->slot_tokens(2), tokens);
  EXPECT_THROW(engine_->slot_tokens(4), RequestError);
}

TEST_F(SlotsTest, AnErasedSlotIsNotReused) {
  start(make_plan({full_group(64)}));
  GenerateParams params = endless({1, 2, 3, 4, 5, 6, 7, 8, 9}, 2);
  params.slot = 0;
  answer(params);
  EXPECT_EQ(answer(params).final->timings.cache_n, 8u);
  EXPECT_EQ(engine_->erase_slot(0), 10u);
  EXPECT_EQ(engine_->erase_slot(0), 0u);
  EXPECT_EQ(answer(params).final->timings.cache_n, 0u);
  EXPECT_THROW(engine_->erase_slot(9), RequestError);
}

TEST_F(SlotsTest, ARestoredSlotGivesTheSameAnswer) {
  start(make_plan({full_group(64)}));
  GenerateParams params = endless({1, 2, 3, 4, 5, 6, 7, 8, 9}, 7);
  params.slot = 0;
  const Answer first = answer(params);
  const std::vector<int32_t> saved = engine_->slot_tokens(0);
  engine_->erase_slot(0);
  GenerateParams restore = endless(saved, 0);
  restore.slot = 3;
  answer(restore);
  EXPECT_EQ(engine_->slot_tokens(3), saved);
  const Answer second = answer(params);
  EXPECT_EQ(second.final->timings.cache_n, 8u);
  EXPECT_EQ(second.tokens, first.tokens);
}

// The answer with shifts, computed without an engine: the model sees what is left of the text, the sampler all of it.
std::vector<int32_t> expected_with_shifts(const PlanSummary& plan, const GenerateParams& params,
                                          const vocab::Vocabulary& vocabulary, uint32_t n_keep, uint32_t n_discard) {
  const ToyModel model(plan.groups, plan.n_vocab, plan.n_embd);
  Sampler sampler(params.sampling, params.sampling.seed.value_or(0), vocabulary.end_of_generation_tokens(),
                  plan.n_vocab, &vocabulary);
  std::vector<int32_t> seen = params.prompt, history = params.prompt, answer;
  while (answer.size() < static_cast<size_t>(params.n_predict)) {
    const stage::RowOutput row{0, stage::OutputKind::logits, model.logits(model.states(seen).back()), {}, 0};
    const int32_t token = sampler.sample(row, history).token;
    for (auto* list : {&seen, &history, &answer}) list->push_back(token);
    if (seen.size() < plan.n_ctx) continue;
    const uint32_t n = n_discard > 0 ? n_discard : (plan.n_ctx - n_keep) / 2;
    seen.erase(seen.begin() + n_keep, seen.begin() + n_keep + n);
  }
  return answer;
}

TEST_F(SlotsTest, AFullContextShiftsAndTheAnswerGoesOn) {
  EngineOptions options;
  options.context_shift = true;
  start(make_plan({full_group(64), window_group(6, 20)}, 24), options);
  GenerateParams params = endless({4, 5, 6, 7, 8, 9}, 60);
  params.sampling.temperature = 0.9f;
  params.sampling.repeat_penalty = 1.3f;
  const Answer all = answer(params);
  EXPECT_EQ(all.tokens, expected_with_shifts(plan_, params, *vocabulary_, 0, 0));
  EXPECT_TRUE(all.final->truncated);
  EXPECT_EQ(all.final->stop_type, StopType::limit);
  EXPECT_EQ(all.final->timings.predicted_n, 60u);
  params.n_keep = 3;
  params.n_discard = 2;
  EXPECT_EQ(answer(params).tokens, expected_with_shifts(plan_, params, *vocabulary_, 3, 2));
  params.n_keep = -1;
  params.n_discard = 0;
  EXPECT_EQ(answer(params).tokens, expected_with_shifts(plan_, params, *vocabulary_, 6, 0));
  params.n_keep = 1000;  // four tokens are always left to shift
  EXPECT_EQ(answer(params).tokens, expected_with_shifts(plan_, params, *vocabulary_, 20, 0));
  params.prompt.insert(params.prompt.begin(), 1);  // BOS is kept, too
  params.n_keep = 3;
  EXPECT_EQ(answer(params).tokens, expected_with_shifts(plan_, params, *vocabulary_, 4, 0));
  EXPECT_GT(engine_->status().counters.finished, 0u);
}

TEST_F(SlotsTest, SeveralSequencesShiftWithFewBlocks) {
  EngineOptions options;
  options.context_shift = true;
  PlanSummary plan = make_plan({full_group(9)}, 24, 3, 4);
  plan.stages.resize(2);
  start(plan, options);
  std::vector<GenerateParams> requests;
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 5; ++i) {
    requests.push_back(endless({4 + i, 5, 6, 7}, 50));
    streams.push_back(engine_->submit(requests.back()));
  }
  for (size_t i = 0; i < streams.size(); ++i)
    EXPECT_EQ(collect(*streams[i]).tokens, expected_with_shifts(plan_, requests[i], *vocabulary_, 0, 0));
}

}  // namespace
}  // namespace caravan::engine::test
