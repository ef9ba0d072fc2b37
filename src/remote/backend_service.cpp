#include "remote/backend_service.h"

#include <fmt/format.h>
#include <openssl/rand.h>
#include <unistd.h>

#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "net/listener.h"
#include "net/tls.h"
#include "remote/channel.h"
#include "remote/chunk_giver.h"
#include "remote/question_desk.h"
#include "remote/reaper.h"
#include "remote/slice_store.h"
#include "remote/stage_seat.h"
#include "remote/surveyor.h"

namespace caravan::remote {

namespace {

// How long a refused peer may take to read why.
constexpr auto kRefusalTime = std::chrono::milliseconds(1000);

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "backend";
}

std::string random_bytes(int n) {
  std::string bytes(static_cast<size_t>(n), '\0');
  CARAVAN_ASSERT(RAND_bytes(reinterpret_cast<unsigned char*>(bytes.data()), n) == 1, "OpenSSL's generator is seeded");
  return bytes;
}

class Peer;

}  // namespace

class BackendService::State : public std::enable_shared_from_this<State> {
 public:
  State(net::IoThreads& io_threads, SliceHost& slice_host, BackendOptions backend_options)
      : io(io_threads),
        host(slice_host),
        options(std::move(backend_options)),
        store(slice_host, options.keep_alive),
        local(options.library, options.cache),
        giver(local),
        quota(options.quota),
        prober(options.quota.max_connections, kMaxProbesAtOnce),
        listener(io_threads, options.endpoint),
        id(random_bytes(16)),
        expiry(listener.executor()),
        surveyor(slice_host, store, options.cache, [this] { return status().activity.n_tickets; }) {
    if (!options.token.empty()) psk.emplace(options.token);
    if (options.name.empty()) options.name = host_name();
    if (!options.advertise.empty()) net::parse_endpoint(options.advertise);  // throws for what is none
  }

  net::awaitable<void> accept_loop(std::shared_ptr<State> self);
  net::awaitable<void> expire_loop(std::shared_ptr<State> self);
  // Whether a connection may shake hands; why not is logged. A coroutine must follow where it may.
  bool begin(const std::string& peer);
  net::awaitable<void> serve(std::shared_ptr<State> self, std::string name,
                             net::awaitable<std::unique_ptr<net::Connection>> secured);
  net::awaitable<std::unique_ptr<net::Connection>> secure(std::unique_ptr<net::TcpConnection> tcp);
  void log_refusal(const std::string& peer, const std::string& reason);
  std::chrono::milliseconds handshake_timeout() const;
  BackendStatus status() const;
  void drain(std::chrono::milliseconds timeout);
  void stop();

  pb::HelloAck hello_ack() const;
  PeerOptions peer_options() const;

  net::IoThreads& io;
  SliceHost& host;
  BackendOptions options;
  SliceStore store;
  LocalWeights local;
  ChunkGiver giver;
  SilentPeers silent_peers;
  ConnectionQuota quota;
  Reaper reaper;        // after the store: what it destroys returns memory to it
  QuestionDesk prober;  // connects to other backends, for all connections at the same time
  InletTable inlets;
  std::optional<net::TlsPsk> psk;
  net::Listener listener;
  const std::string id;
  net::asio::steady_timer expiry;  // on the listener's executor

  mutable std::mutex mutex;
  std::condition_variable ended;
  std::set<std::shared_ptr<Peer>> peers;                     // under mutex; past their hello
  uint32_t n_coroutines = 0;                                 // under mutex; connections being served, and the loops
  std::chrono::steady_clock::time_point next_refusal_log{};  // under mutex
  uint64_t n_accepted = 0, n_refused = 0;                    // under mutex
  uint64_t n_stale = 0;                                      // under mutex; of peers that are gone
  Activity activity;                                         // under mutex; of peers that are gone
  bool stopping = false;                                     // under mutex
  std::atomic<bool> leaving{false};
  Surveyor surveyor;
};

namespace {

// One connection past its TLS handshake. Everything runs on the channel's executor, unless said otherwise.
class Peer : public std::enable_shared_from_this<Peer> {
 public:
  Peer(BackendService::State& service, std::unique_ptr<net::Connection> connection)
      : service_(service),
        channel_(std::make_shared<Channel>(std::move(connection), [this](uint16_t type) { return limits(type); })) {}

  const std::string& name() const { return channel_->peer(); }
  const std::shared_ptr<Channel>& channel() const { return channel_; }

  // The hello within the time given; false when the peer was refused.
  net::awaitable<bool> greet();
  // Serves until the connection ends; returns why it did.
  net::awaitable<std::string> serve();
  // Gives the stages to the reaper; returns how many they were.
  size_t release_stages(const std::string& reason);
  // From any thread.
  void say_leaving();
  void stop();
  // The peer's connection has ended: so does its route.
  void leave_route(const std::string& reason);
  uint32_t n_stages() const { return n_stages_.load(); }
  uint64_t n_stale() const;
  // A tool that loads nothing; not worth a line in the log.
  bool only_looks() const { return only_looks_; }
  // Of the stages that are there.
  std::vector<StageStatus> stages() const;
  // Of those that are gone.
  Activity ended_activity() const;

 private:
  net::FrameLimits limits(uint16_t type) const;
  void handle(net::Frame frame);
  StageSeat& seat(uint32_t stage);
  StageSeat& seat_for_load(uint32_t stage);
  void unload(uint32_t stage);
  void probe(const pb::Probe& message);
  void attach(const pb::Attach& message);
  void test_link(const pb::LinkTest& message);
  void forward(const pb::Forward& message, std::vector<std::byte> payload);
  net::awaitable<void> refuse(pb::Error::Code code, const std::string& text);

  BackendService::State& service_;
  const std::shared_ptr<Channel> channel_;
  bool greeted_ = false;
  bool is_backend_ = false;  // the stage before one of ours, not a server
  bool only_looks_ = false;
  std::shared_ptr<Inlet> inlet_;     // of a backend that has attached
  std::atomic<uint64_t> n_late_{0};  // its steps that were dropped
  mutable std::mutex mutex_;
  std::map<uint32_t, std::unique_ptr<StageSeat>> stages_;  // changed on the executor, under mutex_
  Activity ended_activity_;                                // under mutex_
  std::atomic<uint32_t> n_stages_{0};
  std::atomic<uint32_t> mean_rtt_us_{0};  // of the connection, as the peer measures it
};

net::FrameLimits Peer::limits(uint16_t type) const {
  const MessageInfo* info = find_message(type);
  if (info == nullptr) throw ProtocolError(fmt::format("unknown message type {}", type));
  if (!greeted_) {
    if (info->type != MessageType::hello) throw ProtocolError(fmt::format("{} before Hello", info->name));
    return kHelloLimits;
  }
  if (info->sender == Sender::backend || info->sender == (is_backend_ ? Sender::server : Sender::peer))
    throw ProtocolError(fmt::format("{} from a {}", info->name, is_backend_ ? "backend" : "server"));
  if (info->type == MessageType::hello) throw ProtocolError("a second Hello");
  if (info->type != MessageType::forward) return {info->max_header_bytes, info->max_payload_bytes};
  uint64_t longest = inlet_ ? inlet_->max_forward_bytes() : 0;
  const std::lock_guard lock(mutex_);
  for (const auto& [id, seat] : stages_) longest = std::max(longest, seat->max_forward_bytes());
  return {info->max_header_bytes, longest};
}

net::awaitable<void> Peer::refuse(pb::Error::Code code, const std::string& text) {
  pb::Error error;
  error.set_code(code);
  error.set_text(text);
  channel_->send(MessageType::error, error);
  co_await channel_->finish(kRefusalTime);
}

net::awaitable<bool> Peer::greet() {
  std::optional<net::Frame> frame;
  std::string violation;
  try {
    frame = co_await channel_->read();
  } catch (const Error& error) {
    if (channel_->closed() || dynamic_cast<const net::ConnectionError*>(&error) != nullptr) throw;
    violation = error.what();
  }
  if (!violation.empty()) {
    co_await refuse(pb::Error::PROTOCOL, violation);
    throw ProtocolError(violation);
  }
  if (!frame) throw net::ConnectionError(net::ConnectionError::Kind::lost, "left before its hello");
  const auto hello = parse_header<pb::Hello>(*frame);
  const std::string theirs =
      describe_version(hello.protocol_major(), hello.protocol_minor(), printable(hello.software_version()));
  if (!is_compatible(hello.protocol_major())) {
    const std::string text = fmt::format("this backend speaks {}, the server {}: run the same version on both sides",
                                         describe_version(kProtocolMajor, kProtocolMinor, CARAVAN_VERSION), theirs);
    co_await refuse(pb::Error::VERSION, text);
    throw ProtocolError(text);
  }
  if (const std::string full = service_.quota.admit(quota_address(name())); !full.empty()) {
    co_await refuse(pb::Error::BUSY, full);
    throw net::ConnectionError(net::ConnectionError::Kind::lost, full);
  }
  greeted_ = true;
  is_backend_ = hello.role() == pb::Hello::BACKEND;
  channel_->send(MessageType::hello_ack, service_.hello_ack());
  only_looks_ = hello.role() == pb::Hello::TOOL;
  spdlog::log(only_looks_ ? spdlog::level::debug : spdlog::level::info, "{}: connected: {} '{}', {}", name(),
              is_backend_ ? "backend" : "server", printable(hello.name()), theirs);
  co_return true;
}

net::awaitable<std::string> Peer::serve() {
  std::string violation;
  try {
    while (true) {
      std::optional<net::Frame> frame = co_await channel_->read();
      if (!frame) co_return is_backend_ ? "the backend closed the connection" : "the server closed the connection";
      handle(std::move(*frame));
    }
  } catch (const net::ConnectionError& error) {
    const std::string reason = channel_->close_reason();
    co_return reason.empty() ? error.what() : reason;
  } catch (const Error& error) {
    violation = error.what();
  }
  co_await refuse(pb::Error::PROTOCOL, violation);
  co_return "protocol violation: " + violation;
}

StageSeat& Peer::seat(uint32_t stage) {
  const auto found = stages_.find(stage);
  if (found == stages_.end()) throw ProtocolError(fmt::format("there is no stage {}", stage));
  return *found->second;
}

StageSeat& Peer::seat_for_load(uint32_t stage) {
  if (stage == 0) throw ProtocolError("stage 0 is no stage");
  if (const auto found = stages_.find(stage); found != stages_.end()) return *found->second;
  if (stages_.size() >= kMaxStages)
    throw ProtocolError(fmt::format("more than {} stages on one connection", kMaxStages));
  auto seat = std::make_unique<StageSeat>(
      stage, channel_,
      SeatContext{service_.host, service_.store, service_.local, service_.reaper, service_.io, service_.peer_options(),
                  service_.inlets, service_.silent_peers, service_.options.others_timeout});
  const std::lock_guard lock(mutex_);
  ++n_stages_;
  return *stages_.emplace(stage, std::move(seat)).first->second;
}

void Peer::unload(uint32_t stage) {
  std::shared_ptr<StageSeat> gone;
  {
    const std::lock_guard lock(mutex_);
    auto node = stages_.extract(stage);
    if (node) {
      gone = std::move(node.mapped());
      ended_activity_ += gone->status().activity;
    }
  }
  if (gone) {
    --n_stages_;
    gone->cancel("the stage was unloaded");
  }
  service_.reaper.post([gone = std::move(gone), channel = channel_, stage]() mutable {
    gone.reset();
    pb::Unloaded reply;
    reply.set_stage(stage);
    channel->send(MessageType::unloaded, reply);
  });
}

void Peer::forward(const pb::Forward& message, std::vector<std::byte> payload) {
  if (!is_backend_) return seat(message.stage()).forward(message, std::move(payload));
  if (!inlet_) throw ProtocolError("Forward before Attach");
  if (!inlet_->forward(message, std::move(payload))) ++n_late_;
}

void Peer::attach(const pb::Attach& message) {
  if (inlet_) throw ProtocolError("a second Attach");
  const std::shared_ptr<Inlet> inlet = service_.inlets.find(message.key());
  if (!inlet) throw ProtocolError("Attach: there is no route with this key");
  inlet->attach(message, channel_);
  inlet_ = inlet;
  pb::Attached reply;
  reply.set_stage(message.stage());
  channel_->send(MessageType::attached, reply);
}

void Peer::test_link(const pb::LinkTest& message) {
  if (message.reply_bytes() > kMaxLinkTestBytes)
    throw ProtocolError(
        fmt::format("LinkTest: {} bytes wanted, at most {} are sent", message.reply_bytes(), kMaxLinkTestBytes));
  if (channel_->queued_bytes() > uint64_t{8} * kMaxLinkTestBytes)
    throw ProtocolError("LinkTest: the answer before was not read");
  pb::LinkTestResult reply;
  reply.set_sequence(message.sequence());
  channel_->send(MessageType::link_test_result, reply, std::vector<std::byte>(message.reply_bytes()));
}

void Peer::leave_route(const std::string& reason) {
  if (inlet_) inlet_->detach(reason);
}

// On a thread of the prober, so that a backend that does not answer holds up no more than the questions of this
// connection.
void Peer::probe(const pb::Probe& message) {
  pb::ProbeResult result;
  result.set_sequence(message.sequence());
  const bool posted = service_.prober.post(channel_, [&service = service_, channel = channel_, message,
                                                      result](const std::stop_token& stop) mutable {
    try {
      const auto rtt = probe_peer(service.io, message.endpoint(), message.backend_id(), service.peer_options(), stop);
      result.set_rtt_us(static_cast<uint32_t>(std::min<int64_t>(rtt.count(), UINT32_MAX)));
    } catch (const std::exception& error) {
      result.set_error(std::string(error.what()).substr(0, 1024));
    }
    channel->send(MessageType::probe_result, result);
  });
  if (posted) return;
  result.set_error(fmt::format("busy: {} probes of this connection wait already", kMaxProbesAtOnce));
  channel_->send(MessageType::probe_result, result);
}

namespace {

void add_queue(pb::HeartbeatAck& ack, uint32_t stage, const StageQueue& queue) {
  if (queue.n_tickets == 0) return;
  pb::StageQueue& message = *ack.add_queues();
  message.set_stage(stage);
  message.set_n_tickets(queue.n_tickets);
  message.set_oldest_ticket(queue.oldest_ticket);
  message.set_oldest_ms(static_cast<uint32_t>(std::min<int64_t>(queue.oldest_age.count(), UINT32_MAX)));
}

}  // namespace

void Peer::handle(net::Frame frame) {
  switch (static_cast<MessageType>(frame.type)) {
    case MessageType::heartbeat: {
      const auto ping = parse_header<pb::Heartbeat>(frame);
      mean_rtt_us_ = ping.mean_rtt_us();
      pb::HeartbeatAck ack;
      ack.set_sequence(ping.sequence());
      for (const uint64_t bytes : service_.store.memory_free()) ack.add_memory_free(bytes);
      ack.set_leaving(service_.leaving);
      for (const auto& [id, seat] : stages_) add_queue(ack, id, seat->queue());
      channel_->send(MessageType::heartbeat_ack, ack, {}, Channel::Priority::urgent);
      return;
    }
    case MessageType::heartbeat_ack:
      return;  // that it came is all there is to know
    case MessageType::reserve: {
      const auto message = parse_header<pb::Reserve>(frame);
      return seat_for_load(message.stage()).reserve(message);
    }
    case MessageType::load_slice: {
      const auto message = parse_header<pb::LoadSlice>(frame);
      return seat_for_load(message.stage()).load(message, frame.payload);
    }
    case MessageType::chunk: {
      const auto message = parse_header<pb::Chunk>(frame);
      // A stage that was unloaded meanwhile had asked for it: no violation.
      if (stages_.contains(message.stage())) seat(message.stage()).chunk(message, std::move(frame.payload));
      return;
    }
    case MessageType::open_session: {
      const auto message = parse_header<pb::OpenSession>(frame);
      return seat(message.stage()).open(message);
    }
    case MessageType::close_session: {
      const auto message = parse_header<pb::CloseSession>(frame);
      return seat(message.stage()).close_session(message);
    }
    case MessageType::forward: {
      const auto message = parse_header<pb::Forward>(frame);
      return forward(message, std::move(frame.payload));
    }
    case MessageType::probe:
      return probe(parse_header<pb::Probe>(frame));
    case MessageType::survey:
      return service_.surveyor.post(parse_header<pb::Survey>(frame), channel_);
    case MessageType::survey_layer:
      return service_.surveyor.post(parse_header<pb::SurveyLayer>(frame), frame.payload, channel_);
    case MessageType::link_test:
      return test_link(parse_header<pb::LinkTest>(frame));
    case MessageType::attach:
      return attach(parse_header<pb::Attach>(frame));
    case MessageType::have_chunks:
      return service_.giver.have(channel_, parse_header<pb::HaveChunks>(frame));
    case MessageType::fetch_chunk:
      return service_.giver.fetch(channel_, parse_header<pb::FetchChunk>(frame));
    case MessageType::unload:
      return unload(parse_header<pb::Unload>(frame).stage());
    case MessageType::error: {
      const auto message = parse_header<pb::Error>(frame);
      throw ProtocolError(fmt::format("it says: {}", printable(message.text())));
    }
    default:
      throw ProtocolError(fmt::format("{} is not expected here", message_name(frame.type)));
  }
}

size_t Peer::release_stages(const std::string& reason) {
  std::map<uint32_t, std::unique_ptr<StageSeat>> stages;
  {
    const std::lock_guard lock(mutex_);
    stages.swap(stages_);
    for (const auto& [id, seat] : stages) ended_activity_ += seat->status().activity;
  }
  const size_t n = stages.size();
  n_stages_ = 0;
  for (auto& [id, seat] : stages) {
    seat->cancel(reason);
    service_.reaper.post([seat = std::shared_ptr<StageSeat>(std::move(seat))]() mutable { seat.reset(); });
  }
  return n;
}

uint64_t Peer::n_stale() const {
  const std::lock_guard lock(mutex_);
  uint64_t n = n_late_;
  for (const auto& [id, seat] : stages_) n += seat->n_stale();
  return n;
}

std::vector<StageStatus> Peer::stages() const {
  const std::lock_guard lock(mutex_);
  std::vector<StageStatus> all;
  for (const auto& [id, seat] : stages_) {
    all.push_back(seat->status());
    all.back().server_rtt = std::chrono::microseconds(mean_rtt_us_);
  }
  return all;
}

Activity Peer::ended_activity() const {
  const std::lock_guard lock(mutex_);
  return ended_activity_;
}

void Peer::say_leaving() {
  pb::HeartbeatAck message;
  for (const uint64_t bytes : service_.store.memory_free()) message.add_memory_free(bytes);
  message.set_leaving(true);
  channel_->send(MessageType::heartbeat_ack, message, {}, Channel::Priority::urgent);
}

void Peer::stop() {
  pb::Error error;
  error.set_code(pb::Error::STOPPING);
  error.set_text("the backend stops");
  channel_->send(MessageType::error, error);
  // The writer gets its turn before the connection closes.
  net::asio::post(channel_->executor(), [channel = channel_] {
    net::spawn(channel->executor(), "stopping", [](std::shared_ptr<Channel> c) -> net::awaitable<void> {
      co_await net::sleep_for(std::chrono::milliseconds(20));
      c->close("the backend stops");
    }(channel));
  });
}

}  // namespace

pb::HelloAck BackendService::State::hello_ack() const {
  pb::HelloAck ack;
  ack.set_protocol_major(kProtocolMajor);
  ack.set_protocol_minor(kProtocolMinor);
  ack.set_software_version(CARAVAN_VERSION);
  ack.set_name(options.name);
  ack.set_backend_id(id);
  const std::vector<uint64_t> memory_free = store.memory_free();
  size_t index = 0;
  for (const device::DeviceInfo& info : host.devices()) {
    pb::Device& device = *ack.add_devices();
    device.set_name(info.name);
    device.set_kind(info.kind);
    device.set_description(info.description);
    device.set_memory_total(info.memory_total);
    device.set_memory_free(memory_free[index++]);
    device.set_n_threads(static_cast<uint32_t>(info.n_threads));
    device.set_numeric_class(info.numeric_class);
  }
  ack.set_heartbeat_timeout_ms(static_cast<uint32_t>(options.heartbeat_timeout.count()));
  ack.set_keep_alive_s(static_cast<uint32_t>(options.keep_alive.count()));
  ack.set_max_tickets(kMaxTickets);
  ack.set_advertise(options.advertise);
  ack.set_machine(machine_name());
  return ack;
}

PeerOptions BackendService::State::peer_options() const {
  PeerOptions peers;
  peers.token = options.token;
  peers.name = options.name;
  peers.heartbeat_interval = options.heartbeat_interval;
  peers.heartbeat_timeout = options.heartbeat_timeout;
  return peers;
}

// Whoever dawdles while many shake hands gets less time.
std::chrono::milliseconds BackendService::State::handshake_timeout() const {
  return quota.is_crowded() ? options.handshake_timeout / 5 : options.handshake_timeout;
}

// At most one line per second: refused peers cannot fill the disk.
void BackendService::State::log_refusal(const std::string& peer, const std::string& reason) {
  bool quiet = false;
  {
    const std::lock_guard lock(mutex);
    const auto now = std::chrono::steady_clock::now();
    quiet = now < next_refusal_log;
    if (!quiet) next_refusal_log = now + std::chrono::seconds(1);
  }
  spdlog::log(quiet ? spdlog::level::debug : spdlog::level::warn, "{}: not served: {}", peer, reason);
}

// TLS where a token is set; a peer on the wrong side of that is told so in a way that it understands.
net::awaitable<std::unique_ptr<net::Connection>> BackendService::State::secure(
    std::unique_ptr<net::TcpConnection> tcp) {
  std::array<std::byte, 1> first{};
  size_t n = 0;
  {
    net::Deadline deadline(*tcp, handshake_timeout());
    n = co_await tcp->peek(first);
  }
  if (n == 0) throw net::ConnectionError(net::ConnectionError::Kind::lost, "left without a word");
  const bool speaks_tls = first[0] == net::kTlsHandshakeByte;
  if (psk && speaks_tls) {
    auto secured = co_await psk->accept(std::move(tcp), handshake_timeout());
    co_return secured;
  }
  if (psk) {
    co_await net::refuse_plaintext(std::move(tcp), kRefusalTime);
    throw net::ConnectionError(net::ConnectionError::Kind::peer_needs_token,
                               "refused: it uses no token, this backend requires one (--rpc-token, APP_RPC_TOKEN)");
  }
  if (speaks_tls) {
    co_await net::refuse_tls(std::move(tcp), kRefusalTime);
    throw net::ConnectionError(net::ConnectionError::Kind::peer_has_no_token,
                               "refused: it uses a token, this backend has none (--rpc-token, APP_RPC_TOKEN)");
  }
  co_return tcp;
}

net::awaitable<void> BackendService::State::serve([[maybe_unused]] std::shared_ptr<State> self, std::string name,
                                                  net::awaitable<std::unique_ptr<net::Connection>> secured) {
  std::shared_ptr<Peer> peer;
  bool greeted = false;
  std::string reason;
  try {
    std::unique_ptr<net::Connection> connection = co_await std::move(secured);
    net::Connection& raw = *connection;
    peer = std::make_shared<Peer>(*this, std::move(connection));
    peer->channel()->start();
    {
      net::Deadline deadline(raw, handshake_timeout());
      try {
        greeted = co_await peer->greet();
      } catch (const net::ConnectionError&) {
        if (!deadline.expired()) throw;
        throw net::ConnectionError(net::ConnectionError::Kind::timed_out, "no hello in time");
      }
    }
    bool admitted = false;
    {
      const std::lock_guard lock(mutex);
      admitted = !stopping;
      if (admitted) peers.insert(peer);
    }
    if (admitted) {
      net::spawn(raw.executor(), "watching " + name,
                 watch_silence(peer->channel(), options.heartbeat_interval, options.heartbeat_timeout));
      reason = co_await peer->serve();
    }
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (peer) {
    peer->channel()->close(reason);
    peer->leave_route(reason);
    prober.leave(peer->channel());
    surveyor.leave(peer->channel());
    const uint64_t stale = peer->n_stale();
    const size_t n_stages = peer->release_stages(reason);
    if (greeted)
      spdlog::log(peer->only_looks() ? spdlog::level::debug : spdlog::level::info, "{}: closed: {}{}", name, reason,
                  n_stages == 0 ? "" : fmt::format("; {} stage{} freed", n_stages, n_stages == 1 ? "" : "s"));
    const std::lock_guard lock(mutex);
    peers.erase(peer);
    n_stale += stale;
    activity += peer->ended_activity();
  }
  if (!greeted) log_refusal(name, reason);
  quota.end(quota_address(name), greeted ? ConnectionQuota::State::served : ConnectionQuota::State::shaking_hands);
  {
    const std::lock_guard lock(mutex);
    if (!greeted) ++n_refused;
    --n_coroutines;
    ended.notify_all();
  }
}

bool BackendService::State::begin(const std::string& peer) {
  std::string full;
  {
    const std::lock_guard lock(mutex);
    ++n_accepted;
    full = stopping ? "the backend stops" : quota.begin(quota_address(peer));
    if (full.empty())
      ++n_coroutines;
    else
      ++n_refused;
  }
  if (!full.empty()) log_refusal(peer, full);
  return full.empty();
}

net::awaitable<void> BackendService::State::accept_loop(std::shared_ptr<State> self) {
  while (true) {
    std::unique_ptr<net::TcpConnection> tcp = co_await listener.accept();
    if (!tcp) break;
    if (!begin(tcp->peer())) {
      tcp->close();
      continue;
    }
    const net::Executor executor = tcp->executor();
    const std::string peer = tcp->peer();
    net::spawn(executor, "serving " + peer, serve(self, peer, secure(std::move(tcp))));
  }
  const std::lock_guard lock(mutex);
  --n_coroutines;
  ended.notify_all();
}

net::awaitable<void> BackendService::State::expire_loop(std::shared_ptr<State> self) {
  const auto interval = std::clamp<std::chrono::milliseconds>(options.keep_alive / 10, std::chrono::milliseconds(100),
                                                              std::chrono::milliseconds(5000));
  while (true) {
    {
      const std::lock_guard lock(mutex);
      if (stopping) break;
    }
    boost::system::error_code cancelled;
    expiry.expires_after(interval);
    co_await expiry.async_wait(net::asio::redirect_error(net::asio::use_awaitable, cancelled));
    reaper.post([self] { self->store.expire(SliceStore::Clock::now()); });
  }
  const std::lock_guard lock(mutex);
  --n_coroutines;
  ended.notify_all();
}

BackendStatus BackendService::State::status() const {
  BackendStatus status;
  status.memory_free = store.memory_free();
  for (const device::DeviceInfo& info : host.devices()) status.memory_total.push_back(info.memory_total);
  status.n_resident = store.n_resident();
  status.origins = local.totals();
  status.given_bytes = giver.given_bytes();
  const std::lock_guard lock(mutex);
  status.n_connections = static_cast<uint32_t>(peers.size());
  status.n_accepted = n_accepted;
  status.n_refused = n_refused;
  status.n_stale = n_stale;
  status.activity = activity;
  for (const std::shared_ptr<Peer>& peer : peers) {
    status.n_stages += peer->n_stages();
    status.activity += peer->ended_activity();
    for (StageStatus& stage : peer->stages()) {
      status.activity += stage.activity;
      status.stages.push_back(std::move(stage));
    }
    status.n_stale += peer->n_stale();
  }
  return status;
}

void BackendService::State::drain(std::chrono::milliseconds timeout) {
  constexpr auto kLookInterval = std::chrono::milliseconds(20);
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  leaving = true;
  net::asio::post(listener.executor(), [self = shared_from_this()] { self->listener.close(); });
  std::unique_lock lock(mutex);
  for (const std::shared_ptr<Peer>& peer : peers) peer->say_leaving();
  const auto n_stages = [this] {
    size_t n = 0;
    for (const std::shared_ptr<Peer>& peer : peers) n += peer->n_stages();
    return n;
  };
  if (n_stages() > 0)
    spdlog::info("leaving: {} stages have {:.1f} s to move elsewhere", n_stages(),
                 std::chrono::duration<double>(timeout).count());
  while (n_stages() > 0 && std::chrono::steady_clock::now() < deadline) ended.wait_for(lock, kLookInterval);
  lock.unlock();
  stop();
}

void BackendService::State::stop() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
    for (const std::shared_ptr<Peer>& peer : peers) peer->stop();
  }
  net::asio::post(listener.executor(), [self = shared_from_this()] {
    self->listener.close();
    self->expiry.cancel();
  });
  {
    std::unique_lock lock(mutex);
    ended.wait(lock, [&] { return n_coroutines == 0; });
  }
  giver.stop();
  prober.stop();
  surveyor.stop();
  reaper.wait_for_earlier({});
  store.clear();  // this object may live on a little, the host perhaps not
}

BackendService::BackendService(net::IoThreads& io, SliceHost& host, BackendOptions options)
    : state_(std::make_shared<State>(io, host, std::move(options))) {
  silence_protobuf();
  const net::Endpoint& bound = state_->listener.endpoint();
  spdlog::info("backend '{}' listens on {}{}", state_->options.name, bound.text(),
               state_->psk ? " (TLS, token set)" : "");
  if (!state_->psk && !net::is_loopback(bound))
    spdlog::warn(
        "NO TOKEN IS SET AND {} IS REACHABLE FROM OTHER MACHINES: whoever reaches this port can use this backend. Set "
        "--rpc-token or APP_RPC_TOKEN on both sides, or bind 127.0.0.1",
        bound.text());
  size_t index = 0;
  const std::vector<uint64_t> memory_free = state_->store.memory_free();
  for (const device::DeviceInfo& info : host.devices())
    spdlog::info("device {}: {}, {} threads, {} of {} free", info.name, info.description, info.n_threads,
                 format_bytes(memory_free[index++]), format_bytes(info.memory_total));
  state_->n_coroutines = 2;
  net::spawn(state_->listener.executor(), "accepting", state_->accept_loop(state_));
  net::spawn(state_->listener.executor(), "expiring weights", state_->expire_loop(state_));
}

BackendService::~BackendService() { stop(); }

void BackendService::serve(std::unique_ptr<net::Connection> connection) {
  const auto as_it_is = [](std::unique_ptr<net::Connection> c) -> net::awaitable<std::unique_ptr<net::Connection>> {
    co_return c;
  };
  const net::Executor executor = connection->executor();
  const std::string peer = connection->peer();
  if (state_->begin(peer))
    net::spawn(executor, "serving " + peer, state_->serve(state_, peer, as_it_is(std::move(connection))));
}

const net::Endpoint& BackendService::endpoint() const { return state_->listener.endpoint(); }
BackendStatus BackendService::status() const { return state_->status(); }

void BackendService::drain(std::chrono::milliseconds timeout) { state_->drain(timeout); }
void BackendService::stop() { state_->stop(); }

}  // namespace caravan::remote
