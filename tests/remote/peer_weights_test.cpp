// Weights that backends give each other: who is asked, what is taken, and what happens when it is wrong or does not
// come.
#include <gtest/gtest.h>

#include <fstream>
#include <future>

#include "remote/peer_weight_source.h"
#include "service_support.h"
#include "support/kit.h"

namespace caravan::remote {
namespace {

using namespace std::chrono_literals;
using caravan::testing::TemporaryDirectory;
using testing::Backend;
using testing::eventually;
using testing::FakeModel;
using testing::HandMadeServer;
using testing::load;
using testing::local_options;
using testing::what_of;

constexpr uint64_t kMemory = 64 << 20;
constexpr uint64_t kChunk = weights::kChunkBytes;

std::vector<weights::ChunkRef> chunks_of(const FakeModel& model) {
  std::vector<weights::ChunkRef> chunks;
  for (const weights::TensorEntry& tensor : model.request.manifest.tensors)
    for (uint64_t i = 0; i < weights::n_chunks(tensor.size_bytes); ++i) chunks.push_back({&tensor, i});
  return chunks;
}

BackendOptions with_cache(weights::ChunkCache& cache, const std::string& token) {
  BackendOptions options = local_options();
  options.cache = &cache;
  options.token = token;
  return options;
}

// A backend whose cache holds some chunks of a model.
struct Giver {
  Giver(FakeModel& model, size_t first, size_t last, const std::string& token = "")
      : link(testing::link_options(token)),
        cache(folder.path(), 256 << 20),
        backend(kMemory, with_cache(cache, token)) {
    const auto chunks = chunks_of(model);
    for (size_t i = first; i < std::min(last, chunks.size()); ++i) {
      std::vector<std::byte> bytes(chunks[i].size_bytes());
      EXPECT_TRUE(model.source.fetch(chunks[i], bytes));
      cache.write(*chunks[i].digest(), bytes, {});
    }
    cache.flush();
    model.source.n_bytes = 0;
  }
  explicit Giver(FakeModel& model, const std::string& token = "") : Giver(model, 0, SIZE_MAX, token) {}
  PeerAddress address() { return {backend.service.endpoint().text(), backend.connect(link)->info().id}; }
  uint64_t given() const { return backend.service.status().given_bytes; }
  // Damages the first byte of what it has of these chunks.
  void damage(std::span<const weights::ChunkRef> chunks) const {
    for (const weights::ChunkRef& chunk : chunks) {
      const std::string name = chunk.digest()->hex();
      std::fstream file(folder.path() / "chunks" / name.substr(0, 2) / name, std::ios::in | std::ios::out);
      const int first = file.peek();
      file.seekp(0);
      file.put(static_cast<char>(first ^ 1));
      EXPECT_TRUE(file.good());
    }
  }
  const LinkOptions link;
  TemporaryDirectory folder;
  weights::ChunkCache cache;
  Backend backend;
};

// A backend without cache that loads the model and may ask others.
struct Taker {
  explicit Taker(const std::string& token = "") : backend(kMemory, options(token)) {
    stage = std::make_unique<RemoteStage>(backend.connect(testing::link_options(token)));
  }
  static BackendOptions options(const std::string& token) {
    BackendOptions options = local_options();
    options.token = token;
    options.others_timeout = 20s;
    return options;
  }
  WeightOrigins take(FakeModel& model, std::vector<PeerAddress> others,
                     const stage::Stage::ProgressFunction& on_progress = {}) {
    stage->ask_others(std::move(others));
    load(*stage, model, on_progress);
    return stage->origins();
  }
  Backend backend;
  std::unique_ptr<RemoteStage> stage;
};

// A backend made by hand: greets, says that it has everything, and answers requests for chunks as the test wants.
class HandMadeGiver {
 public:
  // What is sent for a FetchChunk; empty: nothing.
  using Answer = std::function<std::string(const pb::FetchChunk&)>;

  HandMadeGiver(net::IoThreads& io, uint32_t protocol_minor, Answer answer)
      : protocol_minor_(protocol_minor), answer_(std::move(answer)), listener_(io, {"127.0.0.1", 0}) {
    served_ = net::asio::co_spawn(listener_.executor(), serve(*this), net::asio::use_future);
  }
  ~HandMadeGiver() {
    {
      const std::lock_guard lock(mutex_);
      if (connection_) net::asio::post(connection_->executor(), [connection = connection_] { connection->close(); });
    }
    net::run_blocking(listener_.executor(), [](net::Listener& l) -> net::awaitable<void> {
      l.close();
      co_return;
    }(listener_));
    served_.wait();
  }
  PeerAddress address() const { return {listener_.endpoint().text(), id_}; }
  size_t n_of(MessageType type) const {
    const std::lock_guard lock(mutex_);
    return static_cast<size_t>(std::ranges::count(types_, static_cast<uint16_t>(type)));
  }

 private:
  std::string reply_to(const net::Frame& frame) const {
    switch (static_cast<MessageType>(frame.type)) {
      case MessageType::hello: {
        pb::HelloAck ack;
        ack.set_protocol_major(kProtocolMajor);
        ack.set_protocol_minor(protocol_minor_);
        ack.set_backend_id(id_);
        ack.add_devices()->set_numeric_class("fake-1");
        return HandMadeServer::frame(static_cast<uint16_t>(MessageType::hello_ack), ack);
      }
      case MessageType::have_chunks: {
        const auto question = parse_header<pb::HaveChunks>(frame);
        pb::HaveChunksResult result;
        result.set_sequence(question.sequence());
        result.set_have(encode_bits(std::vector<bool>(static_cast<size_t>(question.digests_size()), true)));
        return HandMadeServer::frame(static_cast<uint16_t>(MessageType::have_chunks_result), result);
      }
      case MessageType::fetch_chunk:
        return answer_(parse_header<pb::FetchChunk>(frame));
      default:
        return "";
    }
  }
  static net::awaitable<void> serve(HandMadeGiver& self) {
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
        const std::string reply = self.reply_to(*frame);
        {
          const std::lock_guard lock(self.mutex_);
          self.types_.push_back(frame->type);
        }
        if (!reply.empty()) co_await connection->write_text(reply);
      }
    } catch (const net::ConnectionError&) {
      // closed by one of the two
    }
  }

  const std::string id_ = "0123456789abcdef";
  const uint32_t protocol_minor_;
  const Answer answer_;
  net::Listener listener_;
  mutable std::mutex mutex_;
  std::shared_ptr<net::TcpConnection> connection_;  // under mutex_; shared with what is posted to it
  std::vector<uint16_t> types_;                     // under mutex_; of the frames that came
  std::future<void> served_;
};

std::string chunk_frame(uint64_t sequence, std::string_view payload) {
  pb::FetchedChunk chunk;
  chunk.set_sequence(sequence);
  return HandMadeServer::frame(static_cast<uint16_t>(MessageType::fetched_chunk), chunk, payload);
}

TEST(PeerWeights, ComeFromABackendThatHasThemAndNotFromTheServer) {
  for (const std::string token : {"", "a token of sixteen"}) {
    FakeModel model(kChunk * 5 + 100);
    Giver giver(model, token);
    Taker taker(token);
    const uint64_t total = model.request.manifest.size_bytes();
    const WeightOrigins origins = taker.take(model, {giver.address()});
    EXPECT_EQ(origins.peers, total);
    EXPECT_EQ(origins.server, 0u);
    EXPECT_EQ(taker.stage->pulled_bytes(), 0u);
    EXPECT_EQ(model.source.n_bytes, 0u);
    EXPECT_EQ(giver.given(), total);
    EXPECT_EQ(taker.backend.service.status().origins.peers, total);
    EXPECT_TRUE(eventually([&] { return giver.backend.service.status().n_connections == 0; }));
  }
}

TEST(PeerWeights, ComeFromTheServerWhereNobodyHasThem) {
  FakeModel model(kChunk * 6);
  Giver giver(model, 0, 2), nothing(model, 0, 0);
  Taker taker;
  const WeightOrigins origins = taker.take(model, {nothing.address(), giver.address()});
  EXPECT_EQ(origins.peers, 2 * kChunk);
  EXPECT_EQ(origins.server, 4 * kChunk);
  EXPECT_EQ(nothing.given(), 0u);
}

TEST(PeerWeights, ComeFromAllThatHaveThem) {
  FakeModel model(kChunk * 9);
  Giver all(model), same(model), part(model, 4, 6);
  Taker taker;
  const WeightOrigins origins = taker.take(model, {all.address(), same.address(), part.address()});
  EXPECT_EQ(origins.peers, 9 * kChunk);
  EXPECT_GT(all.given(), 0u);
  EXPECT_GT(same.given(), 0u);
  EXPECT_EQ(all.given() + same.given() + part.given(), 9 * kChunk);
}

TEST(PeerWeights, MayBeEqualChunks) {
  FakeModel model(kChunk * 6);
  std::vector<std::byte>& bytes = model.source.tensors.begin()->second;
  std::ranges::fill(bytes, std::byte{0});
  auto& chunks = model.request.manifest.tensors[0].chunks;
  std::ranges::fill(chunks, sha256(std::span(bytes).first(kChunk)));
  Giver giver(model);
  Taker taker;
  EXPECT_EQ(taker.take(model, {giver.address()}).peers, 6 * kChunk);
}

TEST(PeerWeights, AreNotAskedForWhenNothingIsMissing) {
  FakeModel model(kChunk * 3);
  Giver giver(model), taker(model);
  RemoteStage stage(taker.backend.connect());
  const PeerAddress address = giver.address();
  const uint64_t n_before = giver.backend.service.status().n_accepted;
  stage.ask_others({address});
  load(stage, model);
  EXPECT_EQ(stage.origins().cache, 3 * kChunk);
  EXPECT_EQ(giver.backend.service.status().n_accepted, n_before);
}

TEST(PeerWeights, ThatAreWrongAreFetchedFromTheServer) {
  FakeModel model(kChunk * 5);
  Giver giver(model);
  const auto chunks = chunks_of(model);
  giver.damage(std::span(chunks).subspan(2, 1));
  Taker taker;
  const WeightOrigins origins = taker.take(model, {giver.address()});
  EXPECT_EQ(origins.peers, 4 * kChunk);
  EXPECT_EQ(origins.server, kChunk);
}

TEST(PeerWeights, AreNoMoreTakenFromWhoSendsWrongOnesAgainAndAgain) {
  FakeModel model(kChunk * 10);
  Giver giver(model);
  giver.damage(chunks_of(model));
  Taker taker;
  const WeightOrigins origins = taker.take(model, {giver.address()});
  EXPECT_EQ(origins.peers, 0u);
  EXPECT_EQ(origins.server, 10 * kChunk);
  EXPECT_LT(giver.given(), 10 * kChunk);
}

TEST(PeerWeights, OfAnotherSizeAreFetchedFromTheServer) {
  FakeModel model(kChunk * 2);
  Taker taker;
  HandMadeGiver giver(taker.backend.io, kProtocolMinor,
                      [](const pb::FetchChunk& message) { return chunk_frame(message.sequence(), "short"); });
  const WeightOrigins origins = taker.take(model, {giver.address()});
  EXPECT_EQ(origins.server, 2 * kChunk);
}

TEST(PeerWeights, ComeFromTheServerOnceTheOtherBackendIsGone) {
  FakeModel model(kChunk * 12);
  Giver giver(model);
  Taker taker;
  bool gone = false;
  const WeightOrigins origins = taker.take(model, {giver.address()}, [&](uint64_t done) {
    if (done == 0 || std::exchange(gone, true)) return;
    giver.backend.service.stop();
  });
  EXPECT_EQ(origins.peers + origins.server, 12 * kChunk);
}

TEST(PeerWeights, AreNotTakenFromWhoBreaksTheProtocol) {
  FakeModel model(kChunk * 3);
  for (const std::string& nonsense :
       {chunk_frame(999, "a chunk nobody asked for"), std::string("noise that is no frame at all"),
        HandMadeServer::frame(static_cast<uint16_t>(MessageType::forward), pb::Forward())}) {
    Taker taker;
    HandMadeGiver giver(taker.backend.io, kProtocolMinor, [&](const pb::FetchChunk&) { return nonsense; });
    EXPECT_EQ(taker.take(model, {giver.address()}).server, 3 * kChunk);
    EXPECT_GT(giver.n_of(MessageType::fetch_chunk), 0u);
  }
}

TEST(PeerWeights, AreNotAskedOfAnOlderVersion) {
  FakeModel model(kChunk * 2);
  Taker taker;
  HandMadeGiver old(taker.backend.io, kMinorWithSharedWeights - 1, [](const pb::FetchChunk&) { return ""; });
  EXPECT_EQ(taker.take(model, {old.address()}).server, 2 * kChunk);
  EXPECT_EQ(old.n_of(MessageType::hello), 1u);
  EXPECT_EQ(old.n_of(MessageType::have_chunks), 0u);
}

TEST(PeerWeights, AreNotAskedOfAnotherBackendThanTheOneMeant) {
  FakeModel model(kChunk * 2);
  Giver giver(model);
  Taker taker;
  PeerAddress address = giver.address();
  address.backend_id[0] ^= 1;
  EXPECT_EQ(taker.take(model, {address, {"no endpoint", "id"}}).server, 2 * kChunk);
  EXPECT_EQ(giver.given(), 0u);
}

TEST(PeerWeights, AreGivenUpWhenTheServerLeaves) {
  FakeModel model(kChunk * 2);
  Backend backend(kMemory, Taker::options(""));
  std::promise<void> asked;
  HandMadeGiver silent(backend.io, kProtocolMinor, [&, n = 0](const pb::FetchChunk&) mutable {
    if (n++ == 0) asked.set_value();
    return "";
  });
  const auto link = backend.connect();
  RemoteStage stage(link);
  stage.ask_others({silent.address()});
  auto loading = std::async(std::launch::async, [&] { return what_of([&] { load(stage, model); }); });
  asked.get_future().wait();
  link->close();
  EXPECT_NE(loading.get(), "");
  EXPECT_TRUE(eventually([&] { return backend.memory_free() == kMemory; }));
}

TEST(PeerWeightSource, GivesUpOnABackendThatAnswersNoMore) {
  FakeModel model(kChunk);
  net::IoThreads io(2);
  SilentPeers silent;
  HandMadeGiver giver(io, kProtocolMinor, [](const pb::FetchChunk&) { return ""; });
  PeerOptions patient;
  patient.timeout = 20s;
  PeerWeightSource source(io, {giver.address()}, patient, silent, {.question = 10s, .chunk = 1ms});
  const auto chunks = chunks_of(model);
  source.look_for(chunks);
  ASSERT_TRUE(source.may_have(chunks[0]));
  std::vector<std::byte> bytes(kChunk);
  EXPECT_THROW(source.fetch(chunks[0], bytes), Error);
  EXPECT_FALSE(source.may_have(chunks[0]));
}

TEST(PeerWeightSource, RemembersWhoCouldNotBeReached) {
  FakeModel model(kChunk);
  net::IoThreads io(1);
  PeerAddress nobody;
  {
    nobody = {net::Listener(io, {"127.0.0.1", 0}).endpoint().text(), "id"};
  }
  SilentPeers silent;
  PeerWeightSource source(io, {nobody}, {}, silent);
  source.look_for({});
  EXPECT_FALSE(silent.contains(nobody));
  const auto chunks = chunks_of(model);
  source.look_for(chunks);
  EXPECT_TRUE(silent.contains(nobody));
  EXPECT_FALSE(silent.contains({nobody.endpoint, "a later start of it"}));
  EXPECT_FALSE(source.may_have(chunks[0]));
}

TEST(RemoteStage, NamesNoOtherBackendsToAnOlderVersion) {
  for (const uint32_t minor : {0u, kProtocolMinor}) {
    net::IoThreads io(2);
    net::Listener listener(io, {"127.0.0.1", 0});
    std::promise<pb::LoadSlice> named;
    auto serving = net::asio::co_spawn(
        listener.executor(),
        [](net::Listener& l, uint32_t m, std::promise<pb::LoadSlice>& result) -> net::awaitable<void> {
          auto connection = co_await l.accept();
          pb::HelloAck ack;
          ack.set_protocol_major(kProtocolMajor);
          ack.set_protocol_minor(m);
          ack.add_devices()->set_numeric_class("fake-1");
          co_await connection->write_text(HandMadeServer::frame(2, ack));
          net::FrameReader reader(*connection, [](uint16_t) { return net::FrameLimits{1 << 20, 1 << 20}; });
          auto frame = co_await reader.read();
          while (frame && frame->type != static_cast<uint16_t>(MessageType::load_slice)) frame = co_await reader.read();
          result.set_value(parse_header<pb::LoadSlice>(*frame));
        }(listener, minor, named),
        net::asio::use_future);
    FakeModel model(64);
    RemoteStage stage(BackendLink::connect(io, listener.endpoint(), testing::link_options()));
    stage.ask_others({{"10.0.0.1:50052", "id"}});
    EXPECT_THROW(load(stage, model), Error);
    EXPECT_EQ(named.get_future().get().peers_size(), minor == 0 ? 0 : 1);
    serving.get();
  }
}

// --- peers that mean harm -------------------------------------------------------------------------------------------

std::string backend_hello() {
  pb::Hello message;
  message.set_protocol_major(kProtocolMajor);
  message.set_protocol_minor(kProtocolMinor);
  message.set_role(pb::Hello::BACKEND);
  return HandMadeServer::frame(static_cast<uint16_t>(MessageType::hello), message);
}

void expect_gives(Giver& giver, FakeModel& model) {
  Taker taker;
  EXPECT_EQ(taker.take(model, {giver.address()}).peers, model.request.manifest.size_bytes());
}

TEST(HostilePeer, IsClosedForQuestionsThatNobodyMayAsk) {
  FakeModel model(kChunk);
  Giver giver(model);
  const auto refusal = [&](MessageType type, const google::protobuf::MessageLite& message) {
    HandMadeServer peer(giver.backend.io, giver.backend.service.endpoint());
    peer.send_text(backend_hello());
    peer.send(type, message);
    return peer.read_refusal();
  };
  pb::HaveChunks many, bad;
  for (uint32_t i = 0; i <= kMaxChunksPerWant; ++i) many.add_digests(std::string(32, 'd'));
  EXPECT_NE(refusal(MessageType::have_chunks, many).find("at most 1024"), std::string::npos);
  bad.add_digests("short");
  EXPECT_NE(refusal(MessageType::have_chunks, bad).find("32 bytes"), std::string::npos);
  EXPECT_NE(refusal(MessageType::fetch_chunk, pb::FetchChunk()).find("32 bytes"), std::string::npos);
  EXPECT_EQ(refusal(MessageType::fetched_chunk, pb::FetchedChunk()), "FetchedChunk from a backend");
  HandMadeServer server(giver.backend.io, giver.backend.service.endpoint());
  server.greet();
  server.send(MessageType::fetch_chunk, pb::FetchChunk());
  EXPECT_EQ(server.read_refusal(), "FetchChunk from a server");
  expect_gives(giver, model);
}

TEST(HostilePeer, IsClosedWhenItAsksForChunksWithoutReadingThem) {
  FakeModel model(kChunk);
  Giver giver(model);
  HandMadeServer peer(giver.backend.io, giver.backend.service.endpoint());
  peer.send_text(backend_hello());
  pb::FetchChunk message;
  const Digest digest = model.request.manifest.tensors[0].chunks[0];
  message.set_digest(digest.bytes.data(), digest.bytes.size());
  for (uint32_t i = 0; i < 3 * kMaxChunkRequests; ++i) peer.send(MessageType::fetch_chunk, message);
  EXPECT_TRUE(eventually([&] { return giver.backend.service.status().n_connections == 0; }));
  // What it was sent was in the buffers of the two sockets, and two chunks waited.
  EXPECT_LT(giver.given(), kMaxChunkRequests * kChunk);
  expect_gives(giver, model);
}

TEST(HostilePeer, DelaysNobodyElsesChunks) {
  FakeModel model(kChunk * 4);
  Giver giver(model);
  std::vector<std::unique_ptr<HandMadeServer>> peers;
  pb::FetchChunk message;
  const Digest digest = model.request.manifest.tensors[0].chunks[0];
  message.set_digest(digest.bytes.data(), digest.bytes.size());
  for (int i = 0; i < 4; ++i) {
    peers.push_back(std::make_unique<HandMadeServer>(giver.backend.io, giver.backend.service.endpoint()));
    peers.back()->send_text(backend_hello());
    for (uint32_t n = 0; n < kMaxChunkRequests; ++n) peers.back()->send(MessageType::fetch_chunk, message);
  }
  EXPECT_TRUE(eventually([&] { return giver.backend.service.status().n_connections == 4; }));
  expect_gives(giver, model);  // while these four read nothing
}

}  // namespace
}  // namespace caravan::remote
