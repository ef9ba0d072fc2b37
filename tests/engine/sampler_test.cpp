// The random stream, the sampler chain against plain loops, and the choice from candidates against the choice from all
// logits.
#include "engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "engine/fake_pipeline.h"
#include "engine/random.h"
#include "engine/reference_samplers.h"

namespace caravan::engine {
namespace {

using testing::ElementsAre;

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

TEST(Uniform, IsAFunctionOfSeedAndPositionAndSpreadsEvenly) {
  EXPECT_EQ(uniform(1, 5), uniform(1, 5));
  EXPECT_NE(uniform(1, 5), uniform(2, 5));
  EXPECT_NE(uniform(1, 5), uniform(1, 6));
  EXPECT_NE(uniform(1, 5), uniform(1, 5, RandomStream::xtc));
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

Sampler make_sampler(SamplingParams params, uint32_t n_vocab, std::vector<int32_t> banned = {}) {
  static const std::unique_ptr<const vocab::Vocabulary> vocabulary = test::make_vocabulary();
  return {std::move(params), 0, banned, n_vocab, vocabulary.get()};
}

TEST(Sampler, BiasAndBansDecideGreedily) {
  SamplingParams params = greedy_params();
  params.logit_bias = {{1, 10}, {1, -4}, {3, -INFINITY}};
  EXPECT_EQ(make_sampler(params, 5, {2}).sample(all_logits({5, 0, 100, 50, 4}), {}).token, 1);
}

TEST(Sampler, NeverChoosesNotANumber) {
  EXPECT_EQ(make_sampler(greedy_params(), 3).sample(all_logits({NAN, 1, NAN}), {}).token, 1);
}

TEST(Sampler, AppliesSamplersInTheRequestedOrder) {
  // top_k 1 keeps token 0; penalised before, it would lose to token 1.
  SamplingParams params = greedy_params();
  params.top_k = 1;
  params.presence_penalty = 5;
  const std::vector<float> logits = {3, 2};
  const std::vector<int32_t> history = {0};
  EXPECT_EQ(make_sampler(params, 2).sample(all_logits(logits), history).token, 1);
  params.samplers = {"top_k", "penalties", "temperature"};
  EXPECT_EQ(make_sampler(params, 2).sample(all_logits(logits), history).token, 0);
}

TEST(Sampler, SequenceBreakersEndRepetitions) {
  SamplingParams params = greedy_params();
  params.dry_multiplier = 10;
  const std::vector<int32_t> history = {3 + 'a', 3 + 'b', 3 + 'c', 3 + 'x', 3 + 'a', 3 + 'b'};
  std::vector<float> logits(300, 0);
  logits[3 + 'c'] = 5;
  logits[3 + 'd'] = 4;
  EXPECT_EQ(make_sampler(params, 300).sample(all_logits(logits), history).token, 3 + 'd');
  params.dry_sequence_breakers = {"xa"};
  EXPECT_EQ(make_sampler(params, 300).sample(all_logits(logits), history).token, 3 + 'c');
}

TEST(Sampler, ReportsTheDistributionThatTheTokenWasDrawnFrom) {
  SamplingParams params;
  params.n_probs = 5;
  params.post_sampling_probs = true;
  params.top_k = 2;
  params.top_p = 1;
  params.min_p = 0;
  params.temperature = 0.5f;
  const std::vector<float> logits = {1, 2, 3, -1};
  const auto choice = make_sampler(params, 4).sample(all_logits(logits), {});
  ASSERT_TRUE(choice.probabilities);
  const StepProbabilities& step = *choice.probabilities;
  EXPECT_TRUE(step.post_sampling);
  ASSERT_EQ(step.top.size(), 2u);  // the others are impossible
  EXPECT_EQ(step.top[0].id, 2);
  EXPECT_NEAR(std::exp(step.top[0].logprob), 1 / (1 + std::exp(-2.0)), 1e-6);
  EXPECT_NEAR(std::exp(step.top[0].logprob) + std::exp(step.top[1].logprob), 1, 1e-6);
  EXPECT_EQ(step.chosen.logprob, step.top[choice.token == 2 ? 0 : 1].logprob);
}

TEST(Sampler, AsksForAllLogitsOnlyWhereCandidatesDoNotSuffice) {
  constexpr uint32_t kVocabulary = 32000;
  const std::vector<int32_t> history = {4, 5, 4};
  const auto need = [&](const SamplingParams& params) { return make_sampler(params, kVocabulary).need(history); };
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
  params = {};
  params.top_n_sigma = 1;  // depends on all logits
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = {};
  params.mirostat = 2;
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = {};
  params.xtc_probability = params.typical_p = 0.5f;  // come after top_k
  EXPECT_EQ(need(params).kind, stage::OutputKind::candidates);
  params.temperature = 0;  // but the most likely token may not be the one
  params.top_k = 0;
  EXPECT_EQ(need(params).kind, stage::OutputKind::logits);
  params = greedy_params();
  params.top_n_sigma = 1;
  params.dry_multiplier = 1;
  params.dry_allowed_length = 1;
  EXPECT_EQ(need(params).top_k, 2u);
  EXPECT_THAT(need(params).named_ids, ElementsAre(5));
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
  params.top_n_sigma = pick({-1, -1, 0.5f, 2});
  params.typical_p = pick({1, 1, 0.3f});
  params.xtc_probability = pick({0, 0, 0.7f});
  params.xtc_threshold = pick({0.02f, 0.1f});
  params.dynatemp_range = pick({0, 0, 0.5f});
  params.dry_multiplier = pick({0, 0, 2});
  params.dry_allowed_length = static_cast<int32_t>(pick({0, 1, 2}));
  params.dry_penalty_last_n = static_cast<int32_t>(pick({0, 5, -1}));
  params.mirostat = static_cast<int32_t>(pick({0, 0, 0, 1, 2}));
  params.mirostat_tau = pick({1, 3});
  params.post_sampling_probs = random() % 2 == 0;
  if (random() % 2) std::shuffle(params.samplers.begin(), params.samplers.end(), random);
  if (random() % 4 == 0) params.samplers.resize(random() % (params.samplers.size() + 1));
  if (random() % 4 == 0) {
    params.samplers.emplace_back("adaptive_p");
    params.adaptive_target = 0.4f;
  }
  validate(params, n_vocab);
  return params;
}

TEST(Sampler, CandidatesGiveTheTokensThatAllLogitsGive) {
  constexpr uint32_t kVocabulary = 150;
  constexpr int kSteps = 4;  // so that what a sampler remembers counts
  std::mt19937 random(2024);
  uint32_t n_candidates = 0;
  for (int round = 0; round < 10000; ++round) {
    const SamplingParams params = random_params(random, kVocabulary);
    std::vector<int32_t> history(random() % 20);
    const uint32_t n_tokens = random() % 2 ? kVocabulary : 4;  // few: repetitions
    for (int32_t& token : history) token = static_cast<int32_t>(random() % n_tokens);
    Sampler cheap_sampler = make_sampler(params, kVocabulary, {7});
    Sampler full_sampler = make_sampler(params, kVocabulary, {7});
    for (int step = 0; step < kSteps; ++step) {
      std::vector<float> logits(kVocabulary);
      for (float& logit : logits) logit = static_cast<float>(random() % 48) / 8.0f - 3.0f;  // ties are common
      const stage::OutputRequest need = cheap_sampler.need(history);
      n_candidates += need.kind == stage::OutputKind::candidates;
      const Sampler::Choice cheap = cheap_sampler.sample(answer(need, logits), history);
      const Sampler::Choice full = full_sampler.sample(all_logits(logits), history);
      ASSERT_EQ(cheap.token, full.token) << "round " << round << ", step " << step;
      history.push_back(full.token);
      ASSERT_EQ(cheap.probabilities.has_value(), params.n_probs > 0);
      if (!full.probabilities) continue;
      EXPECT_NEAR(cheap.probabilities->chosen.logprob, full.probabilities->chosen.logprob, 1e-5);
      ASSERT_EQ(cheap.probabilities->top.size(), full.probabilities->top.size()) << "round " << round;
      for (size_t i = 0; i < full.probabilities->top.size(); ++i) {
        EXPECT_EQ(cheap.probabilities->top[i].id, full.probabilities->top[i].id);
      }
    }
  }
  EXPECT_GT(n_candidates, 8000u);
}

TEST(Sampler, RememberingIsAFunctionOfTheSequence) {
  // A sampler that is asked what it needs more than once, for results that are then lost, goes on as if it was not.
  constexpr uint32_t kVocabulary = 150;
  std::mt19937 random(77);
  for (int round = 0; round < 300; ++round) {
    const SamplingParams params = random_params(random, kVocabulary);
    Sampler undisturbed = make_sampler(params, kVocabulary), disturbed = make_sampler(params, kVocabulary);
    std::vector<int32_t> history = {1};
    for (int step = 0; step < 8; ++step) {
      std::vector<float> logits(kVocabulary);
      for (float& logit : logits) logit = static_cast<float>(random() % 100) / 20.0f;
      for (uint32_t n = random() % 3; n > 0; --n) disturbed.need(history);
      const int32_t token = undisturbed.sample(all_logits(logits), history).token;
      ASSERT_EQ(disturbed.sample(answer(disturbed.need(history), logits), history).token, token);
      history.push_back(token);
    }
  }
}

TEST(Sampler, AgreesWithPlainLoopsInAnyOrder) {
  constexpr uint32_t kVocabulary = 60;
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 2);
  uint32_t n_different = 0;
  for (int round = 0; round < 6000; ++round) {
    SamplingParams params = random_params(random, kVocabulary);
    params.mirostat = 0;
    params.temperature = std::max(params.temperature, 0.3f);
    params.top_k = std::max(params.top_k, 1);
    std::erase(params.samplers, "adaptive_p");
    params.adaptive_target = -1;
    std::vector<float> logits(kVocabulary);
    for (float& logit : logits) logit = normal(random);
    std::vector<int32_t> history(random() % 30);
    std::vector<std::string> texts;
    for (int32_t& token : history) {
      token = random() % 3 == 0 ? 13 : 50 + static_cast<int32_t>(random() % 5);  // newlines are breakers
      texts.push_back(std::string(1, static_cast<char>(token - 3)));
    }
    if (params.samplers.empty() ||
        std::find(params.samplers.begin(), params.samplers.end(), "top_k") == params.samplers.end())
      params.samplers.emplace_back("top_k");  // sorts: draws go by the order
    const int32_t token = make_sampler(params, kVocabulary).sample(all_logits(logits), history).token;
    test::Options options;
    for (size_t i = 0; i < logits.size(); ++i) options.push_back({static_cast<int32_t>(i), logits[i]});
    for (const LogitBias& bias : params.logit_bias) options[static_cast<size_t>(bias.token)].logit += bias.bias;
    for (const std::string& name : params.samplers)
      options = test::reference_sampler(name, std::move(options), params, history, texts,
                                        uniform(0, history.size(), RandomStream::xtc));
    n_different += token != test::reference_draw(options, uniform(0, history.size()));
  }
  EXPECT_LE(n_different, 6u);  // float against double at a boundary
}

}  // namespace
}  // namespace caravan::engine
