// A backend service and servers on loopback, in one process: loading, computing, sharing, refusing, losing.
#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "fake_host.h"
#include "net/listener.h"
#include "net/tls.h"
#include "remote/backend_link.h"
#include "remote/backend_service.h"
#include "remote/codec.h"
#include "remote/remote_stage.h"
#include "service_support.h"
#include "support/kit.h"

namespace caravan::remote {
namespace {

using namespace std::chrono_literals;
using testing::Backend;
using testing::Collector;
using testing::eventually;
using testing::FakeHost;
using testing::FakeModel;
using testing::HandMadeServer;
using testing::link_options;
using testing::load;
using testing::local_options;
using testing::simple_batch;
using testing::what_of;

TEST(BackendService, SaysWhoItIs) {
  Backend backend;
  const auto link = backend.connect();
  EXPECT_EQ(link->info().name, "test-backend");
  EXPECT_EQ(link->info().id.size(), 16u);
  EXPECT_EQ(link->info().keep_alive, 300s);
  ASSERT_EQ(link->info().devices.size(), 1u);
  EXPECT_EQ(link->info().devices[0].memory_total, 1u << 20);
  EXPECT_EQ(link->info().memory_free(), 1u << 20);
  EXPECT_EQ(link->info().numeric_class(), "fake-1");
  EXPECT_TRUE(link->alive());
}

TEST(BackendService, LoadsComputesAndDeliversInOrder) {
  Backend backend(64 << 20);
  FakeModel model(weights::kChunkBytes * 9 + 100);
  uint64_t last_progress = 0;
  Collector collector;
  RemoteStage stage(backend.connect());
  load(stage, model, [&](uint64_t done) {
    EXPECT_GE(done, last_progress);
    last_progress = done;
  });
  EXPECT_EQ(last_progress, model.request.manifest.size_bytes());
  EXPECT_EQ(stage.pulled_bytes(), model.request.manifest.size_bytes());
  EXPECT_EQ(stage.held().weights, model.request.manifest.size_bytes());
  EXPECT_EQ(stage.held().kv_cache, 4000u);
  stage.open(77, 1, collector);
  for (uint64_t ticket = 1; ticket <= 50; ++ticket)
    stage.enqueue({77, 1, ticket}, std::make_shared<stage::Batch>(simple_batch(1 + ticket % 5)), {});
  for (uint64_t ticket = 1; ticket <= 50; ++ticket) {
    const stage::StageOutput output = collector.next();
    ASSERT_EQ(output.error, "");
    EXPECT_EQ(output.fence, (stage::Fence{77, 1, ticket}));
    ASSERT_EQ(output.outputs.size(), 1u);
    ASSERT_EQ(output.outputs[0].values.size(), testing::kVocab);
    EXPECT_EQ(output.outputs[0].values[3], static_cast<float>(ticket % 5) + 1 + 3);
  }
}

// A server's weights, until so many chunks were sent: then its connection breaks.
struct BreakingSource : weights::WeightSource {
  BreakingSource(weights::WeightSource& source, BackendLink& to, int n) : inner(source), link(to), n_left(n) {}
  std::string_view name() const override { return inner.name(); }
  void announce(std::span<const weights::ChunkRef> chunks) override { inner.announce(chunks); }
  bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
    if (n_left-- == 0) link.close();
    return inner.fetch(chunk, out);
  }
  weights::WeightSource& inner;
  BackendLink& link;
  std::atomic<int> n_left;
};

TEST(BackendService, GoesOnWithALoadWhoseConnectionBroke) {
  Backend backend(64 << 20);
  FakeModel model(weights::kChunkBytes * 9);
  {
    const auto link = backend.connect();
    RemoteStage stage(link);
    // When the last chunk is asked for, at most six of those before are not used yet.
    BreakingSource breaking(model.source, *link, 8);
    weights::WeightSource* const sources[] = {&breaking};
    EXPECT_THROW(stage.load(model.request, sources, {}), Error);
  }
  RemoteStage stage(backend.connect());
  load(stage, model);
  EXPECT_LE(stage.pulled_bytes(), 7 * weights::kChunkBytes);
  EXPECT_EQ(backend.host.n_loads, 1);
}

TEST(BackendService, SaysWhereTheWeightsCameFrom) {
  const caravan::testing::TemporaryDirectory folder;
  weights::ChunkCache cache(folder.path(), 64 << 20);
  BackendOptions options = local_options();
  options.cache = &cache;
  options.keep_alive = 0s;
  Backend backend(64 << 20, options);
  FakeModel model(weights::kChunkBytes * 2 + 8);
  const uint64_t total = model.request.manifest.size_bytes();
  {
    RemoteStage stage(backend.connect());
    load(stage, model);
    EXPECT_EQ(stage.origins().server, total);
    EXPECT_EQ(stage.origins().cache, 0u);
  }
  cache.flush();
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_resident == 0; }));
  RemoteStage stage(backend.connect());
  load(stage, model);
  EXPECT_EQ(stage.pulled_bytes(), 0u);
  EXPECT_EQ(stage.origins().cache, total);
  EXPECT_EQ(backend.service.status().origins.cache, total);
  EXPECT_EQ(backend.service.status().origins.server, total);
}

TEST(BackendService, PassesHiddenRowsBothWays) {
  Backend backend;
  FakeModel model(64);
  model.request.slice = {0, 1, false, false};
  Collector collector;
  RemoteStage stage(backend.connect());
  load(stage, model);
  stage.open(1, 1, collector);
  std::vector<float> input(2 * testing::kEmbd);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i) * 0.5f;
  stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(2)), input);
  const auto output = collector.next();
  ASSERT_EQ(output.error, "");
  ASSERT_EQ(output.hidden.size(), input.size());
  for (size_t i = 0; i < input.size(); ++i) EXPECT_EQ(output.hidden[i], input[i] + 1);
}

TEST(BackendService, ReportsABatchThatBreaksItsLimitsAndGoesOn) {
  Backend backend;
  FakeModel model(64);
  Collector collector;
  RemoteStage stage(backend.connect());
  load(stage, model);
  stage.open(1, 1, collector);
  auto bad = std::make_shared<stage::Batch>(simple_batch(1));
  bad->tokens[0] = 1000;
  stage.enqueue({1, 1, 1}, bad, {});
  const auto refused = collector.next();
  EXPECT_EQ(refused.fence.ticket, 1u);
  EXPECT_NE(refused.error.find("token of row 0"), std::string::npos) << refused.error;
  stage.enqueue({1, 1, 2}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(collector.next().error, "");
}

TEST(BackendService, SharesOneCopyBetweenTwoServers) {
  Backend backend;
  FakeModel model(20000), same(20000);
  RemoteStage first(backend.connect()), second(backend.connect());
  load(first, model);
  load(second, same);
  EXPECT_EQ(backend.host.n_loads, 1);
  EXPECT_EQ(second.pulled_bytes(), 0u);
  EXPECT_EQ(same.source.n_bytes, 0u);
  EXPECT_EQ(backend.host.n_stages, 2);
  EXPECT_EQ(backend.memory_free(), (1u << 20) - 20000 - 2 * 4160);
  Collector one, two;
  first.open(1, 1, one);
  second.open(2, 9, two);
  first.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  second.enqueue({2, 9, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(one.next().error, "");
  EXPECT_EQ(two.next().error, "");
}

TEST(BackendService, LoadsOnceWhenTwoServersLoadAtTheSameTime) {
  Backend backend(64 << 20);
  FakeModel model(weights::kChunkBytes * 4), same(weights::kChunkBytes * 4);
  RemoteStage first(backend.connect()), second(backend.connect());
  auto loading = std::async(std::launch::async, [&] { load(first, model); });
  load(second, same);
  loading.get();
  EXPECT_EQ(backend.host.n_loads, 1);
  EXPECT_EQ(first.pulled_bytes() + second.pulled_bytes(), model.request.manifest.size_bytes());
}

TEST(BackendService, KeepsSeveralModelsOnOneLink) {
  Backend backend;
  FakeModel a(20000, 1), b(30000, 2);
  const auto link = backend.connect();
  RemoteStage first(link), second(link);
  load(first, a);
  load(second, b);
  Collector one, two;
  first.open(1, 1, one);
  second.open(1, 1, two);
  second.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(2)), {});
  first.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(one.next().outputs.at(0).row, 0u);
  EXPECT_EQ(two.next().outputs.at(0).row, 1u);
}

TEST(BackendService, RefusesWhatDoesNotFitAndServesOn) {
  Backend backend(30000);
  FakeModel big(40000), small(10000);
  RemoteStage stage(backend.connect());
  const std::string text = what_of([&] { load(stage, big); });
  EXPECT_NE(text.find("need"), std::string::npos) << text;
  EXPECT_NE(text.find("have"), std::string::npos) << text;
  EXPECT_NE(text.find(backend.service.endpoint().text()), std::string::npos) << text;
  EXPECT_THROW(load(stage, big), ResourceError);
  load(stage, small);
  EXPECT_EQ(backend.memory_free(), 30000 - 10000 - 4160u);
}

TEST(BackendService, KeepsReservedMemoryForTheOneThatReserved) {
  Backend backend(30000);
  FakeModel model(20000, 1), other(20000, 2);
  RemoteStage first(backend.connect()), second(backend.connect());
  first.reserve({20000, 4000, 160}, stage::content_key(model.request));
  EXPECT_THROW(load(second, other), ResourceError);
  load(first, model);
}

TEST(BackendService, FreesTheKvCacheAndKeepsTheWeightsWhenAServerLeaves) {
  Backend backend;
  FakeModel model(20000);
  {
    RemoteStage stage(backend.connect());
    load(stage, model);
    EXPECT_EQ(backend.memory_free(), (1u << 20) - 20000 - 4160);
  }
  EXPECT_TRUE(eventually([&] { return backend.host.n_stages == 0 && backend.service.status().n_connections == 0; }));
  EXPECT_EQ(backend.host.n_weights, 1);
  EXPECT_EQ(backend.service.status().n_resident, 1u);
  EXPECT_TRUE(eventually([&] { return backend.memory_free() == 1u << 20; }));
  RemoteStage again(backend.connect());
  load(again, model);
  EXPECT_EQ(again.pulled_bytes(), 0u);
}

TEST(BackendService, FreesWeightsAtOnceWhenNothingIsToBeKept) {
  BackendOptions options = local_options();
  options.keep_alive = 0s;
  Backend backend(1 << 20, options);
  FakeModel model(20000);
  {
    RemoteStage stage(backend.connect());
    load(stage, model);
  }
  EXPECT_TRUE(eventually([&] { return backend.host.n_weights == 0; }));
}

TEST(BackendService, GivesTheMemoryOfAnOldStageToTheNextOne) {
  Backend backend(30000);
  FakeModel model(20000, 1), other(20000, 2);
  const auto link = backend.connect();
  for (int i = 0; i < 5; ++i) {
    RemoteStage stage(link);
    load(stage, i % 2 == 0 ? model : other);
  }
}

TEST(BackendService, DropsFramesOfOlderEpochsAndOtherSessions) {
  Backend backend;
  FakeModel model(64);
  Collector collector;
  const auto link = backend.connect();
  RemoteStage stage(link);
  load(stage, model);
  stage.open(5, 2, collector);
  // A server that was planned away would still send these: around RemoteStage's own check, straight into the channel.
  const auto send_raw = [&](const stage::Fence& fence) {
    ByteWriter writer;
    encode_batch(writer, simple_batch(1));
    pb::Forward message;
    message.set_stage(1);
    write_fence(*message.mutable_fence(), fence);
    message.set_batch_bytes(static_cast<uint32_t>(writer.data().size()));
    link->channel().send(MessageType::forward, message, writer.release());
  };
  send_raw({5, 1, 100});
  send_raw({5, 3, 101});
  send_raw({6, 2, 102});
  stage.enqueue({5, 2, 103}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(collector.next().fence.ticket, 103u);
  EXPECT_EQ(backend.service.status().n_stale, 3u);
  EXPECT_EQ(collector.n_waiting(), 0u);
}

TEST(BackendService, AnswersHeartbeatsWhileADeviceComputes) {
  BackendOptions options = local_options();
  options.heartbeat_timeout = 300ms;
  options.heartbeat_interval = 20ms;
  Backend backend(1 << 20, options);
  LinkOptions fast = link_options();
  fast.heartbeat_interval = 20ms;
  fast.heartbeat_timeout = 300ms;
  FakeModel model(64);
  Collector collector;
  const auto link = backend.connect(fast);
  RemoteStage stage(link);
  load(stage, model);
  stage.open(1, 1, collector);
  backend.host.gate.close();
  stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  backend.host.gate.wait_for_visitor();
  // Longer than the timeout: without answers the link would be lost by now.
  const auto until = std::chrono::steady_clock::now() + 900ms;
  while (std::chrono::steady_clock::now() < until) {
    const auto before = std::chrono::steady_clock::now();
    EXPECT_FALSE(link->refresh_memory_free(5000ms).empty());
    EXPECT_LT(std::chrono::steady_clock::now() - before, 4000ms);
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_TRUE(link->alive()) << link->lost_reason();
  backend.host.gate.open();
  EXPECT_EQ(collector.next().error, "");
}

TEST(BackendService, FinishesTheStepOfAServerThatLeavesBeforeItFreesTheStage) {
  Backend backend;
  FakeModel model(64);
  Collector collector;
  backend.host.gate.close();
  {
    RemoteStage stage(backend.connect());
    load(stage, model);
    stage.open(1, 1, collector);
    stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
    backend.host.gate.wait_for_visitor();
  }
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_connections == 0; }));
  EXPECT_EQ(backend.host.n_stages, 1);
  // Others are served meanwhile.
  FakeModel other(64, 2);
  EXPECT_TRUE(backend.connect()->alive());
  backend.host.gate.open();
  EXPECT_TRUE(eventually([&] { return backend.host.n_stages == 0; }));
  EXPECT_EQ(collector.n_waiting(), 0u);
}

TEST(BackendLink, CountsBytesAndTimesHeartbeats) {
  Backend backend;
  LinkOptions options = link_options();
  options.heartbeat_interval = 60s;
  options.heartbeat_timeout = 120s;
  const auto link = backend.connect(options);
  ASSERT_TRUE(link->ask(5s));
  const LinkTraffic before = link->traffic();
  EXPECT_GT(before.rtt.count(), 0);
  EXPECT_GT(before.mean_rtt.count(), 0);
  EXPECT_GT(before.received_bytes, 0u);
  FakeModel model(20000);
  RemoteStage stage(link);
  load(stage, model);
  const LinkTraffic after = link->traffic();
  EXPECT_GE(after.sent_bytes, before.sent_bytes + 20000);
  EXPECT_LT(after.sent_bytes, before.sent_bytes + 22000);
  EXPECT_GT(after.received_bytes, before.received_bytes);
}

TEST(BackendService, AbandonsALoadWhoseServerLeaves) {
  class StuckSource : public weights::WeightSource {
   public:
    void announce(std::span<const weights::ChunkRef>) override {}
    bool fetch(const weights::ChunkRef&, std::span<std::byte>) override {
      asked.set_value();
      released.get_future().wait();
      throw Error("the test ends this load");
    }
    std::promise<void> asked, released;
  };
  Backend backend;
  FakeModel model(20000);
  StuckSource stuck;
  auto link = backend.connect();
  auto loading = std::async(std::launch::async, [&] {
    RemoteStage stage(link);
    weights::WeightSource* const sources[] = {&stuck};
    stage.load(model.request, sources, {});
  });
  stuck.asked.get_future().wait();
  link->close();
  EXPECT_TRUE(eventually([&] { return backend.memory_free() == 1u << 20; }));
  stuck.released.set_value();
  EXPECT_THROW(loading.get(), Error);
  RemoteStage next(backend.connect());
  load(next, model);
}

TEST(BackendService, FailsALoadWhoseSourceHasWrongBytes) {
  Backend backend;
  FakeModel model(20000);
  model.source.tensors["blk.0.weight"][5] ^= std::byte{1};
  const auto link = backend.connect();
  RemoteStage stage(link);
  const std::string text = what_of([&] { load(stage, model); });
  EXPECT_NE(text.find("SHA-256"), std::string::npos) << text;
  model.source.tensors["blk.0.weight"][5] ^= std::byte{1};
  load(stage, model);
  EXPECT_TRUE(link->alive());
}

TEST(BackendService, TellsItsServersThatItStops) {
  auto backend = std::make_unique<Backend>();
  FakeModel model(64);
  Collector collector;
  net::IoThreads io(1);
  const auto link = BackendLink::connect(io, backend->service.endpoint(), link_options());
  const std::string endpoint = backend->service.endpoint().text();
  RemoteStage stage(link);
  load(stage, model);
  std::promise<std::string> lost;
  link->on_lost([&](const std::string& reason) { lost.set_value(reason); });
  backend->service.stop();
  EXPECT_EQ(backend->host.n_stages, 0);
  EXPECT_EQ(lost.get_future().get(), "backend " + endpoint + ": the backend stops");
  stage.open(1, 1, collector);
  stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(collector.next().error, "backend " + endpoint + ": the backend stops");
}

// Notes whether the loss of its link was told before.
class LateListener : public BackendLink::Listener {
 public:
  explicit LateListener(const std::atomic<bool>& told) : told_(told) {}
  void on_frame(net::Frame) override {}
  void on_lost(const std::string&) override { told_before.set_value(told_); }
  uint64_t max_output_bytes() const override { return 0; }
  std::promise<bool> told_before;

 private:
  const std::atomic<bool>& told_;
};

TEST(BackendLink, SaysThatItIsLostBeforeItsStagesFail) {
  auto backend = std::make_unique<Backend>();
  net::IoThreads io(1);
  const auto link = BackendLink::connect(io, backend->service.endpoint(), link_options());
  std::atomic<bool> told{false};
  const auto listener = std::make_shared<LateListener>(told);
  link->attach(listener);
  link->on_lost([&](const std::string&) { told = true; });
  backend->service.stop();
  EXPECT_TRUE(listener->told_before.get_future().get());
}

TEST(Handshake, RefusesAnotherMajorVersionNamingBoth) {
  Backend backend;
  HandMadeServer server(backend.io, backend.service.endpoint());
  pb::Hello hello;
  hello.set_protocol_major(kProtocolMajor + 1);
  hello.set_software_version("9.9");
  server.send(MessageType::hello, hello);
  const std::string text = server.read_refusal();
  EXPECT_NE(text.find(describe_version(kProtocolMajor, kProtocolMinor, CARAVAN_VERSION)), std::string::npos) << text;
  EXPECT_NE(text.find(describe_version(kProtocolMajor + 1, 0, "9.9")), std::string::npos) << text;
}

TEST(Handshake, RefusesABackendOfAnotherMajorVersion) {
  net::IoThreads io(2);
  net::Listener listener(io, {"127.0.0.1", 0});
  auto answering = net::asio::co_spawn(
      listener.executor(),
      [](net::Listener& l) -> net::awaitable<void> {
        auto connection = co_await l.accept();
        pb::HelloAck ack;
        ack.set_protocol_major(7);
        co_await connection->write_text(HandMadeServer::frame(2, ack));
        co_await net::close_gently(*connection, 1s);
      }(listener),
      net::asio::use_future);
  try {
    BackendLink::connect(io, listener.endpoint(), link_options());
    FAIL() << "connected";
  } catch (const NotSupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("protocol 7.0"), std::string::npos) << error.what();
  }
  answering.get();
}

TEST(Handshake, NamesTheSideThatLacksTheToken) {
  BackendOptions with_token = local_options();
  with_token.token = "a token for the test";
  Backend open, closed(1 << 20, with_token);
  EXPECT_TRUE(closed.connect(link_options("a token for the test"))->alive());
  const std::string needs = what_of([&] { closed.connect(); });
  EXPECT_EQ(needs, "backend " + closed.service.endpoint().text() +
                       " requires a token: give its --rpc-token / APP_RPC_TOKEN here, too");
  const std::string has_none = what_of([&] { open.connect(link_options("a token for the test")); });
  EXPECT_EQ(has_none, "backend " + open.service.endpoint().text() +
                          " does not use a token: start it with --rpc-token / APP_RPC_TOKEN or drop --rpc-token here");
  const std::string differs = what_of([&] { closed.connect(link_options("another token, also long enough")); });
  EXPECT_NE(differs.find("backend " + closed.service.endpoint().text() + ": refused: wrong token"), std::string::npos)
      << differs;
  EXPECT_THROW(closed.connect(), RequestError);
  EXPECT_THROW(open.connect(link_options("x")), RequestError);
  EXPECT_THROW(closed.connect(link_options("x")), RequestError);
}

TEST(Handshake, SaysNothingButATlsAlertToAPeerWithoutTheToken) {
  BackendOptions with_token = local_options();
  with_token.token = "a token for the test";
  Backend backend(1 << 20, with_token);
  net::IoThreads io(1);
  const auto answer_to = [&](const std::string& text) {
    const auto connection =
        net::run_blocking(io.next_executor(), net::connect_tcp(backend.service.endpoint(), std::chrono::seconds(5)));
    net::run_blocking(connection->executor(), connection->write_text(text));
    std::string answer;
    std::array<std::byte, 256> some{};
    while (const size_t n = net::run_blocking(connection->executor(), connection->read_some(some)))
      answer.append(reinterpret_cast<const char*>(some.data()), n);
    return answer;
  };
  // Fatal, certificate_required.
  const std::string alert("\x15\x03\x03\x00\x02\x02\x74", 7);
  EXPECT_EQ(answer_to(HandMadeServer::hello()), alert);
  EXPECT_EQ(answer_to("GET / HTTP/1.1\r\n\r\n"), alert);
}

TEST(Handshake, WorksOverTlsAsWithout) {
  BackendOptions with_token = local_options();
  with_token.token = "a token for the test";
  Backend backend(64 << 20, with_token);
  FakeModel model(weights::kChunkBytes * 3 + 64);
  Collector collector;
  RemoteStage stage(backend.connect(link_options("a token for the test")));
  load(stage, model);
  stage.open(1, 1, collector);
  for (uint64_t ticket = 1; ticket <= 20; ++ticket)
    stage.enqueue({1, 1, ticket}, std::make_shared<stage::Batch>(simple_batch(16)), {});
  for (uint64_t ticket = 1; ticket <= 20; ++ticket) EXPECT_EQ(collector.next().error, "");
}

TEST(Handshake, ClosesAPeerThatSaysNothingOrOnlyHalfAHello) {
  BackendOptions options = local_options();
  options.handshake_timeout = 50ms;
  Backend backend(1 << 20, options);
  HandMadeServer silent(backend.io, backend.service.endpoint()), half(backend.io, backend.service.endpoint());
  half.send_text(HandMadeServer::hello().substr(0, 10));
  EXPECT_EQ(silent.read_refusal(), "closed");
  EXPECT_EQ(half.read_refusal(), "closed");
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_refused == 2; }));
}

TEST(Handshake, ClosesConnectionsOverTheLimit) {
  BackendOptions options = local_options();
  options.quota.max_connections = 2;
  Backend backend(1 << 20, options);
  const auto first = backend.connect(), second = backend.connect();
  EXPECT_THROW(backend.connect(), net::ConnectionError);
  first->close();
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_connections == 1; }));
  EXPECT_TRUE(backend.connect()->alive());
}

TEST(BackendLink, NamesABackendThatIsNotThere) {
  net::IoThreads io(1);
  net::Endpoint nobody;
  {
    nobody = net::Listener(io, {"127.0.0.1", 0}).endpoint();
  }
  EXPECT_EQ(what_of([&] { BackendLink::connect(io, nobody, link_options()); }),
            "backend " + nobody.text() + ": Connection refused");
}

// Accepts one connection, answers its hello, and then does as the test says.
struct ScriptedBackend {
  explicit ScriptedBackend(net::IoThreads& io) : listener(io, {"127.0.0.1", 0}) {
    ready = net::asio::co_spawn(listener.executor(), serve(*this), net::asio::use_future);
  }
  static net::awaitable<void> serve(ScriptedBackend& self) {
    self.connection = co_await self.listener.accept();
    pb::HelloAck ack;
    ack.set_protocol_major(kProtocolMajor);
    ack.add_devices()->set_numeric_class("fake-1");
    co_await self.connection->write_text(HandMadeServer::frame(2, ack));
  }
  void send_text(const std::string& text) { net::run_blocking(connection->executor(), connection->write_text(text)); }
  void close() {
    net::asio::post(connection->executor(), net::asio::use_future([this] { connection->close(); })).get();
  }
  net::Listener listener;
  std::unique_ptr<net::TcpConnection> connection;
  std::future<void> ready;
};

// The reason that a link gives when its backend does something.
std::string reason_of_loss(const std::function<void(ScriptedBackend&)>& action, const LinkOptions& options) {
  net::IoThreads io(2);
  ScriptedBackend backend(io);
  const auto link = BackendLink::connect(io, backend.listener.endpoint(), options);
  backend.ready.get();
  auto lost = std::make_shared<std::promise<std::string>>();
  link->on_lost([lost](const std::string& reason) { lost->set_value(reason); });
  Collector collector;
  action(backend);
  const std::string reason = lost->get_future().get();
  EXPECT_FALSE(link->alive());
  EXPECT_EQ(link->lost_reason(), reason);
  const std::string name = "backend " + backend.listener.endpoint().text();
  EXPECT_EQ(reason.substr(0, name.size()), name);
  return reason.substr(std::min(name.size(), reason.size()));
}

TEST(BackendLink, SaysThatTheBackendClosedTheConnection) {
  EXPECT_EQ(reason_of_loss([](ScriptedBackend& backend) { backend.close(); }, link_options()),
            " closed the connection");
}

TEST(BackendLink, SaysThatTheBackendMissedHeartbeats) {
  LinkOptions options = link_options();
  options.heartbeat_interval = 10ms;
  options.heartbeat_timeout = 100ms;
  const std::string reason = reason_of_loss([](ScriptedBackend&) {}, options);
  EXPECT_EQ(reason.substr(0, 24), " missed heartbeats for 0") << reason;
}

TEST(BackendLink, ClosesOnFramesThatABackendMustNotSend) {
  const auto reason_for = [](const std::string& bytes) {
    return reason_of_loss([&](ScriptedBackend& backend) { backend.send_text(bytes); }, link_options());
  };
  EXPECT_NE(reason_for("garbage that is long enough to be a header").find("frame magic"), std::string::npos);
  EXPECT_NE(reason_for(HandMadeServer::frame(15, pb::Forward())).find("Forward from a backend"), std::string::npos);
  EXPECT_NE(reason_for(HandMadeServer::frame(99, pb::Forward())).find("unknown message type 99"), std::string::npos);
  EXPECT_NE(reason_for(HandMadeServer::frame(16, pb::Output(), "1234")).find("payload of 4 bytes"), std::string::npos);
  EXPECT_NE(reason_for(HandMadeServer::frame(2, pb::HelloAck())).find("second HelloAck"), std::string::npos);
}

TEST(RemoteStage, DeliversAnErrorForEveryTicketInFlightWhenTheLinkIsLost) {
  Backend backend;
  FakeModel model(64);
  Collector collector;
  const auto link = backend.connect();
  RemoteStage stage(link);
  load(stage, model);
  stage.open(1, 1, collector);
  backend.host.gate.close();
  for (uint64_t ticket = 1; ticket <= 3; ++ticket)
    stage.enqueue({1, 1, ticket}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  backend.host.gate.wait_for_visitor();
  link->close();
  for (uint64_t ticket = 1; ticket <= 3; ++ticket) {
    const auto output = collector.next();
    EXPECT_EQ(output.fence.ticket, ticket);
    EXPECT_NE(output.error.find("closed here"), std::string::npos) << output.error;
  }
  stage.enqueue({1, 1, 4}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_NE(collector.next().error, "");
  backend.host.gate.open();
}

TEST(RemoteStage, GivesALoadUpThatDoesNotMove) {
  Backend backend;
  FakeModel model(20000);
  const auto link = backend.connect();
  backend.host.load_gate.close();
  {
    RemoteStage stage(link, 0, 300ms);
    const std::string text = what_of([&] {
      try {
        load(stage, model);
      } catch (const StalledError&) {
        throw;
      } catch (const Error& error) {
        ADD_FAILURE() << "another error: " << error.what();
      }
    });
    EXPECT_NE(text.find("no progress for 0.3 s while it was to load its layers"), std::string::npos) << text;
  }
  EXPECT_TRUE(link->alive());
  EXPECT_LT(backend.memory_free(), uint64_t{1} << 20) << "what the backend has not freed is not free";
  backend.host.load_gate.open();
  EXPECT_TRUE(eventually([&] { return backend.memory_free() == 1u << 20; }));
  RemoteStage next(link);
  load(next, model);
}

TEST(RemoteStage, TellsOfEveryChunkThatItSends) {
  Backend backend(64 << 20);
  FakeModel model(3 * weights::kChunkBytes);
  RemoteStage stage(backend.connect());
  int n = 0;
  std::vector<uint64_t> done;
  load(stage, model, [&](uint64_t bytes) {
    ++n;
    if (done.empty() || done.back() != bytes) done.push_back(bytes);
  });
  EXPECT_GE(n, 3);
  EXPECT_TRUE(std::ranges::is_sorted(done));
  EXPECT_EQ(done.back(), 3 * weights::kChunkBytes);
}

TEST(RemoteStage, NeverCallsASinkThatWasReplaced) {
  Backend backend;
  FakeModel model(64);
  Collector old, current;
  RemoteStage stage(backend.connect());
  load(stage, model);
  stage.open(1, 1, old);
  backend.host.gate.close();
  stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  backend.host.gate.wait_for_visitor();
  stage.open(1, 2, current);
  stage.enqueue({1, 2, 2}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  backend.host.gate.open();
  EXPECT_EQ(current.next().fence, (stage::Fence{1, 2, 2}));
  EXPECT_EQ(old.n_waiting(), 0u);
}

// --- peers that mean harm -------------------------------------------------------------------------------------------

// A legitimate server before and after what the others do.
void expect_serves(Backend& backend) {
  FakeModel model(64);
  Collector collector;
  RemoteStage stage(backend.connect());
  load(stage, model);
  stage.open(1, 1, collector);
  stage.enqueue({1, 1, 1}, std::make_shared<stage::Batch>(simple_batch(1)), {});
  EXPECT_EQ(collector.next().error, "");
}

TEST(HostilePeer, IsRefusedForGarbage) {
  Backend backend;
  for (const std::string_view garbage :
       {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00", "SSH-2.0-x\r\n",
        "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}) {
    HandMadeServer peer(backend.io, backend.service.endpoint());
    peer.send_text(garbage);
    peer.finish();
    while (peer.read()) {
    }
  }
  expect_serves(backend);
}

TEST(HostilePeer, IsRefusedForFramesInAWrongState) {
  Backend backend;
  const auto refusal = [&](MessageType type, const google::protobuf::MessageLite& header,
                           std::string_view payload = "") {
    HandMadeServer peer(backend.io, backend.service.endpoint());
    peer.greet();
    peer.send(type, header, payload);
    return peer.read_refusal();
  };
  pb::Forward forward;
  forward.set_stage(1);
  EXPECT_EQ(refusal(MessageType::forward, forward), "there is no stage 1");
  EXPECT_NE(refusal(MessageType::forward, forward, "payload").find("at most 0"), std::string::npos);
  pb::OpenSession open;
  open.set_stage(9);
  EXPECT_EQ(refusal(MessageType::open_session, open), "there is no stage 9");
  EXPECT_EQ(refusal(MessageType::hello, pb::Hello()), "a second Hello");
  EXPECT_EQ(refusal(MessageType::output, pb::Output()), "Output from a server");
  EXPECT_EQ(refusal(static_cast<MessageType>(999), pb::Output()), "unknown message type 999");
  EXPECT_EQ(refusal(MessageType::load_slice, pb::LoadSlice()), "stage 0 is no stage");
  pb::Reserve reserve;
  reserve.set_stage(1);
  EXPECT_NE(refusal(MessageType::reserve, reserve).find("32 bytes"), std::string::npos);
  HandMadeServer early(backend.io, backend.service.endpoint());
  early.send(MessageType::heartbeat, pb::Heartbeat());
  EXPECT_EQ(early.read_refusal(), "Heartbeat before Hello");
  expect_serves(backend);
}

TEST(HostilePeer, IsRefusedForSizesThatLie) {
  Backend backend;
  const auto refusal = [&](net::FrameHeader header) {
    HandMadeServer peer(backend.io, backend.service.endpoint());
    peer.greet();
    const auto raw = net::encode_frame_header(header);
    peer.send_text({reinterpret_cast<const char*>(raw.data()), raw.size()});
    return peer.read_refusal();
  };
  EXPECT_NE(refusal({8, 0, 0xffffffff, 0}).find("at most"), std::string::npos);
  EXPECT_NE(refusal({8, 0, 0, ~uint64_t{0}}).find("at most"), std::string::npos);
  EXPECT_NE(refusal({11, 0, 0, weights::kChunkBytes + 1}).find("at most"), std::string::npos);
  EXPECT_NE(refusal({4, 0, 65, 0}).find("at most"), std::string::npos);
  pb::LoadSlice load_slice;
  load_slice.set_stage(1);
  load_slice.set_metadata_bytes(1u << 30);
  HandMadeServer peer(backend.io, backend.service.endpoint());
  peer.greet();
  peer.send(MessageType::load_slice, load_slice, "short");
  EXPECT_NE(peer.read_refusal().find("metadata"), std::string::npos);
  expect_serves(backend);
}

TEST(HostilePeer, CannotTakeMemoryThatIsNotThere) {
  Backend backend(30000);
  HandMadeServer peer(backend.io, backend.service.endpoint());
  peer.greet();
  pb::Reserve reserve;
  reserve.set_stage(1);
  reserve.set_weights(~uint64_t{0});
  reserve.set_kv_cache(~uint64_t{0});
  reserve.set_content_key(std::string(32, 'k'));
  peer.send(MessageType::reserve, reserve);
  const auto answer = peer.read();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->type, static_cast<uint16_t>(MessageType::error));
  EXPECT_EQ(backend.memory_free(), 30000u);
  expect_serves(backend);
}

TEST(HostilePeer, IsClosedForSendingChunksNobodyAskedForOrFloodsOfStages) {
  Backend backend;
  HandMadeServer peer(backend.io, backend.service.endpoint());
  peer.greet();
  std::string flood;
  for (uint32_t i = 1; i <= kMaxStages + 1; ++i) {
    pb::Reserve reserve;
    reserve.set_stage(i);
    reserve.set_content_key(std::string(32, 'k'));
    flood += HandMadeServer::frame(static_cast<uint16_t>(MessageType::reserve), reserve);
  }
  peer.send_text(flood);
  EXPECT_NE(peer.read_refusal().find("more than 64 stages"), std::string::npos);
  expect_serves(backend);
}

TEST(HostilePeer, IsClosedWhenItAsksWithoutReading) {
  Backend backend;
  HandMadeServer peer(backend.io, backend.service.endpoint());
  peer.greet();
  std::string flood;
  for (int i = 0; i < 20000; ++i)
    flood += HandMadeServer::frame(static_cast<uint16_t>(MessageType::heartbeat), pb::Heartbeat());
  for (int i = 0; i < 60 && backend.service.status().n_connections > 0; ++i) peer.send_text(flood);
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_connections == 0; }));
  expect_serves(backend);
}

// What a server sends to load and to compute, as bytes; LoadSlice asks for a slice that is resident, so that no chunk
// has to follow.
std::string conversation(FakeModel& model) {
  std::string bytes = HandMadeServer::hello();
  const EncodedLoad load_slice = encode_load(model.request, 1, 0);
  bytes += HandMadeServer::frame(8, load_slice.header,
                                 {reinterpret_cast<const char*>(load_slice.payload.data()), load_slice.payload.size()});
  return bytes;
}

TEST(HostilePeer, MayLeaveAfterAnyByte) {
  Backend backend;
  FakeModel model(64);
  RemoteStage resident(backend.connect());
  load(resident, model);
  const std::string bytes = conversation(model);
  for (size_t cut = 0; cut < bytes.size(); cut += 3) {
    HandMadeServer peer(backend.io, backend.service.endpoint());
    peer.send_text(std::string_view(bytes).substr(0, cut));
    if (cut % 2 == 0) peer.finish();
  }
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_connections == 1; }));
  EXPECT_TRUE(eventually([&] { return backend.host.n_stages == 1; }));
  expect_serves(backend);
}

TEST(HostilePeer, MayFlipAnyBit) {
  BackendOptions options = local_options();
  // The peers come faster than they go, and must not keep out the one that looks at the end.
  options.quota.max_handshakes = options.quota.max_handshakes_per_address = 1 << 20;
  Backend backend(1 << 20, options);
  FakeModel model(64);
  RemoteStage resident(backend.connect());
  load(resident, model);
  std::string bytes = conversation(model);
  for (size_t bit = 0; bit < bytes.size() * 8; bit += 7) {
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
    HandMadeServer peer(backend.io, backend.service.endpoint());
    peer.send_text(bytes);
    peer.finish();
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
  }
  EXPECT_TRUE(eventually([&] { return backend.service.status().n_connections == 1; }));
  expect_serves(backend);
}

}  // namespace
}  // namespace caravan::remote
