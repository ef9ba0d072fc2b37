#include "remote/channel.h"

#include <fmt/format.h>

#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>

#include "base/progress.h"
#include "net/tls.h"

namespace caravan::remote {

namespace {

// Small frames are joined until a write has this many bytes; larger payloads are written from where they are.
constexpr size_t kJoinBytes = 64 << 10;

}  // namespace

Channel::Channel(std::unique_ptr<net::Connection> connection, net::FrameReader::LimitFunction limits)
    : connection_(std::move(connection)),
      executor_(connection_->executor()),
      peer_(connection_->peer()),
      reader_(*connection_, std::move(limits)),
      wake_(executor_) {}

void Channel::start() {
  writer_done_ = false;
  net::spawn(executor_, "writing to " + peer_, write_loop(shared_from_this()));
}

void Channel::send(MessageType type, const google::protobuf::MessageLite& header, std::vector<std::byte> payload,
                   Priority priority) {
  const size_t header_bytes = header.ByteSizeLong();
  const auto fixed =
      net::encode_frame_header({static_cast<uint16_t>(type), 0, static_cast<uint32_t>(header_bytes), payload.size()});
  Outgoing frame;
  frame.head.resize(fixed.size() + header_bytes);
  std::memcpy(frame.head.data(), fixed.data(), fixed.size());
  header.SerializeToArray(frame.head.data() + fixed.size(), static_cast<int>(header_bytes));
  frame.payload = std::move(payload);

  bool overfull = false;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    queued_bytes_ += frame.size();
    auto& queue = priority == Priority::urgent ? urgent_ : normal_;
    queue.push_back(std::move(frame));
    overfull = queued_bytes_ > kMaxQueuedBytes || urgent_.size() + normal_.size() > kMaxQueuedFrames;
  }
  if (overfull)
    abort(fmt::format("{} does not read what it asked for", peer_));
  else
    net::asio::post(executor_, [self = shared_from_this()] { self->wake_.cancel(); });
}

net::awaitable<std::optional<net::Frame>> Channel::read() { return reader_.read(); }

void Channel::end(const std::string& reason, Ending ending) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    reason_ = reason;
    urgent_.clear();
    normal_.clear();
  }
  room_.notify_all();
  net::asio::post(executor_, [self = shared_from_this(), ending] {
    if (ending == Ending::abort)
      self->connection_->abort();
    else
      self->connection_->close();
    self->wake_.cancel();
  });
}

std::string Channel::close_reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

bool Channel::wait_for_room(uint64_t bytes) {
  std::unique_lock lock(mutex_);
  room_.wait(lock, [&] { return closed_ || queued_bytes_ < bytes; });
  return !closed_;
}

std::vector<Channel::Outgoing> Channel::take_next() {
  const std::lock_guard lock(mutex_);
  std::vector<Outgoing> frames;
  size_t bytes = 0;
  for (auto* queue : {&urgent_, &normal_}) {
    while (!queue->empty() && (frames.empty() || bytes + queue->front().size() <= kJoinBytes)) {
      bytes += queue->front().size();
      frames.push_back(std::move(queue->front()));
      queue->pop_front();
    }
  }
  return frames;
}

net::awaitable<void> Channel::write_frames(std::vector<Outgoing> frames) {
  uint64_t bytes = 0;
  for (const Outgoing& frame : frames) bytes += frame.size();
  std::vector<net::ConstBuffer> buffers;
  std::vector<std::byte> joined;
  if (bytes <= kJoinBytes) {
    // One contiguous write: TLS makes a record of every buffer otherwise.
    joined.reserve(bytes);
    for (const Outgoing& frame : frames) {
      joined.insert(joined.end(), frame.head.begin(), frame.head.end());
      joined.insert(joined.end(), frame.payload.begin(), frame.payload.end());
    }
    buffers.push_back(net::asio::buffer(joined));
  } else {
    for (const Outgoing& frame : frames) {
      buffers.push_back(net::asio::buffer(frame.head));
      buffers.push_back(net::asio::buffer(frame.payload));
    }
  }
  co_await connection_->write(buffers);
  bytes_sent_ += bytes;
  {
    const std::lock_guard lock(mutex_);
    queued_bytes_ -= bytes;
  }
  room_.notify_all();
}

net::awaitable<void> Channel::write_loop([[maybe_unused]] std::shared_ptr<Channel> self) {
  try {
    while (!closed_) {
      std::vector<Outgoing> frames = take_next();
      if (!frames.empty()) {
        co_await write_frames(std::move(frames));
        continue;
      }
      if (finishing_) break;
      boost::system::error_code ignored;
      wake_.expires_at(net::asio::steady_timer::time_point::max());
      co_await wake_.async_wait(net::asio::redirect_error(net::asio::use_awaitable, ignored));
    }
  } catch (const net::ConnectionError& error) {
    close(error.what());
  }
  writer_done_ = true;
}

net::awaitable<void> Channel::finish(net::Duration timeout) {
  const std::shared_ptr<Channel> self = shared_from_this();
  finishing_ = true;
  wake_.cancel();
  const auto until = std::chrono::steady_clock::now() + timeout;
  while (!writer_done_ && std::chrono::steady_clock::now() < until)
    co_await net::sleep_for(std::chrono::milliseconds(1));
  if (!closed_) co_await net::close_gently(*connection_, timeout);
}

net::awaitable<void> watch_silence(std::shared_ptr<Channel> channel, net::Duration interval, net::Duration timeout) {
  net::FramePace pace(2 * timeout, std::chrono::steady_clock::now());
  while (!channel->closed()) {
    co_await net::sleep_for(interval);
    const auto now = std::chrono::steady_clock::now();
    if (!pace.keeps_up(channel->progress(), now))
      channel->abort(fmt::format("{} sends a frame more slowly than {} a second", channel->peer(),
                                 format_bytes(net::kLeastFrameBytesPerSecond)));
    const auto silence = now - channel->last_received();
    if (silence > timeout)
      channel->abort(fmt::format("{} missed heartbeats for {:.1f} s", channel->peer(),
                                 std::chrono::duration<double>(silence).count()));
  }
}

}  // namespace caravan::remote
