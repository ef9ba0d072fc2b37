// Replicas of a model: when there are any, which devices hold which, and how many sequences each gets.
#include "plan/replicas.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <set>

namespace caravan::plan {
namespace {

using tensor::DType;

stage::DeviceProfile profile_of(double gigabytes_per_s, double gops_per_s) {
  stage::DeviceProfile profile;
  profile.matrices[DType::q4_0] = {gigabytes_per_s * 1e9, gops_per_s * 1e9};
  profile.cache_bytes_per_s = gigabytes_per_s * 1e9;
  profile.step_seconds = 20e-6;
  return profile;
}

// n layers of 30 MB that multiply 50 million times per row, an output matrix of 40 MB.
CostModel::Input input_of(uint32_t n_layer, std::vector<stage::DeviceProfile> devices, uint32_t n_slots,
                          double latency = 100e-6) {
  CostModel::Input input;
  models::WorkByType layer;
  layer[DType::q4_0] = {30e6, 50e6};
  input.work.layers.assign(n_layer, layer);
  input.work.output[DType::q4_0] = {40e6, 50e6};
  input.layer_kv_bytes.assign(n_layer, 2048);
  input.n_embd = 2048;
  input.n_slots = n_slots;
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

// Every replica has all layers in order, no device serves two, and none holds more than it may.
void expect_sound(const Replicas& replicas, uint32_t n_layer, const std::function<bool(const StageSpan&)>& fits) {
  ASSERT_GE(replicas.replicas.size(), 2u);
  std::set<size_t> used;
  for (const Replica& replica : replicas.replicas) {
    uint32_t next = 0;
    for (const StageSpan& stage : replica.stages) {
      EXPECT_TRUE(used.insert(stage.device).second) << "device " << stage.device << " serves twice";
      EXPECT_EQ(stage.begin, next);
      EXPECT_LT(stage.begin, stage.end);
      EXPECT_TRUE(fits(stage));
      next = stage.end;
    }
    EXPECT_EQ(next, n_layer);
    EXPECT_GT(replica.speed, 0);
  }
}

TEST(Replicas, AreOneForEachDeviceThatHoldsTheModel) {
  const CostModel model(input_of(12, {profile_of(10, 100), profile_of(10, 100), profile_of(10, 100)}, 9));
  const auto replicas = fastest_replicas(model, all_devices(model), everything_fits, Goal::throughput);
  ASSERT_TRUE(replicas);
  expect_sound(*replicas, 12, everything_fits);
  EXPECT_EQ(replicas->replicas.size(), 3u);
  const Prediction alone = model.with_slots(3).predict(replicas->replicas[0].stages);
  EXPECT_NEAR(replicas->prediction.streams, 3 * alone.streams, 1e-6);
  EXPECT_NEAR(replicas->prediction.generation, alone.generation, 1e-9);
}

TEST(Replicas, AreMadeOfSeveralDevicesWhereOneDoesNotHoldTheModel) {
  const CostModel model(input_of(10, std::vector(5, profile_of(10, 100)), 8, 2e-3));
  const uint32_t room[] = {9, 10, 1, 5, 5};
  const auto fits = [&](const StageSpan& s) { return s.end - s.begin <= room[s.device]; };
  const auto replicas = fastest_replicas(model, all_devices(model), fits, Goal::throughput);
  ASSERT_TRUE(replicas);
  expect_sound(*replicas, 10, fits);
  EXPECT_EQ(replicas->replicas.size(), 3u);
}

TEST(Replicas, AreNotThereForOneSlotNorWithoutRoomForTwo) {
  const std::vector<stage::DeviceProfile> two(2, profile_of(10, 100));
  const CostModel alone(input_of(12, two, 1)), many(input_of(12, two, 8));
  EXPECT_FALSE(fastest_replicas(alone, {0, 1}, everything_fits, Goal::throughput));
  const auto fits = [](const StageSpan& s) { return s.end - s.begin <= 8; };
  EXPECT_FALSE(fastest_replicas(many, {0, 1}, fits, Goal::throughput));
}

TEST(Replicas, DoWithoutADeviceThatWouldGetNoSequence) {
  const CostModel model(input_of(12, {profile_of(20, 300), profile_of(20, 300), profile_of(0.5, 5)}, 4));
  const auto replicas = fastest_replicas(model, all_devices(model), everything_fits, Goal::throughput);
  ASSERT_TRUE(replicas);
  EXPECT_EQ(replicas->replicas.size(), 2u);
  for (const Replica& replica : replicas->replicas)
    for (const StageSpan& stage : replica.stages) EXPECT_NE(stage.device, 2u);
}

TEST(Replicas, AreNoMoreThanSlotsWhereAllDevicesAreEqual) {
  const CostModel model(input_of(12, std::vector(5, profile_of(10, 100)), 3));
  const auto replicas = fastest_replicas(model, all_devices(model), everything_fits, Goal::throughput);
  ASSERT_TRUE(replicas);
  expect_sound(*replicas, 12, everything_fits);
  EXPECT_LE(replicas->replicas.size(), 3u);
}

TEST(Replicas, ShareSlotsBySpeed) {
  EXPECT_EQ(share_slots(8, {1, 1}), (std::vector<uint32_t>{4, 4}));
  EXPECT_EQ(share_slots(8, {3, 1}), (std::vector<uint32_t>{6, 2}));
  EXPECT_EQ(share_slots(3, {10, 1}), (std::vector<uint32_t>{3, 0}));
}

// The best score of all divisions of up to four devices into groups, each with its fastest stages.
double best_of_all(const CostModel& model, const std::function<bool(const StageSpan&)>& fits, Goal goal) {
  const size_t n = model.n_devices();
  double best = 0;
  std::vector<size_t> group_of(n);  // 0: left out
  const std::function<void(size_t)> extend = [&](size_t device) {
    if (device < n) {
      for (group_of[device] = 0; group_of[device] <= n; ++group_of[device]) extend(device + 1);
      return;
    }
    std::vector<std::vector<size_t>> groups(n + 1);
    for (size_t d = 0; d < n; ++d) groups[group_of[d]].push_back(d);
    groups.erase(groups.begin());
    std::erase_if(groups, [](const auto& group) { return group.empty(); });
    if (groups.size() < 2 || groups.size() > model.n_slots()) return;
    const auto n_replicas = static_cast<uint32_t>(groups.size());
    const CostModel even = model.with_slots((model.n_slots() + n_replicas - 1) / n_replicas);
    std::vector<std::vector<StageSpan>> stages;
    std::vector<double> speeds;
    for (const auto& group : groups) {
      const auto fastest = fastest_stages(even, {}, 0, group, fits, goal);
      if (!fastest) return;
      stages.push_back(*fastest);
      speeds.push_back(CostModel::score(even.predict(*fastest), Goal::throughput));
    }
    const auto shares = share_slots(model.n_slots(), speeds);
    double alone = 0, together = 0;
    for (size_t i = 0; i < stages.size(); ++i) {
      if (shares[i] == 0) return;
      const Prediction own = model.with_slots(shares[i]).predict(stages[i]);
      alone = std::max(alone, CostModel::score(own, Goal::latency));
      together += CostModel::score(own, Goal::throughput);
    }
    best = std::max(best, goal == Goal::throughput ? together : std::sqrt(alone * together));
  };
  extend(0);
  return best;
}

// Clusters of two to four devices whose speeds, links and memories differ by orders of magnitude.
TEST(Replicas, ReachWithOnePlacementNinetyFivePercentOfTheBestDivisionInAGridOfClusters) {
  std::mt19937 random(11);
  const auto between = [&](double low, double high) {  // even on a logarithmic scale
    return low * std::pow(high / low, std::uniform_real_distribution<double>(0, 1)(random));
  };
  double worst = 1;
  int n_replicated = 0;
  for (int cluster = 0; cluster < 60; ++cluster) {
    SCOPED_TRACE(cluster);
    const size_t n_devices = 2 + cluster % 3;
    const uint32_t n_layer = 4 + cluster % 3;
    std::vector<stage::DeviceProfile> profiles;
    std::vector<uint32_t> room;
    for (size_t i = 0; i < n_devices; ++i) {
      const double gigabytes_per_s = between(2, 60), gops_per_s = between(20, 900);
      profiles.push_back(profile_of(gigabytes_per_s, gops_per_s));
      room.push_back(std::uniform_int_distribution<uint32_t>(2, 8)(random));
    }
    auto input = input_of(n_layer, profiles, 2 + cluster % 8);
    for (stage::LinkProfile& link : input.links) link = {between(20e-6, 5e-3), between(1e6, 1e9)};
    const auto fits = [&](const StageSpan& stage) { return stage.end - stage.begin <= room[stage.device]; };
    const CostModel model(input);
    const Goal goal = cluster % 2 ? Goal::automatic : Goal::throughput;
    const auto once = fastest_stages(model, {}, 0, all_devices(model), fits, goal);
    const double score_once = once ? CostModel::score(model.predict(*once), goal) : 0;
    const double best = std::max(score_once, best_of_all(model, fits, goal));
    const auto replicas = fastest_replicas(model, all_devices(model), fits, goal);
    if (best == 0) continue;  // there is no room for the model
    if (replicas) expect_sound(*replicas, n_layer, fits);
    const double found = std::max(score_once, replicas ? replicas->score : 0);
    n_replicated += found > score_once;
    worst = std::min(worst, found / best);
    EXPECT_GE(found / best, 0.95);
  }
  EXPECT_GT(n_replicated, 15);
  RecordProperty("worst_percent", static_cast<int>(100 * worst));
}

}  // namespace
}  // namespace caravan::plan
