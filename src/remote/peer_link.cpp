#include "remote/peer_link.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <condition_variable>
#include <mutex>

#include "base/bytes.h"
#include "base/error.h"

namespace caravan::remote {

std::shared_ptr<BackendLink> connect_peer(net::IoThreads& io, const std::string& endpoint,
                                          const std::string& expected_id, const PeerOptions& options,
                                          const std::stop_token& stop) {
  LinkOptions link;
  link.stop = stop;
  link.role = LinkOptions::Role::peer;
  link.token = options.token;
  link.name = options.name;
  link.expected_id = expected_id;
  link.connect_timeout = options.timeout;
  link.heartbeat_interval = options.heartbeat_interval;
  link.heartbeat_timeout = options.heartbeat_timeout;
  return BackendLink::connect(io, net::parse_endpoint(endpoint), link);
}

namespace {

// Requests stop when a time has come, unless it has gone before.
class OnDeadline {
 public:
  OnDeadline(net::IoThreads& io, std::chrono::steady_clock::time_point deadline, std::stop_source stop)
      : timer_(std::make_shared<net::asio::steady_timer>(io.next_executor(), deadline)) {
    timer_->async_wait([stop = std::move(stop), timer = timer_](const boost::system::error_code& code) mutable {
      if (!code) stop.request_stop();
    });
  }
  ~OnDeadline() {
    // On the timer's own executor: it is not thread-safe.
    net::asio::post(timer_->get_executor(), [timer = timer_] { timer->cancel(); });
  }
  OnDeadline(const OnDeadline&) = delete;
  OnDeadline& operator=(const OnDeadline&) = delete;

 private:
  const std::shared_ptr<net::asio::steady_timer> timer_;  // shared with its handlers
};

std::string no_answer(const std::string& endpoint, const PeerOptions& options) {
  return fmt::format("backend {} does not answer within {:.1f} s", endpoint,
                     std::chrono::duration<double>(options.timeout).count());
}

}  // namespace

std::chrono::microseconds probe_peer(net::IoThreads& io, const std::string& endpoint, const std::string& expected_id,
                                     const PeerOptions& options, const std::stop_token& stop) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + options.timeout;
  const auto link = [&] {
    // Each part of connecting may take options.timeout; all of it together no longer either.
    std::stop_source give_up;
    const std::stop_callback on_stop(stop, [&] { give_up.request_stop(); });
    const OnDeadline on_deadline(io, deadline, give_up);
    try {
      return connect_peer(io, endpoint, expected_id, options, give_up.get_token());
    } catch (const Error&) {
      if (!give_up.stop_requested() || stop.stop_requested()) throw;
      throw Error(no_answer(endpoint, options));
    }
  }();
  const std::stop_callback on_stop(stop, [&] { link->close(); });
  const auto ask = [&] {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (link->ask(std::max(left, std::chrono::milliseconds(0)))) return;
    const std::string reason = link->lost_reason();
    throw Error(reason.empty() ? no_answer(endpoint, options) : reason);
  };
  ask();  // the first answer may wait for caches to warm
  const auto start = Clock::now();
  ask();
  return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start);
}

// Waits for Attached. Shared with the link, which may be delivering to it.
class PeerLink::Answers : public BackendLink::Listener {
 public:
  void on_frame(net::Frame frame) override {
    const std::lock_guard lock(mutex_);
    if (frame.type == static_cast<uint16_t>(MessageType::error)) refusal_ = parse_header<pb::Error>(frame).text();
    attached_ = frame.type == static_cast<uint16_t>(MessageType::attached);
    changed_.notify_all();
  }
  void on_lost(const std::string& reason) override {
    const std::lock_guard lock(mutex_);
    refusal_ = reason;
    changed_.notify_all();
  }
  uint64_t max_output_bytes() const override { return 0; }

  // Empty: attached. Otherwise why not.
  std::string wait(std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, timeout, [&] { return attached_ || !refusal_.empty(); })) return "no answer in time";
    return refusal_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool attached_ = false;  // under mutex_
  std::string refusal_;    // under mutex_
};

std::unique_ptr<PeerLink> PeerLink::attach(net::IoThreads& io, const stage::PeerRoute& route, uint64_t session,
                                           uint64_t epoch, const PeerOptions& options, const std::stop_token& stop,
                                           std::function<void(const std::string& reason)> on_lost) {
  std::unique_ptr<PeerLink> peer(
      new PeerLink(connect_peer(io, route.endpoint, route.backend_id, options, stop), route.stage));
  const std::stop_callback on_stop(stop, [link = peer->link_] { link->close(); });
  const auto answers = std::make_shared<Answers>();
  peer->link_->attach(answers, route.stage);
  pb::Attach message;
  message.set_stage(route.stage);
  message.set_key(route.key);
  message.set_session(session);
  message.set_epoch(epoch);
  peer->link_->channel().send(MessageType::attach, message);
  if (const std::string refusal = answers->wait(options.timeout); !refusal.empty())
    throw Error(fmt::format("backend {} does not take the output of this stage: {}", route.endpoint, refusal));
  peer->link_->on_lost(std::move(on_lost));
  return peer;
}

PeerLink::~PeerLink() { link_->close(); }

void PeerLink::forward(const stage::Fence& fence, std::span<const uint32_t> compute_us,
                       std::span<const std::byte> batch, std::span<const float> hidden) {
  pb::Forward message;
  message.set_stage(stage_);
  message.mutable_fence()->set_session(fence.session);
  message.mutable_fence()->set_epoch(fence.epoch);
  message.mutable_fence()->set_ticket(fence.ticket);
  message.set_batch_bytes(static_cast<uint32_t>(batch.size()));
  message.mutable_compute_us()->Add(compute_us.begin(), compute_us.end());
  ByteWriter payload;
  payload.write_bytes(batch);
  payload.write_bytes(std::as_bytes(hidden));
  link_->channel().send(MessageType::forward, message, payload.release());
}

}  // namespace caravan::remote
