#include "http/server.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/asio/post.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <condition_variable>
#include <thread>
#include <type_traits>

#include "base/log.h"
#include "http/event.h"

namespace caravan::http {
namespace {

namespace beast_http = boost::beast::http;
using Parser = beast_http::request_parser<beast_http::string_body>;

constexpr size_t kReadSize = 16 * 1024;
// Bytes of later requests that are read ahead while a handler runs; after that the client is no longer watched.
constexpr size_t kReadAhead = 256 * 1024;

std::string lower(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return result;
}

// Whether "scheme://host[:port]" is this machine.
bool is_local_origin(std::string_view origin) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (origin.substr(0, scheme.size()) != scheme) continue;
    std::string_view host = origin.substr(scheme.size());
    const size_t end = host.starts_with('[') ? host.find(']') : std::string_view::npos;
    const size_t colon = host.find(':', end == std::string_view::npos ? 0 : end);
    const std::string_view port = colon == std::string_view::npos ? std::string_view() : host.substr(colon + 1);
    if (!std::all_of(port.begin(), port.end(), [](char c) { return c >= '0' && c <= '9'; })) return false;
    host = host.substr(0, colon);
    return host == "localhost" || host == "127.0.0.1" || host == "[::1]";
  }
  return false;
}

// Counts while it lives.
class Counter {
 public:
  explicit Counter(std::atomic<size_t>& count) : count_(count) { count_.fetch_add(1); }
  ~Counter() { count_.fetch_sub(1); }
  Counter(const Counter&) = delete;
  Counter& operator=(const Counter&) = delete;

 private:
  std::atomic<size_t>& count_;
};

int parse_error_status(const boost::system::error_code& error) {
  if (error == beast_http::error::body_limit) return 413;
  if (error == beast_http::error::header_limit) return 431;
  return 400;
}

}  // namespace

// One connection: a reader coroutine that always has one read outstanding, and the loop that serves its requests.
class Server::Session : public Exchange, public std::enable_shared_from_this<Server::Session> {
 public:
  Session(Server& server, std::unique_ptr<net::Connection> connection)
      : server_(server),
        connection_(std::move(connection)),
        arrived_(connection_->executor()),
        space_(connection_->executor()) {
    server_.n_tasks_.fetch_add(1);
    const std::lock_guard lock(server_.mutex_);
    server_.sessions_.insert(this);
  }
  ~Session() override {
    {
      const std::lock_guard lock(server_.mutex_);
      server_.sessions_.erase(this);
    }
    server_.n_tasks_.fetch_sub(1);  // the last use of the server
  }

  const Request& request() const override { return request_; }
  net::Executor executor() const override { return connection_->executor(); }
  bool response_begun() const override { return response_begun_; }
  void on_client_gone(std::function<void()> hook) override {
    client_gone_hook_ = std::move(hook);
    if (!client_gone_hook_ || !ended_) return;
    boost::asio::post(executor(), [self = shared_from_this()] {  // not before the caller is ready for it
      if (self->client_gone_hook_) self->client_gone_hook_();
    });
  }

  // Ends the connection: at once when no exchange is running, otherwise (now is false) after it.
  void close(bool now) {
    boost::asio::post(executor(), [self = shared_from_this(), now] {
      self->keep_alive_ = false;
      if (now || !self->in_exchange_) self->connection_->close();
    });
  }

  // Reads as long as the connection lives.
  net::awaitable<void> read_loop() {
    std::array<std::byte, kReadSize> buffer;
    try {
      for (;;) {
        while (received_.size() >= kReadAhead && !closed_) co_await space_.wait(std::chrono::hours(1));
        const size_t n = co_await connection_->read_some(buffer);
        if (n == 0) break;
        received_.append(reinterpret_cast<const char*>(buffer.data()), n);
        arrived_.notify();
      }
    } catch (const net::ConnectionError&) {
      // the client has gone, or close() was called: the same to us
    }
    ended_ = true;
    arrived_.notify();
    if (client_gone_hook_) client_gone_hook_();
  }

  // Serves requests one after the other until the connection ends.
  net::awaitable<void> serve_loop() {
    try {
      while (keep_alive_ && co_await serve_one()) {
      }
      co_await connection_->shutdown();
    } catch (const net::ConnectionError& error) {
      spdlog::debug("{}: {}", connection_->peer(), error.what());
    }
    connection_->close();
    closed_ = true;
    space_.notify();
  }

  net::awaitable<void> send(Response response) override {
    std::string head = start_head(response);
    head += fmt::format("Content-Length: {}\r\n\r\n", response.body.size());
    if (request_.method != "HEAD") head += response.body;
    response_begun_ = true;
    co_await write(std::move(head));
  }

  net::awaitable<void> begin_stream(Response head) override {
    response_begun_ = true;
    chunked_ = http_minor_ >= 1;
    if (!chunked_) keep_alive_ = false;  // HTTP/1.0: the end of the connection ends the body
    std::string text = start_head(head);
    text += chunked_ ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n";
    co_await write(std::move(text));
  }

  net::awaitable<void> write_chunk(std::string_view bytes) override {
    if (bytes.empty() || request_.method == "HEAD") co_return;
    std::string text = chunked_ ? fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes) : std::string(bytes);
    co_await write(std::move(text));
  }

  net::awaitable<void> end_stream() override {
    std::string last_chunk = "0\r\n\r\n";
    if (chunked_ && request_.method != "HEAD") co_await write(std::move(last_chunk));
  }

 private:
  // Status line and headers, without those that say where the body ends.
  std::string start_head(const Response& response) {
    std::string head = fmt::format("HTTP/1.1 {} {}\r\nServer: llama.cpp\r\nContent-Type: {}\r\n", response.status,
                                   status_text(response.status), response.content_type);
    for (const auto& [name, value] : response.headers) head += fmt::format("{}: {}\r\n", name, value);
    head += cors_headers();
    if (!keep_alive_) head += "Connection: close\r\n";
    return head;
  }

  std::string cors_headers() const {
    const std::string_view origin = request_.header("origin");
    if (origin.empty() || server_.options_.cors_origins.empty()) return "";
    if (server_.options_.cors_origins == "localhost") {
      if (!is_local_origin(origin)) return "";
    } else if (server_.options_.cors_origins != "*") {
      const std::string list = "," + server_.options_.cors_origins + ",";
      if (list.find("," + std::string(origin) + ",") == std::string::npos) return "";
    }
    return fmt::format(
        "Access-Control-Allow-Origin: {}\r\nAccess-Control-Allow-Credentials: true\r\n"
        "Access-Control-Allow-Methods: GET, POST, DELETE, OPTIONS\r\nAccess-Control-Allow-Headers: *\r\nVary: "
        "Origin\r\n",
        origin);
  }

  // Callers name the string first: g++ 12 destroys temporaries of a co_await expression twice.
  net::awaitable<void> write(std::string bytes) {
    const net::Deadline deadline(*connection_, server_.options_.write_timeout);
    co_await connection_->write_text(bytes);
  }

  // Reads one request into request_. False: the connection ended, or nothing came in time. Throws HttpError.
  net::awaitable<bool> read_request() {
    Parser parser;
    parser.eager(true);
    parser.header_limit(server_.options_.max_header_bytes);
    parser.body_limit(server_.options_.max_body_bytes);
    bool continue_sent = false;
    while (!parser.is_done()) {
      if (received_.empty()) {
        if (ended_) {
          if (parser.got_some()) throw HttpError(400, "the connection ended in the middle of a request");
          co_return false;
        }
        if (!co_await arrived_.wait(server_.options_.idle_timeout) && received_.empty() && !ended_) {
          if (parser.got_some()) throw HttpError(408, "the request did not arrive in time");
          co_return false;
        }
        continue;
      }
      boost::system::error_code error;
      const size_t used = parser.put(boost::asio::buffer(received_), error);
      if (error && error != beast_http::error::need_more)
        throw HttpError(parse_error_status(error), "not a valid HTTP request: " + error.message());
      const bool stuck = used == 0 && error == beast_http::error::need_more;
      received_.erase(0, used);
      space_.notify();
      if (parser.is_header_done() && !continue_sent && !parser.is_done() &&
          lower(std::string_view(parser.get()["expect"])) == "100-continue") {
        continue_sent = true;
        std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
        co_await write(std::move(go_on));
      }
      if (stuck) {  // an incomplete line: the parser wants it together with what follows
        if (received_.size() > server_.options_.max_header_bytes) throw HttpError(431, "a header line is too long");
        if (ended_) throw HttpError(400, "the connection ended in the middle of a request");
        if (!co_await arrived_.wait(server_.options_.idle_timeout))
          throw HttpError(408, "the request did not arrive in time");
      }
    }
    take_request(parser.release());
    co_return true;
  }

  void take_request(beast_http::request<beast_http::string_body>&& message) {
    http_minor_ = message.version() % 10;
    keep_alive_ = keep_alive_ && message.keep_alive();
    request_ = {};
    request_.method = std::string(message.method_string());
    request_.peer = connection_->peer();
    parse_target(std::string_view(message.target().data(), message.target().size()), request_);
    for (const auto& field : message)
      request_.headers.emplace(lower(std::string_view(field.name_string().data(), field.name_string().size())),
                               std::string(field.value()));
    request_.body = std::move(message.body());
  }

  // Serves one request. False: the connection is to be closed.
  net::awaitable<bool> serve_one() {
    response_begun_ = chunked_ = false;
    std::exception_ptr failure;
    bool readable = true;
    try {
      if (!co_await read_request()) co_return false;
    } catch (const HttpError&) {
      failure = std::current_exception();
      readable = false;
      keep_alive_ = false;
    }
    const Counter active(server_.active_exchanges_);
    in_exchange_ = true;
    if (readable) {
      try {
        co_await dispatch();
      } catch (const net::ConnectionError&) {
        throw;
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (failure && !response_begun_) {
      Response response = server_.options_.error_response(failure);
      co_await send(std::move(response));
    }
    if (failure && response_begun_ && readable && chunked_) keep_alive_ = false;
    client_gone_hook_ = {};
    in_exchange_ = false;
    co_return keep_alive_ && !server_.stopping_.load();
  }

  net::awaitable<void> dispatch() {
    if (request_.method == "OPTIONS") {
      Response preflight;
      preflight.content_type = "text/html";
      co_await send(std::move(preflight));
      co_return;
    }
    if (server_.options_.guard) {
      if (auto refused = server_.options_.guard(request_)) {
        co_await send(std::move(*refused));
        co_return;
      }
    }
    co_await server_.router_.find(request_.method, request_.path)(*this);
    if (!response_begun_) throw HttpError(500, "the handler gave no response");
  }

  Server& server_;
  const std::unique_ptr<net::Connection> connection_;
  std::string received_;  // not yet parsed
  AsyncEvent arrived_, space_;
  bool ended_ = false;   // the client sends nothing more
  bool closed_ = false;  // nothing more is served
  bool keep_alive_ = true;
  bool in_exchange_ = false;
  bool response_begun_ = false;
  bool chunked_ = false;
  unsigned http_minor_ = 1;
  Request request_;
  std::function<void()> client_gone_hook_;
};

Server::Server(net::IoThreads& io, const Router& router, ServerOptions options)
    : io_(io), router_(router), options_(std::move(options)) {
  CARAVAN_ASSERT(options_.error_response, "the owner says how errors look");
}

Server::~Server() { stop(std::chrono::milliseconds(0)); }

void Server::listen(const net::Endpoint& endpoint) {
  listener_ = std::make_unique<net::Listener>(io_, endpoint);
  n_tasks_.fetch_add(1);
  net::spawn(listener_->executor(), "http listener", accept_loop(*listener_));
}

void Server::listen_unix(const std::string& path) {
  unix_listener_ = std::make_unique<net::UnixListener>(io_, path);
  n_tasks_.fetch_add(1);
  net::spawn(unix_listener_->executor(), "http listener", accept_loop(*unix_listener_));
}

uint16_t Server::port() const { return listener_ ? listener_->port() : 0; }

template <typename Listener>
net::awaitable<void> Server::accept_loop(Listener& listener) {
  while (auto connection = co_await listener.accept()) {
    if constexpr (std::is_same_v<Listener, net::Listener>) {
      if (options_.certificate) {
        const net::Executor executor = connection->executor();
        n_tasks_.fetch_add(1);
        net::spawn(executor, "http handshake", serve_tls(std::move(connection)));
        continue;
      }
    }
    serve(std::move(connection));
  }
  n_tasks_.fetch_sub(1);
}

net::awaitable<void> Server::serve_tls(std::unique_ptr<net::TcpConnection> connection) {
  constexpr auto kTimeout = std::chrono::seconds(4);  // less than stop() waits
  try {
    std::unique_ptr<net::Connection> secured = co_await options_.certificate->accept(std::move(connection), kTimeout);
    if (!stopping_.load()) serve(std::move(secured));
  } catch (const net::ConnectionError& error) {
    spdlog::debug("{}", error.what());
  }
  n_tasks_.fetch_sub(1);
}

void Server::serve(std::unique_ptr<net::Connection> connection) {
  size_t open;
  {
    const std::lock_guard lock(mutex_);
    open = sessions_.size();
  }
  if (open >= options_.max_connections) {
    spdlog::warn("http: refused {}: {} connections are open, the most allowed", connection->peer(), open);
    return;
  }
  const net::Executor executor = connection->executor();
  auto session = std::make_shared<Session>(*this, std::move(connection));
  const auto keep = [](std::shared_ptr<Session> self, bool reads) -> net::awaitable<void> {
    if (reads) {
      co_await self->read_loop();
    } else {
      co_await self->serve_loop();
    }
  };
  net::spawn(executor, "http reader", keep(session, true));
  net::spawn(executor, "http session", keep(session, false));
}

void Server::stop(std::chrono::milliseconds grace) {
  if (stopping_.exchange(true)) return;
  if (listener_) boost::asio::post(listener_->executor(), [this] { listener_->close(); });
  if (unix_listener_) boost::asio::post(unix_listener_->executor(), [this] { unix_listener_->close(); });
  const auto close_all = [this](bool now) {
    std::vector<std::shared_ptr<Session>> alive;  // released after the lock: a session's destructor takes it
    {
      const std::lock_guard lock(mutex_);
      for (Session* session : sessions_)
        if (auto shared = session->weak_from_this().lock()) alive.push_back(std::move(shared));
    }
    for (const auto& session : alive) session->close(now);
  };
  constexpr auto kStep = std::chrono::milliseconds(5);
  const auto wait_until = [&](std::chrono::steady_clock::time_point end, auto&& done) {
    while (!done() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(kStep);
  };
  close_all(false);
  wait_until(std::chrono::steady_clock::now() + grace, [this] { return active_exchanges_.load() == 0; });
  close_all(true);
  constexpr auto kUnwind = std::chrono::seconds(5);  // handlers notice a closed connection at their next write
  wait_until(std::chrono::steady_clock::now() + kUnwind, [this] { return n_tasks_.load() == 0; });
  if (n_tasks_.load() != 0) spdlog::warn("http: {} tasks did not end in time", n_tasks_.load());
}

}  // namespace caravan::http
