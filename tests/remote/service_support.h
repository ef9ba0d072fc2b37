// Backends on loopback, and servers made by hand that send what no server of ours would: for tests of the wire.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "fake_host.h"
#include "net/listener.h"
#include "net/tls.h"
#include "remote/backend_link.h"
#include "remote/backend_service.h"
#include "remote/codec.h"
#include "remote/remote_stage.h"

namespace caravan::remote::testing {

inline BackendOptions local_options() {
  BackendOptions options;
  options.endpoint = {"127.0.0.1", 0};
  options.name = "test-backend";
  return options;
}

inline LinkOptions link_options(std::string token = "") {
  LinkOptions options;
  options.token = std::move(token);
  options.name = "test-server";
  return options;
}

struct Backend {
  explicit Backend(uint64_t memory = 1 << 20, BackendOptions options = local_options())
      : host(memory), service(io, host, std::move(options)) {}
  std::shared_ptr<BackendLink> connect(const LinkOptions& options = link_options()) {
    return BackendLink::connect(io, service.endpoint(), options);
  }
  uint64_t memory_free() const { return service.status().memory_free.at(0); }
  net::IoThreads io{2};
  FakeHost host;
  BackendService service;
};

inline void load(RemoteStage& stage, FakeModel& model, const stage::Stage::ProgressFunction& on_progress = {}) {
  weights::WeightSource* const sources[] = {&model.source};
  stage.load(model.request, sources, on_progress);
}

inline std::string what_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// A peer that speaks the protocol by hand.
class HandMadeServer {
 public:
  HandMadeServer(net::IoThreads& io, const net::Endpoint& endpoint, const std::string& token = "")
      : connection_(net::run_blocking(io.next_executor(), connect(endpoint, token))),
        reader_(*connection_, [](uint16_t) { return net::FrameLimits{1 << 20, 1 << 20}; }) {}
  ~HandMadeServer() { close(); }

  void send_text(std::string_view text) {
    try {
      net::run_blocking(connection_->executor(), connection_->write_text(text));
    } catch (const net::ConnectionError&) {
      // the backend was faster
    }
  }
  static std::string frame(uint16_t type, const google::protobuf::MessageLite& header, std::string_view payload = "") {
    const std::string text = header.SerializeAsString();
    const auto fixed = net::encode_frame_header({type, 0, static_cast<uint32_t>(text.size()), payload.size()});
    return std::string(reinterpret_cast<const char*>(fixed.data()), fixed.size()) + text + std::string(payload);
  }
  static std::string hello() {
    pb::Hello message;
    message.set_protocol_major(kProtocolMajor);
    return frame(1, message);
  }
  void send(MessageType type, const google::protobuf::MessageLite& header, std::string_view payload = "") {
    send_text(frame(static_cast<uint16_t>(type), header, payload));
  }
  // The next frame, or nullopt when the backend has closed.
  std::optional<net::Frame> read() {
    try {
      return net::run_blocking(connection_->executor(), reader_.read());
    } catch (const net::ConnectionError&) {
      return std::nullopt;
    }
  }
  // Reads until the backend closes; the text of the Error it sent before, or "closed".
  std::string read_refusal() {
    std::string text = "closed";
    while (const auto received = read())
      if (received->type == static_cast<uint16_t>(MessageType::error)) text = parse_header<pb::Error>(*received).text();
    return text;
  }
  // The text of the next Error, or "closed"; leaves the connection to the caller, who need not wait for its end.
  std::string read_error() {
    while (const auto received = read())
      if (received->type == static_cast<uint16_t>(MessageType::error)) return parse_header<pb::Error>(*received).text();
    return "closed";
  }
  void greet() {
    send_text(hello());
    const auto ack = read();
    ASSERT_TRUE(ack && ack->type == static_cast<uint16_t>(MessageType::hello_ack));
  }
  void close() {
    net::run_blocking(connection_->executor(), [](net::Connection& c) -> net::awaitable<void> {
      c.close();
      co_return;
    }(*connection_));
  }
  void finish() { net::run_blocking(connection_->executor(), connection_->shutdown()); }

 private:
  static net::awaitable<std::unique_ptr<net::Connection>> connect(net::Endpoint endpoint, std::string token) {
    std::unique_ptr<net::TcpConnection> tcp = co_await net::connect_tcp(endpoint, std::chrono::seconds(5));
    if (token.empty()) co_return tcp;
    const net::TlsPsk psk(token);
    std::unique_ptr<net::Connection> secured = co_await psk.connect(std::move(tcp), std::chrono::seconds(5));
    co_return secured;
  }

  std::unique_ptr<net::Connection> connection_;
  net::FrameReader reader_;
};

}  // namespace caravan::remote::testing
