// TCP connections and listeners on loopback.
#include "net/tcp.h"

#include <gtest/gtest.h>

#include <array>
#include <future>
#include <string>

#include "net/listener.h"

namespace caravan::net {
namespace {

using std::chrono::seconds;

std::span<std::byte> bytes_of(std::string& text) { return std::as_writable_bytes(std::span(text.data(), text.size())); }

// Runs one accept beside one connect.
struct LoopbackPair {
  explicit LoopbackPair(IoThreads& io) : listener(io, {"127.0.0.1", 0}) {
    auto accepted = asio::co_spawn(listener.executor(), listener.accept(), asio::use_future);
    client = run_blocking(io.next_executor(), connect_tcp(listener.endpoint(), seconds(5)));
    server = accepted.get();
  }
  Listener listener;
  std::unique_ptr<TcpConnection> client, server;
};

TEST(TcpConnection, CarriesBytesBothWaysAndEndsInOrder) {
  IoThreads io(2);
  LoopbackPair pair(io);
  run_blocking(pair.client->executor(), pair.client->write_text("hello"));
  std::string text(5, ' ');
  run_blocking(pair.server->executor(), pair.server->read_exactly(bytes_of(text), "a greeting"));
  EXPECT_EQ(text, "hello");
  run_blocking(pair.server->executor(), pair.server->write_text("world"));
  run_blocking(pair.server->executor(), pair.server->shutdown());
  run_blocking(pair.client->executor(), pair.client->read_exactly(bytes_of(text), "an answer"));
  EXPECT_EQ(text, "world");
  EXPECT_EQ(run_blocking(pair.client->executor(), pair.client->read_some(bytes_of(text))), 0u);
}

TEST(TcpConnection, PeekLeavesTheBytesInTheStream) {
  IoThreads io(1);
  LoopbackPair pair(io);
  run_blocking(pair.client->executor(), pair.client->write_text("x"));
  std::string text(1, ' ');
  EXPECT_EQ(run_blocking(pair.server->executor(), pair.server->peek(bytes_of(text))), 1u);
  EXPECT_EQ(run_blocking(pair.server->executor(), pair.server->read_some(bytes_of(text))), 1u);
  EXPECT_EQ(text, "x");
}

TEST(TcpConnection, CloseFailsAnOutstandingRead) {
  IoThreads io(1);
  LoopbackPair pair(io);
  std::string text(1, ' ');
  auto read = asio::co_spawn(pair.server->executor(), pair.server->read_some(bytes_of(text)), asio::use_future);
  asio::post(pair.server->executor(), asio::use_future([&] { pair.server->close(); })).get();
  try {
    read.get();
    FAIL() << "the read ended well";
  } catch (const ConnectionError& error) {
    EXPECT_EQ(error.kind(), ConnectionError::Kind::closed_here);
  }
}

TEST(TcpConnection, ReadExactlyNamesWhatWasCutShort) {
  IoThreads io(1);
  LoopbackPair pair(io);
  run_blocking(pair.client->executor(), pair.client->write_text("abc"));
  asio::post(pair.client->executor(), asio::use_future([&] { pair.client->close(); })).get();
  std::string text(8, ' ');
  try {
    run_blocking(pair.server->executor(), pair.server->read_exactly(bytes_of(text), "a frame header"));
    FAIL() << "read 8 bytes of 3";
  } catch (const ConnectionError& error) {
    EXPECT_NE(std::string(error.what()).find("3 of 8 bytes of a frame header"), std::string::npos) << error.what();
  }
}

TEST(TcpConnection, EveryWriteToAPeerThatAbortedFails) {
  IoThreads io(2);
  LoopbackPair pair(io);
  // More than fits in the socket's buffers, so that the write waits when the reset comes.
  const std::string flood(64 << 20, 'x');
  auto writing = asio::co_spawn(pair.client->executor(), pair.client->write_text(flood), asio::use_future);
  asio::post(pair.server->executor(), asio::use_future([&] { pair.server->abort(); })).get();
  EXPECT_THROW(writing.get(), ConnectionError);
  for (int i = 0; i < 3; ++i) {
    auto again = asio::co_spawn(pair.client->executor(), pair.client->write_text("again"), asio::use_future);
    ASSERT_EQ(again.wait_for(seconds(5)), std::future_status::ready) << "the write waits for a dead socket";
    EXPECT_THROW(again.get(), ConnectionError);
  }
}

TEST(Deadline, ClosesTheConnectionWhenTheTimeIsOver) {
  IoThreads io(1);
  LoopbackPair pair(io);
  const auto wait = [](Connection& connection) -> awaitable<bool> {
    Deadline deadline(connection, std::chrono::milliseconds(20));
    std::array<std::byte, 1> buffer;
    try {
      co_await connection.read_some(buffer);
    } catch (const ConnectionError&) {
      co_return deadline.expired();
    }
    co_return false;
  };
  EXPECT_TRUE(run_blocking(pair.server->executor(), wait(*pair.server)));
}

TEST(ConnectTcp, NamesTheEndpointThatRefuses) {
  IoThreads io(1);
  Endpoint nobody;
  {
    nobody = Listener(io, {"127.0.0.1", 0}).endpoint();
  }
  try {
    run_blocking(io.next_executor(), connect_tcp(nobody, seconds(5)));
    FAIL() << "connected";
  } catch (const ConnectionError& error) {
    EXPECT_EQ(error.kind(), ConnectionError::Kind::unreachable);
    EXPECT_NE(std::string(error.what()).find(nobody.text()), std::string::npos) << error.what();
  }
}

TEST(Listener, CloseEndsAccept) {
  IoThreads io(1);
  Listener listener(io, {"127.0.0.1", 0});
  auto accepted = asio::co_spawn(listener.executor(), listener.accept(), asio::use_future);
  asio::post(listener.executor(), asio::use_future([&] { listener.close(); })).get();
  EXPECT_EQ(accepted.get(), nullptr);
}

TEST(Listener, SaysThatThePortIsTaken) {
  IoThreads io(1);
  Listener first(io, {"127.0.0.1", 0});
  try {
    Listener second(io, first.endpoint());
    FAIL() << "bound twice";
  } catch (const SystemError& error) {
    EXPECT_NE(std::string(error.what()).find(first.endpoint().text()), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace caravan::net
