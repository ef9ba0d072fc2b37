// The connector to backends over the wire: what it asks them, and when.
#include "cluster/remote_backend.h"

#include <gtest/gtest.h>

#include <functional>
#include <future>
#include <stop_token>

#include "../remote/fake_host.h"
#include "net/listener.h"
#include "remote/backend_service.h"

namespace caravan::cluster {
namespace {

using remote::testing::FakeHost;
using std::chrono::seconds;
using tensor::DType;

constexpr uint64_t kEnough = uint64_t{64} << 20;

// A machine in memory that says which processor it has.
class DescribedHost : public FakeHost {
 public:
  explicit DescribedHost(std::string processor, uint64_t memory = kEnough)
      : FakeHost(memory), processor_(std::move(processor)) {}
  std::vector<device::DeviceInfo> devices() const override {
    std::vector<device::DeviceInfo> devices = FakeHost::devices();
    devices.front().description = processor_;
    return devices;
  }

 private:
  const std::string processor_;
};

// A connector that asks for a layer and a type, and backends at one address, one after the other.
class Reconnection : public ::testing::Test {
 protected:
  static stage::SpeedQuestions questions() {
    stage::LoadRequest sample;
    sample.hyperparameters.set("general.architecture", gguf::Value::of("fake"));
    sample.manifest.tensors.push_back({"w", DType::f32, {32, 64, 1, 1}, 4 * 32 * 64, {}});
    sample.slice = {0, 1, false, false};
    return {{{0, sample}}, {DType::q6_k}, {DType::q4_0, DType::q6_k}};
  }

  // Starts a backend, and connects it once. It ends with its connection.
  std::optional<Backend::Speeds> speeds_of(remote::SliceHost& host) {
    remote::BackendOptions options;
    options.endpoint = endpoint_;
    const remote::BackendService service(io_, host, options);
    endpoint_ = service.endpoint();
    const auto backend = connector_->connect(endpoint_.text(), seconds(5), {[](const std::string&) {}, [] {}}, {});
    return backend->speeds() != nullptr ? std::optional(*backend->speeds()) : std::nullopt;
  }

  net::IoThreads io_{2};
  net::Endpoint endpoint_{"127.0.0.1", 0};
  const std::unique_ptr<BackendConnector> connector_ = make_remote_connector(io_, {"", seconds(5), questions()});
};

TEST_F(Reconnection, CountsWithWhatWasMeasuredBefore) {
  DescribedHost host("one processor");
  const auto first = speeds_of(host);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->device.layers.size(), 1u);
  EXPECT_EQ(first->device.rate(DType::q6_k), (stage::MatrixRate{1e9, 1e10}));
  EXPECT_EQ(host.n_measured, 2);  // a layer and a type
  const auto again = speeds_of(host);
  ASSERT_TRUE(again);
  EXPECT_EQ(again->device, first->device);
  EXPECT_EQ(again->link, first->link);
  EXPECT_EQ(host.n_measured, 2);
}

TEST_F(Reconnection, ToAnotherMachineAtTheAddressMeasuresThat) {
  DescribedHost host("one processor"), other("another processor");
  EXPECT_TRUE(speeds_of(host));
  EXPECT_TRUE(speeds_of(other));
  EXPECT_EQ(other.n_measured, 2);
  EXPECT_TRUE(speeds_of(host));
  EXPECT_EQ(host.n_measured, 4);
}

TEST_F(Reconnection, MeasuresAgainWhatHadNoMemoryToBeMeasured) {
  DescribedHost full("one processor", 1 << 20), host("one processor");
  EXPECT_FALSE(speeds_of(full));
  EXPECT_TRUE(speeds_of(host));
  EXPECT_EQ(host.n_measured, 2);
}

TEST_F(Reconnection, IsNotTakenForABackendBeside) {
  DescribedHost host("one processor"), beside("one processor");
  remote::BackendOptions options;
  options.endpoint = endpoint_;
  const remote::BackendService service(io_, beside, options);
  connector_->connect(service.endpoint().text(), seconds(5), {[](const std::string&) {}, [] {}}, {});
  EXPECT_EQ(beside.n_measured, 2);
  EXPECT_TRUE(speeds_of(host));
  EXPECT_EQ(host.n_measured, 2);
}

// A machine that never says how long a layer takes, until it is released.
class SilentHost : public FakeHost {
 public:
  SilentHost() : FakeHost(kEnough) { gate.close(); }
  stage::LayerTimes measure_layer(size_t device, const stage::LoadRequest& sample, uint64_t most_bytes) override {
    gate.pass();
    return FakeHost::measure_layer(device, sample, most_bytes);
  }
};

class GivenUp : public Reconnection {
 protected:
  // Connects to the endpoint and gives up once under_way() has returned.
  void expect_end(const net::Endpoint& endpoint, const std::function<void()>& under_way) {
    std::stop_source stop;
    auto connecting = std::async(std::launch::async, [&] {
      connector_->connect(endpoint.text(), kForever, {[](const std::string&) {}, [] {}}, stop.get_token());
    });
    under_way();
    stop.request_stop();
    ASSERT_EQ(connecting.wait_for(kSoon), std::future_status::ready);
    EXPECT_THROW(connecting.get(), Error);
  }
  static constexpr auto kForever = seconds(60), kSoon = seconds(10);  // a survey alone may take 20
};

TEST_F(GivenUp, IsABackendThatMeasures) {
  SilentHost host;
  remote::BackendOptions options;
  options.endpoint = endpoint_;
  const remote::BackendService service(io_, host, options);
  expect_end(service.endpoint(), [&] { host.gate.wait_for_visitor(); });
  host.gate.open();
}

TEST_F(GivenUp, IsAConnectionThatNobodyAnswers) {
  net::Listener listener(io_, endpoint_);
  std::unique_ptr<net::Connection> connection;
  expect_end(listener.endpoint(), [&] { connection = net::run_blocking(listener.executor(), listener.accept()); });
}

}  // namespace
}  // namespace caravan::cluster
