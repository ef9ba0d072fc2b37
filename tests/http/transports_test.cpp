// What carries HTTP: TLS with a certificate, Unix domain sockets; and which origins and paths are known.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/write.hpp>
#include <filesystem>
#include <string>

#include "http/server.h"
#include "support/kit.h"

namespace caravan::http {
namespace {

namespace asio = boost::asio;
using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string data_file(const std::string& name) { return (testing::test_data_directory() / name).string(); }

class HttpTransports : public ::testing::Test {
 protected:
  HttpTransports() : io_(2) {
    options_.error_response = [](std::exception_ptr error) {
      Response response;
      response.status = 500;
      try {
        std::rethrow_exception(error);
      } catch (const HttpError& http_error) {
        response.status = http_error.status();
      } catch (const std::exception&) {
        response.status = 500;
      }
      return response;
    };
    const auto name_of_path = [](Exchange& exchange) -> net::awaitable<void> {
      Response response;
      response.body = "path " + exchange.request().path;
      co_await exchange.send(std::move(response));
    };
    router_.add("GET", "/hello", name_of_path);
    router_.add("GET", "/items/{id}", name_of_path);
    router_.add("GET", "/items/first", [](Exchange& exchange) -> net::awaitable<void> {
      Response response;
      response.body = "the exact one";
      co_await exchange.send(std::move(response));
    });
  }
  ~HttpTransports() override {
    if (server_) server_->stop(milliseconds(100));
  }
  Server& server() {
    server_ = std::make_unique<Server>(io_, router_, options_);
    return *server_;
  }

  // One request over a connected stream, read to the end.
  template <typename Stream>
  static std::string exchange(Stream& stream, const std::string& request) {
    asio::write(stream, asio::buffer(request));
    std::string text;
    boost::system::error_code code;
    asio::read(stream, asio::dynamic_buffer(text), code);
    return text;
  }
  std::string over_tcp(const std::string& request) {
    asio::ip::tcp::socket socket(client_);
    socket.connect({asio::ip::address_v4::loopback(), server_->port()});
    return exchange(socket, request);
  }
  static std::string get(const std::string& path, const std::string& headers = "") {
    return "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + "\r\n";
  }

  Router router_;
  net::IoThreads io_;
  ServerOptions options_;
  std::unique_ptr<Server> server_;
  asio::io_context client_;
};

TEST_F(HttpTransports, SpeaksTlsWithACertificateThatTheClientCanCheck) {
  options_.certificate =
      std::make_shared<const net::TlsCertificate>(data_file("tls_certificate.pem"), data_file("tls_key.pem"));
  server().listen({"127.0.0.1", 0});
  asio::ssl::context trust(asio::ssl::context::tls_client);
  trust.load_verify_file(data_file("tls_certificate.pem"));
  trust.set_verify_mode(asio::ssl::verify_peer);
  for (int i = 0; i < 2; ++i) {
    asio::ssl::stream<asio::ip::tcp::socket> stream(client_, trust);
    stream.next_layer().connect({asio::ip::address_v4::loopback(), server_->port()});
    stream.handshake(asio::ssl::stream_base::client);
    const std::string response = exchange(stream, get("/hello"));
    EXPECT_THAT(response, StartsWith("HTTP/1.1 200 OK\r\nServer: llama.cpp\r\n"));
    EXPECT_THAT(response, HasSubstr("path /hello"));
  }
  // A client without TLS gets no answer, and the server goes on.
  EXPECT_THAT(over_tcp(get("/hello")), ::testing::Not(HasSubstr("path /hello")));
  asio::ssl::stream<asio::ip::tcp::socket> after(client_, trust);
  after.next_layer().connect({asio::ip::address_v4::loopback(), server_->port()});
  after.handshake(asio::ssl::stream_base::client);
  EXPECT_THAT(exchange(after, get("/hello")), HasSubstr("path /hello"));
}

TEST(TlsCertificate, NamesTheFileThatIsMissingOrDoesNotFit) {
  const auto message = [](const std::string& certificate, const std::string& key) -> std::string {
    try {
      net::TlsCertificate loaded(certificate, key);
    } catch (const RequestError& error) {
      return error.what();
    }
    return "no error";
  };
  const std::string certificate = data_file("tls_certificate.pem");
  EXPECT_THAT(message("/no/such.pem", data_file("tls_key.pem")), HasSubstr("/no/such.pem"));
  EXPECT_THAT(message(certificate, "/no/key.pem"), HasSubstr("/no/key.pem"));
  EXPECT_THAT(message(certificate, data_file("README.md")), HasSubstr("README.md"));
  EXPECT_THAT(message(certificate, data_file("tls_other_key.pem")), HasSubstr("tls_other_key.pem"));
}

class UnixSocketServer : public HttpTransports {
 protected:
  ~UnixSocketServer() override { server_.reset(); }
  std::string over_unix(const std::string& request) {
    asio::local::stream_protocol::socket socket(client_);
    socket.connect(asio::local::stream_protocol::endpoint(path_));
    return exchange(socket, request);
  }
  const testing::TemporaryDirectory folder_;
  const std::string path_ = (folder_.path() / "api.sock").string();
};

TEST_F(UnixSocketServer, AnswersOnAUnixSocketAndRemovesItAtTheEnd) {
  server().listen_unix(path_);
  EXPECT_EQ(server_->port(), 0);
  EXPECT_THAT(over_unix(get("/hello")), HasSubstr("path /hello"));
  EXPECT_THAT(over_unix(get("/hello")), HasSubstr("path /hello"));
  server_.reset();
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(UnixSocketServer, TakesOverASocketThatNobodyListensOnButNoOther) {
  {
    asio::local::stream_protocol::acceptor left(client_, asio::local::stream_protocol::endpoint(path_));
  }
  ASSERT_TRUE(std::filesystem::exists(path_));
  server().listen_unix(path_);
  EXPECT_THAT(over_unix(get("/hello")), HasSubstr("path /hello"));
  Server second(io_, router_, options_);
  EXPECT_THROW(second.listen_unix(path_), SystemError);
  EXPECT_THAT(over_unix(get("/hello")), HasSubstr("path /hello"));
  EXPECT_THROW(second.listen_unix("/" + std::string(300, 'x')), RequestError);
  EXPECT_THROW(second.listen_unix((folder_.path() / "no/such/folder").string()), SystemError);
}

TEST_F(HttpTransports, ReflectsOnlyOriginsOfThisMachineWhenToldSo) {
  options_.cors_origins = "localhost";
  server().listen({"127.0.0.1", 0});
  const auto reflected = [&](const std::string& origin) {
    return over_tcp(get("/hello", "Origin: " + origin + "\r\n")).find("Access-Control-Allow-Origin: " + origin) !=
           std::string::npos;
  };
  for (const char* local :
       {"http://localhost", "https://localhost:8080", "http://127.0.0.1:3000", "http://[::1]", "http://[::1]:81"})
    EXPECT_TRUE(reflected(local)) << local;
  for (const char* other :
       {"http://localhost.example", "http://example", "ftp://localhost", "http://localhost:80.example",
        "http://127.0.0.1.example", "null", "http://user@localhost", "http://[::1"})
    EXPECT_FALSE(reflected(other)) << other;
}

TEST_F(HttpTransports, AnExactPathGoesBeforeOneWithAPlaceholder) {
  server().listen({"127.0.0.1", 0});
  EXPECT_THAT(over_tcp(get("/items/first")), HasSubstr("the exact one"));
  EXPECT_THAT(over_tcp(get("/items/7")), HasSubstr("path /items/7"));
  EXPECT_THAT(over_tcp(get("/items/")), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(over_tcp(get("/items/7/8")), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(over_tcp("POST /items/7 HTTP/1.1\r\nConnection: close\r\n\r\n"), StartsWith("HTTP/1.1 405"));
}

}  // namespace
}  // namespace caravan::http
