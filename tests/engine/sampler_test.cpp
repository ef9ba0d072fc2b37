// Samplers one by one, the random stream, and the choice from candidates against the choice from all logits.
#include "engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "engine/random.h"

namespace caravan::engine {
namespace {

using testing::ElementsAre;

CandidateList list_of(const std::vector<float>& logits) {
  CandidateList list;
  for (size_t i = 0; i < logits.size(); ++i) list.items.push_back({static_cast<int32_t>(i), logits[i]});
  return list;
}

std::vector<int32_t> ids(const CandidateList& list) {
  std::vector<int32_t> result;
  for (const Candidate& candidate : list.items) result.push_back(candidate.id);
  return result;
}

stage::RowOutput all_logits(std::vector<float> logits) {
  return {0, stage::OutputKind::logits, std::move(logits), {}, 0};
}

// What a stage answers, written down from the contract in stage/batch.h.
stage::RowOutput answer(const stage::OutputRequest& wanted, const std::vector<float>& logits) {
  if (wanted.kind == stage::OutputKind::logits) return all_logits(logits);
  stage::RowOutput output{0, wanted.kind, {}, {}, 0};
  output.ids.resize(logits.size());
  std::iota(output.ids.begin(), output.ids.end(), 0);
  std::sort(output.ids.begin(), output.ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  output.ids.resize(wanted.top_k);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  output.log_sum_exp = static_cast<float>(std::log(sum));
  for (const int32_t id : output.ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  for (const int32_t id : wanted.named_ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  return output;
}

SamplingParams greedy_params() {
  SamplingParams params;
  params.temperature = 0;
  return params;
}

TEST(CountTokens, LooksBackOverTheLastNOrAll) {
  const std::vector<int32_t> history = {5, 1, 5, 2, 5};
  EXPECT_THAT(count_tokens(history, 3), ElementsAre(TokenCount{2, 1}, TokenCount{5, 2}));
  EXPECT_THAT(count_tokens(history, -1), ElementsAre(TokenCount{1, 1}, TokenCount{2, 1}, TokenCount{5, 3}));
  EXPECT_THAT(count_tokens(history, 99), count_tokens(history, -1));
  EXPECT_TRUE(count_tokens(history, 0).empty());
}

TEST(Penalties, MatchTheFormula) {
  SamplingParams params;
  params.repeat_penalty = 2;
  params.frequency_penalty = 0.5f;
  params.presence_penalty = 0.25f;
  CandidateList list = list_of({4, -4, 0, 1});
  apply_penalties(list, params, std::vector<TokenCount>{{0, 1}, {1, 3}, {2, 2}});
  EXPECT_EQ(list.items[0].logit, 2 - 0.5f - 0.25f);
  EXPECT_EQ(list.items[1].logit, -8 - 1.5f - 0.25f);
  EXPECT_EQ(list.items[2].logit, 0 - 1.0f - 0.25f);
  EXPECT_EQ(list.items[3].logit, 1);
}

TEST(TopK, KeepsTheLargestAndLowestIdsOfTies) {
  SamplingParams params;
  params.top_k = 3;
  CandidateList list = list_of({1, 3, 2, 3, 2, 2});
  apply_top_k(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(1, 3, 2));
}

TEST(TopP, KeepsTheShortestSufficientPrefix) {
  SamplingParams params;
  const std::vector<float> logits = {std::log(0.5f), std::log(0.1f), std::log(0.3f), std::log(0.1f)};
  for (const auto& [p, n] :
       std::vector<std::pair<float, size_t>>{{0.0f, 1}, {0.4f, 1}, {0.6f, 2}, {0.85f, 3}, {0.95f, 4}}) {
    params.top_p = p;
    CandidateList list = list_of(logits);
    apply_top_p(list, params, {});
    EXPECT_EQ(list.items.size(), n) << p;
    EXPECT_EQ(list.items[0].id, 0);
  }
  params.top_p = 0.1f;
  params.min_keep = 3;
  CandidateList list = list_of(logits);
  apply_top_p(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(0, 2, 1));
}

TEST(MinP, KeepsCandidatesRelativeToTheMostLikely) {
  SamplingParams params;
  params.min_p = 0.25f;
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.3f), std::log(0.1f)};
  CandidateList list = list_of(logits);
  apply_min_p(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(1, 2));
  params.min_keep = 3;
  list = list_of(logits);
  apply_min_p(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(1, 2, 0));
}

TEST(Temperature, DividesOrLeavesTheFirstOfTheLargest) {
  SamplingParams params;
  params.temperature = 2;
  CandidateList list = list_of({4, 2});
  apply_temperature(list, params, {});
  EXPECT_EQ(list.items[0].logit, 2);
  params.temperature = 0;
  list = list_of({1, 7, 7});
  apply_temperature(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(1));
}

TEST(Draw, FollowsTheProbabilities) {
  const CandidateList list = list_of({std::log(0.2f), std::log(0.5f), std::log(0.3f)});
  EXPECT_EQ(draw(list, 0), 0);
  EXPECT_EQ(draw(list, 0.19), 0);
  EXPECT_EQ(draw(list, 0.21), 1);
  EXPECT_EQ(draw(list, 0.69), 1);
  EXPECT_EQ(draw(list, 0.71), 2);
  EXPECT_EQ(draw(list, 0.9999999), 2);
}

TEST(Draw, NeverChoosesAnImpossibleToken) {
  const CandidateList list = list_of({-INFINITY, 1, -INFINITY});
  EXPECT_EQ(draw(list, 0), 1);
  EXPECT_EQ(draw(list, 0x1.fffffffffffffp-1), 1);
  EXPECT_EQ(draw(list_of({-INFINITY, -INFINITY}), 0.5), 0);
}

TEST(Uniform, IsAFunctionOfSeedAndPositionAndSpreadsEvenly) {
  EXPECT_EQ(uniform(1, 5), uniform(1, 5));
  EXPECT_NE(uniform(1, 5), uniform(2, 5));
  EXPECT_NE(uniform(1, 5), uniform(1, 6));
  // 10 bins, 10000 draws along positions and along seeds: a bin's count has a standard deviation of 30.
  for (const bool along_seeds : {false, true}) {
    std::vector<int> bins(10, 0);
    for (uint32_t i = 0; i < 10000; ++i) {
      const double u = along_seeds ? uniform(i, 7) : uniform(7, i);
      ASSERT_GE(u, 0);
      ASSERT_LT(u, 1);
      ++bins[static_cast<size_t>(u * 10)];
    }
    for (const int n : bins) EXPECT_NEAR(n, 1000, 150);
  }
}

TEST(Sampler, BiasAndBansDecideGreedily) {
  SamplingParams params = greedy_params();
  params.logit_bias = {{1, 10}, {1, -4}, {3, -INFINITY}};
  const Sampler sampler(params, 0, std::vector<int32_t>{2}, 5);
  EXPECT_EQ(sampler.sample(all_logits({5, 0, 100, 50, 4}), {}).token, 1);
}

TEST(Sampler, NeverChoosesNotANumber) {
  const Sampler sampler(greedy_params(), 0, {}, 3);
  EXPECT_EQ(sampler.sample(all_logits({NAN, 1, NAN}), {}).token, 1);
}

TEST(Sampler, AppliesSamplersInTheRequestedOrder) {
  // top_k 1 keeps token 0; penalised before, it would lose to token 1.
  SamplingParams params = greedy_params();
  params.top_k = 1;
  params.presence_penalty = 5;
  const std::vector<float> logits = {3, 2};
  const std::vector<int32_t> history = {0};
  EXPECT_EQ(Sampler(params, 0, {}, 2).sample(all_logits(logits), history).token, 1);
  params.samplers = {"top_k", "penalties", "temperature"};
  EXPECT_EQ(Sampler(params, 0, {}, 2).sample(all_logits(logits), history).token, 0);
}

TEST(Sampler, AsksForAllLogitsOnlyWhereCandidatesDoNotSuffice) {
  constexpr uint32_t kVocabulary = 32000;
  const std::vector<int32_t> history = {4, 5, 4};
  const auto need = [&](const SamplingParams& params) { return Sampler(params, 0, {}, kVocabulary).need(history); };
  SamplingParams params = greedy_params();
  EXPECT_EQ(need(params).kind, stage::OutputKind::candidates);
  EXPECT_EQ(need(params).top_k, 1u);
  params.repeat_penalty = 1.1f;
  params.logit_bias = {{9, 1}};
  EXPECT_EQ(need(params).top_k, 4u);
  EXPECT_THAT(need(params).named_ids, ElementsAre(4, 5, 9));
  params = {};
  EXPECT_EQ(need(params).top_k, 40u);
  params.n_probs = 60;
  EXPECT_EQ(need(params).top_k, 60u);
  params = {};
  params.top_k = 0;
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = {};
  params.top_k = 1000;
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = {};
  params.samplers = {"top_p", "top_k"};
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = {};
  params.samplers = {"temperature", "top_k"};
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
}

SamplingParams random_params(std::mt19937& random, uint32_t n_vocab) {
  const auto pick = [&](std::vector<float> values) { return values[random() % values.size()]; };
  SamplingParams params;
  params.temperature = pick({0, 0.3f, 1, 1.7f});
  params.top_k = static_cast<int32_t>(pick({0, 1, 2, 5, 20, 40}));
  params.top_p = pick({0.1f, 0.5f, 0.95f, 1});
  params.min_p = pick({0, 0.05f, 0.4f});
  params.min_keep = static_cast<int32_t>(pick({0, 0, 3}));
  params.repeat_penalty = pick({1, 1.3f, 0.7f});
  params.frequency_penalty = pick({0, 0.4f, -0.3f});
  params.presence_penalty = pick({0, 1, -1});
  params.repeat_last_n = static_cast<int32_t>(pick({0, 4, 64, -1}));
  params.n_probs = static_cast<int32_t>(pick({0, 0, 3, 30}));
  for (uint32_t i = 0; i < random() % 6; ++i) {
    params.logit_bias.push_back({static_cast<int32_t>(random() % n_vocab), pick({-INFINITY, -2, 3, 8})});
  }
  if (random() % 2) std::shuffle(params.samplers.begin(), params.samplers.end(), random);
  if (random() % 4 == 0) params.samplers.resize(random() % (params.samplers.size() + 1));
  return params;
}

TEST(Sampler, CandidatesGiveTheTokenThatAllLogitsGive) {
  constexpr uint32_t kVocabulary = 150;
  std::mt19937 random(2024);
  uint32_t n_candidates = 0;
  for (int round = 0; round < 20000; ++round) {
    const SamplingParams params = random_params(random, kVocabulary);
    std::vector<float> logits(kVocabulary);
    for (float& logit : logits) logit = static_cast<float>(random() % 48) / 8.0f - 3.0f;  // ties are common
    std::vector<int32_t> history(random() % 20);
    for (int32_t& token : history) token = static_cast<int32_t>(random() % kVocabulary);
    const Sampler sampler(params, static_cast<uint32_t>(random()), std::vector<int32_t>{7}, kVocabulary);
    const stage::OutputRequest need = sampler.need(history);
    n_candidates += need.kind == stage::OutputKind::candidates;
    const Sampler::Choice cheap = sampler.sample(answer(need, logits), history);
    const Sampler::Choice full = sampler.sample(all_logits(logits), history);
    ASSERT_EQ(cheap.token, full.token) << "round " << round;
    ASSERT_EQ(cheap.probabilities.has_value(), params.n_probs > 0);
    if (!full.probabilities) continue;
    EXPECT_NEAR(cheap.probabilities->chosen.logprob, full.probabilities->chosen.logprob, 1e-5);
    ASSERT_EQ(cheap.probabilities->top.size(), full.probabilities->top.size());
    for (size_t i = 0; i < full.probabilities->top.size(); ++i) {
      EXPECT_EQ(cheap.probabilities->top[i].id, full.probabilities->top[i].id);
    }
  }
  EXPECT_GT(n_candidates, 5000u);
}

// The whole chain in the default order, written again with plain loops over all ids.
int32_t brute_force(const SamplingParams& p, std::vector<double> logits, const std::vector<int32_t>& history,
                    double u) {
  for (const LogitBias& bias : p.logit_bias) logits[static_cast<size_t>(bias.token)] += bias.bias;
  const size_t n_back = p.repeat_last_n < 0 ? history.size() : std::min<size_t>(history.size(), p.repeat_last_n);
  for (size_t id = 0; id < logits.size(); ++id) {
    const auto n = std::count(history.end() - static_cast<ptrdiff_t>(n_back), history.end(), static_cast<int32_t>(id));
    if (n == 0) continue;
    logits[id] = logits[id] > 0 ? logits[id] / p.repeat_penalty : logits[id] * p.repeat_penalty;
    logits[id] -= static_cast<double>(n) * p.frequency_penalty + p.presence_penalty;
  }
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
  if (p.top_k > 0) order.resize(std::min<size_t>(order.size(), static_cast<size_t>(p.top_k)));
  const double max = logits[order[0]];
  double total = 0;
  for (const size_t id : order) total += std::exp(logits[id] - max);
  double sum = 0;
  size_t keep = 0;
  while (keep < order.size() && (keep == 0 || sum < p.top_p)) sum += std::exp(logits[order[keep++]] - max) / total;
  if (p.top_p < 1) order.resize(keep);
  std::erase_if(order, [&](size_t id) { return logits[id] < max + std::log(p.min_p); });
  if (p.top_k <= 0 && p.top_p >= 1) std::sort(order.begin(), order.end());  // nothing sorted the candidates
  total = 0;
  for (const size_t id : order) total += std::exp((logits[id] - max) / p.temperature);
  sum = 0;
  for (const size_t id : order) {
    sum += std::exp((logits[id] - max) / p.temperature);
    if (sum > u * total) return static_cast<int32_t>(id);
  }
  return static_cast<int32_t>(order.back());
}

TEST(Sampler, AgreesWithABruteForceChain) {
  constexpr uint32_t kVocabulary = 60;
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 2);
  uint32_t n_different = 0;
  for (int round = 0; round < 3000; ++round) {
    SamplingParams params = random_params(random, kVocabulary);
    params.samplers = default_sampler_order();
    params.min_keep = 0;
    params.temperature = std::max(params.temperature, 0.3f);
    if (params.repeat_last_n == 0) params.repeat_last_n = 8;
    std::vector<float> logits(kVocabulary);
    for (float& logit : logits) logit = normal(random);
    std::vector<int32_t> history(random() % 30);
    for (int32_t& token : history) token = static_cast<int32_t>(random() % kVocabulary);
    const auto seed = static_cast<uint32_t>(random());
    const int32_t token = Sampler(params, seed, {}, kVocabulary).sample(all_logits(logits), history).token;
    const int32_t reference =
        brute_force(params, {logits.begin(), logits.end()}, history, uniform(seed, history.size()));
    n_different += token != reference;
  }
  EXPECT_LE(n_different, 3u);  // float against double at a boundary: about 1e-6 per comparison
}

}  // namespace
}  // namespace caravan::engine
