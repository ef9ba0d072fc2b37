// TLS with a pre-shared key: the right token, a wrong one, and a token on one side only.
#include "net/tls.h"

#include <gtest/gtest.h>

#include <future>
#include <string>

#include "net/listener.h"

namespace caravan::net {
namespace {

using std::chrono::seconds;
using Kind = ConnectionError::Kind;

std::span<std::byte> bytes_of(std::string& text) { return std::as_writable_bytes(std::span(text.data(), text.size())); }

struct TcpPair {
  explicit TcpPair(IoThreads& io) : listener(io, {"127.0.0.1", 0}) {
    auto accepted = asio::co_spawn(listener.executor(), listener.accept(), asio::use_future);
    client = run_blocking(io.next_executor(), connect_tcp(listener.endpoint(), seconds(5)));
    server = accepted.get();
  }
  Listener listener;
  std::unique_ptr<TcpConnection> client, server;
};

// The kind of failure of a handshake, or nullopt when it went well.
std::optional<Kind> failure_of(std::future<std::unique_ptr<Connection>> handshake) {
  try {
    handshake.get();
    return std::nullopt;
  } catch (const ConnectionError& error) {
    return error.kind();
  }
}

std::future<std::unique_ptr<Connection>> start_connect(const TlsPsk& psk, TcpPair& pair,
                                                       Duration timeout = seconds(5)) {
  const Executor executor = pair.client->executor();
  return asio::co_spawn(executor, psk.connect(std::move(pair.client), timeout), asio::use_future);
}

std::future<std::unique_ptr<Connection>> start_accept(const TlsPsk& psk, TcpPair& pair, Duration timeout = seconds(5)) {
  const Executor executor = pair.server->executor();
  return asio::co_spawn(executor, psk.accept(std::move(pair.server), timeout), asio::use_future);
}

TEST(TlsPsk, CarriesBytesBetweenTwoSidesWithOneToken) {
  IoThreads io(2);
  const TlsPsk psk("correct horse battery staple");
  TcpPair pair(io);
  auto accepted = start_accept(psk, pair);
  const auto client = start_connect(psk, pair).get();
  const auto server = accepted.get();
  std::string sent(300000, 'x'), received(sent.size(), ' ');
  for (size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<char>('a' + i % 23);
  auto writing = asio::co_spawn(client->executor(), client->write_text(sent), asio::use_future);
  run_blocking(server->executor(), server->read_exactly(bytes_of(received), "text"));
  writing.get();
  EXPECT_EQ(received, sent);
  std::string answer(2, ' ');
  run_blocking(server->executor(), server->write_text("ok"));
  run_blocking(client->executor(), client->read_exactly(bytes_of(answer), "text"));
  EXPECT_EQ(answer, "ok");
}

TEST(TlsPsk, SaysOnBothSidesThatTheTokensDiffer) {
  IoThreads io(2);
  const TlsPsk one("token number one"), two("token number two");
  TcpPair pair(io);
  auto accepted = start_accept(one, pair);
  EXPECT_EQ(failure_of(start_connect(two, pair)), Kind::token_differs);
  EXPECT_EQ(failure_of(std::move(accepted)), Kind::token_differs);
}

TEST(TlsPsk, SaysThatTheListenerHasNoToken) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  const Executor executor = pair.server->executor();
  auto refused = asio::co_spawn(executor, refuse_tls(std::move(pair.server), seconds(5)), asio::use_future);
  EXPECT_EQ(failure_of(start_connect(psk, pair)), Kind::peer_has_no_token);
  refused.get();
}

TEST(TlsPsk, NoticesAPeerThatAnswersWithSomethingElse) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  auto handshake = start_connect(psk, pair);
  run_blocking(pair.server->executor(), pair.server->write_text("CRVN plain text that is no TLS record"));
  EXPECT_EQ(failure_of(std::move(handshake)), Kind::peer_has_no_token);
}

TEST(TlsPsk, GivesUpOnAPeerThatSaysNothing) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  EXPECT_EQ(failure_of(start_accept(psk, pair, std::chrono::milliseconds(30))), Kind::timed_out);
}

TEST(TlsPsk, RefusesGarbageAndAPlainTlsClientWithoutTheToken) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair garbage(io);
  auto accepted = start_accept(psk, garbage);
  run_blocking(garbage.client->executor(), garbage.client->write_text("\x16\x03\x01\x40\x00 not a client hello"));
  run_blocking(garbage.client->executor(), garbage.client->shutdown());
  EXPECT_TRUE(failure_of(std::move(accepted)).has_value());
}

TEST(TlsPsk, EndsInOrder) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  auto accepted = start_accept(psk, pair);
  const auto client = start_connect(psk, pair).get();
  const auto server = accepted.get();
  auto closing = asio::co_spawn(client->executor(), close_gently(*client, seconds(5)), asio::use_future);
  std::string text(1, ' ');
  EXPECT_EQ(run_blocking(server->executor(), server->read_some(bytes_of(text))), 0u);
  run_blocking(server->executor(), close_gently(*server, seconds(5)));
  closing.get();
}

TEST(TlsPsk, RefusesShortTokens) {
  EXPECT_THROW(TlsPsk(""), RequestError);
  EXPECT_THROW(TlsPsk(std::string(kMinTokenBytes - 1, 'x')), RequestError);
  EXPECT_NO_THROW(TlsPsk(std::string(kMinTokenBytes, 'x')));
}

}  // namespace
}  // namespace caravan::net
