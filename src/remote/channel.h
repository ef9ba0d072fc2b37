// A connection that speaks frames: a queue of outgoing messages that any thread may add to, a coroutine that writes it,
// and reading by one coroutine. Both sides of the protocol use it.
#pragma once

#include <google/protobuf/message_lite.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "net/frame.h"
#include "remote/protocol.h"

namespace caravan::remote {

// Shared between the coroutines that read, write and watch it, and the threads that send: hence shared_ptr.
class Channel : public std::enable_shared_from_this<Channel> {
 public:
  // Urgent frames overtake those that wait.
  enum class Priority { normal, urgent };

  // Takes an established connection. limits: see FrameReader.
  Channel(std::unique_ptr<net::Connection> connection, net::FrameReader::LimitFunction limits);

  net::Executor executor() const { return executor_; }
  const std::string& peer() const { return peer_; }

  // Starts writing. Once, after construction.
  void start();
  // Queues a message; from any thread. Closes the channel when the peer has not read for too long: more than
  // kMaxQueuedBytes or kMaxQueuedFrames wait. Does nothing once closed.
  void send(MessageType type, const google::protobuf::MessageLite& header, std::vector<std::byte> payload = {},
            Priority priority = Priority::normal);
  // The next frame; nullopt when the peer ended the stream in order. By one coroutine on executor().
  net::awaitable<std::optional<net::Frame>> read();
  // Writes what is queued, then ends the connection so that it arrives, within timeout. Instead of read(), by the same
  // coroutine.
  net::awaitable<void> finish(net::Duration timeout);
  // Ends the connection at once; from any thread. The first reason stays.
  void close(const std::string& reason) { end(reason, Ending::close); }
  // As close(), for a peer that does not read or answer: what waits for it is dropped.
  void abort(const std::string& reason) { end(reason, Ending::abort); }

  bool closed() const { return closed_.load(); }
  // Why it was closed; empty while it is not.
  std::string close_reason() const;
  // On executor().
  std::chrono::steady_clock::time_point last_received() const { return reader_.last_received(); }
  net::ReadProgress progress() const { return reader_.progress(); }

  // Blocks until fewer than `bytes` wait to be written; false when the channel is closed. Not on an I/O thread.
  bool wait_for_room(uint64_t bytes);

  // That wait to be written, from any thread.
  uint64_t queued_bytes() const {
    const std::lock_guard lock(mutex_);
    return queued_bytes_;
  }

  // Of frames, since the beginning; from any thread.
  uint64_t bytes_received() const { return reader_.bytes_received(); }
  uint64_t bytes_sent() const { return bytes_sent_.load(); }

  static constexpr uint64_t kMaxQueuedBytes = uint64_t{512} << 20;
  static constexpr size_t kMaxQueuedFrames = 8192;

 private:
  struct Outgoing {
    std::vector<std::byte> head;  // frame header and message header
    std::vector<std::byte> payload;
    size_t size() const { return head.size() + payload.size(); }
  };

  enum class Ending { close, abort };
  void end(const std::string& reason, Ending ending);
  net::awaitable<void> write_loop(std::shared_ptr<Channel> self);
  // Takes what the next write consists of: many small frames, or one large one.
  std::vector<Outgoing> take_next();
  net::awaitable<void> write_frames(std::vector<Outgoing> frames);

  const std::unique_ptr<net::Connection> connection_;
  const net::Executor executor_;
  const std::string peer_;
  net::FrameReader reader_;
  net::asio::steady_timer wake_;  // the writer waits on it; on executor()
  bool finishing_ = false;        // on executor()
  bool writer_done_ = true;       // on executor()

  mutable std::mutex mutex_;
  std::condition_variable room_;
  std::deque<Outgoing> urgent_, normal_;  // under mutex_
  uint64_t queued_bytes_ = 0;             // under mutex_; what is being written included
  std::string reason_;                    // under mutex_
  std::atomic<bool> closed_{false};
  std::atomic<uint64_t> bytes_sent_{0};
};

// Closes channel with reason when nothing has come for timeout, or when a frame dribbles and falls behind
// (net::FramePace) by twice that; looks every interval. Ends with the channel.
net::awaitable<void> watch_silence(std::shared_ptr<Channel> channel, net::Duration interval, net::Duration timeout);

}  // namespace caravan::remote
