#include "remote/backend_link.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "net/tls.h"
#include "remote/codec.h"

namespace caravan::remote {

namespace {

using Kind = net::ConnectionError::Kind;
constexpr size_t kMaxDevices = 64;
// Heartbeats whose answers are waited for.
constexpr size_t kMaxPings = 64;

// A backend's failure to be connected, as the error type that callers tell apart.
[[noreturn]] void rethrow_for(const std::string& who, const net::ConnectionError& error) {
  switch (error.kind()) {
    case Kind::token_differs:
      throw RequestError(
          fmt::format("{}: refused: wrong token: --rpc-token (APP_RPC_TOKEN) differs between the two sides", who),
          RequestError::Kind::unauthorized);
    case Kind::peer_has_no_token:
      throw RequestError(fmt::format("{} does not use a token: start it with --rpc-token / APP_RPC_TOKEN or drop "
                                     "--rpc-token here",
                                     who),
                         RequestError::Kind::unauthorized);
    case Kind::peer_needs_token:
      throw RequestError(fmt::format("{} requires a token: give its --rpc-token / APP_RPC_TOKEN here, too", who),
                         RequestError::Kind::unauthorized);
    default:
      throw net::ConnectionError(error.kind(), fmt::format("backend {}", error.what()));
  }
}

// What a backend's Error before the end of the handshake means here.
[[noreturn]] void throw_refusal(const std::string& who, const pb::Error& error) {
  switch (error.code()) {
    case pb::Error::VERSION:
      throw NotSupportedError(fmt::format("{}: refused: {}", who, error.text()));
    default:
      throw net::ConnectionError(Kind::lost, fmt::format("{}: refused: {}", who, error.text()));
  }
}

// "10.0.0.2:50052 closed the connection" may name the resolved address; people know the endpoint they wrote.
std::string name_backend(const std::string& who, const std::string& peer, const std::string& cause) {
  if (cause.starts_with(peer + ": ")) return fmt::format("{}: {}", who, cause.substr(peer.size() + 2));
  if (cause.starts_with(peer + " ")) return fmt::format("{} {}", who, cause.substr(peer.size() + 1));
  return fmt::format("{}: {}", who, cause);
}

}  // namespace

uint64_t BackendInfo::memory_total() const {
  uint64_t bytes = 0;
  for (const RemoteDevice& device : devices) bytes += device.memory_total;
  return bytes;
}

uint64_t BackendInfo::memory_free() const {
  uint64_t bytes = 0;
  for (const RemoteDevice& device : devices) bytes += device.memory_free;
  return bytes;
}

class BackendLink::State : public std::enable_shared_from_this<State> {
 public:
  State(std::unique_ptr<net::Connection> connection, net::Endpoint endpoint, const LinkOptions& link_options)
      : options(link_options), who("backend " + endpoint.text()) {
    info.endpoint = std::move(endpoint);
    channel = std::make_shared<Channel>(std::move(connection), [this](uint16_t type) { return limits(type); });
  }

  net::awaitable<void> greet();
  net::awaitable<void> read_loop(std::shared_ptr<State> self);
  net::FrameLimits limits(uint16_t type) const;
  void handle(net::Frame frame);
  void handle_for_stage(net::Frame frame);
  template <typename Message>
  void handle_answer(net::Frame frame);
  template <typename Message>
  std::optional<net::Frame> ask(MessageType type, Message message, std::vector<std::byte> payload,
                                std::chrono::milliseconds timeout);
  void lost(const std::string& cause);
  std::shared_ptr<Listener> find(uint32_t stage) const;
  // A heartbeat that is sent now. With mutex held.
  pb::Heartbeat begin_ping();
  void note_ack(const pb::HeartbeatAck& ack);
  bool ping_and_wait(std::unique_lock<std::mutex>& lock, std::chrono::steady_clock::time_point deadline);

  const LinkOptions options;
  const std::string who;  // "backend 10.0.0.2:50052"
  BackendInfo info;       // const after greet()
  bool greeted = false;   // on the executor
  std::shared_ptr<Channel> channel;

  mutable std::mutex mutex;
  std::condition_variable acknowledged;
  std::map<uint32_t, std::shared_ptr<Listener>> listeners;          // under mutex
  uint32_t next_stage = 1;                                          // under mutex
  uint64_t longest_output = 0;                                      // under mutex; of stages that are gone
  std::vector<uint64_t> memory_free;                                // under mutex
  uint64_t last_ack = 0, last_ping = 0;                             // under mutex; heartbeat sequences
  std::map<uint64_t, std::chrono::steady_clock::time_point> pings;  // under mutex; sent and not answered
  LinkTraffic traffic;                                              // under mutex; without bytes
  std::map<uint32_t, StageQueue> queues;                            // under mutex; by stage
  std::set<uint32_t> unloading;                                     // under mutex; stages that the backend is to free
  std::map<uint64_t, std::optional<net::Frame>> answers;            // under mutex; that are waited for, by sequence
  uint64_t last_question = 0;                                       // under mutex
  std::function<void(const std::string&)> lost_callback;            // under mutex
  std::function<void()> leaving_callback;                           // under mutex
  bool leaving = false;                                             // under mutex
  std::string lost_reason;                                          // under mutex; not empty: it is lost
  bool closed_here = false;                                         // under mutex
};

namespace {

// The stage that a message from a backend is about; every such message has it as field 1, but Error has it as 3.
uint32_t stage_of(const net::Frame& frame) {
  switch (static_cast<MessageType>(frame.type)) {
    case MessageType::lease:
      return parse_header<pb::Lease>(frame).stage();
    case MessageType::load_progress:
      return parse_header<pb::LoadProgress>(frame).stage();
    case MessageType::want_chunks:
      return parse_header<pb::WantChunks>(frame).stage();
    case MessageType::loaded:
      return parse_header<pb::Loaded>(frame).stage();
    case MessageType::output:
      return parse_header<pb::Output>(frame).stage();
    case MessageType::unloaded:
      return parse_header<pb::Unloaded>(frame).stage();
    case MessageType::session_opened:
      return parse_header<pb::SessionOpened>(frame).stage();
    case MessageType::hop_lost:
      return parse_header<pb::HopLost>(frame).stage();
    case MessageType::attached:
      return parse_header<pb::Attached>(frame).stage();
    case MessageType::error:
      return parse_header<pb::Error>(frame).stage();
    case MessageType::have_chunks_result:
    case MessageType::fetched_chunk:
      return 0;  // a listener of its own
    default:
      throw ProtocolError(fmt::format("{} is not expected here", message_name(frame.type)));
  }
}

}  // namespace

net::FrameLimits BackendLink::State::limits(uint16_t type) const {
  const MessageInfo* message = find_message(type);
  if (message == nullptr) throw ProtocolError(fmt::format("unknown message type {}", type));
  if (message->sender != Sender::backend && message->sender != Sender::both)
    throw ProtocolError(fmt::format("{} from a backend", message->name));
  const bool is_answer = message->type == MessageType::hello_ack || message->type == MessageType::error;
  if (!greeted && !is_answer) throw ProtocolError(fmt::format("{} before HelloAck", message->name));
  if (greeted && message->type == MessageType::hello_ack) throw ProtocolError("a second HelloAck");
  if (message->type != MessageType::output) return {message->max_header_bytes, message->max_payload_bytes};
  const std::lock_guard lock(mutex);
  uint64_t longest = longest_output;  // one of theirs may be under way still
  for (const auto& [id, listener] : listeners) longest = std::max(longest, listener->max_output_bytes());
  return {message->max_header_bytes, longest};
}

net::awaitable<void> BackendLink::State::greet() {
  pb::Hello hello;
  hello.set_protocol_major(kProtocolMajor);
  hello.set_protocol_minor(kProtocolMinor);
  hello.set_software_version(CARAVAN_VERSION);
  hello.set_role(options.role == LinkOptions::Role::peer   ? pb::Hello::BACKEND
                 : options.role == LinkOptions::Role::tool ? pb::Hello::TOOL
                                                           : pb::Hello::SERVER);
  hello.set_name(options.name);
  channel->send(MessageType::hello, hello);
  std::optional<net::Frame> frame = co_await channel->read();
  if (!frame) throw net::ConnectionError(Kind::lost, channel->peer() + " closed the connection before its hello");
  if (frame->type == static_cast<uint16_t>(MessageType::error)) throw_refusal(who, parse_header<pb::Error>(*frame));
  const auto ack = parse_header<pb::HelloAck>(*frame);
  if (!is_compatible(ack.protocol_major()))
    throw NotSupportedError(
        fmt::format("{} speaks {}, this side {}: run the same version on both sides", who,
                    describe_version(ack.protocol_major(), ack.protocol_minor(), ack.software_version()),
                    describe_version(kProtocolMajor, kProtocolMinor, CARAVAN_VERSION)));
  if (ack.devices_size() < 1 || static_cast<size_t>(ack.devices_size()) > kMaxDevices)
    throw ProtocolError(fmt::format("{}: {} devices, expected 1 to {}", who, ack.devices_size(), kMaxDevices));
  if (!options.expected_id.empty() && ack.backend_id() != options.expected_id)
    throw ProtocolError(
        fmt::format("{} is another backend ('{}') than the one meant: the name or address leads "
                    "elsewhere from here; see --advertise",
                    who, printable(ack.name())));
  info.name = ack.name();
  info.id = ack.backend_id();
  info.software_version = ack.software_version();
  info.protocol_minor = ack.protocol_minor();
  info.keep_alive = std::chrono::seconds(ack.keep_alive_s());
  info.advertised = ack.advertise().empty() ? info.endpoint.text() : ack.advertise();
  if (ack.machine().size() <= kMaxMachineBytes) info.machine = ack.machine();
  for (const pb::Device& device : ack.devices()) {
    info.devices.push_back({device.name(), device.kind(), device.description(), device.memory_total(),
                            device.memory_free(), device.n_threads(), device.numeric_class()});
    memory_free.push_back(device.memory_free());
  }
  greeted = true;
}

std::shared_ptr<BackendLink::Listener> BackendLink::State::find(uint32_t stage) const {
  const std::lock_guard lock(mutex);
  const auto found = listeners.find(stage);
  return found != listeners.end() ? found->second : nullptr;
}

pb::Heartbeat BackendLink::State::begin_ping() {
  if (pings.size() >= kMaxPings) pings.erase(pings.begin());
  pings[++last_ping] = std::chrono::steady_clock::now();
  pb::Heartbeat ping;
  ping.set_sequence(last_ping);
  ping.set_mean_rtt_us(static_cast<uint32_t>(std::min<int64_t>(traffic.mean_rtt.count(), UINT32_MAX)));
  return ping;
}

// With mutex held.
void BackendLink::State::note_ack(const pb::HeartbeatAck& ack) {
  if (ack.sequence() == 0) return;
  last_ack = std::max(last_ack, ack.sequence());
  if (const auto ping = pings.find(ack.sequence()); ping != pings.end()) {
    traffic.rtt =
        std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - ping->second);
    traffic.mean_rtt = traffic.mean_rtt.count() == 0 ? traffic.rtt : (7 * traffic.mean_rtt + traffic.rtt) / 8;
  }
  pings.erase(pings.begin(), pings.upper_bound(ack.sequence()));
  queues.clear();
  for (const pb::StageQueue& queue : ack.queues())
    queues[queue.stage()] = {queue.n_tickets(), queue.oldest_ticket(), std::chrono::milliseconds(queue.oldest_ms())};
}

void BackendLink::State::handle(net::Frame frame) {
  switch (static_cast<MessageType>(frame.type)) {
    case MessageType::heartbeat: {
      pb::HeartbeatAck ack;
      ack.set_sequence(parse_header<pb::Heartbeat>(frame).sequence());
      return channel->send(MessageType::heartbeat_ack, ack, {}, Channel::Priority::urgent);
    }
    case MessageType::heartbeat_ack: {
      const auto ack = parse_header<pb::HeartbeatAck>(frame);
      if (static_cast<size_t>(ack.memory_free_size()) != info.devices.size())
        throw ProtocolError(fmt::format("HeartbeatAck: memory of {} devices, expected {}", ack.memory_free_size(),
                                        info.devices.size()));
      std::function<void()> callback;
      {
        const std::lock_guard lock(mutex);
        memory_free.assign(ack.memory_free().begin(), ack.memory_free().end());
        note_ack(ack);
        if (ack.leaving() && !std::exchange(leaving, true)) callback = std::exchange(leaving_callback, nullptr);
      }
      if (callback) callback();
      return acknowledged.notify_all();
    }
    case MessageType::probe_result:
      return handle_answer<pb::ProbeResult>(std::move(frame));
    case MessageType::survey_result:
      return handle_answer<pb::SurveyResult>(std::move(frame));
    case MessageType::survey_layer_result:
      return handle_answer<pb::SurveyLayerResult>(std::move(frame));
    case MessageType::link_test_result:
      return handle_answer<pb::LinkTestResult>(std::move(frame));
    default:
      return handle_for_stage(std::move(frame));
  }
}

template <typename Message>
void BackendLink::State::handle_answer(net::Frame frame) {
  const uint64_t sequence = parse_header<Message>(frame).sequence();
  {
    const std::lock_guard lock(mutex);
    if (const auto asked = answers.find(sequence); asked != answers.end()) asked->second = std::move(frame);
  }
  acknowledged.notify_all();
}

// Sends a message with a new sequence and waits for the answer that has the same; nullopt: none came in time. Throws
// Error when the link is lost.
template <typename Message>
std::optional<net::Frame> BackendLink::State::ask(MessageType type, Message message, std::vector<std::byte> payload,
                                                  std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex);
  const uint64_t sequence = ++last_question;
  answers.emplace(sequence, std::nullopt);
  message.set_sequence(sequence);
  channel->send(type, message, std::move(payload));
  acknowledged.wait_for(lock, timeout, [&] { return answers.at(sequence) || !lost_reason.empty(); });
  std::optional<net::Frame> answer = std::move(answers.extract(sequence).mapped());
  if (!lost_reason.empty()) throw Error(lost_reason);
  return answer;
}

void BackendLink::State::handle_for_stage(net::Frame frame) {
  const uint32_t stage = stage_of(frame);
  if (frame.type == static_cast<uint16_t>(MessageType::error) && stage == 0)
    throw ProtocolError(parse_header<pb::Error>(frame).text());
  if (frame.type == static_cast<uint16_t>(MessageType::unloaded)) {
    {
      const std::lock_guard lock(mutex);
      unloading.erase(stage);
    }
    return acknowledged.notify_all();
  }
  // Frames for a stage that has gone were under way when it went.
  if (const std::shared_ptr<Listener> listener = find(stage)) listener->on_frame(std::move(frame));
}

net::awaitable<void> BackendLink::State::read_loop([[maybe_unused]] std::shared_ptr<State> self) {
  std::string cause;
  try {
    while (true) {
      std::optional<net::Frame> frame = co_await channel->read();
      if (!frame) break;
      handle(std::move(*frame));
    }
    cause = channel->peer() + " closed the connection";
  } catch (const net::ConnectionError& error) {
    const std::string reason = channel->close_reason();
    cause = reason.empty() ? error.what() : reason;
  } catch (const Error& error) {
    cause = error.what();
  }
  channel->close(cause);
  lost(name_backend(who, channel->peer(), cause));
}

void BackendLink::State::lost(const std::string& reason) {
  std::map<uint32_t, std::shared_ptr<Listener>> affected;
  std::function<void(const std::string&)> callback;
  {
    const std::lock_guard lock(mutex);
    lost_reason = reason;
    affected = listeners;
    if (!closed_here) callback = std::move(lost_callback);
    lost_callback = nullptr;
  }
  // Before those who wait hear of it: what fails for them is looked up there.
  if (callback) callback(reason);
  acknowledged.notify_all();
  for (const auto& [id, listener] : affected) listener->on_lost(reason);
}

namespace {

// Pings every interval and closes the channel after timeout without a byte.
net::awaitable<void> heartbeat_loop(std::shared_ptr<Channel> channel, std::function<pb::Heartbeat()> next,
                                    std::chrono::milliseconds interval) {
  while (!channel->closed()) {
    channel->send(MessageType::heartbeat, next(), {}, Channel::Priority::urgent);
    co_await net::sleep_for(interval);
  }
}

// TCP, and TLS where there is a token.
net::awaitable<std::unique_ptr<net::Connection>> open_connection(net::Endpoint endpoint, LinkOptions options) {
  std::unique_ptr<net::TcpConnection> tcp = co_await net::connect_tcp(endpoint, options.connect_timeout);
  if (options.token.empty()) co_return tcp;
  const net::TlsPsk psk(options.token);
  std::unique_ptr<net::Connection> secured = co_await psk.connect(std::move(tcp), options.connect_timeout);
  co_return secured;
}

}  // namespace

std::shared_ptr<BackendLink> BackendLink::connect(net::IoThreads& io, const net::Endpoint& endpoint,
                                                  const LinkOptions& options) {
  silence_protobuf();
  if (!options.token.empty()) net::check_token(options.token);
  const std::string who = "backend " + endpoint.text();
  std::shared_ptr<State> state;
  try {
    std::unique_ptr<net::Connection> connection =
        net::run_blocking(io.next_executor(), open_connection(endpoint, options), options.stop);
    net::Connection& raw = *connection;
    const net::Executor executor = raw.executor();
    state = std::make_shared<State>(std::move(connection), endpoint, options);
    const auto greet_in_time = [](std::shared_ptr<State> s, net::Connection& c) -> net::awaitable<void> {
      net::Deadline deadline(c, s->options.connect_timeout);
      s->channel->start();
      try {
        co_await s->greet();
      } catch (const net::ConnectionError&) {
        if (!deadline.expired()) throw;
        throw net::ConnectionError(Kind::timed_out,
                                   fmt::format("{}: no hello within {:.1f} s", s->info.endpoint.text(),
                                               std::chrono::duration<double>(s->options.connect_timeout).count()));
      }
    };
    net::run_blocking(executor, greet_in_time(state, raw), options.stop);
  } catch (const net::ConnectionError& error) {
    if (state) state->channel->close("the handshake failed");
    const std::string text = error.what();
    if (text.starts_with(who)) throw;  // a refusal says it all
    rethrow_for(who, error);
  } catch (const Error& error) {
    if (state) state->channel->close("the handshake failed");
    if (std::string_view(error.what()).starts_with(who)) throw;
    throw ProtocolError(fmt::format("{}: {}", who, error.what()));
  }
  const std::shared_ptr<Channel>& channel = state->channel;
  net::spawn(channel->executor(), "reading from " + who, state->read_loop(state));
  const auto next_ping = [weak = std::weak_ptr<State>(state)]() -> pb::Heartbeat {
    const std::shared_ptr<State> s = weak.lock();
    if (!s) return {};
    const std::lock_guard lock(s->mutex);
    return s->begin_ping();
  };
  net::spawn(channel->executor(), "pinging " + who, heartbeat_loop(channel, next_ping, options.heartbeat_interval));
  net::spawn(channel->executor(), "watching " + who,
             watch_silence(channel, options.heartbeat_interval, options.heartbeat_timeout));
  return std::shared_ptr<BackendLink>(new BackendLink(std::move(state)));
}

BackendLink::~BackendLink() { close(); }

const BackendInfo& BackendLink::info() const { return state_->info; }

std::vector<uint64_t> BackendLink::memory_free() const {
  const std::lock_guard lock(state_->mutex);
  return state_->memory_free;
}

std::vector<uint64_t> BackendLink::refresh_memory_free(std::chrono::milliseconds timeout) {
  State& state = *state_;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::unique_lock lock(state.mutex);
  state.acknowledged.wait_until(lock, deadline, [&] { return state.unloading.empty() || !state.lost_reason.empty(); });
  state.ping_and_wait(lock, deadline);
  return state.memory_free;
}

// Unlocks lock while it waits.
bool BackendLink::State::ping_and_wait(std::unique_lock<std::mutex>& lock,
                                       std::chrono::steady_clock::time_point deadline) {
  const pb::Heartbeat ping = begin_ping();
  channel->send(MessageType::heartbeat, ping, {}, Channel::Priority::urgent);
  acknowledged.wait_until(lock, deadline, [&] { return last_ack >= ping.sequence() || !lost_reason.empty(); });
  return last_ack >= ping.sequence();
}

bool BackendLink::ask(std::chrono::milliseconds timeout) {
  std::unique_lock lock(state_->mutex);
  return state_->ping_and_wait(lock, std::chrono::steady_clock::now() + timeout);
}

StageQueue BackendLink::queue(uint32_t stage) const {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->queues.find(stage);
  return found != state_->queues.end() ? found->second : StageQueue();
}

LinkTraffic BackendLink::traffic() const {
  LinkTraffic traffic;
  {
    const std::lock_guard lock(state_->mutex);
    traffic = state_->traffic;
  }
  traffic.received_bytes = state_->channel->bytes_received();
  traffic.sent_bytes = state_->channel->bytes_sent();
  return traffic;
}

std::chrono::microseconds BackendLink::probe(const std::string& endpoint, const std::string& backend_id,
                                             std::chrono::milliseconds timeout) {
  pb::Probe message;
  message.set_endpoint(endpoint);
  message.set_backend_id(backend_id);
  const std::optional<net::Frame> answer = state_->ask(MessageType::probe, message, {}, timeout);
  if (!answer)
    throw Error(fmt::format("{} did not say within {:.1f} s whether it reaches {}", state_->who,
                            std::chrono::duration<double>(timeout).count(), endpoint));
  const auto result = parse_header<pb::ProbeResult>(*answer);
  if (!result.error().empty()) throw Error(fmt::format("{}: {}", state_->who, printable(result.error(), 1024)));
  return std::chrono::microseconds(result.rtt_us());
}

BackendLink::Survey BackendLink::survey(size_t device, std::span<const tensor::DType> types,
                                        std::chrono::milliseconds timeout) {
  pb::Survey message;
  message.set_device(static_cast<uint32_t>(device));
  for (const tensor::DType type : types) message.add_types(static_cast<uint32_t>(type));
  const std::optional<net::Frame> answer = state_->ask(MessageType::survey, message, {}, timeout);
  if (!answer)
    throw Error(fmt::format("{} did not say within {:.1f} s how fast it is", state_->who,
                            std::chrono::duration<double>(timeout).count()));
  const auto result = parse_header<pb::SurveyResult>(*answer);
  Survey survey;
  survey.error = printable(result.error(), 1024);
  if (survey.error.empty() && !types.empty()) survey.profile = read_profile(result);
  using Milliseconds = std::chrono::milliseconds;
  const auto now = std::chrono::duration_cast<Milliseconds>(std::chrono::system_clock::now().time_since_epoch());
  survey.clock_ahead = Milliseconds(static_cast<int64_t>(result.clock_ms() - static_cast<uint64_t>(now.count())));
  for (const std::string& problem : result.problems()) survey.problems.push_back(printable(problem, 1024));
  return survey;
}

stage::LayerTimes BackendLink::survey_layer(size_t device, const stage::LoadRequest& sample,
                                            std::chrono::milliseconds timeout) {
  stage::LoadRequest request = sample;
  for (weights::TensorEntry& tensor : request.manifest.tensors)
    tensor.chunks.assign(weights::n_chunks(tensor.size_bytes), Digest());
  EncodedLoad encoded = encode_load(request, 0, static_cast<uint32_t>(device));
  if (encoded.payload.size() > kMaxSampleBytes)
    throw NotSupportedError(fmt::format("what describes a layer takes {} bytes, a backend takes at most {}",
                                        encoded.payload.size(), kMaxSampleBytes));
  pb::SurveyLayer message;
  *message.mutable_layer() = std::move(encoded.header);
  const std::optional<net::Frame> answer =
      state_->ask(MessageType::survey_layer, message, std::move(encoded.payload), timeout);
  if (!answer)
    throw Error(fmt::format("{} did not say within {:.1f} s how long a layer takes", state_->who,
                            std::chrono::duration<double>(timeout).count()));
  const auto result = parse_header<pb::SurveyLayerResult>(*answer);
  if (!result.error().empty())
    throw Error(
        fmt::format("{}: how long a layer takes is not known: {}", state_->who, printable(result.error(), 1024)));
  return read_times(result);
}

stage::LinkProfile BackendLink::measure(std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + timeout;
  const auto seconds_of = [&](uint32_t bytes) {
    pb::LinkTest message;
    message.set_reply_bytes(bytes);
    const auto start = Clock::now();
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - start);
    if (!state_->ask(MessageType::link_test, message, std::vector<std::byte>(bytes), left))
      throw Error(fmt::format("{} did not send {} back within {:.1f} s", state_->who, format_bytes(bytes),
                              std::chrono::duration<double>(timeout).count()));
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  constexpr size_t kRoundTrips = 7;
  constexpr auto kPause = std::chrono::milliseconds(4);
  constexpr uint32_t kFirstBytes = 64 << 10;
  constexpr double kLongEnough = 0.02;
  // As batches find it: machines sleep while they wait for one.
  std::array<double, kRoundTrips> round_trips{};
  for (double& seconds : round_trips) {
    std::this_thread::sleep_for(kPause);
    seconds = seconds_of(0);
  }
  std::ranges::sort(round_trips);
  const double round_trip = round_trips[kRoundTrips / 2];
  // A connection gathers speed: what takes short is sent again, and more of it.
  stage::LinkProfile link{round_trip / 2, 0};
  for (uint32_t bytes = kFirstBytes;; bytes = std::min(4 * bytes, kMaxLinkTestBytes)) {
    const double seconds = seconds_of(bytes);
    link.bytes_per_s = std::max(link.bytes_per_s, 2.0 * bytes / std::max(seconds - round_trip, 1e-6));
    if (seconds > kLongEnough || bytes == kMaxLinkTestBytes) return link;
  }
}

bool BackendLink::alive() const { return !state_->channel->closed(); }

std::string BackendLink::lost_reason() const {
  const std::lock_guard lock(state_->mutex);
  return state_->lost_reason;
}

void BackendLink::on_lost(std::function<void(const std::string& reason)> callback) {
  std::string reason;
  {
    const std::lock_guard lock(state_->mutex);
    reason = state_->lost_reason;
    if (reason.empty()) {
      state_->lost_callback = std::move(callback);
      return;
    }
    if (state_->closed_here) return;
  }
  callback(reason);
}

void BackendLink::on_leaving(std::function<void()> callback) {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->leaving) {
      state_->leaving_callback = std::move(callback);
      return;
    }
  }
  callback();
}

void BackendLink::close() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->closed_here = true;
  }
  state_->channel->close(fmt::format("{}: closed here", state_->channel->peer()));
}

uint32_t BackendLink::attach(const std::shared_ptr<Listener>& listener) {
  std::string reason;
  uint32_t stage = 0;
  {
    const std::lock_guard lock(state_->mutex);
    stage = state_->next_stage++;
    state_->listeners.emplace(stage, listener);
    reason = state_->lost_reason;
  }
  if (!reason.empty()) listener->on_lost(reason);
  return stage;
}

void BackendLink::attach(const std::shared_ptr<Listener>& listener, uint32_t stage) {
  std::string reason;
  {
    const std::lock_guard lock(state_->mutex);
    state_->listeners.emplace(stage, listener);
    reason = state_->lost_reason;
  }
  if (!reason.empty()) listener->on_lost(reason);
}

void BackendLink::detach(uint32_t stage) {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->listeners.find(stage);
  if (found == state_->listeners.end()) return;
  state_->longest_output = std::max(state_->longest_output, found->second->max_output_bytes());
  state_->listeners.erase(found);
}

void BackendLink::unload(uint32_t stage) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->lost_reason.empty()) state_->unloading.insert(stage);
  }
  pb::Unload message;
  message.set_stage(stage);
  state_->channel->send(MessageType::unload, message);
}

Channel& BackendLink::channel() { return *state_->channel; }

}  // namespace caravan::remote
