// TLS in two forms. Between our own programs: TLS 1.3 with a key derived from a shared token (external PSK,
// psk_dhe_ke), no certificates; who has the token is trusted, nobody else gets past the handshake (docs/protocol.md).
// For HTTP: TLS 1.2 or 1.3 with the certificate of a server, as browsers expect.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "net/connection.h"
#include "net/tcp.h"

namespace caravan::net {

// Shorter tokens are refused: they can be guessed from one recorded handshake.
inline constexpr size_t kMinTokenBytes = 16;
// Throws RequestError, which says how long a token has to be, for a shorter one.
void check_token(std::string_view token);

// The key of a token, ready for both sides of a handshake. Const after construction; outlives its connections'
// handshakes.
class TlsPsk {
 public:
  // Throws as check_token().
  explicit TlsPsk(std::string_view token);
  ~TlsPsk();
  TlsPsk(const TlsPsk&) = delete;
  TlsPsk& operator=(const TlsPsk&) = delete;

  // Make a connected TCP connection a TLS one, as the side that connected or the one that accepted; within timeout.
  // Throw ConnectionError: token_differs, peer_has_no_token, timed_out, lost.
  awaitable<std::unique_ptr<Connection>> connect(std::unique_ptr<TcpConnection> tcp, Duration timeout) const;
  awaitable<std::unique_ptr<Connection>> accept(std::unique_ptr<TcpConnection> tcp, Duration timeout) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A server's certificate and private key. Const after construction; outlives its connections.
class TlsCertificate {
 public:
  // Reads PEM files: the certificate chain and the private key, which must belong to it. Throws RequestError naming the
  // file.
  TlsCertificate(const std::string& certificate_file, const std::string& key_file);
  ~TlsCertificate();
  TlsCertificate(const TlsCertificate&) = delete;
  TlsCertificate& operator=(const TlsCertificate&) = delete;

  // Makes an accepted TCP connection a TLS one, within timeout. Throws ConnectionError: timed_out, lost (also when the
  // client speaks no TLS).
  awaitable<std::unique_ptr<Connection>> accept(std::unique_ptr<TcpConnection> tcp, Duration timeout) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The first byte of a TLS handshake record: what a listener sees first from a TLS client.
inline constexpr std::byte kTlsHandshakeByte{0x16};

// Answers a TLS client on a connection that speaks no TLS with the alert unknown_psk_identity, from which the client
// knows that this side has no token, and closes.
awaitable<void> refuse_tls(std::unique_ptr<TcpConnection> tcp, Duration timeout);
// Answers a client that speaks no TLS with the alert certificate_required, from which it knows that this side has a
// token (is_tls_alert()), and closes: nothing but TLS records leave a side that has one.
awaitable<void> refuse_plaintext(std::unique_ptr<TcpConnection> tcp, Duration timeout);

// Whether a stream that should be something else begins as a TLS alert record does: with its type and major version.
inline constexpr size_t kTlsAlertPrefixBytes = 2;
bool is_tls_alert(std::span<const std::byte, kTlsAlertPrefixBytes> begin);

// Ends a connection so that what was written last arrives: shuts down, reads and drops until the peer ends or timeout,
// closes. (Closing with unread input resets a TCP connection, and the peer may lose the last bytes.)
awaitable<void> close_gently(Connection& connection, Duration timeout);

}  // namespace caravan::net
