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

StageSeat::StageSeat(uint32_t stage, std::shared_ptr<Channel> channel, SliceHost& host, SliceStore& store,
                     LocalWeights& local, Reaper& reaper)
    : id_(stage),
      channel_(std::move(channel)),
      host_(host),
      store_(store),
      local_(local),
      reaper_(reaper),
      thread_([this](std::stop_token stop) { work(stop); }) {}

StageSeat::~StageSeat() {
  cancel("the stage was unloaded");
  thread_.join();
  // No sink is called any more once the stage is gone.
  stage_.reset();
}

void StageSeat::cancel(const std::string& reason) {
  std::shared_ptr<RemoteWeightSource> source;
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_.empty()) cancelled_ = reason;
    source = source_;
  }
  if (source) source->end(reason);
  thread_.request_stop();
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
    reaper_.wait_for_earlier(thread_.get_stop_token());
    lease_ = {};
    lease_ = store_.reserve(device, need, key);
    pb::Lease reply;
    reply.set_stage(id_);
    reply.set_reserved(lease_.bytes());
    channel_->send(MessageType::lease, reply);
  });
}

void StageSeat::load(const pb::LoadSlice& header, std::span<const std::byte> payload) {
  auto request = std::make_shared<stage::LoadRequest>(decode_load(header, payload, channel_->peer()));
  {
    const std::lock_guard lock(mutex_);
    shape_.reset();  // nothing is forwarded to a stage that is about to go
    in_flight_.clear();
    in_flight_bytes_ = 0;
  }
  is_open_ = false;
  post([this, request, device = header.device()] {
    const std::stop_token stop = thread_.get_stop_token();
    // What this or another connection has given up must be free before more is asked for.
    stage_.reset();
    lease_ = {};
    reaper_.wait_for_earlier(stop);
    if (device >= host_.devices().size()) throw FormatError(fmt::format("there is no device {}", device));
    lease_ = store_.reserve(device, host_.need(device, *request), stage::content_key(*request));

    const auto source = std::make_shared<RemoteWeightSource>(channel_, id_);
    {
      const std::lock_guard lock(mutex_);
      if (!cancelled_.empty()) return;
      source_ = source;
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
      const LoadSources sources(local_, source);
      loaded = store_.load(lease_, *request, sources.list(), on_progress, stop);
      origins = sources.origins();
      ready = host_.make_stage(device, *request, loaded.weights);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      source_.reset();
      lease_ = {};
      throw;
    }
    const stage::MemoryNeed need = host_.need(device, *request);
    stage_ = std::move(ready.stage);
    {
      const std::lock_guard lock(mutex_);
      source_.reset();
      shape_ = Shape{ready.limits, ready.n_embd, request->slice};
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (loaded.shared)
      spdlog::info("{}: {} loaded: shares {} of weights that are here; {} of KV cache and scratch", channel_->peer(),
                   describe(*request), format_bytes(need.weights), format_bytes(lease_.bytes()));
    else
      spdlog::info(
          "{}: {} loaded in {:.2f} s: {} of weights from models-dir, {} from the cache, {} from the server; {} of KV "
          "cache and scratch",
          channel_->peer(), describe(*request), seconds, format_bytes(origins.models_dir), format_bytes(origins.cache),
          format_bytes(origins.server), format_bytes(lease_.bytes()));
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

void StageSeat::open(const pb::OpenSession& message) {
  for (const pb::Route* route : {&message.input(), &message.output()})
    if (route->kind() != pb::Route::CONNECTION) {
      report(NotSupportedError("routes to another backend are not supported, only the session's own connection"),
             pb::Error::NOT_SUPPORTED);
      return;
    }
  {
    const std::lock_guard lock(mutex_);
    if (!shape_) throw ProtocolError(fmt::format("OpenSession: stage {} is not loaded", id_));
  }
  if (is_open_ && message.session() == session_ && message.epoch() < epoch_)
    throw ProtocolError(fmt::format("OpenSession: epoch {} of session {:x} after epoch {}", message.epoch(),
                                    message.session(), epoch_));
  session_ = message.session();
  epoch_ = message.epoch();
  is_open_ = true;
  post([this, session = session_, epoch = epoch_] {
    stage_->open(session, epoch, *this);
    const std::lock_guard lock(mutex_);
    std::erase_if(in_flight_, [&](const auto& item) {
      const bool old = item.first.session != session || item.first.epoch != epoch;
      if (old) in_flight_bytes_ -= item.second;
      return old;
    });
  });
}

void StageSeat::close_session(const pb::CloseSession& message) {
  if (!is_open_ || message.session() != session_) return;
  is_open_ = false;  // frames of the session are stale from now on
}

void StageSeat::forward(const pb::Forward& header, std::span<const std::byte> payload) {
  const stage::Fence fence = read_fence(header.fence());
  Shape shape;
  {
    const std::lock_guard lock(mutex_);
    if (!shape_) throw ProtocolError(fmt::format("Forward: stage {} is not loaded", id_));
    shape = *shape_;
  }
  if (header.batch_bytes() > payload.size())
    throw ProtocolError(
        fmt::format("Forward: a batch of {} bytes in a payload of {}", header.batch_bytes(), payload.size()));
  auto batch = std::make_shared<stage::Batch>(decode_batch(payload.first(header.batch_bytes())));
  const auto hidden_bytes = payload.subspan(header.batch_bytes());
  const uint64_t expected = shape.slice.embeds ? 0 : uint64_t{batch->n_rows()} * shape.n_embd * sizeof(float);
  if (hidden_bytes.size() != expected)
    throw ProtocolError(fmt::format("Forward: {} bytes of hidden rows, {} rows of {} values have {}",
                                    hidden_bytes.size(), batch->n_rows(), shape.n_embd, expected));
  if (!is_open_ || fence.session != session_ || fence.epoch != epoch_) {
    ++n_stale_;
    return;
  }
  try {
    stage::validate(*batch, shape.limits);
  } catch (const Error& error) {
    send_output_error(fence, error.what());
    return;
  }
  auto hidden = decode_floats(hidden_bytes);

  bool direct = false;
  {
    const std::lock_guard lock(mutex_);
    const bool added = in_flight_.emplace(fence, payload.size()).second;
    in_flight_bytes_ += payload.size();
    if (!added) throw ProtocolError(fmt::format("Forward: ticket {} is in flight already", fence.ticket));
    if (in_flight_.size() > kMaxTickets || in_flight_bytes_ > kMaxInFlightBytes)
      throw ProtocolError(fmt::format("Forward: {} tickets with {} in flight, at most {} and {} are accepted",
                                      in_flight_.size(), format_bytes(in_flight_bytes_), kMaxTickets,
                                      format_bytes(kMaxInFlightBytes)));
    direct = n_pending_jobs_ == 0;
  }
  if (direct) {
    stage_->enqueue(fence, std::move(batch), std::move(hidden));
    return;
  }
  auto input = std::make_shared<std::vector<float>>(std::move(hidden));
  post([this, fence, batch, input] { stage_->enqueue(fence, batch, std::move(*input)); });
}

void StageSeat::send_output_error(const stage::Fence& fence, const std::string& error) {
  pb::Output message;
  message.set_stage(id_);
  write_fence(*message.mutable_fence(), fence);
  message.set_error(error.substr(0, 16 << 10));
  channel_->send(MessageType::output, message);
}

void StageSeat::deliver(stage::StageOutput output) noexcept {
  {
    const std::lock_guard lock(mutex_);
    const auto found = in_flight_.find(output.fence);
    if (found == in_flight_.end()) return;  // of a session that was opened anew
    in_flight_bytes_ -= found->second;
    in_flight_.erase(found);
  }
  try {
    if (!output.error.empty()) {
      send_output_error(output.fence, output.error);
      return;
    }
    pb::Output message;
    message.set_stage(id_);
    write_fence(*message.mutable_fence(), output.fence);
    message.set_compute_us(static_cast<uint32_t>(std::min(output.compute_seconds * 1e6, 4e9)));
    channel_->send(MessageType::output, message, encode_output(output));
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

size_t StageSeat::n_in_flight() const {
  const std::lock_guard lock(mutex_);
  return in_flight_.size();
}

}  // namespace caravan::remote
