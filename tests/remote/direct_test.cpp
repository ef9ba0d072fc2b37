// Stages that hand their rows to the next one's backend: what arrives, what it costs, and who is kept out.
#include <gtest/gtest.h>

#include <deque>
#include <future>

#include "remote/inlet.h"
#include "remote/peer_link.h"
#include "service_support.h"

namespace caravan::remote {
namespace {

using namespace std::chrono_literals;
using testing::Backend;
using testing::Collector;
using testing::eventually;
using testing::FakeModel;
using testing::HandMadeServer;
using testing::kEmbd;
using testing::link_options;
using testing::load;
using testing::local_options;
using testing::simple_batch;
using testing::what_of;

constexpr uint64_t kSession = 0xfedcba9876543210;

BackendOptions with_token(const std::string& token) {
  BackendOptions options = local_options();
  options.token = token;
  options.heartbeat_timeout = 120s;
  return options;
}

std::shared_ptr<const stage::Batch> batch_of(uint32_t n_rows) {
  return std::make_shared<stage::Batch>(simple_batch(n_rows));
}

// A model cut into n stages, each on a backend of its own.
struct Chain {
  explicit Chain(size_t n, const std::string& token = "") {
    for (size_t i = 0; i < n; ++i) {
      backends.push_back(std::make_unique<Backend>(1 << 20, with_token(token)));
      LinkOptions options = link_options(token);
      options.heartbeat_interval = 60s;  // bytes are counted
      options.heartbeat_timeout = 120s;
      links.push_back(backends[i]->connect(options));
      stages.push_back(std::make_unique<RemoteStage>(links[i]));
      FakeModel model(64, static_cast<uint32_t>(i));
      model.request.slice = {static_cast<uint32_t>(i), static_cast<uint32_t>(i) + 1, i == 0, i + 1 == n};
      load(*stages[i], model);
      sinks.push_back(std::make_unique<Collector>());
    }
  }
  // Joins all stages.
  void open(uint64_t epoch) {
    std::string key;
    for (size_t i = stages.size(); i-- > 0;) {
      stage::Routes routes;
      if (i + 1 < stages.size()) {
        routes.output = stages[i + 1]->address();
        routes.output->key = key;
      }
      if (i > 0) routes.input_key = key = make_route_key();
      stages[i]->open(kSession, epoch, *sinks[i], routes);
    }
  }
  void start(const stage::Fence& fence, const std::shared_ptr<const stage::Batch>& batch) {
    stages.back()->expect(fence, batch);
    stages.front()->enqueue(fence, batch, {});
  }
  Collector& end() { return *sinks.back(); }

  std::vector<std::unique_ptr<Backend>> backends;
  std::vector<std::shared_ptr<BackendLink>> links;
  std::vector<std::unique_ptr<Collector>> sinks;
  std::vector<std::unique_ptr<RemoteStage>> stages;
};

// A backend made by hand: takes one connection, greets, answers Attach, and keeps what comes.
class HandMadeBackend {
 public:
  explicit HandMadeBackend(net::IoThreads& io) : listener_(io, {"127.0.0.1", 0}) {
    served_ = net::asio::co_spawn(listener_.executor(), serve(*this), net::asio::use_future);
  }
  ~HandMadeBackend() {
    close();
    net::run_blocking(listener_.executor(), [](net::Listener& l) -> net::awaitable<void> {
      l.close();
      co_return;
    }(listener_));
    served_.wait();
  }
  stage::PeerRoute route() const { return {listener_.endpoint().text(), id_, 4, make_route_key()}; }
  void close() {
    const std::lock_guard lock(mutex_);
    if (connection_) net::asio::post(connection_->executor(), [connection = connection_] { connection->close(); });
  }
  std::vector<net::Frame> forwards() const {
    const std::lock_guard lock(mutex_);
    return forwards_;
  }

 private:
  static net::awaitable<void> serve(HandMadeBackend& self) {
    auto accepted = co_await self.listener_.accept();
    if (!accepted) co_return;
    const std::shared_ptr<net::TcpConnection> connection = std::move(accepted);
    {
      const std::lock_guard lock(self.mutex_);
      self.connection_ = connection;
    }
    net::FrameReader reader(*connection, [](uint16_t) { return net::FrameLimits{1 << 20, 1 << 20}; });
    try {
      while (true) {
        auto frame = co_await reader.read();
        if (!frame) co_return;
        std::string answer;
        if (frame->type == static_cast<uint16_t>(MessageType::hello)) {
          pb::HelloAck ack;
          ack.set_protocol_major(kProtocolMajor);
          ack.set_backend_id(self.id_);
          ack.add_devices()->set_numeric_class("fake-1");
          answer = HandMadeServer::frame(static_cast<uint16_t>(MessageType::hello_ack), ack);
        } else if (frame->type == static_cast<uint16_t>(MessageType::attach)) {
          pb::Attached attached;
          attached.set_stage(parse_header<pb::Attach>(*frame).stage());
          answer = HandMadeServer::frame(static_cast<uint16_t>(MessageType::attached), attached);
        } else if (frame->type == static_cast<uint16_t>(MessageType::forward)) {
          const std::lock_guard lock(self.mutex_);
          self.forwards_.push_back(std::move(*frame));
        }
        if (!answer.empty()) co_await connection->write_text(answer);
      }
    } catch (const net::ConnectionError&) {
      // closed by the test
    }
  }

  const std::string id_ = "0123456789abcdef";
  net::Listener listener_;
  mutable std::mutex mutex_;
  std::shared_ptr<net::TcpConnection> connection_;  // under mutex_; shared with what is posted to it
  std::vector<net::Frame> forwards_;                // under mutex_
  std::future<void> served_;
};

TEST(DirectHops, GoFromStageToStageAndComeBackFromTheLast) {
  for (const std::string token : {"", "a token of sixteen"}) {
    Chain chain(3, token);
    chain.open(1);
    for (uint64_t ticket = 1; ticket <= 20; ++ticket) chain.start({kSession, 1, ticket}, batch_of(1 + ticket % 4));
    for (uint64_t ticket = 1; ticket <= 20; ++ticket) {
      const stage::StageOutput output = chain.end().next();
      ASSERT_EQ(output.error, "");
      EXPECT_EQ(output.fence, (stage::Fence{kSession, 1, ticket}));
      ASSERT_EQ(output.outputs.size(), 1u);
      EXPECT_EQ(output.outputs[0].values.at(5), static_cast<float>(ticket % 4) + 3 + 5);
      EXPECT_EQ(output.earlier_seconds.size(), 2u);
    }
    EXPECT_EQ(chain.sinks[0]->n_waiting() + chain.sinks[1]->n_waiting(), 0u);
  }
}

TEST(DirectHops, SayWithEachHeartbeatWhereBatchesAre) {
  Chain chain(2);
  chain.open(1);
  chain.backends[1]->host.gate.close();
  chain.start({kSession, 1, 7}, batch_of(1));
  chain.start({kSession, 1, 8}, batch_of(1));
  EXPECT_TRUE(eventually([&] { return chain.stages[1]->ask_queue(5s)->n_tickets == 2; }));
  EXPECT_EQ(chain.stages[1]->queue().oldest_ticket, 7u);
  EXPECT_TRUE(eventually([&] { return chain.stages[1]->ask_queue(5s)->oldest_age > 0ms; }));
  EXPECT_EQ(chain.stages[0]->ask_queue(5s)->n_tickets, 0u);
  chain.backends[1]->host.gate.open();
  EXPECT_EQ(chain.end().next().error, "");
  EXPECT_EQ(chain.end().next().error, "");
  EXPECT_EQ(chain.stages[1]->ask_queue(5s)->n_tickets, 0u);
  chain.links[0]->close();
  EXPECT_FALSE(chain.stages[0]->ask_queue(5s).has_value());
}

TEST(DirectHops, CarryOnInTheNextEpoch) {
  Chain chain(2);
  for (uint64_t epoch = 1; epoch <= 3; ++epoch) {
    chain.open(epoch);
    chain.start({kSession, epoch, epoch}, batch_of(2));
    const stage::StageOutput output = chain.end().next();
    EXPECT_EQ(output.error, "");
    EXPECT_EQ(output.fence.epoch, epoch);
  }
}

TEST(DirectHops, ReportAFailureWhereItHappensAndGoOn) {
  Chain chain(2);
  chain.open(1);
  auto bad = std::make_shared<stage::Batch>(simple_batch(1));
  bad->tokens[0] = 1000;
  chain.start({kSession, 1, 1}, bad);
  const stage::StageOutput refused = chain.sinks[0]->next();
  EXPECT_EQ(refused.fence.ticket, 1u);
  EXPECT_NE(refused.error.find("token of row 0"), std::string::npos) << refused.error;
  chain.start({kSession, 1, 2}, batch_of(1));
  const stage::StageOutput output = chain.end().next();
  EXPECT_EQ(output.fence.ticket, 2u);
  EXPECT_EQ(output.error, "");
}

// A row with two cache groups of a long sequence that needs new blocks in both, after three other stages.
stage::Batch decode_step() {
  stage::Batch batch;
  batch.tokens = {151000};
  batch.positions = {{123456, 123456, 123456, 123456}};
  batch.slots = {7};
  batch.visible = {{0, 123457}, {119361, 123457}};
  for (const uint32_t group : {0u, 1u}) {
    stage::KvOp append;
    append.group = group;
    append.slot = 7;
    append.block = 30000;
    batch.kv_ops.push_back(append);
  }
  stage::KvOp drop;
  drop.kind = stage::KvOp::Kind::drop_front;
  drop.group = 1;
  drop.slot = 7;
  drop.n_tokens = 119360;
  batch.kv_ops.push_back(drop);
  batch.outputs = {{0, stage::OutputKind::candidates, 40, {}}};
  return batch;
}

TEST(DirectHops, CostAtMost128BytesPerTokenBesideTheRow) {
  ByteWriter payload;
  encode_batch(payload, decode_step());
  pb::Forward header;
  header.set_stage(9);
  write_fence(*header.mutable_fence(), {kSession, 200, 3'000'000});
  header.set_batch_bytes(static_cast<uint32_t>(payload.data().size()));
  for (int i = 0; i < 3; ++i) header.add_compute_us(30000);
  EXPECT_LE(net::kFrameHeaderBytes + header.ByteSizeLong() + payload.data().size(), 128u);
}

TEST(DirectHops, SendOneSmallMessagePerStageAndToken) {
  Chain chain(1);  // its only stage becomes the first of two
  FakeModel model(64, 5);
  model.request.slice = {0, 1, true, false};
  load(*chain.stages[0], model);
  HandMadeBackend next(chain.backends[0]->io);
  stage::Routes routes;
  routes.output = next.route();
  chain.stages[0]->open(kSession, 1, *chain.sinks[0], routes);
  const uint64_t received = chain.links[0]->channel().bytes_received();
  for (uint64_t ticket = 1; ticket <= 10; ++ticket) chain.stages[0]->enqueue({kSession, 1, ticket}, batch_of(1), {});
  ASSERT_TRUE(eventually([&] { return next.forwards().size() == 10; }));
  for (const net::Frame& frame : next.forwards())
    EXPECT_LE(net::kFrameHeaderBytes + frame.header.size() + frame.payload.size(), 4 * kEmbd + 128);
  EXPECT_EQ(chain.links[0]->channel().bytes_received(), received) << "the server hears nothing of what is handed on";
}

TEST(DirectHops, BringKCandidatesBackIn16KAnd128Bytes) {
  Chain chain(2);
  chain.open(1);
  for (const uint32_t top_k : {1u, 8u, 20u}) {
    auto batch = std::make_shared<stage::Batch>(simple_batch(1));
    batch->outputs = {{0, stage::OutputKind::candidates, top_k, {}}};
    const uint64_t before = chain.links[1]->channel().bytes_received();
    chain.start({kSession, 1, top_k}, batch);
    ASSERT_EQ(chain.end().next().error, "");
    EXPECT_LE(chain.links[1]->channel().bytes_received() - before, 16 * top_k + 128);
  }
}

TEST(DirectHops, TellTheServerWhenTheNextBackendIsLost) {
  Chain chain(1);
  FakeModel model(64, 5);
  model.request.slice = {0, 1, true, false};
  load(*chain.stages[0], model);
  HandMadeBackend next(chain.backends[0]->io);
  stage::Routes routes;
  routes.output = next.route();
  chain.stages[0]->open(kSession, 3, *chain.sinks[0], routes);
  next.close();
  const stage::StageOutput output = chain.sinks[0]->next();
  EXPECT_EQ(output.fence, (stage::Fence{kSession, 3, 0}));
  EXPECT_NE(output.error.find(routes.output->endpoint), std::string::npos) << output.error;
  EXPECT_TRUE(chain.links[0]->alive());
}

TEST(DirectHops, AreRefusedWhereTheNextBackendIsAbsentOrAnother) {
  Chain chain(2);
  const auto error_of = [&](const std::function<void(stage::PeerRoute&)>& change) {
    stage::Routes input, output;
    input.input_key = make_route_key();
    chain.stages[1]->open(kSession, 1, *chain.sinks[1], input);
    output.output = chain.stages[1]->address();
    output.output->key = *input.input_key;
    change(*output.output);
    return what_of([&] { chain.stages[0]->open(kSession, 1, *chain.sinks[0], output); });
  };
  EXPECT_EQ(error_of([](stage::PeerRoute&) {}), "");
  EXPECT_NE(error_of([](stage::PeerRoute& route) { route.key = make_route_key(); }).find("no route with this key"),
            std::string::npos);
  EXPECT_NE(error_of([](stage::PeerRoute& route) { ++route.stage; }).find("the route leads to stage"),
            std::string::npos);
  EXPECT_NE(error_of([](stage::PeerRoute& route) { route.backend_id = "somebody else's!"; }).find("another backend"),
            std::string::npos);
  net::Endpoint nobody;
  {
    net::IoThreads io(1);
    nobody = net::Listener(io, {"127.0.0.1", 0}).endpoint();
  }
  EXPECT_NE(error_of([&](stage::PeerRoute& route) { route.endpoint = nobody.text(); }).find("refused"),
            std::string::npos);
  EXPECT_TRUE(chain.links[0]->alive() && chain.links[1]->alive());
}

TEST(DirectHops, TakeNoStepsFromTheServerWhereAPeerIsNamed) {
  Chain chain(2);
  chain.open(1);
  ByteWriter writer;
  encode_batch(writer, simple_batch(1));
  pb::Forward message;
  message.set_stage(chain.stages[1]->address().stage);
  write_fence(*message.mutable_fence(), {kSession, 1, 50});
  message.set_batch_bytes(static_cast<uint32_t>(writer.data().size()));
  const std::vector<float> row(kEmbd);
  writer.write_bytes(std::as_bytes(std::span(row)));
  chain.links[1]->channel().send(MessageType::forward, message, writer.release());
  EXPECT_TRUE(eventually([&] { return chain.backends[1]->service.status().n_stale == 1; }));
  chain.start({kSession, 1, 51}, batch_of(1));
  EXPECT_EQ(chain.end().next().fence.ticket, 51u);
}

// A peer made by hand that tries to get into the second stage of a chain.
class Intruder : public ::testing::Test {
 protected:
  Intruder() : chain_(2) {
    stage_ = chain_.stages[1]->address().stage;
    open_inlet();
  }
  // Opens a route for whoever has the key.
  void open_inlet() {
    stage::Routes routes;
    routes.input_key = key_;
    chain_.stages[1]->open(kSession, epoch_, *chain_.sinks[1], routes);
  }
  Backend& backend() { return *chain_.backends[1]; }
  std::unique_ptr<HandMadeServer> connect() {
    auto peer = std::make_unique<HandMadeServer>(backend().io, backend().service.endpoint());
    pb::Hello hello;
    hello.set_protocol_major(kProtocolMajor);
    hello.set_role(pb::Hello::BACKEND);
    peer->send(MessageType::hello, hello);
    const auto ack = peer->read();
    EXPECT_TRUE(ack && ack->type == static_cast<uint16_t>(MessageType::hello_ack));
    return peer;
  }
  pb::Attach attach() const {
    pb::Attach message;
    message.set_stage(stage_);
    message.set_key(key_);
    message.set_session(kSession);
    message.set_epoch(epoch_);
    return message;
  }
  std::unique_ptr<HandMadeServer> connect_and_attach() {
    auto peer = connect();
    peer->send(MessageType::attach, attach());
    const auto answer = peer->read();
    EXPECT_TRUE(answer && answer->type == static_cast<uint16_t>(MessageType::attached));
    return peer;
  }
  std::string refusal_of(const pb::Attach& message) {
    const auto peer = connect();
    peer->send(MessageType::attach, message);
    return peer->read_error();
  }
  // A step of one row.
  std::string step(uint64_t epoch, uint64_t ticket, size_t n_values = kEmbd, uint32_t stage_offset = 0) const {
    ByteWriter writer;
    encode_batch(writer, simple_batch(1));
    pb::Forward message;
    message.set_stage(stage_ + stage_offset);
    write_fence(*message.mutable_fence(), {kSession, epoch, ticket});
    message.set_batch_bytes(static_cast<uint32_t>(writer.data().size()));
    const std::vector<float> row(n_values, 1.0f);
    writer.write_bytes(std::as_bytes(std::span(row)));
    const auto bytes = writer.release();
    return HandMadeServer::frame(static_cast<uint16_t>(MessageType::forward), message,
                                 {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
  // The backend serves its other stages, and this one over a new route.
  void expect_unharmed() {
    chain_.open(++epoch_);
    chain_.start({kSession, epoch_, epoch_}, batch_of(1));
    while (true) {
      const stage::StageOutput output = chain_.end().next();
      if (output.fence.epoch != epoch_) continue;  // the end of the intruder's route
      EXPECT_EQ(output.error, "");
      break;
    }
  }

  Chain chain_;
  const std::string key_ = make_route_key();
  uint32_t stage_ = 0;
  uint64_t epoch_ = 7;
};

TEST_F(Intruder, NeedsTheKeyTheStageAndTheEpoch) {
  pb::Attach message = attach();
  message.set_key(make_route_key());
  EXPECT_NE(refusal_of(message).find("no route with this key"), std::string::npos);
  message = attach();
  message.set_key("");
  EXPECT_NE(refusal_of(message).find("no route with this key"), std::string::npos);
  message = attach();
  message.set_stage(stage_ + 1);
  EXPECT_NE(refusal_of(message).find("leads to stage"), std::string::npos);
  message = attach();
  message.set_epoch(6);
  EXPECT_NE(refusal_of(message).find("another session or epoch"), std::string::npos);
  message = attach();
  message.set_session(1);
  EXPECT_NE(refusal_of(message).find("another session or epoch"), std::string::npos);
  const auto peer = connect_and_attach();
  EXPECT_NE(refusal_of(attach()).find("taken"), std::string::npos);
  expect_unharmed();
  EXPECT_NE(refusal_of(attach()).find("no route with this key"), std::string::npos) << "the key's epoch is over";
}

TEST_F(Intruder, HasStepsOfOtherEpochsDroppedAndCounted) {
  const auto peer = connect_and_attach();
  const auto expected = batch_of(1);
  chain_.stages[1]->expect({kSession, 7, 3}, expected);
  peer->send_text(step(6, 1));
  peer->send_text(step(8, 2));
  peer->send_text(step(7, 3));
  EXPECT_EQ(chain_.end().next().fence, (stage::Fence{kSession, 7, 3}));
  EXPECT_EQ(backend().service.status().n_stale, 2u);
}

TEST_F(Intruder, LosesItsOwnConnectionForWhatNoPeerSends) {
  const auto frame = [](MessageType type, const google::protobuf::MessageLite& header,
                        const std::string& payload = "") {
    return HandMadeServer::frame(static_cast<uint16_t>(type), header, payload);
  };
  const std::vector<std::pair<std::function<std::string()>, std::string>> cases = {
      {[&] { return step(epoch_, 1, kEmbd - 1); }, "bytes of hidden rows"},
      {[&] { return step(epoch_, 1, kEmbd, 1); }, "leads to stage"},
      {[&] { return step(epoch_, 1) + step(epoch_, 1); }, "in flight already"},
      {[] { return "garbage that is long enough to be a header"; }, "frame magic"},
      {[&] { return frame(MessageType::load_slice, pb::LoadSlice()); }, "LoadSlice from a backend"},
      {[&] { return frame(MessageType::unload, pb::Unload()); }, "Unload from a backend"},
      {[&] { return frame(MessageType::attach, attach()); }, "a second Attach"},
      {[] {
         const auto fixed = net::encode_frame_header({static_cast<uint16_t>(MessageType::forward), 0, 0, 64 << 20});
         return std::string(reinterpret_cast<const char*>(fixed.data()), fixed.size());
       },
       "at most"},
  };
  for (const auto& [bytes, reason] : cases) {
    ++epoch_;
    open_inlet();
    backend().host.gate.close();
    {
      const auto peer = connect_and_attach();
      peer->send_text(bytes());
      EXPECT_NE(peer->read_error().find(reason), std::string::npos) << reason;
    }
    backend().host.gate.open();
    const stage::StageOutput lost = chain_.end().next();
    EXPECT_EQ(lost.fence, (stage::Fence{kSession, epoch_, 0})) << lost.error;
    expect_unharmed();
  }
}

TEST_F(Intruder, MayLeaveInTheMiddleOfAStep) {
  const std::string whole = step(7, 1);
  for (const size_t size : {size_t{1}, size_t{19}, size_t{25}, whole.size() - 1}) {
    ++epoch_;
    open_inlet();
    {
      const auto peer = connect_and_attach();
      peer->send_text(whole.substr(0, size));
    }
    EXPECT_EQ(chain_.end().next().fence, (stage::Fence{kSession, epoch_, 0}));
    expect_unharmed();
  }
}

TEST_F(Intruder, GetsNothingBeforeItAttaches) {
  const auto peer = connect();
  peer->send_text(step(7, 1));
  EXPECT_NE(peer->read_error().find("at most 0"), std::string::npos);
  expect_unharmed();
}

TEST(Probes, TellWhetherOneBackendReachesAnother) {
  for (const std::string token : {"", "a token of sixteen"}) {
    Chain chain(2, token);
    const stage::PeerRoute other = chain.stages[1]->address();
    EXPECT_GT(chain.links[0]->probe(other.endpoint, other.backend_id, 5s).count(), 0);
    EXPECT_NE(what_of([&] { chain.links[0]->probe(other.endpoint, "somebody else's!", 5s); }).find("another backend"),
              std::string::npos);
    EXPECT_NE(what_of([&] { chain.links[0]->probe("127.0.0.1:1", other.backend_id, 5s); }).find("refused"),
              std::string::npos);
    EXPECT_NE(what_of([&] { chain.links[0]->probe("no endpoint", other.backend_id, 5s); }), "");
    EXPECT_TRUE(chain.links[0]->alive());
  }
}

// Takes connections, and nothing that is sent on them.
class BlackHole {
 public:
  explicit BlackHole(net::IoThreads& io) : listener_(io, {"127.0.0.1", 0}) {}
  std::string address() const { return listener_.endpoint().text(); }

 private:
  net::Listener listener_;  // the system accepts for it
};

TEST(DirectHops, AreGivenUpWhenTheirStageGoes) {
  net::IoThreads io(1);
  BlackHole hole(io);
  PeerOptions options;
  options.timeout = 120s;
  std::stop_source stop;
  auto attaching = std::async(std::launch::async, [&] {
    return what_of([&] {
      PeerLink::attach(io, {hole.address(), "somebody else's!", 1, make_route_key()}, kSession, 1, options,
                       stop.get_token(), {});
    });
  });
  stop.request_stop();
  ASSERT_EQ(attaching.wait_for(60s), std::future_status::ready);
  EXPECT_NE(attaching.get(), "");
}

// A server that asks as much as it can.
class AskingServer : public HandMadeServer {
 public:
  explicit AskingServer(Backend& backend) : HandMadeServer(backend.io, backend.service.endpoint()) { greet(); }
  void probe(const std::string& endpoint, int n) {
    for (int i = 0; i < n; ++i) {
      pb::Probe message;
      message.set_sequence(++sequence_);
      message.set_endpoint(endpoint);
      message.set_backend_id("somebody else's!");
      send(MessageType::probe, message);
    }
  }
  std::optional<pb::ProbeResult> next_result() {
    while (const auto frame = read())
      if (frame->type == static_cast<uint16_t>(MessageType::probe_result)) return parse_header<pb::ProbeResult>(*frame);
    return std::nullopt;
  }

 private:
  uint64_t sequence_ = 0;
};

TEST(Probes, OfOnePeerHoldUpNoOther) {
  Chain chain(2);
  BlackHole hole(chain.backends[0]->io);
  std::vector<std::unique_ptr<AskingServer>> hostile;
  for (int i = 0; i < 4; ++i) {
    hostile.push_back(std::make_unique<AskingServer>(*chain.backends[0]));
    hostile[i]->probe(hole.address(), kMaxProbesAtOnce + 4);
  }
  for (const auto& server : hostile)
    for (int i = 0; i < 4; ++i) {
      const auto result = server->next_result();
      ASSERT_TRUE(result) << "cut off";
      EXPECT_EQ(result->error(), "busy: 16 probes of this connection wait already");
      EXPECT_EQ(result->sequence(), kMaxProbesAtOnce + 1 + i);
    }
  // Those that wait take half a minute and more; a server waits for two and a half seconds.
  const stage::PeerRoute other = chain.stages[1]->address();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_GT(chain.links[0]->probe(other.endpoint, other.backend_id, 10s).count(), 0);
  EXPECT_LT(std::chrono::steady_clock::now() - start, 8s);
  for (const auto& server : hostile) {
    const auto result = server->next_result();
    ASSERT_TRUE(result) << "cut off";
    EXPECT_NE(result->error().find("does not answer"), std::string::npos) << result->error();
  }
}

TEST(Probes, AreGivenUpByABackendThatStops) {
  Backend backend;
  BlackHole hole(backend.io);
  AskingServer server(backend);
  server.probe(hole.address(), kMaxProbesAtOnce + 1);
  ASSERT_TRUE(server.next_result()) << "the one too many is answered when the others have been posted";
  const auto start = std::chrono::steady_clock::now();
  backend.service.stop();
  // All of them would take 32 s.
  EXPECT_LT(std::chrono::steady_clock::now() - start, 20s);
}

TEST(Probes, FindABackendWhereItSaysItIs) {
  BackendOptions options = local_options();
  options.advertise = "inner.example:50052";
  Backend backend(1 << 20, options);
  EXPECT_EQ(RemoteStage(backend.connect()).address().endpoint, "inner.example:50052");
  options.advertise = "nonsense";
  EXPECT_THROW(Backend(1 << 20, options), RequestError);
}

}  // namespace
}  // namespace caravan::remote
