// caravan health: asks a server for GET /health, or greets a backend; for container health checks.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include "base/error.h"
#include "base/log.h"
#include "commands.h"
#include "entrypoint.h"
#include "model_options.h"
#include "net/io.h"
#include "options.h"
#include "remote/backend_link.h"

namespace caravan::app {
namespace {

struct HealthOptions {
  std::string host, port, token;
  bool asks_backend = false, uses_tls = false;
  int timeout_s = 5;
};

// A connected socket that closes itself.
class Socket {
 public:
  Socket(const HealthOptions& o) {
    if (o.host.ends_with(".sock")) {
      connect_unix(o.host, o.timeout_s);
    } else {
      connect_tcp(o);
    }
  }
  ~Socket() { close(fd_); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  // Returns 0 or the error's number.
  int connect(int family, const sockaddr* address, socklen_t size, int timeout_s) {
    fd_ = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd_ < 0) return errno;
    const timeval timeout{timeout_s, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    if (::connect(fd_, address, size) == 0) return 0;
    const int error = errno;
    close(fd_);
    fd_ = -1;
    return error;
  }

  void connect_unix(const std::string& path, int timeout_s) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) throw RequestError("the path of the socket is too long: " + path);
    std::memcpy(address.sun_path, path.data(), path.size());
    const int error = connect(AF_UNIX, reinterpret_cast<const sockaddr*>(&address), sizeof address, timeout_s);
    if (error != 0) throw SystemError("connect to " + path, error);
  }

  void connect_tcp(const HealthOptions& o) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* addresses = nullptr;
    const int unresolved = getaddrinfo(o.host.c_str(), o.port.c_str(), &hints, &addresses);
    if (unresolved != 0) throw Error(fmt::format("{}: {}", o.host, gai_strerror(unresolved)));
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(addresses, freeaddrinfo);
    int error = EHOSTUNREACH;
    for (const addrinfo* a = addresses; a != nullptr && error != 0; a = a->ai_next)
      error = connect(a->ai_family, a->ai_addr, a->ai_addrlen, o.timeout_s);
    if (error != 0) throw SystemError(fmt::format("connect to {}:{}", o.host, o.port), error);
  }

  int fd_ = -1;
};

constexpr size_t kMostAnswer = 65536;

std::string exchange(const Socket& socket, const std::string& request) {
  if (send(socket.fd(), request.data(), request.size(), MSG_NOSIGNAL) < 0) throw SystemError("send", errno);
  std::string response;
  char buffer[4096];
  for (ssize_t n; response.size() < kMostAnswer && (n = recv(socket.fd(), buffer, sizeof buffer, 0)) > 0;)
    response.append(buffer, static_cast<size_t>(n));
  return response;
}

// The same over TLS. The certificate is not looked at: this asks whether a server of one's own answers, and tells
// nothing.
std::string exchange_by_tls(const Socket& socket, const std::string& request) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
  const std::unique_ptr<SSL, decltype(&SSL_free)> tls(SSL_new(context.get()), SSL_free);
  if (!tls || SSL_set_fd(tls.get(), socket.fd()) != 1 || SSL_connect(tls.get()) != 1)
    throw Error("the server does not speak TLS");
  if (SSL_write(tls.get(), request.data(), static_cast<int>(request.size())) <= 0) throw Error("TLS: cannot send");
  std::string response;
  char buffer[4096];
  for (int n; response.size() < kMostAnswer && (n = SSL_read(tls.get(), buffer, sizeof buffer)) > 0;)
    response.append(buffer, static_cast<size_t>(n));
  return response;
}

int ask_server(const HealthOptions& o) {
  const Socket socket(o);
  const std::string request = fmt::format("GET /health HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
                                          o.host.ends_with(".sock") ? "localhost" : o.host);
  const std::string response = o.uses_tls ? exchange_by_tls(socket, request) : exchange(socket, request);
  const size_t body = response.find("\r\n\r\n");
  fmt::print("{}\n", body == std::string::npos ? "no answer" : response.substr(body + 4));
  return response.starts_with("HTTP/1.1 200") ? 0 : 1;
}

int ask_backend(const HealthOptions& o) {
  configure_logging(parse_log_level("off"));
  net::IoThreads io(1);
  remote::LinkOptions options;
  options.token = o.token;
  options.name = "health check";
  options.role = remote::LinkOptions::Role::tool;
  options.connect_timeout = std::chrono::seconds(o.timeout_s);
  const auto port = static_cast<uint16_t>(parse_integer(o.port, 1, 65535));
  const auto link = remote::BackendLink::connect(io, {o.host, port}, options);
  fmt::print("backend '{}': {} MiB free\n", link->info().name, link->info().memory_free() >> 20);
  return 0;
}

// The value of the last of these options in a command line, "" when none is there.
std::string last_value(const std::vector<std::string>& arguments, std::initializer_list<std::string_view> names) {
  std::string value;
  for (size_t i = 0; i < arguments.size(); ++i)
    for (const std::string_view name : names) {
      if (arguments[i] == name && i + 1 < arguments.size()) value = arguments[i + 1];
      if (arguments[i].starts_with(std::string(name) + "=")) value = arguments[i].substr(name.size() + 1);
    }
  return value;
}

// In a container process 1 tells what runs there; elsewhere, and where process 1 is another's, a server is asked.
Launch running_launch() {
  std::ifstream file("/proc/1/cmdline", std::ios::binary);  // files of /proc have no size
  const std::string command_line{std::istreambuf_iterator<char>(file), {}};
  return launch_of_process(command_line, process_environment).value_or(Launch{"server", {}});
}

// Where it listens, as an address to connect to.
std::string reachable(const std::string& host) {
  if (host.empty() || host == "0.0.0.0") return "127.0.0.1";
  return host == "::" ? "::1" : host;
}

}  // namespace

int run_health(int argc, char** argv) {
  const Launch launch = running_launch();
  HealthOptions o;
  o.asks_backend = launch.command == "backend";
  std::string certificate = last_value(launch.arguments, {"--ssl-cert-file"});
  OptionParser parser(
      "caravan health [--host HOST] [--port N] [--backend]",
      "Asks a server for its health, or greets a backend. Exit status: 0 ready, 1 not. In a container it\n"
      "finds out by itself what runs there and where.");
  parser.add({{"--backend"}, "", "ask a backend, not a server", {}, into(o.asks_backend)});
  parser.add({{"--host"},
              "HOST",
              "where it listens, or the path of a Unix socket (127.0.0.1)",
              {"LLAMA_ARG_HOST", "APP_BIND"},
              into(o.host)});
  parser.add({{"--port"},
              "N",
              "its port (8080 of a server, 50052 of a backend)",
              {"LLAMA_ARG_PORT", "APP_PORT"},
              [&o](const std::string& value) { o.port = std::to_string(parse_integer(value, 1, 65535)); }});
  parser.add({{"--tls"}, "", "the server speaks HTTPS", {}, into(o.uses_tls)});
  parser.add({{"--timeout"}, "S", "seconds to wait for the answer (5)", {}, into(o.timeout_s, 1, 3600)});
  add_token_options(parser, o.token, "a backend's secret");
  // What the process was started with stands before what its environment says, but behind this command's own options.
  std::vector<std::string> words{"health"};
  for (const auto& [name, value] :
       {std::pair<std::string, std::string>{"--host", last_value(launch.arguments, {"--host", "-H"})},
        {"--port", last_value(launch.arguments, {"--port", "-p"})},
        {"--rpc-token", last_value(launch.arguments, {"--rpc-token"})},
        {"--rpc-token-file", last_value(launch.arguments, {"--rpc-token-file"})}})
    if (!value.empty()) words.insert(words.end(), {name, value});
  words.insert(words.end(), argv + 1, argv + argc);
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  if (parser.parse(static_cast<int>(pointers.size()), pointers.data()) == OptionParser::Result::exit) return 0;

  if (launch.command != "server" && launch.command != "backend" && argc == 1) {
    fmt::print("{}: nothing listens here\n", launch.command);
    return 0;
  }
  if (process_environment("LLAMA_ARG_SSL_CERT_FILE").value_or("").size() + certificate.size() > 0) o.uses_tls = true;
  o.host = reachable(o.host);
  if (o.port.empty()) o.port = o.asks_backend ? "50052" : "8080";
  return o.asks_backend ? ask_backend(o) : ask_server(o);
}

}  // namespace caravan::app
