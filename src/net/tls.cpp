#include "net/tls.h"

#include <fmt/format.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/ssl.h>

#include <array>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/write.hpp>
#include <string>

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 with sanitizers takes Asio's allocator of coroutine frames for a mismatched pair.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

namespace caravan::net {

namespace {

using Key = std::array<unsigned char, 32>;
using Kind = ConnectionError::Kind;
namespace ssl = asio::ssl;

// Both are part of the protocol (docs/protocol.md).
constexpr std::string_view kIdentity = "caravan-rpc-1";
constexpr std::string_view kKeyInfo = "caravan rpc psk 1";
// The PSK is bound to SHA-256, so only suites with that hash can use it.
constexpr const char* kCipherSuites = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
constexpr unsigned char kAes128GcmSha256[] = {0x13, 0x01};

// HKDF-SHA256 (RFC 5869) without salt: the token is the input key, the info string names the use.
Key derive_key(std::string_view token) {
  Key key{};
  EVP_KDF* kdf = EVP_KDF_fetch(nullptr, "HKDF", nullptr);
  EVP_KDF_CTX* context = EVP_KDF_CTX_new(kdf);
  EVP_KDF_free(kdf);
  char digest[] = "SHA256";
  const OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, const_cast<char*>(token.data()), token.size()),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, const_cast<char*>(kKeyInfo.data()), kKeyInfo.size()),
      OSSL_PARAM_construct_end()};
  const int ok = EVP_KDF_derive(context, key.data(), key.size(), parameters);
  EVP_KDF_CTX_free(context);
  CARAVAN_ASSERT(ok == 1, "OpenSSL 3 always provides HKDF");
  return key;
}

// Where a context keeps the address of its key, for the callbacks below.
int key_index() {
  static const int index = SSL_CTX_get_ex_new_index(0, nullptr, nullptr, nullptr, nullptr);
  return index;
}

SSL_SESSION* make_session(SSL* connection) {
  const auto* key = static_cast<const Key*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(connection), key_index()));
  const SSL_CIPHER* cipher = SSL_CIPHER_find(connection, kAes128GcmSha256);
  SSL_SESSION* session = SSL_SESSION_new();
  if (session == nullptr || cipher == nullptr || SSL_SESSION_set1_master_key(session, key->data(), key->size()) != 1 ||
      SSL_SESSION_set_cipher(session, cipher) != 1 || SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION) != 1) {
    SSL_SESSION_free(session);
    return nullptr;
  }
  return session;
}

int use_session(SSL* connection, const EVP_MD*, const unsigned char** id, size_t* id_size, SSL_SESSION** session) {
  *session = make_session(connection);
  *id = reinterpret_cast<const unsigned char*>(kIdentity.data());
  *id_size = kIdentity.size();
  return *session != nullptr ? 1 : 0;
}

int find_session(SSL* connection, const unsigned char* id, size_t id_size, SSL_SESSION** session) {
  *session = nullptr;
  if (std::string_view(reinterpret_cast<const char*>(id), id_size) != kIdentity) return 1;  // unknown: no PSK
  *session = make_session(connection);
  return *session != nullptr ? 1 : 0;
}

void configure(ssl::context& context, Key& key) {
  SSL_CTX* native = context.native_handle();
  CARAVAN_ASSERT(SSL_CTX_set_ex_data(native, key_index(), &key) == 1, "a fresh context takes ex_data");
  CARAVAN_ASSERT(SSL_CTX_set_min_proto_version(native, TLS1_3_VERSION) == 1, "OpenSSL 3 has TLS 1.3");
  CARAVAN_ASSERT(SSL_CTX_set_ciphersuites(native, kCipherSuites) == 1, "both suites are TLS 1.3's");
  SSL_CTX_set_psk_use_session_callback(native, use_session);
  SSL_CTX_set_psk_find_session_callback(native, find_session);
  // No tickets and no cache: each connection proves the token anew.
  SSL_CTX_set_num_tickets(native, 0);
  SSL_CTX_set_session_cache_mode(native, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(native, SSL_MODE_RELEASE_BUFFERS);
}

// Whom a handshake trusts.
enum class Trust { token, anyone };

class TlsConnection : public Connection {
 public:
  TlsConnection(Socket socket, ssl::context& context, std::string peer, Trust trust)
      : executor_(socket.get_executor()), stream_(std::move(socket), context), peer_(std::move(peer)), trust_(trust) {}

  Executor executor() const override { return executor_; }
  const std::string& peer() const override { return peer_; }

  awaitable<size_t> read_some(std::span<std::byte> buffer) override {
    boost::system::error_code code;
    const size_t n = co_await stream_.async_read_some(asio::buffer(buffer.data(), buffer.size()),
                                                      asio::redirect_error(asio::use_awaitable, code));
    if (code == asio::error::eof) co_return 0;
    if (code == ssl::error::stream_truncated && !closed_)
      throw ConnectionError(Kind::lost, fmt::format("{} closed the connection", peer_));
    if (code) throw connection_error(peer_, code, closed_);
    co_return n;
  }

  awaitable<void> write(std::span<const ConstBuffer> buffers) override {
    // As in TcpConnection::write().
    if (write_failed_) throw connection_error(peer_, asio::error::broken_pipe, closed_);
    boost::system::error_code code;
    const std::vector<ConstBuffer> sequence(buffers.begin(), buffers.end());
    co_await asio::async_write(stream_, sequence, asio::redirect_error(asio::use_awaitable, code));
    write_failed_ = static_cast<bool>(code);
    if (code) throw connection_error(peer_, code, closed_);
  }

  awaitable<void> shutdown() override {
    // Sends close_notify, then waits for the peer's; bounded, since a peer may never answer.
    boost::system::error_code ignored;
    const auto waiting = std::make_shared<bool>(true);  // shared with the handler, which may run later
    asio::steady_timer bound(executor_, std::chrono::seconds(1));
    bound.async_wait([this, waiting](const boost::system::error_code& code) {
      boost::system::error_code unused;
      if (!code && *waiting) stream_.lowest_layer().cancel(unused);
    });
    co_await stream_.async_shutdown(asio::redirect_error(asio::use_awaitable, ignored));
    *waiting = false;
    stream_.lowest_layer().shutdown(asio::socket_base::shutdown_send, ignored);
  }

  void close() noexcept override {
    closed_ = true;
    boost::system::error_code ignored;
    stream_.lowest_layer().close(ignored);
  }

  void abort() noexcept override {
    reset_on_close(stream_.next_layer());
    close();
  }

  awaitable<void> handshake(ssl::stream_base::handshake_type type) {
    boost::system::error_code code;
    co_await stream_.async_handshake(type, asio::redirect_error(asio::use_awaitable, code));
    if (code) throw handshake_error(code);
    // With a PSK the handshake is a resumption; anything else would be a peer without the token.
    if (trust_ == Trust::token && SSL_session_reused(stream_.native_handle()) != 1)
      throw ConnectionError(Kind::token_differs, fmt::format("{}: the TLS handshake did not use the token", peer_));
  }

  Socket& socket() { return stream_.next_layer(); }

 private:
  ConnectionError handshake_error(const boost::system::error_code& code) const {
    if (code.category() != asio::error::get_ssl_category()) return connection_error(peer_, code, closed_);
    if (trust_ == Trust::anyone)
      return {Kind::lost, fmt::format("{}: the TLS handshake failed: {}", peer_, code.message())};
    switch (ERR_GET_REASON(static_cast<unsigned long>(code.value()))) {
      case SSL_R_BINDER_DOES_NOT_VERIFY:
      case SSL_R_SSLV3_ALERT_ILLEGAL_PARAMETER:
      case SSL_R_TLSV1_ALERT_DECRYPT_ERROR:
        return {Kind::token_differs, fmt::format("{}: the token differs", peer_)};
      case SSL_R_TLSV1_ALERT_UNKNOWN_PSK_IDENTITY:
        return {Kind::peer_has_no_token, fmt::format("{}: the other side uses no token", peer_)};
      case SSL_R_WRONG_VERSION_NUMBER:
      case SSL_R_HTTP_REQUEST:
        return {Kind::peer_has_no_token, fmt::format("{}: the other side does not speak TLS", peer_)};
      // Programs of others:
      case SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM:  // for the certificate that a client without the key would need
        return {Kind::token_differs, fmt::format("{}: the other side speaks TLS without the token", peer_)};
      case SSL_R_CERTIFICATE_VERIFY_FAILED:
        return {Kind::lost, fmt::format("{}: the other side offers a certificate in place of the token", peer_)};
      case SSL_R_UNSUPPORTED_PROTOCOL:
      case SSL_R_TLSV1_ALERT_PROTOCOL_VERSION:
        return {Kind::lost, fmt::format("{}: the other side does not speak TLS 1.3", peer_)};
      default:
        return {Kind::lost, fmt::format("{}: the TLS handshake failed: {}", peer_, code.message())};
    }
  }

  Executor executor_;
  ssl::stream<Socket> stream_;
  std::string peer_;
  const Trust trust_;
  bool closed_ = false;
  bool write_failed_ = false;
};

awaitable<std::unique_ptr<Connection>> handshake(std::unique_ptr<TcpConnection> tcp, ssl::context& context,
                                                 ssl::stream_base::handshake_type type, Trust trust, Duration timeout) {
  const std::string peer = tcp->peer();
  auto connection = std::make_unique<TlsConnection>(tcp->release(), context, peer, trust);
  std::exception_ptr failure;
  {
    Deadline deadline(*connection, timeout);
    try {
      co_await connection->handshake(type);
    } catch (const ConnectionError& error) {
      if (deadline.expired())
        throw ConnectionError(Kind::timed_out, fmt::format("{}: no TLS handshake within {:.1f} s", peer,
                                                           std::chrono::duration<double>(timeout).count()));
      failure = std::current_exception();
    }
  }
  if (failure) {
    // The alert that tells the other side why must not be lost to a reset.
    TcpConnection rest(std::move(connection->socket()));
    co_await close_gently(rest, std::chrono::milliseconds(500));
    std::rethrow_exception(failure);
  }
  co_return connection;
}

}  // namespace

struct TlsPsk::State {
  explicit State(std::string_view token)
      : key(derive_key(token)), client(ssl::context::tls_client), server(ssl::context::tls_server) {
    configure(client, key);
    configure(server, key);
    // There are no trusted authorities: a server that offers a certificate in place of the PSK is refused.
    SSL_CTX_set_verify(client.native_handle(), SSL_VERIFY_PEER, nullptr);
  }
  Key key;
  ssl::context client, server;
};

void check_token(std::string_view token) {
  if (token.size() < kMinTokenBytes)
    throw RequestError(fmt::format("the token has {} bytes, at least {} are needed; `caravan token` prints a good one",
                                   token.size(), kMinTokenBytes));
}

TlsPsk::TlsPsk(std::string_view token) {
  check_token(token);
  state_ = std::make_unique<State>(token);
}

TlsPsk::~TlsPsk() = default;

awaitable<std::unique_ptr<Connection>> TlsPsk::connect(std::unique_ptr<TcpConnection> tcp, Duration timeout) const {
  return handshake(std::move(tcp), state_->client, ssl::stream_base::client, Trust::token, timeout);
}

awaitable<std::unique_ptr<Connection>> TlsPsk::accept(std::unique_ptr<TcpConnection> tcp, Duration timeout) const {
  return handshake(std::move(tcp), state_->server, ssl::stream_base::server, Trust::token, timeout);
}

struct TlsCertificate::State {
  ssl::context context{ssl::context::tls_server};
};

TlsCertificate::TlsCertificate(const std::string& certificate_file, const std::string& key_file)
    : state_(std::make_unique<State>()) {
  ssl::context& context = state_->context;
  const auto check = [](const char* what, const std::string& file, const boost::system::error_code& code) {
    if (code) throw RequestError(fmt::format("{} '{}': {}", what, file, code.message()));
  };
  boost::system::error_code code;
  context.use_certificate_chain_file(certificate_file, code);
  check("the TLS certificate", certificate_file, code);
  context.use_private_key_file(key_file, ssl::context::pem, code);
  check("the TLS private key", key_file, code);
  SSL_CTX* native = context.native_handle();
  if (SSL_CTX_check_private_key(native) != 1)
    throw RequestError(
        fmt::format("the TLS private key '{}' does not belong to the certificate '{}'", key_file, certificate_file));
  CARAVAN_ASSERT(SSL_CTX_set_min_proto_version(native, TLS1_2_VERSION) == 1, "OpenSSL 3 has TLS 1.2");
  SSL_CTX_set_mode(native, SSL_MODE_RELEASE_BUFFERS);
}

TlsCertificate::~TlsCertificate() = default;

awaitable<std::unique_ptr<Connection>> TlsCertificate::accept(std::unique_ptr<TcpConnection> tcp,
                                                              Duration timeout) const {
  return handshake(std::move(tcp), state_->context, ssl::stream_base::server, Trust::anyone, timeout);
}

namespace {

constexpr unsigned char kAlertRecord = 21, kMajorVersion = 3, kFatal = 2;

awaitable<void> refuse(std::unique_ptr<TcpConnection> tcp, unsigned char alert, Duration timeout) {
  // Type, version 3.3, two bytes that follow. RFC 8446, sections 5.1 and 6.
  const std::array<unsigned char, 7> record{kAlertRecord, kMajorVersion, 3, 0, 2, kFatal, alert};
  const std::array<ConstBuffer, 1> buffers{asio::buffer(record)};
  co_await tcp->write(buffers);
  co_await close_gently(*tcp, timeout);
}

}  // namespace

awaitable<void> refuse_tls(std::unique_ptr<TcpConnection> tcp, Duration timeout) {
  return refuse(std::move(tcp), SSL_AD_UNKNOWN_PSK_IDENTITY, timeout);
}

awaitable<void> refuse_plaintext(std::unique_ptr<TcpConnection> tcp, Duration timeout) {
  return refuse(std::move(tcp), SSL_AD_CERTIFICATE_REQUIRED, timeout);
}

bool is_tls_alert(std::span<const std::byte, kTlsAlertPrefixBytes> begin) {
  return begin[0] == std::byte{kAlertRecord} && begin[1] == std::byte{kMajorVersion};
}

awaitable<void> close_gently(Connection& connection, Duration timeout) {
  Deadline deadline(connection, timeout);
  try {
    co_await connection.shutdown();
    std::array<std::byte, 4096> dropped;
    while (co_await connection.read_some(dropped) != 0) {
    }
  } catch (const ConnectionError&) {
    // it ended, one way or the other
  }
  connection.close();
}

}  // namespace caravan::net
