// Predicted speeds, and the split chosen for them against all splits there are.
#include "plan/cost_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace caravan::plan {
namespace {

using tensor::DType;

constexpr double kGB = 1e9;

stage::DeviceProfile profile_of(double gigabytes_per_s, double gops_per_s) {
  stage::DeviceProfile profile;
  profile.matrices[DType::q4_0] = {gigabytes_per_s * kGB, gops_per_s * 1e9};
  profile.cache_bytes_per_s = gigabytes_per_s * kGB;
  profile.step_seconds = 20e-6;
  return profile;
}

// n layers of 30 MB that multiply 50 million times per row, an output matrix of 40 MB.
CostModel::Input input_of(uint32_t n_layer, std::vector<stage::DeviceProfile> devices, double latency = 100e-6) {
  CostModel::Input input;
  models::WorkByType layer;
  layer[DType::q4_0] = {30e6, 50e6};
  input.work.layers.assign(n_layer, layer);
  input.work.output[DType::q6_k] = {40e6, 50e6};
  input.layer_kv_bytes.assign(n_layer, 2048);
  input.n_embd = 2048;
  input.n_slots = 4;
  input.links.assign(devices.size(), {latency, 125e6});
  input.devices = std::move(devices);
  return input;
}

bool everything_fits(const StageSpan&) { return true; }

std::vector<size_t> all_devices(const CostModel& model) {
  std::vector<size_t> devices(model.n_devices());
  std::iota(devices.begin(), devices.end(), size_t{0});
  return devices;
}

TEST(CostModel, ReadsTheWeightsOncePerTokenOnEveryStage) {
  auto input = input_of(10, {profile_of(10, 100)}, 0);
  input.context = 0;
  input.work.output.clear();
  const CostModel model(input);
  const StageSpan whole[] = {{0, 0, 10}};
  EXPECT_NEAR(1 / model.predict(whole).generation, 10 * 30e6 / 10e9 + 20e-6, 1e-9);
}

TEST(CostModel, SendsHiddenRowsStraightWhereThatIsPossible) {
  auto input = input_of(4, {profile_of(10, 100), profile_of(10, 100)});
  input.links = {{3e-3, 1e9}, {1e-3, 5e8}};
  const double bytes = 4.0 * input.n_embd * 8;
  EXPECT_NEAR(CostModel(input).hop_seconds(0, 1, 8), 3e-3 + bytes / 5e8, 1e-9) << "nothing else is known";
  input.hops = {{std::nullopt, 2e-4}, {std::nullopt, std::nullopt}};
  const CostModel model(input);
  EXPECT_NEAR(model.hop_seconds(0, 1, 8), 2e-4 + bytes / 5e8, 1e-9);
  EXPECT_NEAR(model.hop_seconds(1, 0, 8), 4e-3 + bytes / 5e8 + bytes / 1e9, 1e-9) << "through the server";
  EXPECT_NEAR(model.hop_seconds(1, std::nullopt, 8), 1e-3, 1e-9);
}

TEST(CostModel, TakesMeasuredTimesOfLayersWhereThereAreSome) {
  auto input = input_of(4, {profile_of(10, 100), profile_of(10, 100)}, 0);
  input.layer_kinds = {0, 1, 0, 1};
  input.devices[0].layers[0] = {{1, 9}, {10e-3, 50e-3}};
  const CostModel model(input);
  const double step = input.devices[0].step_seconds;
  EXPECT_NEAR(model.stage_seconds({0, 0, 1}, 1, 0), 10e-3 + step, 1e-9);
  EXPECT_NEAR(model.stage_seconds({0, 0, 1}, 5, 0), 30e-3 + step, 1e-9);
  const double other = model.stage_seconds({1, 1, 2}, 5, 0);  // not measured
  EXPECT_NEAR(model.stage_seconds({0, 0, 2}, 5, 0), 30e-3 + other, 1e-9);
  EXPECT_NEAR(model.stage_seconds({1, 0, 2}, 5, 0), 2 * other - step, 1e-9);
}

TEST(CostModel, MultipliesOnceRowsOutweighTheWeights) {
  const CostModel model(input_of(10, {profile_of(10, 100)}));
  const double few = model.stage_seconds({0, 0, 9}, 1, 0), many = model.stage_seconds({0, 0, 9}, 256, 0);
  EXPECT_GT(many, 9 * 256 * 2 * 50e6 / 100e9);
  EXPECT_LT(few, 10 * 30e6 / 10e9);
}

TEST(CostModel, LetsStagesWorkAtTheSameTime) {
  const CostModel model(input_of(10, {profile_of(10, 100), profile_of(10, 100)}));
  const StageSpan one[] = {{0, 0, 10}}, two[] = {{0, 0, 5}, {1, 5, 10}};
  const Prediction alone = model.predict(one), split = model.predict(two);
  EXPECT_LT(split.generation, alone.generation);  // one sequence passes both, and a link
  EXPECT_GT(split.streams, 1.5 * alone.generation);
  EXPECT_GT(split.prompt, 1.5 * alone.prompt);
}

TEST(FastestStages, LeavesOutADeviceThatSlowsThingsDown) {
  const CostModel model(input_of(12, {profile_of(20, 300), profile_of(0.5, 5)}));
  const auto stages = fastest_stages(model, {}, 0, all_devices(model), everything_fits, Goal::automatic);
  ASSERT_TRUE(stages);
  EXPECT_EQ(*stages, (std::vector<StageSpan>{{0, 0, 12}}));
}

TEST(FastestStages, TakesItInWhereMemoryDemands) {
  const CostModel model(input_of(12, {profile_of(20, 300), profile_of(0.5, 5)}));
  const auto fits = [](const StageSpan& stage) { return stage.device != 0 || stage.end - stage.begin <= 10; };
  const auto stages = fastest_stages(model, {}, 0, all_devices(model), fits, Goal::latency);
  ASSERT_TRUE(stages);
  ASSERT_EQ(stages->size(), 2u);
  for (const StageSpan& stage : *stages) EXPECT_EQ(stage.end - stage.begin, stage.device == 0 ? 10u : 2u);
}

TEST(FastestStages, GivesNothingWhereNothingFits) {
  const CostModel model(input_of(12, {profile_of(20, 300)}));
  EXPECT_FALSE(
      fastest_stages(model, {}, 0, all_devices(model), [](const StageSpan&) { return false; }, Goal::automatic));
}

TEST(FastestStages, KeepsTheStagesThatAreFixed) {
  const CostModel model(input_of(12, {profile_of(20, 300), profile_of(20, 300)}));
  const std::vector<StageSpan> first = {{0, 0, 4}};
  const auto stages = fastest_stages(model, first, 4, {1}, everything_fits, Goal::latency);
  ASSERT_TRUE(stages);
  EXPECT_EQ(*stages, (std::vector<StageSpan>{{0, 0, 4}, {1, 4, 12}}));
}

// The best score of all orders, subsets and cuts.
double best_of_all(const CostModel& model, const std::function<bool(const StageSpan&)>& fits, Goal goal) {
  double best = 0;
  std::vector<StageSpan> stages;
  std::vector<bool> used(model.n_devices());
  const std::function<void(uint32_t)> extend = [&](uint32_t begin) {
    if (begin == model.n_layer()) {
      best = std::max(best, CostModel::score(model.predict(stages), goal));
      return;
    }
    for (size_t device = 0; device < used.size(); ++device) {
      if (used[device]) continue;
      for (uint32_t end = begin + 1; end <= model.n_layer(); ++end) {
        if (!fits({device, begin, end})) break;
        used[device] = true;
        stages.push_back({device, begin, end});
        extend(end);
        stages.pop_back();
        used[device] = false;
      }
    }
  };
  extend(0);
  return best;
}

// Clusters of one to four devices whose speeds, links and memories differ by orders of magnitude.
TEST(FastestStages, ReachesNinetyFivePercentOfTheBestSplitInAGridOfClusters) {
  std::mt19937 random(7);
  const auto between = [&](double low, double high) {  // even on a logarithmic scale
    return low * std::pow(high / low, std::uniform_real_distribution<double>(0, 1)(random));
  };
  double worst = 1;
  int n_placed = 0;
  for (int cluster = 0; cluster < 200; ++cluster) {
    const size_t n_devices = 1 + cluster % 4;
    std::vector<stage::DeviceProfile> profiles;
    for (size_t i = 0; i < n_devices; ++i) {
      const double gigabytes_per_s = between(2, 60), gops_per_s = between(20, 900);
      profiles.push_back(profile_of(gigabytes_per_s, gops_per_s));
    }
    auto input = input_of(6 + cluster % 5, profiles);
    for (stage::LinkProfile& link : input.links) link = {between(20e-6, 5e-3), between(1e6, 1e9)};
    input.n_slots = 1 + cluster / 4 % 8;
    std::vector<uint32_t> room;
    for (size_t i = 0; i < n_devices; ++i) room.push_back(std::uniform_int_distribution<uint32_t>(1, 10)(random));
    const auto fits = [&](const StageSpan& stage) { return stage.end - stage.begin <= room[stage.device]; };
    const CostModel model(input);
    const auto goal = static_cast<Goal>(cluster % 3);
    const double best = best_of_all(model, fits, goal);
    const auto stages = fastest_stages(model, {}, 0, all_devices(model), fits, goal);
    ASSERT_EQ(stages.has_value(), best > 0);
    if (!stages) continue;
    ++n_placed;
    const double ratio = CostModel::score(model.predict(*stages), goal) / best;
    worst = std::min(worst, ratio);
    EXPECT_GE(ratio, 0.95) << "cluster " << cluster;
  }
  EXPECT_GT(n_placed, 100);
  RecordProperty("worst_percent", static_cast<int>(100 * worst));
}

}  // namespace
}  // namespace caravan::plan
