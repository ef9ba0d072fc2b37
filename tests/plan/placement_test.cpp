// Placement of layers on devices by free memory, shares and -ngl, and the context that fits.
#include "plan/placement.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "base/error.h"

namespace caravan::plan {
namespace {

constexpr uint64_t kMiB = 1 << 20;

// n layers of 10 MiB with one full group of 1 KiB per token and layer, 5 MiB of embedding, 20 MiB of output, 4 MiB of
// scratch.
PlacementRequest request_of(uint32_t n_layer, uint32_t n_ctx) {
  PlacementRequest request;
  request.n_layer = n_layer;
  request.n_ctx_train = 65536;
  request.n_ctx = n_ctx;
  request.cache.block_tokens = 32;
  request.cache.max_slots = 4;
  request.needs.embedding_weights = 5 * kMiB;
  request.needs.output_weights = 20 * kMiB;
  request.needs.layer_weights.assign(n_layer, 10 * kMiB);
  request.needs.layer_kv_cache.assign(n_layer, 32 * 1024);
  request.needs.scratch = 4 * kMiB;
  PlacementRequest::Group group;
  group.window = 0;
  for (uint32_t i = 0; i < n_layer; ++i) group.layers.push_back(i);
  request.groups.push_back(group);
  return request;
}

// Every layer once and in order in each replica, the ends marked, nothing over its memory, no device in two replicas.
void expect_sound(const Placement& placement, const std::vector<DeviceOffer>& offers, uint32_t n_layer) {
  uint32_t next = 0;
  size_t replica = 0;
  std::set<size_t> used;
  for (const PlacedStage& stage : placement.stages) {
    if (next == n_layer) {
      next = 0;
      ++replica;
    }
    EXPECT_EQ(stage.replica, replica);
    EXPECT_TRUE(used.insert(stage.device).second);
    EXPECT_EQ(stage.slice.layer_begin, next);
    EXPECT_LT(stage.slice.layer_begin, stage.slice.layer_end);
    EXPECT_EQ(stage.slice.embeds, next == 0);
    next = stage.slice.layer_end;
    EXPECT_EQ(stage.slice.outputs, next == n_layer);
    EXPECT_LE(stage.need.total(), offers[stage.device].memory_free);
  }
  EXPECT_EQ(next, n_layer);
}

TEST(Placement, DividesEqualDevicesEqually) {
  const std::vector<DeviceOffer> offers = {{"a", 500 * kMiB}, {"b", 500 * kMiB}};
  const Placement placement = place(request_of(20, 4096), offers);
  expect_sound(placement, offers, 20);
  ASSERT_EQ(placement.stages.size(), 2u);
  EXPECT_NEAR(placement.stages[0].slice.layer_end, 10.5, 1.0);  // the output matrix weighs as much as two layers
  EXPECT_EQ(placement.n_ctx, 4096u);
}

TEST(Placement, GivesMoreLayersToMoreMemory) {
  const std::vector<DeviceOffer> offers = {{"small", 150 * kMiB}, {"large", 600 * kMiB}};
  const Placement placement = place(request_of(30, 4096), offers);
  expect_sound(placement, offers, 30);
  EXPECT_LT(placement.stages[0].slice.layer_end, 10u);
}

TEST(Placement, FollowsTensorSplit) {
  const std::vector<DeviceOffer> offers = {{"a", 900 * kMiB}, {"b", 900 * kMiB}};
  auto request = request_of(20, 4096);
  request.tensor_split = {3, 1};
  const Placement placement = place(request, offers);
  expect_sound(placement, offers, 20);
  EXPECT_EQ(placement.stages[0].slice.layer_end, 15u);
  request.tensor_split = {1, 2, 3};
  EXPECT_THROW(place(request, offers), RequestError);
  request.tensor_split = {0, 0};
  EXPECT_THROW(place(request, offers), RequestError);
}

TEST(Placement, KeepsLayersBeyondNglOnTheServer) {
  const std::vector<DeviceOffer> offers = {{"local", 900 * kMiB, true}, {"a", 900 * kMiB}, {"b", 900 * kMiB}};
  auto request = request_of(20, 4096);
  request.n_gpu_layers = 12;
  const Placement placement = place(request, offers);
  expect_sound(placement, offers, 20);
  ASSERT_EQ(placement.stages.size(), 3u);
  EXPECT_EQ(placement.stages[0].device, 0u);
  EXPECT_EQ(placement.stages[0].slice.layer_end, 8u);

  request.n_gpu_layers = 99;
  for (const auto& stage : place(request, offers).stages) EXPECT_NE(stage.device, 0u);
  request.n_gpu_layers = 0;
  ASSERT_EQ(place(request, offers).stages.size(), 1u);
  EXPECT_EQ(place(request, offers).stages[0].device, 0u);
}

TEST(Placement, SpillsToTheServerOnlyWhatBackendsCannotHold) {
  const std::vector<DeviceOffer> offers = {{"local", 900 * kMiB, true}, {"a", 130 * kMiB}};
  const Placement placement = place(request_of(20, 4096), offers);
  expect_sound(placement, offers, 20);
  ASSERT_EQ(placement.stages.size(), 2u);
  EXPECT_EQ(placement.stages[0].device, 0u);
  EXPECT_EQ(placement.stages[1].device, 1u);
}

TEST(Placement, RefusesWhatDoesNotFitAndNamesEveryDevice) {
  const std::vector<DeviceOffer> offers = {{"alpha:50052", 40 * kMiB}, {"beta:50052", 40 * kMiB}};
  try {
    place(request_of(20, 4096), offers);
    FAIL() << "it fitted";
  } catch (const ResourceError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("alpha:50052"), std::string::npos) << message;
    EXPECT_NE(message.find("beta:50052"), std::string::npos) << message;
    EXPECT_NE(message.find("40 MiB"), std::string::npos) << message;
  }
}

TEST(Placement, ChoosesTheLargestContextThatFits) {
  const std::vector<DeviceOffer> offers = {{"a", 600 * kMiB}};
  auto request = request_of(20, 0);
  const Placement placement = place(request, offers);
  expect_sound(placement, offers, 20);
  EXPECT_GT(placement.n_ctx, 8192u);
  EXPECT_LT(placement.n_ctx, 20000u);
  request.n_ctx_train = 2048;
  EXPECT_EQ(place(request, offers).n_ctx, 2048u);
}

TEST(Placement, BoundsTheBlocksOfWindows) {
  auto request = request_of(2, 32768);
  request.groups = {{{0}, 0u}, {{1}, 512u}, {{}, std::nullopt}};
  request.cache.max_rows = 256;
  const auto blocks = blocks_for_context(request, 32768);
  EXPECT_EQ(blocks, (std::vector<uint32_t>{1024 + 4, (512 / 32 + 2) * 4 + 256 / 32, 0}));
}

TEST(Placement, NeverOverfillsRandomClusters) {
  std::mt19937 random(7);
  int placed = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<DeviceOffer> offers;
    if (random() % 2) offers.push_back({"local", (random() % 400) * kMiB, true});
    for (uint32_t i = 0, n = 1 + random() % 4; i < n; ++i)
      offers.push_back({"b" + std::to_string(i), (random() % 300) * kMiB});
    const uint32_t n_layer = 1 + random() % 30;
    try {
      expect_sound(place(request_of(n_layer, random() % 2 ? 0 : 4096), offers), offers, n_layer);
      ++placed;
    } catch (const ResourceError&) {
      // refused: nothing to check
    }
  }
  EXPECT_GT(placed, 50);
}

// A cost model for request_of(n_layer, ...) on these devices, in GB/s.
CostModel speeds_of(uint32_t n_layer, const std::vector<double>& gigabytes_per_s, uint32_t n_slots = 1) {
  CostModel::Input input;
  input.n_slots = n_slots;
  input.work.layers.assign(n_layer, {{tensor::DType::q8_0, {10.0 * kMiB, 10.0 * kMiB}}});
  input.work.output[tensor::DType::q8_0] = {20.0 * kMiB, 20.0 * kMiB};
  input.layer_kv_bytes.assign(n_layer, 1024);
  input.n_embd = 1024;
  for (const double speed : gigabytes_per_s) {
    stage::DeviceProfile profile;
    profile.matrices[tensor::DType::q8_0] = {speed * 1e9, speed * 1e10};
    profile.cache_bytes_per_s = speed * 1e9;
    profile.step_seconds = 1e-5;
    input.devices.push_back(profile);
    input.links.push_back({1e-4, 1e9});
  }
  return CostModel(input);
}

TEST(Placement, LeavesOutASlowBackendWhereTheOthersHoldTheModel) {
  const std::vector<DeviceOffer> offers = {{"slow", 900 * kMiB}, {"fast", 900 * kMiB}};
  const auto request = request_of(20, 4096);
  const CostModel model = speeds_of(20, {0.5, 20});
  const Placement placement = place(request, offers, Speed{model, Goal::latency});
  expect_sound(placement, offers, 20);
  ASSERT_EQ(placement.stages.size(), 1u);
  EXPECT_EQ(placement.stages[0].device, 1u);
  ASSERT_TRUE(placement.prediction);
  EXPECT_GT(placement.prediction->generation, 50);
  const auto reasons = left_out(request, offers, placement);
  ASSERT_EQ(reasons.size(), 1u);
  EXPECT_EQ(reasons.at(0), "it would slow things down");
}

TEST(Placement, KeepsWithinMemoryWhateverTheSpeed) {
  const std::vector<DeviceOffer> offers = {{"slow", 900 * kMiB}, {"fast", 130 * kMiB}, {"tiny", 5 * kMiB}};
  const auto request = request_of(20, 4096);
  const CostModel model = speeds_of(20, {0.5, 20, 20});
  const Placement placement = place(request, offers, Speed{model, Goal::automatic});
  expect_sound(placement, offers, 20);
  EXPECT_EQ(placement.stages.size(), 2u);
  EXPECT_NE(left_out(request, offers, placement).at(2).find("one layer"), std::string::npos);
}

TEST(Placement, PredictsForSharesToo) {
  const std::vector<DeviceOffer> offers = {{"a", 900 * kMiB}, {"b", 900 * kMiB}};
  auto request = request_of(20, 4096);
  request.tensor_split = {1, 1};
  const CostModel model = speeds_of(20, {0.5, 20});
  const Placement placement = place(request, offers, Speed{model, Goal::automatic});
  ASSERT_EQ(placement.stages.size(), 2u);
  EXPECT_EQ(placement.stages[0].slice.layer_end, 10u);
  EXPECT_TRUE(placement.prediction);
}

TEST(Placement, HoldsTheModelSeveralTimesForManySequences) {
  const std::vector<DeviceOffer> offers = {
      {"a", 900 * kMiB}, {"b", 900 * kMiB}, {"small", 200 * kMiB}, {"c", 900 * kMiB}};
  const auto request = request_of(20, 4096);
  const CostModel model = speeds_of(20, {10, 10, 10, 10}, 8);
  const Placement many = place(request, offers, Speed{model, Goal::throughput});
  expect_sound(many, offers, 20);
  EXPECT_EQ(many.n_replicas(), 3u);
  EXPECT_EQ(many.replica_speeds.size(), 3u);
  EXPECT_EQ(many.n_ctx, 4096u);
  EXPECT_NE(describe(many, offers, {}).find("replica 3"), std::string::npos);
  const Placement once = place(request, offers, Speed{model, Goal::latency});
  EXPECT_EQ(once.n_replicas(), 1u);
  EXPECT_GT(many.prediction->streams, once.prediction->streams);
  EXPECT_EQ(place(request, offers, Speed{model, std::nullopt}).n_replicas(), 1u);
  const CostModel one_slot = speeds_of(20, {10, 10, 10, 10}, 1);
  EXPECT_EQ(place(request, offers, Speed{one_slot, Goal::throughput}).n_replicas(), 1u);
}

TEST(Placement, ShortensOnlyAnUnaskedContextForReplicasAndOnlyForThroughput) {
  const std::vector<DeviceOffer> offers = {{"a", 600 * kMiB}, {"b", 600 * kMiB}};
  auto request = request_of(20, 0);
  const CostModel model = speeds_of(20, {10, 10}, 8);
  const uint32_t alone = place(request, offers).n_ctx;
  const Placement shorter = place(request, offers, Speed{model, Goal::throughput});
  expect_sound(shorter, offers, 20);
  EXPECT_EQ(shorter.n_replicas(), 2u);
  EXPECT_LT(shorter.n_ctx, alone);
  EXPECT_GT(shorter.n_ctx, 8192u) << "as much as both hold";
  const Placement automatic = place(request, offers, Speed{model, Goal::automatic});
  EXPECT_EQ(automatic.n_replicas(), 1u);
  EXPECT_EQ(automatic.n_ctx, alone);
  request.n_ctx = alone;
  EXPECT_EQ(place(request, offers, Speed{model, Goal::throughput}).n_replicas(), 1u);
}

// By its own prediction, and whatever memory and speeds are.
TEST(Placement, IsNeverWorseThanTheBestThatHoldsTheModelOnceAndNeverOverfills) {
  std::mt19937 random(5);
  int n_replicated = 0;
  for (int cluster = 0; cluster < 60; ++cluster) {
    SCOPED_TRACE(cluster);
    const size_t n_devices = 1 + random() % 5;
    std::vector<DeviceOffer> offers;
    std::vector<double> speeds;
    for (size_t i = 0; i < n_devices; ++i) {
      offers.push_back({std::to_string(i), (50 + random() % 500) * kMiB});
      speeds.push_back(1 + static_cast<double>(random() % 30));
    }
    const auto request = request_of(12, random() % 2 ? 4096 : 0);
    const CostModel model = speeds_of(12, speeds, 1 + random() % 12);
    const Goal goal = random() % 2 ? Goal::throughput : Goal::automatic;
    Placement once;
    try {
      once = place(request, offers, Speed{model, Goal::latency});
    } catch (const ResourceError&) {
      continue;
    }
    const Placement placement = place(request, offers, Speed{model, goal});
    expect_sound(placement, offers, 12);
    EXPECT_GE(placement.n_ctx, 4096u);
    if (placement.n_replicas() == 1) continue;
    ++n_replicated;
    if (goal != Goal::throughput) continue;
    double together = 0;
    for (const double speed : placement.replica_speeds) together += speed;
    EXPECT_GT(together, CostModel::score(*once.prediction, goal));
  }
  EXPECT_GT(n_replicated, 15);
}

}  // namespace
}  // namespace caravan::plan
