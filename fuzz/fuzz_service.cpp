// A backend and what a server and another backend past their hello may send it, in any order, over connections in
// memory. The input is a stream of frames, as fuzz_frame's, but for three things: flag 1 of a frame's header sends it
// as the other backend; a LoadSlice without a payload gets the payload of a slice that is resident, so that stages can
// be loaded, opened and computed; and nothing makes the backend connect to anybody. After each input the connections
// end, and everything they held must be free.
#include <chrono>
#include <cstdint>
#include <memory>
#include <set>

#include "base/error.h"
#include "base/log.h"
#include "frames.h"
#include "net/memory_connection.h"
#include "remote/backend_link.h"
#include "remote/backend_service.h"
#include "remote/codec.h"
#include "remote/fake_host.h"
#include "remote/remote_stage.h"

namespace {

using namespace caravan;
using namespace caravan::remote;
using testing::FakeHost;
using testing::FakeModel;

constexpr uint64_t kMemoryBytes = 1 << 20;
constexpr auto kPatience = std::chrono::seconds(5);
constexpr uint16_t kAsBackend = 1;

template <typename Condition>
bool soon(Condition condition) {
  return testing::eventually(condition, kPatience, std::chrono::microseconds(50));
}

BackendOptions options() {
  BackendOptions options;
  options.endpoint = {"127.0.0.1", 0};
  options.heartbeat_interval = std::chrono::milliseconds(50);
  return options;
}

// A backend with the weights of two slices: the first and the last stage of a model.
struct Machine {
  Machine() {
    spdlog::set_level(spdlog::level::off);
    last.request.slice = {1, 2, false, true};
    const auto link = BackendLink::connect(io, service.endpoint(), {});
    for (FakeModel* model : {&first, &last}) {
      RemoteStage stage(link);
      weights::WeightSource* const sources[] = {&model->source};
      stage.load(model->request, sources, {});
    }
    link->close();
    expect_all_free();
  }
  void expect_all_free() const {
    CARAVAN_ASSERT(soon([&] { return service.status().n_connections == 0; }), "connections that have ended go");
    CARAVAN_ASSERT(soon([&] { return host.n_stages == 0; }), "so do their stages");
    CARAVAN_ASSERT(soon([&] { return service.status().memory_free.at(0) == kMemoryBytes; }), "and their memory");
  }

  net::IoThreads io{2};
  FakeModel first{64, 1}, last{64, 2};
  FakeHost host{kMemoryBytes};
  BackendService service{io, host, options()};
};

// One side that has connected. What it reads is counted.
class Client {
 public:
  Client(Machine& machine, pb::Hello::Role role) : executor_(machine.io.next_executor()) {
    auto [here, there] = net::make_memory_pair(executor_);
    connection_ = std::move(here);
    reading_ = net::asio::co_spawn(executor_, read(*this), net::asio::use_future);
    machine.service.serve(std::move(there));
    pb::Hello hello;
    hello.set_protocol_major(kProtocolMajor);
    hello.set_role(role);
    send(MessageType::hello, hello.SerializeAsString(), {}, {MessageType::hello_ack});
  }
  ~Client() {
    net::run_blocking(executor_, connection_->shutdown());
    CARAVAN_ASSERT(reading_.wait_for(kPatience) == std::future_status::ready, "a backend lets go of who has left");
    net::run_blocking(executor_, [](net::Connection& c) -> net::awaitable<void> {
      c.close();
      co_return;
    }(*connection_));
  }

  // Sends a frame, and waits for one of the answers, if any, unless the backend has closed.
  void send(MessageType type, const std::string& header, std::span<const std::byte> payload,
            const std::set<MessageType>& answers) {
    {
      const std::lock_guard lock(mutex_);
      answered_ = answers.empty();
      answers_ = answers;
    }
    const auto fixed = net::encode_frame_header(
        {static_cast<uint16_t>(type), 0, static_cast<uint32_t>(header.size()), payload.size()});
    const std::array<net::ConstBuffer, 3> buffers{net::asio::buffer(fixed), net::asio::buffer(header),
                                                  net::asio::buffer(payload.data(), payload.size())};
    try {
      net::run_blocking(executor_, connection_->write(buffers));
    } catch (const net::ConnectionError&) {
      return;  // closed
    }
    std::unique_lock lock(mutex_);
    // Two loads of the same weights wait for each other, with reason.
    changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return answered_ || ended_; });
  }

 private:
  static net::awaitable<void> read(Client& self) {
    net::FrameReader reader(*self.connection_, [](uint16_t) { return net::FrameLimits{1 << 20, 1 << 26}; });
    try {
      while (const auto frame = co_await reader.read()) {
        const std::lock_guard lock(self.mutex_);
        self.answered_ = self.answered_ || self.answers_.contains(static_cast<MessageType>(frame->type));
        self.changed_.notify_all();
      }
    } catch (const net::ConnectionError&) {
      // closed
    }
    const std::lock_guard lock(self.mutex_);
    self.ended_ = true;
    self.changed_.notify_all();
  }

  const net::Executor executor_;
  std::unique_ptr<net::Connection> connection_;
  std::future<void> reading_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<MessageType> answers_;  // under mutex_; that are waited for
  bool answered_ = false;          // under mutex_
  bool ended_ = false;             // under mutex_
};

const std::set<MessageType>& answers_to(MessageType type) {
  static const std::set<MessageType> none;
  static const std::map<MessageType, std::set<MessageType>> table = {
      {MessageType::load_slice, {MessageType::loaded, MessageType::want_chunks, MessageType::error}},
      {MessageType::reserve, {MessageType::lease, MessageType::error}},
      {MessageType::open_session, {MessageType::session_opened, MessageType::error}},
      {MessageType::unload, {MessageType::unloaded}},
      {MessageType::attach, {MessageType::attached, MessageType::error}},
      {MessageType::heartbeat, {MessageType::heartbeat_ack}},
  };
  const auto found = table.find(type);
  return found != table.end() ? found->second : none;
}

// Changes a frame so that the backend connects to nobody, and fills in resident slices; false: not to be sent.
bool prepare(const Machine& machine, net::Frame& frame) {
  const auto replace = [&](const google::protobuf::MessageLite& header) {
    const std::string text = header.SerializeAsString();
    const auto bytes = std::as_bytes(std::span(text));
    frame.header.assign(bytes.begin(), bytes.end());
  };
  switch (static_cast<MessageType>(frame.type)) {
    case MessageType::probe:
      return false;
    case MessageType::load_slice: {
      auto message = parse_header<pb::LoadSlice>(frame);
      message.clear_peers();
      if (frame.payload.empty()) {
        const FakeModel& model = message.slice().embeds() ? machine.first : machine.last;
        EncodedLoad encoded = encode_load(model.request, message.stage(), message.device());
        message.set_n_metadata(encoded.header.n_metadata());
        message.set_metadata_bytes(encoded.header.metadata_bytes());
        frame.payload = std::move(encoded.payload);
      }
      replace(message);
      return true;
    }
    case MessageType::open_session: {
      auto message = parse_header<pb::OpenSession>(frame);
      if (message.output().kind() == pb::Route::PEER) return false;
      replace(message);
      return true;
    }
    default:
      return true;
  }
}

void run(const Machine& machine, ByteReader& reader, Client& server, Client& backend) {
  while (reader.remaining() > 0) {
    const auto start = reader.take(net::kFrameHeaderBytes, "frame header");
    std::vector<std::byte> fixed(start.begin(), start.end());
    constexpr size_t kFlagsAt = 6;
    const bool as_backend = (static_cast<uint16_t>(fixed[kFlagsAt]) & kAsBackend) != 0;
    fixed[kFlagsAt] = std::byte{0};
    ByteReader header_reader(fixed, "fuzz");
    const net::FrameHeader header = net::parse_frame_header(header_reader);
    net::Frame frame = fuzz::take_frame(header, reader);
    try {
      if (!prepare(machine, frame)) continue;
    } catch (const Error&) {
      // does not parse: the backend is to see that
    }
    const auto type = static_cast<MessageType>(frame.type);
    (as_backend ? backend : server)
        .send(type, {reinterpret_cast<const char*>(frame.header.data()), frame.header.size()}, frame.payload,
              answers_to(type));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Machine machine;
  ByteReader reader(std::as_bytes(std::span(data, size)), "fuzz");
  {
    Client server(machine, pb::Hello::SERVER), backend(machine, pb::Hello::BACKEND);
    try {
      run(machine, reader, server, backend);
    } catch (const Error&) {
      // the input is no stream of frames from here on
    }
  }
  machine.expect_all_free();
  return 0;
}
