// The prefix cache on its own, and in the engine: over a model whose output depends on every KV cell that a row sees,
// so that a wrong block, a wrong copy or one evicted while it is held changes the answer.
#include "engine/prefix_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "engine/engine_support.h"
#include "engine/fake_pipeline.h"

namespace caravan::engine::test {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<int32_t> counting(int32_t first, size_t n) {
  std::vector<int32_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::vector<int32_t> operator+(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// A cache with blocks of 4 tokens, and sequences that fill it.
class PrefixCacheTest : public testing::Test {
 protected:
  void start(std::vector<GroupLimits> groups) {
    plan_ = make_plan(std::move(groups));
    allocators_.clear();
    for (const GroupLimits& group : plan_.groups) allocators_.emplace_back(group.n_blocks);
    cache_.reset(plan_, &allocators_);
  }
  // A table per group for n tokens; windows dropped what the next row does not see.
  std::vector<BlockTable> allocate(uint32_t n_tokens) {
    std::vector<BlockTable> tables(plan_.groups.size());
    for (uint32_t group = 0; group < tables.size(); ++group) {
      tables[group].n_dropped = plan_.groups[group].first_visible(n_tokens) / plan_.block_tokens;
      while (tables[group].end() * plan_.block_tokens < n_tokens) {
        cache_.evict(group, 1);
        tables[group].blocks.push_back(*allocators_[group].allocate());
      }
    }
    return tables;
  }
  void release(const std::vector<BlockTable>& tables) {
    for (uint32_t group = 0; group < tables.size(); ++group)
      for (const uint32_t block : tables[group].blocks) allocators_[group].release(block);
  }
  // A sequence that computed all its tokens and ended.
  std::vector<BlockTable> run(const std::vector<int32_t>& tokens) {
    const std::vector<BlockTable> tables = allocate(static_cast<uint32_t>(tokens.size()));
    cache_.insert_ended(tokens, tables);
    release(tables);
    return tables;
  }
  uint32_t found(const std::vector<int32_t>& tokens) const {
    const PrefixMatch match = cache_.find(tokens, static_cast<uint32_t>(tokens.size()));
    return match.n_tokens + match.n_partial;
  }

  PlanSummary plan_;
  std::vector<BlockAllocator> allocators_;
  PrefixCache cache_;
};

TEST_F(PrefixCacheTest, FindsTheBlocksOfTheLongestCommonPrefix) {
  start({full_group(16)});
  const std::vector<int32_t> tokens = counting(1, 10);
  const auto tables = run(tokens);
  const PrefixMatch match = cache_.find(counting(1, 8) + counting(50, 4), 12);
  EXPECT_EQ(match.n_tokens, 8u);
  EXPECT_THAT(match.tables[0].blocks, ElementsAre(tables[0].blocks[0], tables[0].blocks[1]));
  EXPECT_EQ(match.n_partial, 0u);
  EXPECT_EQ(found(counting(2, 8)), 0u);
}

TEST_F(PrefixCacheTest, FindsAPrefixThatEndsInsideABlock) {
  start({full_group(16)});
  const auto tables = run(counting(1, 10));
  const PrefixMatch inside = cache_.find(counting(1, 6) + counting(50, 4), 10);
  EXPECT_EQ(inside.n_tokens, 4u);
  EXPECT_EQ(inside.n_partial, 2u);
  EXPECT_THAT(inside.partial, ElementsAre(tables[0].blocks[1]));
  // The last, partly filled block counts too; the limit holds in the middle of a block.
  EXPECT_EQ(found(counting(1, 20)), 10u);
  EXPECT_EQ(cache_.find(counting(1, 20), 7).n_partial, 3u);
}

TEST_F(PrefixCacheTest, PrefersTheChildThatSharesMost) {
  start({full_group(16)});
  run({1, 2, 3, 4, 10, 11, 12, 13});
  run({1, 2, 3, 4, 10, 11, 20});
  run({1, 2, 3, 4, 10, 30});
  run({1, 2, 3, 4, 5, 5, 5, 5});
  EXPECT_EQ(found({1, 2, 3, 4, 10, 11, 12, 99}), 7u);
  EXPECT_EQ(found({1, 2, 3, 4, 10, 11, 20, 99}), 7u);
  EXPECT_EQ(found({1, 2, 3, 4, 10, 30, 1, 1}), 6u);
  EXPECT_EQ(found({1, 2, 3, 4, 10, 11, 99}), 6u);
  EXPECT_EQ(found({1, 2, 3, 4, 99}), 4u);
}

TEST_F(PrefixCacheTest, KeepsEqualContentsOnceAndReplacesWhatIsShorter) {
  start({full_group(16)});
  run(counting(1, 6));
  EXPECT_EQ(allocators_[0].n_idle(), 2u);
  run(counting(1, 5));  // shorter: nothing new
  EXPECT_EQ(allocators_[0].n_idle(), 2u);
  run(counting(1, 8));  // its second block replaces the shorter one
  EXPECT_EQ(allocators_[0].n_idle(), 2u);
  run(counting(1, 8));
  EXPECT_EQ(allocators_[0].n_idle(), 2u);
  EXPECT_EQ(found(counting(1, 8)), 8u);
}

TEST_F(PrefixCacheTest, EvictsTheLeastRecentlyUsedFromItsEnd) {
  start({full_group(6)});
  run(counting(1, 12));
  run(counting(101, 12));
  EXPECT_EQ(allocators_[0].n_free(), 0u);
  cache_.hold(cache_.find(counting(1, 12), 12));  // used now
  release(cache_.find(counting(1, 12), 12).tables);
  cache_.evict(0, 1);
  EXPECT_EQ(found(counting(101, 12)), 8u);
  cache_.evict(0, 3);
  EXPECT_EQ(found(counting(101, 12)), 0u);
  EXPECT_EQ(found(counting(1, 12)), 12u);
  cache_.evict(0, 5);
  EXPECT_EQ(found(counting(1, 12)), 4u);
}

TEST_F(PrefixCacheTest, KeepsLockedPrefixDuringEviction) {
  start({full_group(6)});
  run(counting(1, 8));
  const PrefixMatch held = cache_.find(counting(1, 8), 8);
  cache_.hold(held);
  run(counting(101, 16));
  run(counting(201, 16));
  EXPECT_EQ(found(counting(1, 8)), 8u);
  EXPECT_EQ(found(counting(101, 16)), 0u);
  release(held.tables);
  cache_.evict(0, 6);
  EXPECT_EQ(found(counting(1, 8)), 0u);
}

TEST_F(PrefixCacheTest, HoldsAPartialBlockUntilItWasCopied) {
  start({full_group(2)});
  run(counting(1, 4));
  const PrefixMatch match = cache_.find(counting(1, 3), 3);
  ASSERT_EQ(match.n_partial, 3u);
  cache_.hold(match);
  cache_.evict(0, 1);
  EXPECT_EQ(allocators_[0].n_available(), 1u);
  cache_.release_partial(match);
  EXPECT_EQ(allocators_[0].n_available(), 2u);
}

TEST_F(PrefixCacheTest, ASequenceSharesItsBlocksWhileItRuns) {
  start({full_group(16)});
  const std::vector<int32_t> tokens = counting(1, 11);
  const auto tables = allocate(11);
  cache_.insert(tokens, tables);
  const PrefixMatch match = cache_.find(counting(1, 20), 20);
  EXPECT_EQ(match.n_tokens, 8u);
  EXPECT_EQ(match.n_partial, 0u);  // the block that is still written to is nobody else's
  EXPECT_EQ(allocators_[0].n_idle(), 0u);
  release(tables);
  EXPECT_EQ(allocators_[0].n_idle(), 2u);
  EXPECT_EQ(allocators_[0].n_free(), 14u);
}

TEST_F(PrefixCacheTest, UsesAPrefixOnlyWhileTheTokensOfItsWindowAreThere) {
  start({full_group(16), window_group(6, 4)});
  run(counting(1, 16));  // a row at 16 sees [11, 16]: blocks 2 and 3 of the window group are left
  const PrefixMatch all = cache_.find(counting(1, 20), 20);
  EXPECT_EQ(all.n_tokens, 16u);
  EXPECT_EQ(all.tables[0].end(), 4u);
  EXPECT_EQ(all.tables[1].n_dropped, 2u);
  EXPECT_EQ(all.tables[1].blocks.size(), 2u);
  // A shorter prefix would need block 1 or what is before it.
  EXPECT_EQ(found(counting(1, 12) + counting(50, 4)), 0u);
  EXPECT_EQ(found(counting(1, 8) + counting(50, 4)), 0u);
  // Without its window the prefix is of no use; the full group alone does not help.
  cache_.evict(1, 4);
  EXPECT_EQ(found(counting(1, 20)), 0u);
}

TEST_F(PrefixCacheTest, FillsInTheWindowsThatWereEvicted) {
  start({full_group(16), window_group(6, 4)});
  run(counting(1, 16));
  cache_.evict(1, 4);
  run(counting(1, 16));
  EXPECT_EQ(found(counting(1, 20)), 16u);
  EXPECT_EQ(allocators_[0].n_idle(), 4u);
}

TEST_F(PrefixCacheTest, WindowsOnlyNeedTheirEnd) {
  start({window_group(4, 3)});
  run(counting(1, 40));
  EXPECT_EQ(found(counting(1, 40)), 40u);
  cache_.evict(0, 3);
  EXPECT_EQ(found(counting(1, 40)), 0u);
}

TEST_F(PrefixCacheTest, ErasesWhatNoLongerPathShares) {
  start({full_group(16)});
  run(counting(1, 10));
  run(counting(1, 4) + counting(50, 4));
  cache_.erase(counting(1, 10));
  EXPECT_EQ(found(counting(1, 10)), 4u);
  EXPECT_EQ(found(counting(1, 4) + counting(50, 4)), 8u);
  cache_.clear();
  EXPECT_EQ(allocators_[0].n_free(), 16u);
}

TEST_F(PrefixCacheTest, TakesPathsAsLongAsAnyContext) {
  start({full_group(60000)});
  const std::vector<int32_t> tokens(240000, 1);
  run(tokens);
  EXPECT_EQ(found(tokens), 240000u);
  cache_.evict(0, 60000);
  run(tokens);
}

// The engine with the cache.

class PrefixEngineTest : public testing::Test {
 protected:
  void start(const PlanSummary& plan) {
    plan_ = plan;
    pipeline_.ready(plan);
    engine_.emplace(pipeline_, *vocabulary_, EngineOptions{});
    ASSERT_TRUE(engine_->wait_until_ready(kLong));
  }
  Answer answer(const GenerateParams& params) { return collect(*engine_->submit(params)); }
  std::vector<int32_t> expected(const GenerateParams& params) { return expected_tokens(plan_, params, *vocabulary_); }
  void TearDown() override {
    engine_.reset();
    EXPECT_THAT(pipeline_.errors(), IsEmpty());
  }

  FakePipeline pipeline_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_ = make_vocabulary();
  PlanSummary plan_;
  std::optional<Engine> engine_;
};

GenerateParams long_greedy(std::vector<int32_t> prompt, int32_t n_predict) {
  GenerateParams params = greedy(std::move(prompt), n_predict);
  params.sampling.ignore_eos = true;
  return params;
}

TEST_F(PrefixEngineTest, ARepeatedPromptComputesOnlyItsLastToken) {
  start(make_plan({full_group(64)}));
  const GenerateParams params = long_greedy(counting(1, 30), 9);
  const Answer first = answer(params), second = answer(params);
  EXPECT_EQ(first.final->timings.cache_n, 0u);
  EXPECT_EQ(first.final->timings.prompt_n, 30u);
  EXPECT_EQ(second.final->timings.cache_n, 29u);
  EXPECT_EQ(second.final->timings.prompt_n, 1u);
  EXPECT_EQ(first.tokens, expected(params));
  EXPECT_EQ(second.tokens, first.tokens);
  EXPECT_EQ(engine_->status().counters.cached_prompt_tokens, 29u);
}

TEST_F(PrefixEngineTest, TheNextTurnOfAChatComputesOnlyWhatIsNew) {
  start(make_plan({full_group(64)}));
  const GenerateParams first = long_greedy(counting(1, 21), 10);
  const Answer turn = answer(first);
  const GenerateParams second = long_greedy(first.prompt + turn.tokens + counting(100, 5), 10);
  const Answer next = answer(second);
  EXPECT_EQ(next.tokens, expected(second));
  EXPECT_EQ(next.final->timings.cache_n, 30u);  // the last token of the answer was never computed
  EXPECT_EQ(next.final->timings.prompt_n, 6u);
}

TEST_F(PrefixEngineTest, RunningSequencesShareTheirPrefix) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  const std::vector<int32_t> prefix = counting(1, 24);
  const GenerateParams first = long_greedy(prefix + counting(100, 3), 20);
  auto running = engine_->submit(first);
  pipeline_.release(3);  // 16 and 11 prompt tokens, one decoded
  pipeline_.wait_for_batches(4);
  const GenerateParams second = long_greedy(prefix + counting(200, 3), 20);
  auto sharing = engine_->submit(second);
  pipeline_.open_gate();
  const Answer a = collect(*running), b = collect(*sharing);
  EXPECT_EQ(a.tokens, expected(first));
  EXPECT_EQ(b.tokens, expected(second));
  EXPECT_EQ(b.final->timings.cache_n, 24u);
}

TEST_F(PrefixEngineTest, SharedPrefixesLetMoreSequencesRunAtOnce) {
  start(make_plan({full_group(12)}));  // 48 tokens: the prefix of 32 once, and 16 for the rest
  const std::vector<int32_t> prefix = counting(1, 32);
  answer(long_greedy(prefix, 1));
  std::vector<GenerateParams> requests;
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 4; ++i) {
    requests.push_back(long_greedy(prefix + std::vector<int32_t>{100 + i}, 3));
    streams.push_back(engine_->submit(requests.back()));
  }
  for (size_t i = 0; i < streams.size(); ++i) {
    const Answer result = collect(*streams[i]);
    EXPECT_EQ(result.tokens, expected(requests[i]));
    EXPECT_EQ(result.final->timings.cache_n, 32u);
  }
  EXPECT_EQ(engine_->status().counters.preemptions, 0u);
}

TEST_F(PrefixEngineTest, ARequestWithoutCachePromptNeitherTakesNorLeavesAnything) {
  start(make_plan({full_group(64)}));
  GenerateParams params = long_greedy(counting(1, 30), 3);
  answer(params);
  params.cache_prompt = false;
  EXPECT_EQ(answer(params).final->timings.cache_n, 0u);
  params.prompt = counting(100, 30);
  EXPECT_EQ(answer(params).tokens, expected(params));
  params.cache_prompt = true;
  EXPECT_EQ(answer(params).final->timings.cache_n, 0u);
  EXPECT_EQ(answer(params).final->timings.cache_n, 29u);
}

TEST_F(PrefixEngineTest, ACancelledRequestLeavesWhatItHadComputed) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}, 256, 8));
  auto left = engine_->submit(long_greedy(counting(1, 40), 3));
  pipeline_.release(2);
  pipeline_.wait_for_batches(3);  // 24 tokens
  left->cancel();
  while (engine_->status().counters.cancelled == 0) {
    pipeline_.wake();
    std::this_thread::yield();
  }
  pipeline_.open_gate();
  const GenerateParams params = long_greedy(counting(1, 40), 3);
  const Answer result = answer(params);
  EXPECT_EQ(result.tokens, expected(params));
  EXPECT_EQ(result.final->timings.cache_n, 24u);
}

TEST_F(PrefixEngineTest, ANewPlanStartsWithoutAPrefix) {
  start(make_plan({full_group(64)}));
  const GenerateParams params = long_greedy(counting(1, 30), 3);
  answer(params);
  pipeline_.lose("gone");
  while (engine_->status().state == EngineStatus::State::ready) std::this_thread::yield();
  plan_.epoch = 2;
  pipeline_.ready(plan_);
  ASSERT_TRUE(engine_->wait_until_ready(kLong));
  const Answer result = answer(params);
  EXPECT_EQ(result.final->timings.cache_n, 0u);
  EXPECT_EQ(result.tokens, expected(params));
}

TEST_F(PrefixEngineTest, AFailedBatchEmptiesTheCache) {
  start(make_plan({full_group(64)}));
  const GenerateParams params = long_greedy(counting(1, 30), 3);
  answer(params);
  pipeline_.fail_when(
      [](const stage::Batch& batch) { return std::count(batch.tokens.begin(), batch.tokens.end(), 200) > 0; }, "bad");
  EXPECT_TRUE(answer(greedy({200, 200}, 1)).error);
  const Answer result = answer(params);
  EXPECT_EQ(result.final->timings.cache_n, 0u);
  EXPECT_EQ(result.tokens, expected(params));
}

// Prompts that begin like others, in every way: the same, shorter, longer, cut anywhere, or with an earlier answer.
std::vector<int32_t> related_prompt(std::mt19937& random, const std::vector<std::vector<int32_t>>& earlier) {
  if (earlier.empty() || random() % 5 == 0) return random_tokens(random, 1 + random() % 30);
  std::vector<int32_t> prompt = earlier[random() % earlier.size()];
  prompt.resize(1 + random() % prompt.size());
  return prompt + random_tokens(random, random() % 12);
}

TEST_F(PrefixEngineTest, AnswersAreTheSameWithAndWithoutTheCacheUnderEveryKindOfGroup) {
  const std::vector<std::vector<GroupLimits>> shapes = {
      {full_group(256)},                                       // everything stays
      {full_group(24)},                                        // eviction and preemption
      {full_group(14)},                                        // one sequence at a time, more or less
      {full_group(64), window_group(6, 20)},                   //
      {full_group(24), window_group(6, 9)},                    //
      {window_group(5, 20), full_group(40)},                   //
      {window_group(8, 3)},                                    // no full group, the blocks of one sequence
      {window_group(8, 40)},                                   //
      {window_group(3, 30), window_group(9, 12)},              //
      {full_group(30), window_group(1, 30), full_group(200)},  // two full groups of different size
  };
  for (uint32_t shape = 0; shape < shapes.size(); ++shape) {
    uint64_t n_cached = 0;
    for (uint32_t seed = 0; seed < 3; ++seed) {
      SCOPED_TRACE(testing::Message() << "shape " << shape << " seed " << seed);
      std::mt19937 random(shape * 100 + seed);
      FakePipeline pipeline;
      PlanSummary plan = make_plan(shapes[shape], 256, 1 + random() % 20, 1 + random() % 5);
      plan.stages.resize(1 + random() % 3);
      pipeline.ready(plan);
      Engine engine(pipeline, *vocabulary_, {});
      ASSERT_TRUE(engine.wait_until_ready(kLong));
      std::vector<std::vector<int32_t>> earlier;
      for (int round = 0; round < 6; ++round) {
        std::vector<GenerateParams> requests;
        std::vector<std::shared_ptr<TokenStream>> streams;
        for (int i = 0; i < 6; ++i) {
          GenerateParams params = random_request(random);
          params.prompt = related_prompt(random, earlier);
          params.prompt.resize(std::min<size_t>(params.prompt.size(), effective_context(plan) - 1));
          params.cache_prompt = random() % 8 != 0;
          streams.push_back(engine.submit(params));
          requests.push_back(std::move(params));
        }
        for (size_t i = 0; i < requests.size(); ++i) {
          if (random() % 6 == 0) {
            streams[i]->cancel();
            continue;
          }
          const Answer result = collect(*streams[i]);
          EXPECT_EQ(result.tokens, expected_tokens(plan, requests[i], *vocabulary_)) << "round " << round << ", " << i;
          ASSERT_TRUE(result.final);
          EXPECT_EQ(result.final->timings.cache_n + result.final->timings.prompt_n, requests[i].prompt.size());
          n_cached += result.final->timings.cache_n;
          earlier.push_back(requests[i].prompt + result.tokens);
        }
        if (round == 3) {  // a plan change in the middle
          plan.epoch = 2;
          pipeline.ready(plan);
        }
      }
      engine.shutdown(std::chrono::milliseconds(0));
      EXPECT_EQ(engine.status().kv_usage_ratio, 0);
      EXPECT_THAT(pipeline.errors(), IsEmpty());
    }
    const bool barely_fits_one = shape == 6;
    EXPECT_TRUE(barely_fits_one || n_cached > 0) << "shape " << shape;
  }
}

}  // namespace
}  // namespace caravan::engine::test
