// Slices of a real (tiny) model on backends over loopback: bit for bit what one slice in this process computes.
#include <gtest/gtest.h>

#include "device/cpu/cpu_device.h"
#include "fake_host.h"
#include "remote/backend_link.h"
#include "remote/backend_service.h"
#include "remote/remote_stage.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::remote {
namespace {

using caravan::testing::BatchBuilder;
using caravan::testing::SliceChain;
using testing::Collector;

std::vector<std::unique_ptr<device::Device>> one_device(int n_threads) {
  std::vector<std::unique_ptr<device::Device>> devices;
  devices.push_back(std::make_unique<device::cpu::CpuDevice>(n_threads, select_isa(), uint64_t{64} << 20));
  return devices;
}

constexpr const char* kToken = "a secret of sixteen";

BackendOptions backend_options() {
  BackendOptions options;
  options.endpoint = {"127.0.0.1", 0};
  options.token = kToken;
  return options;
}

// A backend with a real device, in this process.
struct RealBackend {
  RealBackend(net::IoThreads& io, int n_threads) : host(one_device(n_threads)), service(io, host, backend_options()) {
    LinkOptions options;
    options.token = kToken;
    link = BackendLink::connect(io, service.endpoint(), options);
  }
  DeviceSliceHost host;
  BackendService service;
  std::shared_ptr<BackendLink> link;
};

TEST(RealSlices, OverTwoBackendsEqualTheWholeModelBitForBit) {
  const caravan::testing::TemporaryDirectory folder;
  for (const auto kind : {caravan::testing::TinyKind::llama, caravan::testing::TinyKind::gemma3}) {
    const uint32_t n_layer = kind == caravan::testing::TinyKind::gemma3 ? 6 : 3;
    const auto model = gguf::Model::open(
        caravan::testing::write_tiny_model(folder.path(), {.kind = kind, .n_layer = n_layer}, "model"));
    const stage::CacheConfig cache = caravan::testing::test_cache(model);
    const auto groups =
        models::find_arch(model.metadata()).cache_groups(models::find_arch(model.metadata()).read(model.metadata()));
    std::vector<int32_t> tokens;
    for (int32_t i = 0; i < 40; ++i) tokens.push_back((i * 7 + 3) % 50);

    device::cpu::CpuDevice device(1, select_isa(), uint64_t{64} << 20);
    SliceChain whole(device, model, {{0, n_layer, true, true}}, cache);

    net::IoThreads io(2);
    RealBackend first(io, 1), second(io, 2);
    weights::ModelSource source(model);
    weights::WeightSource* const sources[] = {&source};
    for (uint32_t cut = 1; cut < n_layer; ++cut) {
      const auto slices = caravan::testing::cut(n_layer, {cut});
      RemoteStage front(first.link), back(second.link);
      front.load(caravan::testing::load_request(model, slices[0], cache, weights::Hashing::sha256), sources, {});
      back.load(caravan::testing::load_request(model, slices[1], cache, weights::Hashing::sha256), sources, {});
      Collector middle, end;
      front.open(1, cut, middle);
      back.open(1, cut, end);
      BatchBuilder builder(groups, cache);
      whole.session(0).reset();
      uint64_t ticket = 0;
      for (size_t begin = 0; begin < tokens.size(); begin += 8) {
        auto batch = std::make_shared<stage::Batch>();
        builder.add(*batch, 0, std::span(tokens).subspan(begin, 8), stage::OutputKind::logits);
        const stage::Fence fence{1, cut, ++ticket};
        front.enqueue(fence, batch, {});
        stage::StageOutput hidden = middle.next();
        ASSERT_EQ(hidden.error, "");
        back.enqueue(fence, batch, std::move(hidden.hidden));
        const stage::StageOutput output = end.next();
        ASSERT_EQ(output.error, "");
        const auto expected = whole.compute(*batch);
        ASSERT_EQ(output.outputs.size(), expected.size());
        for (size_t i = 0; i < expected.size(); ++i) {
          EXPECT_EQ(output.outputs[i].row, expected[i].row);
          EXPECT_EQ(output.outputs[i].values, expected[i].values) << "cut " << cut << ", row " << begin + i;
        }
      }
    }
  }
}

TEST(RealSlices, RefusesAnArchitectureThatTheBackendDoesNotKnow) {
  net::IoThreads io(2);
  RealBackend backend(io, 1);
  testing::FakeModel model(64);
  model.request.hyperparameters.set("general.architecture", gguf::Value::of("nosuch"));
  weights::WeightSource* const sources[] = {&model.source};
  RemoteStage stage(backend.link);
  try {
    stage.load(model.request, sources, {});
    FAIL() << "loaded";
  } catch (const NotSupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("nosuch"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(backend.link->alive());
}

TEST(RealSlices, RefusesTensorsThatDoNotFitTheArchitecture) {
  net::IoThreads io(2);
  RealBackend backend(io, 1);
  testing::FakeModel model(64);
  weights::WeightSource* const sources[] = {&model.source};
  RemoteStage stage(backend.link);
  EXPECT_THROW(stage.load(model.request, sources, {}), FormatError);
  EXPECT_TRUE(backend.link->alive());
}

}  // namespace
}  // namespace caravan::remote
