// The API without sockets: every route over a scripted pipeline, called as the HTTP server would.
#pragma once

#include <gtest/gtest.h>

#include <boost/asio/post.hpp>
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "engine/fake_pipeline.h"
#include "http/exchange.h"
#include "net/connection.h"
#include "server/api.h"
#include "server/json.h"

namespace caravan::server::test {

// What a handler sent.
struct Reply {
  int status = 0;
  std::string content_type;
  std::vector<std::pair<std::string, std::string>> headers;
  std::string text;     // the body, or all chunks
  size_t n_chunks = 0;  // of a stream
  bool streamed = false, ended = false;

  Json json() const { return Json::parse(text); }

  // The JSON of every "data:" event of a stream; anything else in it fails the test.
  std::vector<Json> events() const {
    std::vector<Json> events;
    for (std::string rest = text; !rest.empty();) {
      const size_t end = rest.find("\n\n");
      EXPECT_NE(end, std::string::npos) << "an event does not end: " << rest;
      if (end == std::string::npos) break;
      const std::string event = rest.substr(0, end);
      EXPECT_EQ(event.rfind("data: ", 0), 0u) << event;
      EXPECT_EQ(event.find('\n'), std::string::npos) << "JSON is on one line: " << event;
      if (event.rfind("data: ", 0) == 0) events.push_back(Json::parse(event.substr(6)));
      rest.erase(0, end + 2);
    }
    return events;
  }
};

class FakeExchange : public http::Exchange {
 public:
  FakeExchange(net::Executor executor, http::Request request)
      : executor_(std::move(executor)), request_(std::move(request)) {}

  const http::Request& request() const override { return request_; }
  net::Executor executor() const override { return executor_; }
  net::awaitable<void> send(http::Response response) override {
    begin(response);
    reply_.text = std::move(response.body);
    reply_.ended = true;
    co_return;
  }
  net::awaitable<void> begin_stream(http::Response head) override {
    begin(head);
    reply_.streamed = true;
    co_return;
  }
  net::awaitable<void> write_chunk(std::string_view bytes) override {
    const std::lock_guard lock(mutex_);
    ++reply_.n_chunks;
    reply_.text += bytes;
    written_.notify_all();
    co_return;
  }
  net::awaitable<void> end_stream() override {
    reply_.ended = true;
    co_return;
  }
  bool response_begun() const override { return begun_; }
  void on_client_gone(std::function<void()> hook) override { gone_hook_ = std::move(hook); }

  // From the test: the client closes the connection.
  void leave() {
    boost::asio::post(executor_, [this] {
      if (gone_hook_) gone_hook_();
    });
  }
  void wait_for_chunks(size_t n) {
    std::unique_lock lock(mutex_);
    written_.wait(lock, [&] { return reply_.n_chunks >= n; });
  }
  // After the handler has returned.
  const Reply& reply() const { return reply_; }

 private:
  void begin(const http::Response& response) {
    EXPECT_FALSE(begun_) << "one response per exchange";
    begun_ = true;
    reply_.status = response.status;
    reply_.content_type = response.content_type;
    reply_.headers = response.headers;
  }

  const net::Executor executor_;
  const http::Request request_;
  Reply reply_;
  bool begun_ = false;
  std::function<void()> gone_hook_;
  std::mutex mutex_;  // guards the text and number of chunks while the handler runs
  std::condition_variable written_;
};

// A causal model of 263 tokens (see engine/fake_pipeline.h) with a context of 256; or groups as given.
class ApiTest : public ::testing::Test {
 protected:
  explicit ApiTest(std::vector<engine::GroupLimits> groups = {engine::test::full_group(64)},
                   std::unique_ptr<const vocab::Vocabulary> vocabulary = engine::test::make_vocabulary())
      : vocabulary_(std::move(vocabulary)),
        engine_(pipeline_, *vocabulary_),
        api_{engine_, *vocabulary_, facts(groups), {}},
        plan_(engine::test::make_plan(groups)),
        io_(1) {
    add_routes(router_, api_);
    guard_ = make_guard(api_);
  }

  // The model is loaded; tests of the time before do not call this.
  void ready() {
    pipeline_.ready(plan_);
    ASSERT_TRUE(engine_.wait_until_ready(std::chrono::seconds(30)));
  }
  // Makes the answer to a prompt of n_prompt tokens these tokens, and an end-of-generation token after them.
  void script(size_t n_prompt, std::vector<int32_t> tokens) {
    pipeline_.force([n_prompt, tokens = std::move(tokens)](uint32_t position) -> std::optional<int32_t> {
      if (position + 1 < n_prompt) return std::nullopt;
      const size_t index = position + 1 - n_prompt;
      return index < tokens.size() ? tokens[index] : engine::test::kEos;
    });
  }
  void script(size_t n_prompt, std::string_view text) {
    std::vector<int32_t> tokens;
    for (const char c : text) tokens.push_back(engine::test::byte_token(c));
    script(n_prompt, tokens);
  }

  static http::Request request(std::string method, std::string path, std::string body = "") {
    http::Request request;
    request.method = std::move(method);
    request.path = std::move(path);
    request.body = std::move(body);
    return request;
  }
  // Runs the handler as http::Server does.
  net::awaitable<void> dispatch(FakeExchange& exchange) {
    std::exception_ptr failure;
    try {
      if (auto refused = guard_(exchange.request())) {
        co_await exchange.send(std::move(*refused));
        co_return;
      }
      co_await router_.find(exchange.request().method, exchange.request().path)(exchange);
    } catch (const net::ConnectionError&) {
      co_return;
    } catch (...) {
      failure = std::current_exception();
    }
    if (failure && !exchange.response_begun()) {
      http::Response response = error_response(failure);
      co_await exchange.send(std::move(response));
    }
  }
  Reply call(const http::Request& request) {
    FakeExchange exchange(io_.next_executor(), request);
    net::run_blocking(exchange.executor(), dispatch(exchange));
    EXPECT_TRUE(exchange.reply().ended);
    return exchange.reply();
  }
  Reply get(const std::string& path) { return call(request("GET", path)); }
  Reply post(const std::string& path, const Json& body) { return call(request("POST", path, body.dump())); }

  // Checks an error answer; its message contains every word.
  static void expect_error(const Reply& reply, int code, const std::string& type,
                           std::initializer_list<std::string> words = {}) {
    EXPECT_EQ(reply.status, code) << reply.text;
    const Json error = reply.json().value("error", Json::object());
    EXPECT_EQ(error.value("code", 0), code) << reply.text;
    EXPECT_EQ(error.value("type", ""), type) << reply.text;
    for (const std::string& word : words)
      EXPECT_NE(error.value("message", "").find(word), std::string::npos) << reply.text << " lacks " << word;
  }

  engine::test::FakePipeline pipeline_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_;
  engine::Engine engine_;
  Api api_;
  engine::PlanSummary plan_;
  http::Router router_;
  std::function<std::optional<http::Response>(const http::Request&)> guard_;
  net::IoThreads io_;

 private:
  static ModelFacts facts(const std::vector<engine::GroupLimits>& groups) {
    ModelFacts facts;
    facts.path = "/models/toy.gguf";
    facts.architecture = "llama";
    facts.file_type = "Q4_K - Medium";
    facts.n_params = 1000;
    facts.size_bytes = 4000;
    facts.n_ctx_train = 2048;
    facts.n_embd = 3;
    facts.n_vocab = engine::test::kVocabularySize;
    facts.causal = groups.front().kind != engine::GroupLimits::Kind::none;
    facts.created = 1700000000;
    return facts;
  }
};

}  // namespace caravan::server::test
