// TLS with a pre-shared key: the right token, a wrong one, a token on one side only, and others that speak TLS without.
#include "net/tls.h"

#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

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

TEST(TlsPsk, RefusesGarbageThatBeginsAsTls) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair garbage(io);
  auto accepted = start_accept(psk, garbage);
  run_blocking(garbage.client->executor(), garbage.client->write_text("\x16\x03\x01\x40\x00 not a client hello"));
  run_blocking(garbage.client->executor(), garbage.client->shutdown());
  EXPECT_TRUE(failure_of(std::move(accepted)).has_value());
}

std::string from_hex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16));
  return bytes;
}

// Two first messages of clients (RFC 8446, section 4.1.2) whose token is kGoldenToken, made with Python's hmac and
// hashlib alone: random 00..1f, TLS_AES_128_GCM_SHA256, an x25519 share, the identity caravan-rpc-1, and the binder by
// the key 0bb0d5a85bf1b972f586818572c427d776cb857d06ca65f8eda03516fae9d2cb: HKDF-SHA256 of the token (RFC 5869) without
// salt, with the info "caravan rpc psk 1". One offers psk_dhe_ke only, the other psk_ke only.
constexpr std::string_view kGoldenToken = "correct horse battery staple";
constexpr std::string_view kHelloOfPskDheKe =
    "16030100b4010000b00303000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f0000021301"
    "01000085002b0003020304000a00040002001d000d0006000408040403003300260024001d0020090000000000000000"
    "0000000000000000000000000000000000000000000000002d00020101002900380013000d6361726176616e2d727063"
    "2d31000000000021201c0ef139dcfffebc0abb26687fdfdcbffd100c41a31333a3431014438d32c9d6";
constexpr std::string_view kHelloOfPskKe =
    "16030100b4010000b00303000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f0000021301"
    "01000085002b0003020304000a00040002001d000d0006000408040403003300260024001d0020090000000000000000"
    "0000000000000000000000000000000000000000000000002d00020100002900380013000d6361726176616e2d727063"
    "2d310000000000212009ea972c0598ecbe39bb9a8cd807e1e8784ab8869d2a7cd6e0b876e06050a608";

// The first record that a listener with kGoldenToken answers to a client's first message.
std::string answer_to(std::string_view hello) {
  IoThreads io(2);
  const TlsPsk psk(kGoldenToken);
  TcpPair pair(io);
  auto accepted = start_accept(psk, pair);
  run_blocking(pair.client->executor(), pair.client->write_text(from_hex(hello)));
  std::string answer(7, ' ');
  run_blocking(pair.client->executor(), pair.client->read_exactly(bytes_of(answer), "answer"));
  run_blocking(pair.client->executor(), pair.client->shutdown());
  EXPECT_TRUE(failure_of(std::move(accepted)).has_value()) << "the client never finishes";
  return answer;
}

constexpr char kHandshakeRecord = 22, kAlertRecord = 21, kServerHello = 2;

TEST(TlsPsk, HasTheKeyOfTheSpecification) {
  const std::string answer = answer_to(kHelloOfPskDheKe);
  EXPECT_EQ(answer[0], kHandshakeRecord);
  EXPECT_EQ(answer[5], kServerHello);
  // Another key makes another binder.
  std::string other(kHelloOfPskDheKe);
  other.back() ^= 1;
  EXPECT_EQ(answer_to(other)[0], kAlertRecord);
}

TEST(TlsPsk, RefusesAKeyExchangeWithoutDiffieHellman) {
  const std::string answer = answer_to(kHelloOfPskKe);
  EXPECT_EQ(answer[0], kAlertRecord);
}

// A side that speaks TLS by OpenSSL alone, and blocks.
class PlainTls {
 public:
  explicit PlainTls(const SSL_METHOD* method) : context_(SSL_CTX_new(method)) {}
  ~PlainTls() { SSL_CTX_free(context_); }
  PlainTls(const PlainTls&) = delete;
  PlainTls& operator=(const PlainTls&) = delete;
  SSL_CTX* context() { return context_; }
  // A certificate and its key, signed by itself.
  void use_certificate() {
    EVP_PKEY* key = EVP_EC_gen("P-256");
    X509* certificate = X509_new();
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    ASSERT_GT(X509_sign(certificate, key, EVP_sha256()), 0);
    ASSERT_EQ(SSL_CTX_use_certificate(context_, certificate), 1);
    ASSERT_EQ(SSL_CTX_use_PrivateKey(context_, key), 1);
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
  // Shakes hands, reads until the other side ends, and ends. Whether anything was read.
  enum class Side { client, server };
  bool talk(std::unique_ptr<TcpConnection> tcp, Side side) {
    Socket socket = tcp->release();
    socket.non_blocking(false);
    SSL* connection = SSL_new(context_);
    SSL_set_fd(connection, socket.native_handle());
    bool any = false;
    if ((side == Side::client ? SSL_connect(connection) : SSL_accept(connection)) == 1) {
      char byte = 0;
      any = SSL_read(connection, &byte, 1) == 1;
    }
    SSL_free(connection);
    return any;
  }

 private:
  SSL_CTX* context_;
};

// What a listener with a token says about such a client.
ConnectionError refusal_of_client(PlainTls& client) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  auto accepted = start_accept(psk, pair);
  EXPECT_FALSE(client.talk(std::move(pair.client), PlainTls::Side::client));
  try {
    accepted.get();
  } catch (const ConnectionError& error) {
    return error;
  }
  ADD_FAILURE() << "accepted";
  return {Kind::closed_here, ""};
}

TEST(TlsPsk, RefusesATlsClientWithoutAToken) {
  PlainTls client(TLS_client_method());
  const ConnectionError refusal = refusal_of_client(client);
  EXPECT_EQ(refusal.kind(), Kind::token_differs);
  EXPECT_NE(std::string(refusal.what()).find("without the token"), std::string::npos) << refusal.what();
}

TEST(TlsPsk, RefusesAClientOfTls12) {
  PlainTls client(TLS_client_method());
  SSL_CTX_set_max_proto_version(client.context(), TLS1_2_VERSION);
  const ConnectionError refusal = refusal_of_client(client);
  EXPECT_EQ(refusal.kind(), Kind::lost);
  EXPECT_NE(std::string(refusal.what()).find("TLS 1.3"), std::string::npos) << refusal.what();
}

TEST(TlsPsk, RefusesAServerWithACertificateInPlaceOfTheToken) {
  IoThreads io(2);
  const TlsPsk psk("token number one");
  TcpPair pair(io);
  PlainTls server(TLS_server_method());
  server.use_certificate();
  auto connected = start_connect(psk, pair);
  EXPECT_FALSE(server.talk(std::move(pair.server), PlainTls::Side::server));
  try {
    connected.get();
    FAIL() << "connected";
  } catch (const ConnectionError& error) {
    EXPECT_EQ(error.kind(), Kind::lost);
    EXPECT_NE(std::string(error.what()).find("a certificate in place of the token"), std::string::npos) << error.what();
  }
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
