#include "remote/remote_stage.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>

#include "base/error.h"
#include "base/log.h"
#include "remote/codec.h"
#include "stage/loaded_slice.h"

namespace caravan::remote {

namespace {

// Chunks that wait to be sent: enough to keep the link busy while the next is read from the file.
constexpr uint64_t kQueuedChunkBytes = 4 * weights::kChunkBytes;

[[noreturn]] void throw_error(const std::string& who, const pb::Error& error) {
  const std::string text = fmt::format("{}: {}", who, error.text());
  switch (error.code()) {
    case pb::Error::RESOURCE:
      throw ResourceError(text);
    case pb::Error::FORMAT:
      throw FormatError(text);
    case pb::Error::NOT_SUPPORTED:
      throw NotSupportedError(text);
    case pb::Error::SOURCE:
      throw weights::SourceError(text);
    default:
      throw Error(text);
  }
}

stage::StageOutput lost_step(const stage::Fence& fence, const std::string& error) {
  stage::StageOutput output;
  output.fence = fence;
  output.error = error;
  output.stage_lost = true;
  return output;
}

// Chunks of a manifest by their hash, to answer a backend from sources.
class ChunkServer {
 public:
  ChunkServer(const weights::Manifest& manifest, std::span<weights::WeightSource* const> sources) : sources_(sources) {
    for (const weights::TensorEntry& tensor : manifest.tensors)
      for (uint64_t i = 0; i < weights::n_chunks(tensor.size_bytes); ++i)
        chunks_.emplace(tensor.chunks.at(i), weights::ChunkRef{&tensor, i});
  }

  // Sends what is wanted, in order; only chunks of the manifest exist for the peer. The peer verifies the bytes. sent
  // is called after each.
  void answer(const pb::WantChunks& want, Channel& channel, const std::function<void()>& sent) const {
    if (static_cast<uint32_t>(want.digests_size()) > kMaxChunksPerWant)
      throw ProtocolError(
          fmt::format("WantChunks: {} chunks, at most {} are accepted", want.digests_size(), kMaxChunksPerWant));
    for (const std::string& raw : want.digests()) {
      const Digest digest = Digest::from_bytes(raw);
      const auto found = chunks_.find(digest);
      if (found == chunks_.end())
        throw ProtocolError(fmt::format("WantChunks: {} is no chunk of the slice", digest.hex()));
      std::vector<std::byte> bytes(found->second.size_bytes());
      const bool have = std::ranges::any_of(
          sources_, [&](weights::WeightSource* source) { return source->fetch(found->second, bytes); });
      pb::Chunk reply;
      reply.set_stage(want.stage());
      reply.set_digest(raw);
      reply.set_missing(!have);
      if (!have) bytes.clear();
      if (!channel.wait_for_room(kQueuedChunkBytes)) return;
      channel.send(MessageType::chunk, reply, std::move(bytes));
      sent();
    }
  }

 private:
  std::span<weights::WeightSource* const> sources_;
  std::unordered_map<Digest, weights::ChunkRef> chunks_;
};

}  // namespace

class RemoteStage::State : public BackendLink::Listener {
 public:
  explicit State(std::string who_is) : who(std::move(who_is)) {}

  void on_frame(net::Frame frame) override;
  void on_lost(const std::string& reason) override;
  uint64_t max_output_bytes() const override;

  // The next frame of a conversation, waiting for it. Throws Error when the link is lost, or what an Error says;
  // StalledError with what the backend was to do when nothing comes for patience.
  net::Frame next_frame(std::chrono::milliseconds patience, std::string_view task);
  void start_conversation();
  void deliver(const net::Frame& frame);
  void hop_lost(const pb::HopLost& message);
  bool awaits_opening() const {
    const std::lock_guard lock(mutex);
    return opening;
  }
  // Takes a ticket out of pending; null when it is not there.
  std::shared_ptr<const stage::Batch> extract(const stage::Fence& fence);
  // Delivers to the sink unless it was replaced meanwhile.
  void hand_over(stage::StageOutput output);

  const std::string who;

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool in_conversation = false;         // under mutex: load(), reserve() or open() waits for frames
  bool opening = false;                 // under mutex: open() waits for SessionOpened
  std::deque<net::Frame> conversation;  // under mutex
  std::string lost;                     // under mutex
  bool is_loaded = false;               // under mutex
  OutputShape shape;                    // under mutex
  stage::MemoryNeed held;               // under mutex
  uint64_t pulled_bytes = 0;            // under mutex
  WeightOrigins origins;                // under mutex
  uint64_t session = 0, epoch = 0;      // under mutex
  bool takes_from_peer = false;         // under mutex: steps are announced by expect()
  bool hands_on = false;                // under mutex: the output goes to the next stage
  // Tickets in flight and what was asked for, of the current session and epoch; not those that are handed on.
  std::map<stage::Fence, std::shared_ptr<const stage::Batch>> pending;  // under mutex
  uint64_t longest_output = 0;                                          // under mutex

  std::mutex sink_mutex;              // held while the sink is called
  stage::OutputSink* sink = nullptr;  // under sink_mutex
  uint64_t sink_session = 0, sink_epoch = 0;
};

void RemoteStage::State::on_frame(net::Frame frame) {
  if (frame.type == static_cast<uint16_t>(MessageType::output)) return deliver(frame);
  if (frame.type == static_cast<uint16_t>(MessageType::unloaded)) return;
  if (frame.type == static_cast<uint16_t>(MessageType::session_opened) && !awaits_opening()) return;
  if (frame.type == static_cast<uint16_t>(MessageType::hop_lost)) return hop_lost(parse_header<pb::HopLost>(frame));
  {
    const std::lock_guard lock(mutex);
    if (in_conversation) {
      if (conversation.size() > kMaxTickets) throw ProtocolError("too many messages about one load");
      conversation.push_back(std::move(frame));
      changed.notify_all();
      return;
    }
  }
  if (frame.type != static_cast<uint16_t>(MessageType::error)) return;  // of a conversation that was given up
  // The stage has failed outside a conversation: so have its tickets.
  const std::string text = fmt::format("{}: {}", who, parse_header<pb::Error>(frame).text());
  std::map<stage::Fence, std::shared_ptr<const stage::Batch>> failed;
  {
    const std::lock_guard lock(mutex);
    failed.swap(pending);
    if (hands_on) failed[{session, epoch, 0}] = nullptr;  // it is not known here what it holds
  }
  for (const auto& [fence, batch] : failed) hand_over(lost_step(fence, text));
}

void RemoteStage::State::on_lost(const std::string& reason) {
  std::map<stage::Fence, std::shared_ptr<const stage::Batch>> failed;
  {
    const std::lock_guard lock(mutex);
    lost = reason;
    failed.swap(pending);
  }
  changed.notify_all();
  for (const auto& [fence, batch] : failed) hand_over(lost_step(fence, reason));
}

uint64_t RemoteStage::State::max_output_bytes() const {
  const std::lock_guard lock(mutex);
  return longest_output;
}

void RemoteStage::State::deliver(const net::Frame& frame) {
  const auto header = parse_header<pb::Output>(frame);
  stage::StageOutput output;
  output.fence = read_fence(header.fence());
  std::shared_ptr<const stage::Batch> batch;
  OutputShape output_shape;
  if (static_cast<uint32_t>(header.compute_us_size()) > kMaxHops)
    throw ProtocolError(fmt::format("Output: the times of {} stages", header.compute_us_size()));
  {
    const std::lock_guard lock(mutex);
    batch = extract(output.fence);
    output_shape = shape;
    if (!batch && (!hands_on || header.error().empty())) return;  // of an older epoch
  }
  if (header.error().empty())
    decode_output(frame.payload, *batch, output_shape, output);
  else
    output.error = fmt::format("{}: {}", who, header.error());
  for (const uint32_t us : header.compute_us()) output.earlier_seconds.push_back(us * 1e-6);
  if (!output.earlier_seconds.empty()) {
    output.compute_seconds = output.earlier_seconds.back();
    output.earlier_seconds.pop_back();
  }
  hand_over(std::move(output));
}

// With mutex held.
std::shared_ptr<const stage::Batch> RemoteStage::State::extract(const stage::Fence& fence) {
  // Steps stay in order: those expected before this one have failed at a stage before.
  if (takes_from_peer) pending.erase(pending.begin(), pending.lower_bound(fence));
  const auto found = pending.find(fence);
  if (found == pending.end()) return nullptr;
  return std::move(pending.extract(found).mapped());
}

void RemoteStage::State::hop_lost(const pb::HopLost& message) {
  stage::StageOutput output;
  output.fence = {message.session(), message.epoch(), 0};
  output.error = fmt::format("{}: {}", who, printable(message.text(), 1024));
  output.stage_lost = true;
  hand_over(std::move(output));
}

void RemoteStage::State::hand_over(stage::StageOutput output) {
  const std::lock_guard lock(sink_mutex);
  if (sink == nullptr || output.fence.session != sink_session || output.fence.epoch != sink_epoch) return;
  sink->deliver(std::move(output));
}

void RemoteStage::State::start_conversation() {
  const std::lock_guard lock(mutex);
  in_conversation = true;
  conversation.clear();
}

net::Frame RemoteStage::State::next_frame(std::chrono::milliseconds patience, std::string_view task) {
  std::unique_lock lock(mutex);
  if (!changed.wait_for(lock, patience, [&] { return !conversation.empty() || !lost.empty(); }))
    throw StalledError(fmt::format("{}: no progress for {:.1f} s while it was to {}", who,
                                   std::chrono::duration<double>(patience).count(), task));
  if (conversation.empty()) throw Error(lost);
  net::Frame frame = std::move(conversation.front());
  conversation.pop_front();
  lock.unlock();
  if (frame.type == static_cast<uint16_t>(MessageType::error)) throw_error(who, parse_header<pb::Error>(frame));
  return frame;
}

RemoteStage::RemoteStage(std::shared_ptr<BackendLink> link, size_t device, std::chrono::milliseconds patience)
    : link_(std::move(link)),
      device_(device),
      patience_(patience),
      state_(std::make_shared<State>("backend " + link_->info().endpoint.text())),
      stage_(link_->attach(state_)) {
  CARAVAN_ASSERT(device_ < link_->info().devices.size(), "callers choose from the backend's devices");
}

RemoteStage::~RemoteStage() {
  {
    const std::lock_guard lock(state_->sink_mutex);
    state_->sink = nullptr;
  }
  link_->detach(stage_);
  link_->unload(stage_);
}

namespace {

// Ends a conversation however it went.
template <typename StateType>
struct ConversationEnd {
  StateType& state;
  ~ConversationEnd() {
    const std::lock_guard lock(state.mutex);
    state.in_conversation = state.opening = false;
    state.conversation.clear();
  }
};

}  // namespace

void RemoteStage::reserve(const stage::MemoryNeed& need, const Digest& key) {
  state_->start_conversation();
  const ConversationEnd<State> end{*state_};
  pb::Reserve message;
  message.set_stage(stage_);
  message.set_device(static_cast<uint32_t>(device_));
  message.set_weights(need.weights);
  message.set_kv_cache(need.kv_cache);
  message.set_scratch(need.scratch);
  message.set_content_key(key.bytes.data(), key.bytes.size());
  link_->channel().send(MessageType::reserve, message);
  const net::Frame frame = state_->next_frame(patience_, "reserve memory");
  if (frame.type != static_cast<uint16_t>(MessageType::lease))
    throw ProtocolError(fmt::format("{}: {} in place of Lease", state_->who, message_name(frame.type)));
}

void RemoteStage::reserve(const stage::LoadRequest& request, const stage::MemoryNeed& need) {
  reserve(need, stage::content_key(request));
}

void RemoteStage::load(const stage::LoadRequest& request, std::span<weights::WeightSource* const> sources,
                       const ProgressFunction& on_progress) {
  for (const weights::TensorEntry& tensor : request.manifest.tensors)
    if (tensor.chunks.size() != weights::n_chunks(tensor.size_bytes))
      throw FormatError(fmt::format("manifest: tensor '{}' has no chunk hashes, a backend needs them", tensor.name));
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_loaded = false;
    state_->pending.clear();
  }
  state_->start_conversation();
  const ConversationEnd<State> end{*state_};
  const ChunkServer chunks(request.manifest, sources);
  EncodedLoad encoded = encode_load(request, stage_, static_cast<uint32_t>(device_));
  if (link_->info().protocol_minor >= kMinorWithSharedWeights) encode_peers(encoded.header, others_);
  link_->channel().send(MessageType::load_slice, encoded.header, std::move(encoded.payload));
  uint64_t done_bytes = 0;
  const auto tell = [&] {
    if (on_progress) on_progress(done_bytes);
  };
  while (true) {
    const net::Frame frame = state_->next_frame(patience_, "load its layers");
    switch (static_cast<MessageType>(frame.type)) {
      case MessageType::want_chunks:
        chunks.answer(parse_header<pb::WantChunks>(frame), link_->channel(), tell);
        break;
      case MessageType::load_progress:
        done_bytes = parse_header<pb::LoadProgress>(frame).bytes_done();
        tell();
        break;
      case MessageType::loaded: {
        const auto loaded = parse_header<pb::Loaded>(frame);
        const std::lock_guard lock(state_->mutex);
        state_->shape = {loaded.n_embd(), loaded.n_vocab(), request.slice.outputs};
        state_->held = {loaded.weights(), loaded.kv_cache(), loaded.scratch()};
        state_->pulled_bytes = loaded.pulled_bytes();
        state_->origins = {loaded.from_models_dir(), loaded.from_cache(), loaded.pulled_bytes(), loaded.from_peers()};
        state_->is_loaded = true;
        return;
      }
      default:
        throw ProtocolError(fmt::format("{}: {} while a slice is loaded", state_->who, message_name(frame.type)));
    }
  }
}

std::optional<StageQueue> RemoteStage::ask_queue(std::chrono::milliseconds timeout) const {
  if (!link_->ask(timeout)) return std::nullopt;
  return queue();
}

const stage::MemoryNeed& RemoteStage::held() const { return state_->held; }
uint64_t RemoteStage::pulled_bytes() const { return state_->pulled_bytes; }
WeightOrigins RemoteStage::origins() const { return state_->origins; }

// Sends OpenSession; false when the stage is not loaded.
bool RemoteStage::begin_session(uint64_t session, uint64_t epoch, stage::OutputSink& sink,
                                const stage::Routes& routes) {
  {
    const std::lock_guard lock(state_->sink_mutex);
    state_->sink = &sink;
    state_->sink_session = session;
    state_->sink_epoch = epoch;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->session = session;
    state_->epoch = epoch;
    state_->takes_from_peer = routes.input_key.has_value();
    state_->hands_on = routes.output.has_value();
    state_->pending.clear();
    if (!state_->is_loaded) return false;
  }
  pb::OpenSession message;
  message.set_stage(stage_);
  message.set_session(session);
  message.set_epoch(epoch);
  message.mutable_input()->set_kind(routes.input_key ? pb::Route::PEER : pb::Route::CONNECTION);
  if (routes.input_key) message.mutable_input()->set_key(*routes.input_key);
  pb::Route& output = *message.mutable_output();
  output.set_kind(routes.output ? pb::Route::PEER : pb::Route::CONNECTION);
  if (routes.output) {
    output.set_endpoint(routes.output->endpoint);
    output.set_backend_id(routes.output->backend_id);
    output.set_stage(routes.output->stage);
    output.set_key(routes.output->key);
  }
  link_->channel().send(MessageType::open_session, message);
  return true;
}

void RemoteStage::open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) {
  begin_session(session, epoch, sink, {});  // false: enqueue() says so
}

stage::PeerRoute RemoteStage::address() const { return {link_->info().advertised, link_->info().id, stage_, ""}; }

void RemoteStage::open(uint64_t session, uint64_t epoch, stage::OutputSink& sink, const stage::Routes& routes) {
  state_->start_conversation();
  const ConversationEnd<State> end{*state_};
  {
    const std::lock_guard lock(state_->mutex);
    state_->opening = true;
  }
  if (!begin_session(session, epoch, sink, routes)) throw Error(state_->who + ": the stage has not been loaded");
  while (true) {
    const net::Frame frame = state_->next_frame(patience_, "open a session");
    if (frame.type != static_cast<uint16_t>(MessageType::session_opened))
      throw ProtocolError(fmt::format("{}: {} in place of SessionOpened", state_->who, message_name(frame.type)));
    const auto opened = parse_header<pb::SessionOpened>(frame);
    if (opened.session() != session || opened.epoch() != epoch) continue;  // the answer to an earlier one
    if (!opened.error().empty()) throw Error(fmt::format("{}: {}", state_->who, printable(opened.error(), 1024)));
    return;
  }
}

void RemoteStage::expect(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch) {
  const std::lock_guard lock(state_->mutex);
  if (!state_->lost.empty() || fence.session != state_->session || fence.epoch != state_->epoch) return;
  state_->longest_output = std::max(state_->longest_output, output_bytes(*batch, state_->shape));
  state_->pending.emplace(fence, std::move(batch));
}

void RemoteStage::enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch,
                          std::vector<float> input) {
  std::string failure;
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->lost.empty())
      failure = state_->lost;
    else if (!state_->is_loaded)
      failure = state_->who + ": the stage has not been loaded";
    else if (fence.session != state_->session || fence.epoch != state_->epoch)
      return;  // stale: dropped, as the backend would
    else if (!state_->hands_on) {
      state_->pending.emplace(fence, batch);
      state_->longest_output = std::max(state_->longest_output, output_bytes(*batch, state_->shape));
    }
  }
  if (!failure.empty()) {
    // Not on this thread: a sink may call enqueue().
    net::asio::post(link_->channel().executor(),
                    [state = state_, fence, failure] { state->hand_over(lost_step(fence, failure)); });
    return;
  }
  ByteWriter writer;
  encode_batch(writer, *batch);
  pb::Forward message;
  message.set_stage(stage_);
  write_fence(*message.mutable_fence(), fence);
  message.set_batch_bytes(static_cast<uint32_t>(writer.data().size()));
  writer.write_bytes(std::as_bytes(std::span(input)));
  link_->channel().send(MessageType::forward, message, writer.release());
}

std::string RemoteStage::numeric_class() const { return link_->info().devices[device_].numeric_class; }

}  // namespace caravan::remote
