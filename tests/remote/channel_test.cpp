// What a channel does with a peer that sends too slowly, over connections in memory.
#include "remote/channel.h"

#include <gtest/gtest.h>

#include "net/memory_connection.h"

namespace caravan::remote {
namespace {

using namespace std::chrono_literals;

// A channel that is read and watched, and the other end.
struct Watched {
  explicit Watched(std::chrono::milliseconds timeout) : executor(io.next_executor()) {
    auto [here, there] = net::make_memory_pair(executor);
    other = std::move(there);
    channel = std::make_shared<Channel>(std::move(here), [](uint16_t) { return net::FrameLimits{1 << 10, 1 << 20}; });
    ended = net::asio::co_spawn(
        executor,
        [](std::shared_ptr<Channel> c) -> net::awaitable<void> {
          try {
            while (co_await c->read()) {
            }
          } catch (const Error&) {
            // closed
          }
        }(channel),
        net::asio::use_future);
    net::spawn(executor, "watching", watch_silence(channel, 10ms, timeout));
  }
  ~Watched() {
    channel->close("the test is over");
    ended.wait();
  }
  bool send(std::span<const std::byte> bytes) {
    try {
      const std::array<net::ConstBuffer, 1> buffers{net::asio::buffer(bytes.data(), bytes.size())};
      net::run_blocking(executor, other->write(buffers));
      return true;
    } catch (const net::ConnectionError&) {
      return false;
    }
  }

  net::IoThreads io{1};
  const net::Executor executor;
  std::unique_ptr<net::Connection> other;
  std::shared_ptr<Channel> channel;
  std::future<void> ended;
};

TEST(Channel, ClosesOnAFrameThatDribbles) {
  Watched watched(2s);
  watched.send(net::encode_frame_header({4, 0, 0, 1 << 20}));
  const auto start = std::chrono::steady_clock::now();
  // A sign of life every fiftieth of a second, for a frame that would end in six hours.
  while (watched.send(std::array<std::byte, 1>{}) && std::chrono::steady_clock::now() < start + 30s)
    std::this_thread::sleep_for(20ms);
  EXPECT_NE(watched.channel->close_reason().find("more slowly than"), std::string::npos)
      << watched.channel->close_reason();
}

}  // namespace
}  // namespace caravan::remote
