// What a backend tells of its machine, and how a connection is measured.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "remote/surveyor.h"
#include "service_support.h"

namespace caravan::remote {
namespace {

using namespace std::chrono_literals;
using tensor::DType;
using testing::Backend;
using testing::what_of;

constexpr uint64_t kEnough = uint64_t{64} << 20;
constexpr DType kTypes[] = {DType::q4_0, DType::q6_k};

TEST(Survey, MeasuresEachTypeOnce) {
  Backend backend(kEnough);
  const auto link = backend.connect();
  const auto first = link->survey(0, kTypes, 5s);
  ASSERT_TRUE(first.profile) << first.error;
  EXPECT_EQ(first.profile->matrices.size(), 2u);
  EXPECT_EQ(first.profile->rate(DType::q6_k), (stage::MatrixRate{1e9, 1e10}));
  EXPECT_EQ(first.profile->cache_bytes_per_s, 1e9);
  EXPECT_LT(std::chrono::abs(first.clock_ahead), 60s);
  EXPECT_TRUE(first.problems.empty());
  EXPECT_EQ(link->survey(0, kTypes, 5s).profile, first.profile);
  EXPECT_EQ(backend.connect()->survey(0, kTypes, 5s).profile, first.profile);
  EXPECT_EQ(backend.host.n_measured, 1);
  const DType another[] = {DType::q8_0};
  EXPECT_EQ(link->survey(0, another, 5s).profile->matrices.size(), 3u);
  EXPECT_EQ(backend.host.n_measured, 2);
  EXPECT_EQ(backend.memory_free(), kEnough);
}

TEST(Survey, WithoutTypesMeasuresNothing) {
  Backend backend(kEnough);
  const auto survey = backend.connect()->survey(0, {}, 5s);
  EXPECT_FALSE(survey.profile);
  EXPECT_EQ(survey.error, "");
  EXPECT_EQ(backend.host.n_measured, 0);
}

TEST(Survey, SaysWhyThereAreNoSpeeds) {
  Backend backend(1 << 20);
  const auto link = backend.connect();
  const auto survey = link->survey(0, kTypes, 5s);
  EXPECT_FALSE(survey.profile);
  EXPECT_NE(survey.error.find("too little memory"), std::string::npos);
  EXPECT_TRUE(link->alive());
}

TEST(Survey, OfADeviceThatIsNotThereEndsTheConnection) {
  Backend backend(kEnough);
  const auto link = backend.connect();
  EXPECT_NE(what_of([&] { link->survey(7, kTypes, 5s); }).find("there is no device 7"), std::string::npos);
}

TEST(Survey, RefusesNumbersThatAreNoSpeeds) {
  pb::SurveyResult result;
  EXPECT_THROW(read_profile(result), ProtocolError);
  stage::DeviceProfile profile;
  profile.matrices[DType::q4_0] = {2e9, 3e9};
  profile.cache_bytes_per_s = 4e9;
  write_profile(result, profile);
  EXPECT_EQ(read_profile(result), profile);
  pb::MatrixRate& unknown = *result.add_matrices();
  unknown.set_type(4711);
  unknown.set_bytes_per_s(1);
  unknown.set_ops_per_s(1);
  EXPECT_EQ(read_profile(result), profile);
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    result.mutable_matrices(0)->set_ops_per_s(bad);
    EXPECT_THROW(read_profile(result), ProtocolError) << bad;
  }
}

// A layer of two small tensors; the fake host computes nothing.
stage::LoadRequest sample_layer(uint32_t layer, int64_t n_out = 64) {
  stage::LoadRequest sample;
  sample.hyperparameters.set("general.architecture", gguf::Value::of("fake"));
  sample.manifest.tensors.push_back({"w", DType::f32, {32, n_out, 1, 1}, static_cast<uint64_t>(4 * 32 * n_out), {}});
  sample.slice = {layer, layer + 1, false, false};
  return sample;
}

TEST(SurveyLayer, MeasuresEachLayerOnce) {
  Backend backend(kEnough);
  const auto link = backend.connect();
  ASSERT_TRUE(link->knows_layer_surveys());
  const stage::LayerTimes times = link->survey_layer(0, sample_layer(3), 5s);
  EXPECT_EQ(times, (stage::LayerTimes{{1, 8}, {1e-3, 8e-3}}));
  EXPECT_EQ(backend.connect()->survey_layer(0, sample_layer(3), 5s), times);
  EXPECT_EQ(backend.host.n_measured, 1);
  link->survey_layer(0, sample_layer(4), 5s);
  EXPECT_EQ(backend.host.n_measured, 2);
  EXPECT_EQ(backend.memory_free(), kEnough);
}

TEST(SurveyLayer, SaysWhyALayerIsNotMeasured) {
  Backend backend(kEnough);
  const auto link = backend.connect();
  const auto why = what_of([&] { link->survey_layer(0, sample_layer(0, 1 << 20), 5s); });
  EXPECT_NE(why.find("the layer is too large"), std::string::npos) << why;
  EXPECT_TRUE(link->alive());
  EXPECT_NE(what_of([&] { link->survey_layer(7, sample_layer(0), 5s); }).find("there is no device 7"),
            std::string::npos);
}

TEST(SurveyLayer, RefusesNumbersThatAreNoTimes) {
  const auto result_of = [](std::vector<uint32_t> n_rows, std::vector<double> seconds) {
    pb::SurveyLayerResult result;
    write_times(result, {std::move(n_rows), std::move(seconds)});
    return result;
  };
  const stage::LayerTimes good{{1, 8, 128}, {1e-3, 2e-3, 3e-3}};
  EXPECT_EQ(read_times(result_of(good.n_rows, good.seconds)), good);
  EXPECT_THROW(read_times(result_of({}, {})), ProtocolError);
  EXPECT_THROW(read_times(result_of({1, 8}, {1e-3})), ProtocolError);
  EXPECT_THROW(read_times(result_of({2}, {1e-3})), ProtocolError);
  EXPECT_THROW(read_times(result_of({1, 8, 8}, {1, 1, 1})), ProtocolError);
  EXPECT_THROW(read_times(result_of({1, 8, 4}, {1, 1, 1})), ProtocolError);
  EXPECT_THROW(read_times(result_of({1, 1u << 31}, {1, 1})), ProtocolError);
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")})
    EXPECT_THROW(read_times(result_of({1}, {bad})), ProtocolError) << bad;
}

TEST(Survey, NamesTheMachine) {
  Backend one(kEnough), other(kEnough);
  EXPECT_EQ(one.connect()->info().machine, other.connect()->info().machine);
  EXPECT_EQ(one.connect()->info().machine, machine_name());
}

TEST(LinkTest, MeasuresTheRoundTripAndTheRate) {
  Backend backend;
  const stage::LinkProfile link = backend.connect()->measure(5s);
  EXPECT_GT(link.latency_seconds, 0);
  EXPECT_LT(link.latency_seconds, 1);
  EXPECT_GT(link.bytes_per_s, 1e5);
}

}  // namespace
}  // namespace caravan::remote
