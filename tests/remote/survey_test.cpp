// What a backend tells of its machine, and how a connection is measured.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

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

TEST(LinkTest, MeasuresTheRoundTripAndTheRate) {
  Backend backend;
  const stage::LinkProfile link = backend.connect()->measure(5s);
  EXPECT_GT(link.latency_seconds, 0);
  EXPECT_LT(link.latency_seconds, 1);
  EXPECT_GT(link.bytes_per_s, 1e5);
}

}  // namespace
}  // namespace caravan::remote
