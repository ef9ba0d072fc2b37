// A connection as coroutines see it, whatever carries it: TCP, TLS with a pre-shared key, or memory (tests).
#pragma once

#include <boost/asio/buffer.hpp>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "net/io.h"

namespace caravan::net {

// A connection or the attempt to make one failed. The message names the peer and the cause.
class ConnectionError : public Error {
 public:
  enum class Kind {
    unresolved,        // the host name has no address
    unreachable,       // refused, no route
    timed_out,         // within the time given
    lost,              // reset, broken pipe, cut mid-stream
    closed_here,       // close() was called on this side
    token_differs,     // TLS: the other side has another token
    peer_needs_token,  // the other side speaks TLS, this one does not
    peer_has_no_token  // this side speaks TLS, the other one does not
  };
  ConnectionError(Kind kind, const std::string& message) : Error(message), kind_(kind) {}
  Kind kind() const { return kind_; }

 private:
  Kind kind_;
};

using ConstBuffer = asio::const_buffer;

// A bidirectional byte stream. Everything is called on executor(), which is serial: one read_some and one write may be
// under way at the same time, no more. Keep one read_some outstanding beside the writer: it is how the end of the peer
// is noticed.
class Connection {
 public:
  virtual ~Connection() = default;

  virtual Executor executor() const = 0;
  // Reads at least one byte, at most buffer.size(); 0 when the peer has ended the stream in order.
  // Throws ConnectionError.
  virtual awaitable<size_t> read_some(std::span<std::byte> buffer) = 0;
  // Writes all of the buffers, in order; they stay valid until it returns. Throws ConnectionError.
  virtual awaitable<void> write(std::span<const ConstBuffer> buffers) = 0;
  // Tells the peer that nothing more will be written (TCP FIN; TLS close_notify first). Never throws.
  virtual awaitable<void> shutdown() = 0;
  // Ends both directions at once; what waits in read_some or write fails with closed_here. Idempotent.
  virtual void close() noexcept = 0;
  // As close(), and drops what the peer has not taken yet (TCP reset): for one that does not read or does not answer.
  virtual void abort() noexcept { close(); }
  // "10.0.0.2:41712".
  virtual const std::string& peer() const = 0;

  // Convenience over read_some and write.
  // Fills buffer; throws ConnectionError (lost) when the peer ends before, naming what was being read.
  awaitable<void> read_exactly(std::span<std::byte> buffer, std::string_view what);
  awaitable<void> write_text(std::string_view text);
};

// Closes a connection when it has not been destroyed within a time: bounds a handshake, a request, a write.
// Created and destroyed on the connection's executor; the connection outlives it.
class Deadline {
 public:
  Deadline(Connection& connection, Duration timeout);
  ~Deadline();
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;
  bool expired() const;
  // Starts the time again.
  void restart(Duration timeout);

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with the timer's handler, which may run after the destructor
};

}  // namespace caravan::net
