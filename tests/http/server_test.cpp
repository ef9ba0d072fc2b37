// The HTTP server against raw sockets: requests in pieces, keep-alive, limits, streams, clients that leave.
#include "http/server.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/post.hpp>
#include <future>
#include <string>
#include <thread>

#include "http/event.h"

namespace caravan::http {
namespace {

using std::chrono::milliseconds;

// A blocking client socket on loopback; reads time out after 10 s so that a defect cannot hang the test.
class Client {
 public:
  explicit Client(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    timeval timeout{10, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  ~Client() { leave(); }
  void leave() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void send(std::string_view text) {
    EXPECT_EQ(::send(fd_, text.data(), text.size(), MSG_NOSIGNAL), ssize_t(text.size()));
  }
  // Reads until the text received contains `end`, or the connection ends.
  std::string read_until(std::string_view end) {
    std::string text;
    char c;
    while (text.find(end) == std::string::npos && recv(fd_, &c, 1, 0) == 1) text += c;
    return text;
  }
  std::string read_to_end() { return read_until(std::string(1, '\0') + "never sent"); }

 private:
  int fd_;
};

class HttpServer : public ::testing::Test {
 protected:
  HttpServer() : io_(2) {
    options_.max_body_bytes = 1000;
    options_.error_response = [](std::exception_ptr error) {
      Response response;
      try {
        std::rethrow_exception(error);
      } catch (const HttpError& http_error) {
        response.status = http_error.status();
        response.body = http_error.what();
      } catch (const std::exception& other) {
        response.status = 500;
        response.body = other.what();
      }
      return response;
    };
    router_.add("GET", "/hello", [](Exchange& exchange) -> net::awaitable<void> {
      Response response;
      response.body = "hello " + exchange.request().query.at("name");
      co_await exchange.send(response);
    });
    router_.add("POST", "/echo", [](Exchange& exchange) -> net::awaitable<void> {
      Response response;
      response.body = exchange.request().body;
      co_await exchange.send(response);
    });
    router_.add("GET", "/throw", [](Exchange&) -> net::awaitable<void> {
      throw std::runtime_error("it broke");
      co_return;
    });
    router_.add("GET", "/stream", [](Exchange& exchange) -> net::awaitable<void> {
      Response head;
      head.content_type = "text/event-stream";
      co_await exchange.begin_stream(head);
      co_await exchange.write_chunk("data: 1\n\n");
      co_await exchange.write_chunk("data: 2\n\n");
      co_await exchange.end_stream();
    });
    router_.add("GET", "/wait-late", [this](Exchange& exchange) -> net::awaitable<void> {
      waiting_.set_value();
      AsyncEvent gone(exchange.executor());
      co_await gone.wait(milliseconds(50));  // the end of the connection is read meanwhile
      exchange.on_client_gone([&] { gone.notify(); });
      const bool left = co_await gone.wait(std::chrono::seconds(10));
      exchange.on_client_gone({});
      client_left_.set_value(left);
    });
    router_.add("GET", "/wait", [this](Exchange& exchange) -> net::awaitable<void> {
      AsyncEvent gone(exchange.executor());
      exchange.on_client_gone([&] { gone.notify(); });
      waiting_.set_value();
      const bool left = co_await gone.wait(std::chrono::seconds(10));
      client_left_.set_value(left);
      exchange.on_client_gone({});
      Response response;
      co_await exchange.send(response);
    });
    server_ = std::make_unique<Server>(io_, router_, options_);
    server_->listen({"127.0.0.1", 0});
  }
  ~HttpServer() override { server_->stop(milliseconds(100)); }

  Router router_;
  net::IoThreads io_;
  ServerOptions options_;
  std::unique_ptr<Server> server_;
  std::promise<void> waiting_;
  std::promise<bool> client_left_;
};

TEST_F(HttpServer, NoticesAClientThatHadLeftBeforeTheHandlerAsked) {
  Client client(server_->port());
  client.send("GET /wait-late HTTP/1.1\r\nHost: x\r\n\r\n");
  waiting_.get_future().wait();
  client.leave();
  EXPECT_TRUE(client_left_.get_future().get());
}

TEST_F(HttpServer, AnswersSeveralRequestsOnOneConnection) {
  Client client(server_->port());
  for (int i = 0; i < 3; ++i) {
    client.send("GET /hello?name=a%20b+c HTTP/1.1\r\nHost: x\r\n\r\n");
    const std::string response = client.read_until("hello a b c");
    EXPECT_EQ(response.rfind("HTTP/1.1 200 OK\r\n", 0), 0u) << response;
    EXPECT_NE(response.find("Content-Length: 11\r\n"), std::string::npos) << response;
  }
}

TEST_F(HttpServer, AnswersPipelinedRequestsInOrder) {
  Client client(server_->port());
  client.send(
      "GET /hello?name=1 HTTP/1.1\r\nHost: x\r\n\r\nPOST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\ntwo"
      "GET /hello?name=3 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const std::string all = client.read_to_end();
  const size_t one = all.find("hello 1"), two = all.find("two"), three = all.find("hello 3");
  ASSERT_NE(three, std::string::npos) << all;
  EXPECT_LT(one, two);
  EXPECT_LT(two, three);
}

TEST_F(HttpServer, TakesARequestInSingleBytes) {
  Client client(server_->port());
  for (const char c : std::string("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nbytes"))
    client.send({&c, 1});
  EXPECT_NE(client.read_until("bytes").find("200 OK"), std::string::npos);
}

TEST_F(HttpServer, RefusesTooLargeABodyAndUnknownPathsAndMethods) {
  Client large(server_->port());
  large.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n");
  EXPECT_EQ(large.read_until("\r\n"), "HTTP/1.1 413 Payload Too Large\r\n");
  Client unknown(server_->port());
  unknown.send("GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(unknown.read_until("\r\n"), "HTTP/1.1 404 Not Found\r\n");
  Client method(server_->port());
  method.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(method.read_until("\r\n"), "HTTP/1.1 405 Method Not Allowed\r\n");
}

TEST_F(HttpServer, AnswersGarbageWith400AndCloses) {
  Client client(server_->port());
  client.send("\x16\x03\x01 this is no HTTP\r\n\r\n");
  EXPECT_EQ(client.read_to_end().rfind("HTTP/1.1 400 Bad Request\r\n", 0), 0u);
}

TEST_F(HttpServer, GoesOnAfterAHandlerThrew) {
  Client client(server_->port());
  client.send("GET /throw HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_NE(client.read_until("it broke").find("500 Internal Server Error"), std::string::npos);
  client.send("GET /hello?name=again HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_NE(client.read_until("hello again").find("200 OK"), std::string::npos);
}

TEST_F(HttpServer, StreamsInChunks) {
  Client client(server_->port());
  client.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::string response = client.read_until("0\r\n\r\n");
  EXPECT_NE(response.find("Transfer-Encoding: chunked"), std::string::npos);
  EXPECT_NE(response.find("9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"), std::string::npos) << response;
}

TEST_F(HttpServer, EndsAStreamToAnHttp10ClientByClosing) {
  Client client(server_->port());
  client.send("GET /stream HTTP/1.0\r\n\r\n");
  const std::string response = client.read_to_end();
  EXPECT_EQ(response.find("Transfer-Encoding"), std::string::npos) << response;
  EXPECT_EQ(response.substr(response.find("\r\n\r\n") + 4), "data: 1\n\ndata: 2\n\n");
}

TEST_F(HttpServer, TellsTheHandlerWhenTheClientLeaves) {
  Client client(server_->port());
  client.send("GET /wait HTTP/1.1\r\nHost: x\r\n\r\n");
  waiting_.get_future().wait();
  client.leave();
  EXPECT_TRUE(client_left_.get_future().get());
}

TEST_F(HttpServer, ReflectsTheOriginAndAnswersPreflights) {
  Client client(server_->port());
  client.send("OPTIONS /anything HTTP/1.1\r\nHost: x\r\nOrigin: http://a.example\r\n\r\n");
  const std::string response = client.read_until("\r\n\r\n");
  EXPECT_NE(response.find("200 OK"), std::string::npos);
  EXPECT_NE(response.find("Access-Control-Allow-Origin: http://a.example\r\n"), std::string::npos);
}

TEST_F(HttpServer, AnswersExpectContinue) {
  Client client(server_->port());
  client.send("POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
  EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.send("ok");
  EXPECT_NE(client.read_until("\r\n\r\nok").find("200 OK"), std::string::npos);
}

TEST_F(HttpServer, StopsWhileIdleConnectionsAreOpen) {
  Client idle(server_->port());
  idle.send("GET /hello?name=x HTTP/1.1\r\nHost: x\r\n\r\n");
  idle.read_until("hello x");
  const auto start = std::chrono::steady_clock::now();
  server_->stop(milliseconds(3000));
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(2500));
  EXPECT_EQ(idle.read_to_end(), "");
}

TEST(PercentDecode, KeepsBrokenEscapes) {
  EXPECT_EQ(percent_decode("a%41%zz%4", false), "aA%zz%4");
  EXPECT_EQ(percent_decode("%2", true), "%2");
  EXPECT_EQ(percent_decode("a+b", true), "a b");
}

}  // namespace
}  // namespace caravan::http
