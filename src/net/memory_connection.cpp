#include "net/memory_connection.h"

#include <algorithm>
#include <boost/asio/redirect_error.hpp>
#include <deque>

namespace caravan::net {

namespace {

using Kind = ConnectionError::Kind;

// One direction. Both ends run on one serial executor, so nothing is locked.
struct Pipe {
  Pipe(const Executor& executor, Faults f) : faults(f), changed(executor) {}

  Faults faults;
  std::deque<std::byte> data;
  uint64_t n_written = 0;
  bool ended = false;          // by shutdown, or by the cut
  bool reset = false;          // by the cut
  bool reader_closed = false;  // nobody will read
  asio::steady_timer changed;  // its waiters are woken by cancel()

  void notify() { changed.cancel(); }

  awaitable<void> wait() {
    boost::system::error_code ignored;
    changed.expires_at(asio::steady_timer::time_point::max());
    co_await changed.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
  }

  void push(std::byte value) {
    if (faults.cut_after_bytes && n_written >= *faults.cut_after_bytes) return;
    if (faults.flip_bit && *faults.flip_bit / 8 == n_written) value ^= std::byte(1 << (*faults.flip_bit % 8));
    data.push_back(value);
    ++n_written;
  }

  void check_cut() {
    if (!faults.cut_after_bytes || n_written < *faults.cut_after_bytes) return;
    ended = true;
    reset = faults.cut_is_reset;
  }
};

class MemoryConnection : public Connection {
 public:
  MemoryConnection(const Executor& executor, std::shared_ptr<Pipe> in, std::shared_ptr<Pipe> out, std::string peer)
      : executor_(executor), in_(std::move(in)), out_(std::move(out)), peer_(std::move(peer)) {}
  ~MemoryConnection() override { close(); }

  Executor executor() const override { return executor_; }
  const std::string& peer() const override { return peer_; }

  awaitable<size_t> read_some(std::span<std::byte> buffer) override {
    const std::shared_ptr<Pipe> in = in_;  // outlives this object while the coroutine waits
    if (in->faults.read_delay > Duration::zero()) co_await sleep_for(in->faults.read_delay);
    in->check_cut();
    while (in->data.empty() && !in->ended && !in->reader_closed) co_await in->wait();
    if (in->reader_closed) throw ConnectionError(Kind::closed_here, "closed here");
    if (in->data.empty() && in->reset) throw ConnectionError(Kind::lost, "memory: connection reset");
    const size_t n = std::min({buffer.size(), in->faults.max_read, in->data.size()});
    std::copy_n(in->data.begin(), n, buffer.begin());
    in->data.erase(in->data.begin(), in->data.begin() + static_cast<ptrdiff_t>(n));
    in->notify();
    co_return n;
  }

  awaitable<void> write(std::span<const ConstBuffer> buffers) override {
    const std::shared_ptr<Pipe> out = out_;
    const std::vector<ConstBuffer> sequence(buffers.begin(), buffers.end());
    for (const ConstBuffer& buffer : sequence) {
      const auto* bytes = static_cast<const std::byte*>(buffer.data());
      for (size_t i = 0; i < buffer.size(); ++i) {
        while (out->data.size() >= out->faults.capacity && !out->reader_closed && !closed_) co_await out->wait();
        if (closed_) throw ConnectionError(Kind::closed_here, "closed here");
        if (out->reader_closed) throw ConnectionError(Kind::lost, "memory: broken pipe");
        out->push(bytes[i]);
        if (out->data.size() >= out->faults.capacity) out->notify();
      }
    }
    out->check_cut();
    out->notify();
  }

  awaitable<void> shutdown() override {
    out_->ended = true;
    out_->notify();
    co_return;
  }

  void close() noexcept override {
    closed_ = true;
    in_->reader_closed = true;
    out_->ended = true;
    in_->notify();
    out_->notify();
  }

 private:
  Executor executor_;
  std::shared_ptr<Pipe> in_, out_;  // shared with the other end, and with coroutines that wait
  std::string peer_;
  bool closed_ = false;
};

}  // namespace

std::pair<std::unique_ptr<Connection>, std::unique_ptr<Connection>> make_memory_pair(const Executor& executor,
                                                                                     Faults first_to_second,
                                                                                     Faults second_to_first) {
  auto forth = std::make_shared<Pipe>(executor, first_to_second);
  auto back = std::make_shared<Pipe>(executor, second_to_first);
  return {std::make_unique<MemoryConnection>(executor, back, forth, "memory:second"),
          std::make_unique<MemoryConnection>(executor, forth, back, "memory:first")};
}

}  // namespace caravan::net
