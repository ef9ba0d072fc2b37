// What a backend tells of its machine, and how a connection is measured.
#include <gtest/gtest.h>

#include <cmath>
#include <future>
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
  EXPECT_EQ(backend.host.n_measured, 2);
  const DType another[] = {DType::q8_0};
  EXPECT_EQ(link->survey(0, another, 5s).profile->matrices.size(), 3u);
  EXPECT_EQ(backend.host.n_measured, 3);
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

// A server made by hand that asks how fast the device is at a type.
class AskingServer : public testing::HandMadeServer {
 public:
  explicit AskingServer(Backend& backend) : HandMadeServer(backend.io, backend.service.endpoint()) { greet(); }
  void ask(uint64_t sequence) {
    pb::Survey message;
    message.set_sequence(sequence);
    message.add_types(static_cast<uint32_t>(DType::q4_0));
    send(MessageType::survey, message);
  }
  pb::SurveyResult next_result() {
    while (const auto frame = read())
      if (frame->type == static_cast<uint16_t>(MessageType::survey_result))
        return parse_header<pb::SurveyResult>(*frame);
    ADD_FAILURE() << "cut off";
    return {};
  }
};

TEST(Survey, GivesConnectionsTurnsAndTellsThoseThatAskTooMuch) {
  Backend backend(kEnough);
  backend.host.measure_gate.close();
  AskingServer hostile(backend), honest(backend);
  for (uint64_t i = 1; i <= kMaxSurveysAtOnce + 3; ++i) hostile.ask(i);
  for (uint64_t i = 1; i <= 3; ++i) {
    const pb::SurveyResult result = hostile.next_result();
    EXPECT_EQ(result.sequence(), kMaxSurveysAtOnce + i);
    EXPECT_EQ(result.error(), "busy: 4 surveys of this connection wait already");
  }
  backend.host.measure_gate.wait_for_visitor();
  honest.ask(77);
  EXPECT_TRUE(testing::eventually([&] { return backend.service.status().n_connections == 2; }));
  backend.host.measure_gate.open();
  EXPECT_EQ(honest.next_result().error(), "");
  for (uint64_t i = 1; i <= kMaxSurveysAtOnce; ++i) EXPECT_EQ(hostile.next_result().sequence(), i);
}

TEST(Survey, IsGivenUpByABackendThatStops) {
  Backend backend(kEnough);
  backend.host.measure_gate.close();
  AskingServer server(backend);
  for (uint64_t i = 1; i <= kMaxSurveysAtOnce; ++i) server.ask(i);
  backend.host.measure_gate.wait_for_visitor();
  auto stopping = std::async(std::launch::async, [&] { backend.service.stop(); });
  EXPECT_TRUE(testing::eventually([&] { return backend.service.status().n_connections == 0; }));
  backend.host.measure_gate.open();
  stopping.get();
  EXPECT_EQ(backend.host.n_measured, 1);
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
