#include "remote/stage_seat.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "remote/codec.h"

namespace caravan::remote {

namespace {

// Bytes of activations that wait at one stage; a server keeps far fewer in flight.
constexpr uint64_t kMaxInFlightBytes = uint64_t{512} << 20;
// How often a server hears of the progress of a load.
constexpr auto kProgressInterval = std::chrono::milliseconds(100);

pb::Error::Code code_of(const std::exception& error) {
  if (dynamic_cast<const ResourceError*>(&error) != nullptr) return pb::Error::RESOURCE;
  if (dynamic_cast<const FormatError*>(&error) != nullptr) return pb::Error::FORMAT;
  if (dynamic_cast<const NotSupportedError*>(&error) != nullptr) return pb::Error::NOT_SUPPORTED;
  if (dynamic_cast<const Error*>(&error) != nullptr) return pb::Error::SOURCE;
  return pb::Error::INTERNAL;
}

std::string describe(const stage::LoadRequest& request) {
  return fmt::format("layers {}-{} of {}", request.slice.layer_begin, request.slice.layer_end,
                     request.hyperparameters.find_string("general.architecture").value_or("an unnamed architecture"));
}

}  // namespace

StageSeat::StageSeat(uint32_t stage, std::shared_ptr<Channel> channel, SeatContext context)
    : id_(stage),
      channel_(std::move(channel)),
      context_(std::move(context)),
      thread_([this](std::stop_token stop) { work(stop); }) {}

StageSeat::~StageSeat() {
  cancel("the stage was unloaded");
  thread_.join();
  close_routes("the stage was unloaded");  // what the thread's last job may have opened
  // No sink is called any more once the stage is gone.
  stage_.reset();
}

void StageSeat::cancel(const std::string& reason) {
  std::shared_ptr<RemoteWeightSource> source;
  std::shared_ptr<PeerWeightSource> others;
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_.empty()) cancelled_ = reason;
    source = source_;
    others = others_;
  }
  if (source) source->end(reason);
  if (others) others->end(reason);
  close_routes(reason);
  thread_.request_stop();
}

// Ends the links to the neighbours. Not with mutex_ held: whoever is receiving holds the inlet's lock and waits for
// ours.
void StageSeat::close_routes(const std::string& reason) {
  std::shared_ptr<Inlet> inlet;
  std::shared_ptr<PeerLink> outlet;
  {
    const std::lock_guard lock(mutex_);
    inlet = std::move(inlet_);
    outlet = std::move(outlet_);
  }
  if (inlet) inlet->close(reason);
}

void StageSeat::post(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (n_pending_jobs_ >= kMaxTickets) throw ProtocolError("too many messages wait for one stage");
    jobs_.push_back(std::move(job));
    ++n_pending_jobs_;
  }
  jobs_changed_.notify_all();
}

void StageSeat::work(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  while (jobs_changed_.wait(lock, stop, [&] { return !jobs_.empty(); }) && !stop.stop_requested()) {
    const std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    guarded(job);
    lock.lock();
    --n_pending_jobs_;
  }
}

void StageSeat::guarded(const std::function<void()>& job) {
  try {
    job();
  } catch (const std::exception& error) {
    report(error, code_of(error));
  }
}

void StageSeat::report(const std::exception& error, pb::Error::Code code) {
  if (channel_->closed()) return;
  spdlog::warn("{}: stage {}: {}", channel_->peer(), id_, error.what());
  pb::Error message;
  message.set_stage(id_);
  message.set_code(code);
  message.set_text(std::string(error.what()).substr(0, 16 << 10));
  channel_->send(MessageType::error, message);
}

void StageSeat::reserve(const pb::Reserve& message) {
  const Digest key = Digest::from_bytes(message.content_key());
  const stage::MemoryNeed need{message.weights(), message.kv_cache(), message.scratch()};
  post([this, need, key, device = message.device()] {
    context_.reaper.wait_for_earlier(thread_.get_stop_token());
    lease_ = context_.store.reserve(device, need, key, std::exchange(lease_, {}));
    pb::Lease reply;
    reply.set_stage(id_);
    reply.set_reserved(lease_.bytes());
    channel_->send(MessageType::lease, reply);
  });
}

void StageSeat::load(const pb::LoadSlice& header, std::span<const std::byte> payload) {
  auto request = std::make_shared<stage::LoadRequest>(decode_load(header, payload, channel_->peer()));
  std::vector<PeerAddress> peers = decode_peers(header);
  {
    const std::lock_guard lock(mutex_);
    shape_.reset();  // nothing is forwarded to a stage that is about to go
    in_flight_.clear();
    in_flight_bytes_ = 0;
    is_open_ = false;
  }
  post([this, request, peers = std::move(peers), device = header.device()] {
    const std::stop_token stop = thread_.get_stop_token();
    // What this or another connection has given up must be free before more is asked for.
    stage_.reset();
    context_.reaper.wait_for_earlier(stop);
    if (device >= context_.host.devices().size()) throw FormatError(fmt::format("there is no device {}", device));
    // What was reserved for it stays reserved.
    lease_ = context_.store.reserve(device, context_.host.need(device, *request), stage::content_key(*request),
                                    std::exchange(lease_, {}));

    const auto source = std::make_shared<RemoteWeightSource>(channel_, id_);
    PeerOptions peer_options = context_.peers;
    peer_options.timeout = context_.others_timeout;
    PeerWeightSource::Patience patience;
    patience.question = 3 * context_.others_timeout;
    const auto others =
        std::make_shared<PeerWeightSource>(context_.io, peers, peer_options, context_.silent_peers, patience);
    {
      const std::lock_guard lock(mutex_);
      if (!cancelled_.empty()) return;
      source_ = source;
      others_ = others;
    }
    std::unique_ptr<Progress> progress;
    auto last_sent = std::chrono::steady_clock::now();
    const uint64_t total = request->manifest.size_bytes();
    const auto on_progress = [&](uint64_t bytes_done) {
      if (!progress)
        progress =
            std::make_unique<Progress>(fmt::format("loading {} for {}", describe(*request), channel_->peer()), total);
      progress->update(bytes_done);
      const auto now = std::chrono::steady_clock::now();
      if (now - last_sent < kProgressInterval && bytes_done < total) return;
      last_sent = now;
      pb::LoadProgress message;
      message.set_stage(id_);
      message.set_bytes_done(bytes_done);
      channel_->send(MessageType::load_progress, message);
    };
    const auto started = std::chrono::steady_clock::now();
    SliceStore::Loaded loaded;
    ReadyStage ready;
    WeightOrigins origins;
    try {
      const LoadSources sources(context_.local, others, source);
      loaded = context_.store.load(lease_, *request, sources.list(), on_progress, stop);
      origins = sources.origins();
      ready = context_.host.make_stage(device, *request, loaded.weights);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      source_.reset();
      others_.reset();
      lease_ = {};
      throw;
    }
    const stage::MemoryNeed need = context_.host.need(device, *request);
    stage_ = std::move(ready.stage);
    {
      const std::lock_guard lock(mutex_);
      source_.reset();
      others_.reset();
      shape_ = Shape{ready.limits, ready.n_embd, request->slice};
      held_ = need;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (loaded.shared)
      spdlog::info("{}: {} loaded: shares {} of weights that are here; {} of KV cache and scratch", channel_->peer(),
                   describe(*request), format_bytes(need.weights), format_bytes(lease_.bytes()));
    else
      spdlog::info(
          "{}: {} loaded in {:.2f} s: {} of weights from models-dir, {} from the cache, {} from other backends, {} "
          "from "
          "the server; {} of KV cache and scratch",
          channel_->peer(), describe(*request), seconds, format_bytes(origins.models_dir), format_bytes(origins.cache),
          format_bytes(origins.peers), format_bytes(origins.server), format_bytes(lease_.bytes()));
    pb::Loaded reply;
    reply.set_stage(id_);
    reply.set_weights(need.weights);
    reply.set_kv_cache(need.kv_cache);
    reply.set_scratch(need.scratch);
    reply.set_n_embd(ready.n_embd);
    reply.set_n_vocab(ready.limits.n_vocab);
    reply.set_pulled_bytes(source->bytes_received());
    reply.set_shared(loaded.shared);
    reply.set_from_models_dir(origins.models_dir);
    reply.set_from_cache(origins.cache);
    reply.set_from_peers(origins.peers);
    channel_->send(MessageType::loaded, reply);
  });
}

void StageSeat::chunk(const pb::Chunk& header, std::vector<std::byte> payload) {
  std::shared_ptr<RemoteWeightSource> source;
  {
    const std::lock_guard lock(mutex_);
    source = source_;
  }
  // After a load that failed, chunks it had asked for may still come.
  if (source) source->receive(header, std::move(payload));
}

namespace {

// Throws ProtocolError for routes that cannot be meant.
void check_routes(const pb::OpenSession& message, const stage::Slice& slice) {
  const auto check_key = [](const pb::Route& route, std::string_view side) {
    if (route.key().size() != kRouteKeyBytes)
      throw ProtocolError(fmt::format("OpenSession: the key of the {} has {} bytes, expected {}", side,
                                      route.key().size(), kRouteKeyBytes));
  };
  if (message.input().kind() == pb::Route::PEER) {
    if (slice.embeds) throw ProtocolError("OpenSession: a stage that embeds has no input from a peer");
    check_key(message.input(), "input");
  }
  if (message.output().kind() == pb::Route::PEER) {
    if (slice.outputs) throw ProtocolError("OpenSession: the output of the last stage goes to no peer");
    check_key(message.output(), "output");
  }
  for (const pb::Route* route : {&message.input(), &message.output()})
    if (route->kind() != pb::Route::CONNECTION && route->kind() != pb::Route::PEER)
      throw ProtocolError(fmt::format("OpenSession: route kind {} is not known", static_cast<int>(route->kind())));
}

}  // namespace

void StageSeat::open(const pb::OpenSession& message) {
  {
    const std::lock_guard lock(mutex_);
    if (!shape_) throw ProtocolError(fmt::format("OpenSession: stage {} is not loaded", id_));
    check_routes(message, shape_->slice);
    if (is_open_ && message.session() == session_ && message.epoch() < epoch_)
      throw ProtocolError(fmt::format("OpenSession: epoch {} of session {:x} after epoch {}", message.epoch(),
                                      message.session(), epoch_));
    session_ = message.session();
    epoch_ = message.epoch();
    is_open_ = true;
    source_of_input_ = message.input().kind() == pb::Route::PEER ? Source::peer : Source::server;
    hands_on_ = message.output().kind() == pb::Route::PEER;
  }
  post([this, message] { run_open(message); });
}

// On the seat's thread.
void StageSeat::run_open(const pb::OpenSession& message) {
  close_routes("the session was opened anew");
  stage_->open(message.session(), message.epoch(), *this);
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(in_flight_, [&](const auto& item) {
      const bool old = item.first.session != message.session() || item.first.epoch != message.epoch();
      if (old) in_flight_bytes_ -= item.second.bytes;
      return old;
    });
  }
  pb::SessionOpened reply;
  reply.set_stage(id_);
  reply.set_session(message.session());
  reply.set_epoch(message.epoch());
  try {
    connect_neighbours(message);
  } catch (const Error& error) {
    spdlog::warn("{}: stage {}: {}", channel_->peer(), id_, error.what());
    reply.set_error(std::string(error.what()).substr(0, 16 << 10));
  }
  channel_->send(MessageType::session_opened, reply);
}

// The route from the stage before is there when the server hears that the session is open; then it opens that stage,
// which connects to this one.
void StageSeat::connect_neighbours(const pb::OpenSession& message) {
  std::shared_ptr<Inlet> inlet;
  std::shared_ptr<PeerLink> outlet;
  if (message.input().kind() == pb::Route::PEER)
    inlet = std::make_shared<Inlet>(static_cast<Inlet::Receiver&>(*this), id_, message.session(), message.epoch());
  if (message.output().kind() == pb::Route::PEER) {
    const pb::Route& output = message.output();
    pb::HopLost lost;
    lost.set_stage(id_);
    lost.set_session(message.session());
    lost.set_epoch(message.epoch());
    outlet = PeerLink::attach(context_.io, {output.endpoint(), output.backend_id(), output.stage(), output.key()},
                              message.session(), message.epoch(), context_.peers, thread_.get_stop_token(),
                              [channel = channel_, n_lost = n_hops_lost_, lost](const std::string& reason) mutable {
                                ++*n_lost;
                                lost.set_text(reason.substr(0, 16 << 10));
                                channel->send(MessageType::hop_lost, lost);
                              });
  }
  const std::lock_guard lock(mutex_);
  if (!cancelled_.empty()) throw Error(cancelled_);
  inlet_ = inlet;
  outlet_ = std::move(outlet);
  if (inlet) context_.inlets.add(message.input().key(), inlet);
}

void StageSeat::peer_lost(uint64_t session, uint64_t epoch, const std::string& reason) {
  ++*n_hops_lost_;
  pb::HopLost message;
  message.set_stage(id_);
  message.set_session(session);
  message.set_epoch(epoch);
  message.set_text("the stage before was lost: " + reason.substr(0, 16 << 10));
  channel_->send(MessageType::hop_lost, message);
}

void StageSeat::close_session(const pb::CloseSession& message) {
  {
    const std::lock_guard lock(mutex_);
    if (!is_open_ || message.session() != session_) return;
    is_open_ = false;  // frames of the session are stale from now on
  }
  close_routes("the session was closed");
}

void StageSeat::forward(const pb::Forward& header, std::vector<std::byte> payload) {
  take(header, std::move(payload), Source::server);
}

void StageSeat::receive(const pb::Forward& header, std::vector<std::byte> payload) {
  take(header, std::move(payload), Source::peer);
}

// On the executor of whoever sent the step.
void StageSeat::take(const pb::Forward& header, std::vector<std::byte> payload, Source source) {
  const stage::Fence fence = read_fence(header.fence());
  Shape shape;
  bool hands_on = false;
  {
    const std::lock_guard lock(mutex_);
    if (!shape_) throw ProtocolError(fmt::format("Forward: stage {} is not loaded", id_));
    if (!is_open_ || fence.session != session_ || fence.epoch != epoch_ || source != source_of_input_) {
      ++n_stale_;
      return;
    }
    shape = *shape_;
    hands_on = hands_on_;
  }
  if (header.batch_bytes() > payload.size())
    throw ProtocolError(
        fmt::format("Forward: a batch of {} bytes in a payload of {}", header.batch_bytes(), payload.size()));
  if (static_cast<uint32_t>(header.compute_us_size()) > kMaxHops)
    throw ProtocolError(
        fmt::format("Forward: the times of {} stages, at most {} are accepted", header.compute_us_size(), kMaxHops));
  const std::span<const std::byte> bytes(payload);
  auto batch = std::make_shared<stage::Batch>(decode_batch(bytes.first(header.batch_bytes())));
  const auto hidden_bytes = bytes.subspan(header.batch_bytes());
  const uint64_t expected = shape.slice.embeds ? 0 : uint64_t{batch->n_rows()} * shape.n_embd * sizeof(float);
  if (hidden_bytes.size() != expected)
    throw ProtocolError(fmt::format("Forward: {} bytes of hidden rows, {} rows of {} values have {}",
                                    hidden_bytes.size(), batch->n_rows(), shape.n_embd, expected));
  try {
    stage::validate(*batch, shape.limits);
  } catch (const Error& error) {
    send_output_error(fence, error.what());
    return;
  }
  auto hidden = decode_floats(hidden_bytes);
  Ticket ticket;
  ticket.bytes = payload.size();
  ticket.came = std::chrono::steady_clock::now();
  ticket.compute_us.assign(header.compute_us().begin(), header.compute_us().end());
  if (hands_on) {
    payload.resize(header.batch_bytes());
    payload.shrink_to_fit();
    ticket.batch = std::move(payload);
  }

  const std::lock_guard lock(mutex_);
  if (!is_open_ || fence.session != session_ || fence.epoch != epoch_) {  // opened anew meanwhile
    ++n_stale_;
    return;
  }
  in_flight_bytes_ += ticket.bytes;
  activity_.bytes_in += ticket.bytes;
  if (!in_flight_.emplace(fence, std::move(ticket)).second)
    throw ProtocolError(fmt::format("Forward: ticket {} is in flight already", fence.ticket));
  if (in_flight_.size() > kMaxTickets || in_flight_bytes_ > kMaxInFlightBytes)
    throw ProtocolError(fmt::format("Forward: {} tickets with {} in flight, at most {} and {} are accepted",
                                    in_flight_.size(), format_bytes(in_flight_bytes_), kMaxTickets,
                                    format_bytes(kMaxInFlightBytes)));
  if (n_pending_jobs_ == 0) {
    stage_->enqueue(fence, std::move(batch), std::move(hidden));
    return;
  }
  auto input = std::make_shared<std::vector<float>>(std::move(hidden));
  if (n_pending_jobs_ >= kMaxTickets) throw ProtocolError("too many messages wait for one stage");
  jobs_.push_back([this, fence, batch, input] { stage_->enqueue(fence, batch, std::move(*input)); });
  ++n_pending_jobs_;
  jobs_changed_.notify_all();
}

void StageSeat::send_output_error(const stage::Fence& fence, const std::string& error) {
  pb::Output message;
  message.set_stage(id_);
  write_fence(*message.mutable_fence(), fence);
  message.set_error(error.substr(0, 16 << 10));
  channel_->send(MessageType::output, message);
}

void StageSeat::deliver(stage::StageOutput output) noexcept {
  Ticket ticket;
  std::shared_ptr<PeerLink> outlet;
  bool hands_on = false;
  {
    const std::lock_guard lock(mutex_);
    const auto found = in_flight_.find(output.fence);
    if (found == in_flight_.end()) return;  // of a session that was opened anew
    ticket = std::move(found->second);
    in_flight_bytes_ -= ticket.bytes;
    in_flight_.erase(found);
    outlet = outlet_;
    hands_on = hands_on_;
    ++activity_.n_tickets;
    activity_.compute_seconds += output.compute_seconds;
    if (!output.error.empty()) ++activity_.n_failed;
    if (outlet) activity_.bytes_out += ticket.batch.size() + output.hidden.size() * sizeof(float);
  }
  try {
    if (!output.error.empty()) {
      send_output_error(output.fence, output.error);
      return;
    }
    ticket.compute_us.push_back(static_cast<uint32_t>(std::min(output.compute_seconds * 1e6, 4e9)));
    if (outlet) {
      outlet->forward(output.fence, ticket.compute_us, ticket.batch, output.hidden);
      return;
    }
    if (hands_on) return;  // the session ends: its routes are closed
    pb::Output message;
    message.set_stage(id_);
    write_fence(*message.mutable_fence(), output.fence);
    message.mutable_compute_us()->Add(ticket.compute_us.begin(), ticket.compute_us.end());
    std::vector<std::byte> payload = encode_output(output);
    {
      const std::lock_guard lock(mutex_);
      activity_.bytes_out += payload.size();
    }
    channel_->send(MessageType::output, message, std::move(payload));
  } catch (const std::exception& error) {  // out of memory
    channel_->close(error.what());
  }
}

uint64_t StageSeat::max_forward_bytes() const {
  const std::lock_guard lock(mutex_);
  if (!shape_) return 0;
  // Hidden rows; and per row what a batch holds, with room for KV operations and named ids.
  const uint64_t rows = shape_->limits.max_rows;
  const uint64_t hidden = shape_->slice.embeds ? 0 : rows * shape_->n_embd * sizeof(float);
  return std::min(kMaxForwardBytes, hidden + rows * (256 + 8 * shape_->limits.n_blocks.size()) + (uint64_t{16} << 20));
}

StageStatus StageSeat::status() const {
  StageStatus status;
  status.peer = channel_->peer();
  status.stage = id_;
  const std::lock_guard lock(mutex_);
  if (shape_) {
    status.layer_begin = shape_->slice.layer_begin;
    status.layer_end = shape_->slice.layer_end;
    status.held = held_;
  }
  if (outlet_) status.next_rtt = outlet_->mean_rtt();
  status.n_queued = in_flight_.size();
  status.activity = activity_;
  status.activity.n_hops_lost = *n_hops_lost_;
  return status;
}

StageQueue StageSeat::queue() const {
  const std::lock_guard lock(mutex_);
  StageQueue queue;
  if (in_flight_.empty()) return queue;
  queue.n_tickets = static_cast<uint32_t>(in_flight_.size());
  const auto& [fence, oldest] = *in_flight_.begin();
  queue.oldest_ticket = fence.ticket;
  queue.oldest_age =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - oldest.came);
  return queue;
}

size_t StageSeat::n_in_flight() const {
  const std::lock_guard lock(mutex_);
  return in_flight_.size();
}

}  // namespace caravan::remote
