#include "net/connection.h"

#include <fmt/format.h>

#include <array>

namespace caravan::net {

awaitable<void> Connection::read_exactly(std::span<std::byte> buffer, std::string_view what) {
  size_t done = 0;
  while (done < buffer.size()) {
    const size_t n = co_await read_some(buffer.subspan(done));
    if (n == 0)
      throw ConnectionError(
          ConnectionError::Kind::lost,
          fmt::format("{} ended the connection after {} of {} bytes of {}", peer(), done, buffer.size(), what));
    done += n;
  }
}

awaitable<void> Connection::write_text(std::string_view text) {
  const std::array<ConstBuffer, 1> buffers{asio::buffer(text.data(), text.size())};
  co_await write(buffers);
}

struct Deadline::State {
  State(Connection& c) : connection(&c), timer(c.executor()) {}
  Connection* connection;  // nullptr once the Deadline is gone
  asio::steady_timer timer;
  bool expired = false;
  uint64_t generation = 0;  // of the latest restart(): an earlier handler must not act

  static void start(const std::shared_ptr<State>& state, Duration timeout) {
    const uint64_t generation = ++state->generation;
    state->timer.expires_after(timeout);
    state->timer.async_wait([state, generation](const boost::system::error_code& code) {
      if (code || state->connection == nullptr || state->generation != generation) return;
      state->expired = true;
      state->connection->close();
    });
  }
};

Deadline::Deadline(Connection& connection, Duration timeout) : state_(std::make_shared<State>(connection)) {
  State::start(state_, timeout);
}

Deadline::~Deadline() {
  state_->connection = nullptr;
  state_->timer.cancel();
}

bool Deadline::expired() const { return state_->expired; }

void Deadline::restart(Duration timeout) {
  if (!state_->expired) State::start(state_, timeout);
}

}  // namespace caravan::net
