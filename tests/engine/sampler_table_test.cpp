// Samplers one by one: on examples, and on random candidates against their definitions in double precision.
#include "engine/sampler_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "base/error.h"
#include "engine/final_draw.h"
#include "engine/reference_samplers.h"

namespace caravan::engine {
namespace {

using test::Options;
using testing::ElementsAre;
using testing::IsEmpty;

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

int32_t drawn(const CandidateList& list, double u) { return list.items[draw(list, u)].id; }

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
  const std::vector<TokenCount> counts = {{0, 1}, {1, 3}, {2, 2}};
  apply_penalties(list, params, {.counts = counts});
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
  EXPECT_EQ(drawn(list, 0), 0);
  EXPECT_EQ(drawn(list, 0.19), 0);
  EXPECT_EQ(drawn(list, 0.21), 1);
  EXPECT_EQ(drawn(list, 0.69), 1);
  EXPECT_EQ(drawn(list, 0.71), 2);
  EXPECT_EQ(drawn(list, 0.9999999), 2);
}

TEST(Draw, NeverChoosesAnImpossibleToken) {
  const CandidateList list = list_of({-INFINITY, 1, -INFINITY});
  EXPECT_EQ(drawn(list, 0), 1);
  EXPECT_EQ(drawn(list, 0x1.fffffffffffffp-1), 1);
  EXPECT_EQ(drawn(list_of({-INFINITY, -INFINITY}), 0.5), 0);
}

TEST(TopNSigma, MakesTheUnlikelyImpossible) {
  SamplingParams params;
  params.top_n_sigma = 1;  // mean 2, deviation 2
  CandidateList list = list_of({5, 3, 2.5f, 1, 1, -0.5f, -INFINITY});
  apply_top_n_sigma(list, params, {});
  EXPECT_EQ(list.items[0].logit, 5);
  EXPECT_EQ(list.items[1].logit, -INFINITY);
  EXPECT_EQ(list.items.size(), 7u);
}

TEST(Typical, PrefersTheExpectedSurprise) {
  SamplingParams params;
  params.typical_p = 0.2f;
  // Entropy 1.09 nats; surprises 0.69, 1.20, 2.30, 2.30.
  CandidateList list = list_of({std::log(0.5f), std::log(0.3f), std::log(0.1f), std::log(0.1f)});
  apply_typical_p(list, params, {});
  EXPECT_THAT(ids(list), ElementsAre(1));
}

TEST(Xtc, DropsAllLikelyCandidatesButTheLast) {
  SamplingParams params;
  params.xtc_probability = 0.5f;
  params.xtc_threshold = 0.2f;
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};
  const auto after = [&](double chance) {
    CandidateList list = list_of(logits);
    apply_xtc(list, params, {.xtc_chance = chance});
    return ids(list);
  };
  params.xtc_threshold = 0.19f;  // clear of rounding
  EXPECT_THAT(after(0.49), ElementsAre(2, 0));
  EXPECT_THAT(after(0.5), ElementsAre(0, 1, 2, 3));
  params.xtc_threshold = 0.35f;  // one candidate alone is never dropped
  EXPECT_THAT(after(0), ElementsAre(1, 3, 2, 0));
  params.xtc_threshold = 0.19f;
  params.min_keep = 3;
  EXPECT_THAT(after(0), ElementsAre(1, 3, 2, 0));
}

TEST(DynamicTemperature, RisesWithTheEntropy) {
  SamplingParams params;
  params.temperature = 1;
  params.dynatemp_range = 0.5f;
  CandidateList unsure = list_of({2, 2});  // the largest entropy: temperature 1.5
  apply_temperature(unsure, params, {});
  EXPECT_FLOAT_EQ(unsure.items[0].logit, 2 / 1.5f);
  CandidateList sure = list_of({100, 0});  // none: 0.5
  apply_temperature(sure, params, {});
  EXPECT_FLOAT_EQ(sure.items[0].logit, 200);
  CandidateList one = list_of({7});
  apply_temperature(one, params, {});
  EXPECT_EQ(one.items[0].logit, 7);
}

SamplingParams dry_params(int32_t allowed_length) {
  SamplingParams params;
  params.dry_multiplier = 1;
  params.dry_base = 2;
  params.dry_allowed_length = allowed_length;
  params.dry_penalty_last_n = -1;
  return params;
}

TEST(Dry, PenalisesWhatWouldContinueARepetition) {
  // 3 tokens are repeated: 4 came after them; and after the last one alone came 9.
  const std::vector<int32_t> history = {1, 2, 3, 4, 5, 3, 9, 1, 2, 3};
  EXPECT_THAT(dry_penalties(history, history.size(), dry_params(2)), ElementsAre(TokenPenalty{4, 2}));
  EXPECT_THAT(dry_penalties(history, history.size(), dry_params(1)),
              ElementsAre(TokenPenalty{4, 4}, TokenPenalty{9, 1}));
  EXPECT_THAT(dry_penalties(history, history.size(), dry_params(4)), IsEmpty());
  EXPECT_THAT(dry_penalties(history, 2, dry_params(2)), ElementsAre(TokenPenalty{4, 1}));
  EXPECT_THAT(dry_penalties(history, 1, dry_params(2)), IsEmpty());
  SamplingParams params = dry_params(2);
  params.dry_penalty_last_n = 9;  // the first token is out of sight
  EXPECT_THAT(dry_penalties(history, history.size(), params), ElementsAre(TokenPenalty{4, 1}));
}

TEST(Dry, StaysFiniteForEndlessRepetitions) {
  const std::vector<int32_t> history(5000, 7);
  const std::vector<TokenPenalty> penalties = dry_penalties(history, history.size(), dry_params(2));
  ASSERT_EQ(penalties.size(), 1u);
  EXPECT_TRUE(std::isfinite(penalties[0].penalty));
  EXPECT_GT(penalties[0].penalty, 1e20f);
}

TEST(BreakerTracker, FindsBreakersWithinAndAcrossTokens) {
  BreakerTracker tracker({":", "", "\nUser"});
  const auto after = [&](std::string_view piece) {
    tracker.push(piece);
    return tracker.tokens_since();
  };
  EXPECT_EQ(after("a"), 1u);
  EXPECT_EQ(after("b"), 2u);
  EXPECT_EQ(after("x: y"), 0u);
  EXPECT_EQ(after("\nUs"), 1u);
  EXPECT_EQ(after(""), 2u);
  EXPECT_EQ(after("er name"), 0u);
  EXPECT_EQ(after("User"), 1u);  // not twice from the same newline
  EXPECT_EQ(after("\n"), 2u);
  EXPECT_EQ(after("User"), 0u);
}

// Random settings; no value lies where rounding could decide.
SamplingParams random_settings(std::mt19937& random) {
  const auto pick = [&](std::vector<float> values) { return values[random() % values.size()]; };
  SamplingParams p;
  p.temperature = pick({0, 0.31f, 1, 1.73f});
  p.dynatemp_range = pick({0, 0.23f, 0.9f, 2});
  p.dynatemp_exponent = pick({1, 0.5f, 2});
  p.top_k = static_cast<int32_t>(pick({0, 1, 5, 20}));
  p.top_p = pick({0.113f, 0.517f, 0.951f, 1});
  p.min_p = pick({0, 0.0517f, 0.413f});
  p.top_n_sigma = pick({-1, 0.53f, 1.51f});
  p.typical_p = pick({0.211f, 0.613f, 1});
  p.xtc_probability = pick({0, 0.5f, 1});
  p.xtc_threshold = pick({0.0513f, 0.113f, 0.6f});
  p.min_keep = static_cast<int32_t>(pick({0, 0, 3}));
  p.repeat_penalty = pick({1, 1.3f, 0.7f});
  p.repeat_last_n = static_cast<int32_t>(pick({0, 4, -1}));
  p.frequency_penalty = pick({0, 0.41f});
  p.presence_penalty = pick({0, -1});
  p.dry_multiplier = pick({0, 0.8f});
  p.dry_base = pick({1, 1.75f});
  p.dry_allowed_length = static_cast<int32_t>(pick({0, 1, 2}));
  p.dry_penalty_last_n = static_cast<int32_t>(pick({0, 6, 64, -1}));
  return p;
}

TEST(Samplers, MatchTheirDefinitionsOnRandomCandidates) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 2);
  std::map<std::string_view, int> n_changed;
  for (int round = 0; round < 4000; ++round) {
    const SamplingParams p = random_settings(random);
    CandidateList list = list_of(std::vector<float>(1 + random() % 40));
    Options options;
    for (Candidate& candidate : list.items) {
      candidate.logit = random() % 20 == 0 ? -INFINITY : normal(random);
      options.push_back({candidate.id, static_cast<double>(candidate.logit)});
    }
    if (std::isinf(list.max_logit())) continue;
    std::vector<int32_t> history(random() % 30);
    for (int32_t& token : history) token = static_cast<int32_t>(random() % 5);
    std::vector<std::string> texts;
    BreakerTracker tracker(p.dry_sequence_breakers);
    for (size_t i = 0; i < history.size(); ++i) {
      texts.push_back(random() % 15 == 0 ? "a:" : "b");
      tracker.push(texts.back());
    }
    const std::vector<TokenCount> counts = count_tokens(history, p.repeat_last_n);
    const std::vector<TokenPenalty> dry = dry_penalties(history, tracker.tokens_since(), p);
    const SamplerRow& row = sampler_table()[random() % (sampler_table().size() - 1)];
    if (!row.active(p)) continue;
    const double chance = random() % 2 ? 0.9 : 0.1;
    const Options expected = test::reference_sampler(std::string(row.name), options, p, history, texts, chance);
    CandidateList before_it = list;
    row.apply(list, p, {counts, dry, chance});
    n_changed[row.name] += list.items != before_it.items;
    SCOPED_TRACE(testing::Message() << "round " << round << ", " << row.name);
    ASSERT_EQ(list.items.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(list.items[i].id, expected[i].id);
      if (std::isinf(expected[i].logit)) {
        ASSERT_EQ(list.items[i].logit, -INFINITY);
      } else {
        // A few roundings to f32, of logits up to some hundreds.
        ASSERT_NEAR(list.items[i].logit, expected[i].logit, 1e-5 * (1 + std::abs(expected[i].logit)));
      }
    }
  }
  for (const SamplerRow& row : sampler_table()) {
    if (!row.apply) continue;
    EXPECT_GT(n_changed[row.name], 50) << row.name;
  }
}

SamplingParams feedback_params(int32_t mirostat) {
  SamplingParams params;
  params.mirostat = mirostat;
  params.mirostat_tau = 3;
  params.mirostat_eta = 0.3f;
  if (mirostat == 0) {
    params.samplers.emplace_back("adaptive_p");
    params.adaptive_target = 0.37f;
    params.adaptive_decay = 0.8f;
  }
  return params;
}

TEST(FinalDraw, FollowsTheDefinitionsOfMirostatAndAdaptiveP) {
  constexpr uint32_t kVocabulary = 300;
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (const int32_t mirostat : {0, 1, 2}) {
    const SamplingParams params = feedback_params(mirostat);
    FinalDraw final_draw(params, kVocabulary);
    double mu = 2.0 * params.mirostat_tau;
    std::vector<double> past;
    for (int step = 0; step < 500; ++step) {
      std::normal_distribution<float> normal(0, 0.5f + static_cast<float>(step % 7));
      CandidateList list = list_of(std::vector<float>(kVocabulary));
      Options options;
      for (Candidate& candidate : list.items) {
        candidate.logit = normal(random);
        options.push_back({candidate.id, static_cast<double>(candidate.logit)});
      }
      const double u = uniform(random);
      const int32_t expected = mirostat == 0 ? test::reference_adaptive(options, params, u, past)
                                             : test::reference_mirostat(options, params, kVocabulary, u, mu);
      ASSERT_EQ(final_draw.draw_from(list, u), expected) << "mirostat " << mirostat << ", step " << step;
      if (mirostat == 0) continue;
      ASSERT_NEAR(final_draw.mu(), mu, 1e-4);
    }
  }
}

TEST(FinalDraw, KeepsTheSurpriseNearItsTarget) {
  // Zipf-like probabilities, for which mirostat was made: the mean surprise of many draws comes near tau.
  constexpr uint32_t kVocabulary = 2000;
  std::mt19937 random(3);
  std::uniform_real_distribution<double> uniform(0, 1);
  CandidateList zipf;
  for (uint32_t i = 0; i < kVocabulary; ++i)
    zipf.items.push_back({static_cast<int32_t>(i), -1.2f * std::log(static_cast<float>(i + 1))});
  const std::vector<double> p = zipf.probabilities();
  for (const int32_t mirostat : {1, 2}) {
    FinalDraw final_draw(feedback_params(mirostat), kVocabulary);
    double surprise = 0;
    constexpr int kDraws = 4000;
    for (int i = 0; i < kDraws; ++i) {
      CandidateList list = zipf;
      const auto id = static_cast<size_t>(final_draw.draw_from(list, uniform(random)));
      surprise -= std::log2(list.probabilities()[id]) / kDraws;  // list is sorted: id is its index
    }
    EXPECT_NEAR(surprise, 3, 0.1) << "mirostat " << mirostat;
  }
}

TEST(FinalDraw, ChoosesTheOnlyCandidate) {
  for (const int32_t mirostat : {0, 1, 2}) {
    FinalDraw final_draw(feedback_params(mirostat), 10);
    CandidateList one;
    one.items = {{4, 2.0f}};
    EXPECT_EQ(final_draw.draw_from(one, 0.9), 4);
    CandidateList impossible = list_of({-INFINITY, -INFINITY});
    EXPECT_EQ(final_draw.draw_from(impossible, 0.9), 0);
  }
}

TEST(SamplerNames, AreFoundByCharacterAndByOtherNames) {
  EXPECT_EQ(sampler_names("edskypmxt"), default_sampler_order());
  EXPECT_THAT(sampler_names("ta"), ElementsAre("temperature", "adaptive_p"));
  EXPECT_THROW(sampler_names("kz"), RequestError);
  EXPECT_EQ(sampler_name("top-k"), "top_k");
  EXPECT_EQ(sampler_name("typical"), "typ_p");
  EXPECT_EQ(sampler_name("temp"), "temperature");
  EXPECT_EQ(sampler_name("in-fill"), "in-fill");
  SamplingParams params;
  params.samplers = {"infill"};
  EXPECT_THROW(validate(params, 10), RequestError);
}

TEST(SamplingParams, AreRefusedByName) {
  const std::vector<std::pair<std::string, std::function<void(SamplingParams&)>>> bad = {
      {"mirostat", [](SamplingParams& p) { p.mirostat = 3; }},
      {"mirostat_tau", [](SamplingParams& p) { p.mirostat_tau = NAN; }},
      {"dry_base", [](SamplingParams& p) { p.dry_base = 0.5f; }},
      {"dry_allowed_length", [](SamplingParams& p) { p.dry_allowed_length = -1; }},
      {"dry_penalty_last_n", [](SamplingParams& p) { p.dry_penalty_last_n = -2; }},
      {"dry_sequence_breakers", [](SamplingParams& p) { p.dry_sequence_breakers.resize(1000, "x"); }},
      {"adaptive_decay", [](SamplingParams& p) { p.adaptive_decay = 1; }},
      {"adaptive_target", [](SamplingParams& p) { p.adaptive_target = 0.5f; }},  // not among the samplers
      {"xtc_threshold", [](SamplingParams& p) { p.xtc_threshold = INFINITY; }},
      {"typical_p", [](SamplingParams& p) { p.typical_p = NAN; }},
  };
  EXPECT_NO_THROW(validate(SamplingParams(), 10));
  for (const auto& [field, spoil] : bad) {
    SamplingParams params;
    spoil(params);
    try {
      validate(params, 10);
      ADD_FAILURE() << field << " was accepted";
    } catch (const RequestError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("Field '" + field + "': Value must be"));
    }
  }
}

}  // namespace
}  // namespace caravan::engine
