// caravan health: asks a server for GET /health, for container health checks.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"
#include "commands.h"
#include "options.h"

namespace caravan::app {
namespace {

// A connected TCP socket that closes itself.
class Socket {
 public:
  Socket(const std::string& host, const std::string& port, int timeout_s) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* addresses = nullptr;
    const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &addresses);
    if (error != 0) throw Error(fmt::format("{}: {}", host, gai_strerror(error)));
    const timeval timeout{timeout_s, 0};
    int connect_error = 0;
    for (const addrinfo* a = addresses; a != nullptr && fd_ < 0; a = a->ai_next) {
      fd_ = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
      if (fd_ < 0) continue;
      setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
      setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
      if (connect(fd_, a->ai_addr, a->ai_addrlen) != 0) {
        connect_error = errno;
        close(fd_);
        fd_ = -1;
      }
    }
    freeaddrinfo(addresses);
    if (fd_ < 0) throw SystemError(fmt::format("connect to {}:{}", host, port), connect_error);
  }
  ~Socket() { close(fd_); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  std::string exchange(const std::string& request) const {
    if (send(fd_, request.data(), request.size(), MSG_NOSIGNAL) < 0) throw SystemError("send", errno);
    std::string response;
    char buffer[4096];
    constexpr size_t kMost = 65536;
    for (ssize_t n; response.size() < kMost && (n = recv(fd_, buffer, sizeof buffer, 0)) > 0;)
      response.append(buffer, static_cast<size_t>(n));
    return response;
  }

 private:
  int fd_ = -1;
};

}  // namespace

int run_health(int argc, char** argv) {
  std::string host = "127.0.0.1";
  int port = 8080, timeout_s = 5;
  OptionParser parser("caravan health [--host HOST] [--port N]",
                      "Asks a server for its health. Exit status: 0 ready, 1 not.");
  parser.add({{"--host"}, "HOST", "where the server listens (127.0.0.1)", {}, into(host)});
  parser.add({{"--port"}, "N", "its port (8080)", {"LLAMA_ARG_PORT", "APP_PORT"}, into(port, 1, 65535)});
  parser.add({{"--timeout"}, "S", "seconds to wait for the answer (5)", {}, into(timeout_s, 1, 3600)});
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;

  const Socket socket(host, std::to_string(port), timeout_s);
  const std::string response =
      socket.exchange(fmt::format("GET /health HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", host));
  const size_t body = response.find("\r\n\r\n");
  fmt::print("{}\n", body == std::string::npos ? "no answer" : response.substr(body + 4));
  return response.rfind("HTTP/1.1 200", 0) == 0 ? 0 : 1;
}

}  // namespace caravan::app
