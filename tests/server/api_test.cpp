// The endpoints over a scripted pipeline: shapes, statuses, streams, errors, keys.
#include "server/api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "base/base64.h"
#include "server/api_harness.h"

namespace caravan::server {
namespace {

using engine::test::byte_token;
using test::Reply;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using State = engine::EngineStatus::State;

std::vector<std::string> keys(const Json& object) {
  std::vector<std::string> names;
  for (const auto& item : object.items()) names.push_back(item.key());
  return names;
}

class ApiLoading : public test::ApiTest {};

class ApiReady : public test::ApiTest {
 protected:
  void SetUp() override { ready(); }
  const Json prompt_ = {1, byte_token('a'), byte_token('b')};
  Json body(const Json& more = Json::object()) const {
    Json body = {{"prompt", prompt_}, {"temperature", 0}};
    body.update(more);
    return body;
  }
};

TEST_F(ApiLoading, AnswersThatTheModelLoadsBeforeAnythingElse) {
  api_.settings.api_keys = {"secret"};
  expect_error(get("/health"), 503, "unavailable_error", {"Loading model"});
  for (const char* path : {"/v1/models", "/props", "/metrics", "/no/such/path"})
    expect_error(get(path), 503, "unavailable_error", {"Loading model"});
  expect_error(post("/completion", {{"prompt", "a"}}), 503, "unavailable_error", {"Loading model"});
  EXPECT_EQ(get("/livez").status, 200);
}

TEST_F(ApiLoading, ServesTheChatPageToEveryoneMeanwhile) {
  api_.settings.api_keys = {"secret"};
  const test::Reply page = get("/");
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.content_type, "text/html; charset=utf-8");
  EXPECT_EQ(page.text.rfind("<!doctype html>", 0), 0u);
  for (const char* file : {"app.js", "style.css", "markdown.js", "icon.svg", "index.html"}) {
    EXPECT_EQ(get("/" + std::string(file)).status, 200) << file;
    EXPECT_EQ(get("/" + std::string(file)).content_type.find("json"), std::string::npos) << file;
  }
}

TEST_F(ApiReady, IsHealthyAndAlive) {
  EXPECT_EQ(get("/health").text, R"({"status":"ok"})");
  EXPECT_EQ(get("/v1/health").text, R"({"status":"ok"})");
  EXPECT_EQ(get("/livez").text, R"({"status":"alive"})");
}

TEST_F(ApiReady, IsNotHealthyWithoutAPlanAndSaysWhy) {
  pipeline_.lose("backend 10.0.0.2:50052: connection lost");
  while (engine_.status().state != State::no_plan) std::this_thread::yield();
  expect_error(get("/health"), 503, "unavailable_error", {"10.0.0.2:50052"});
  expect_error(get("/v1/health"), 503, "unavailable_error", {"10.0.0.2:50052"});
  EXPECT_EQ(get("/livez").status, 200);
  EXPECT_EQ(get("/v1/models").status, 200);
  EXPECT_EQ(get("/props").status, 200);
  EXPECT_EQ(get("/metrics").status, 200);
}

TEST_F(ApiReady, ChecksKeysButForPublicPages) {
  api_.settings.api_keys = {"first", "second"};
  expect_error(get("/props"), 401, "authentication_error", {"Invalid API Key"});
  expect_error(get("/no/such/path"), 401, "authentication_error");
  for (const char* path : {"/health", "/v1/health", "/livez", "/models", "/v1/models"})
    EXPECT_EQ(get(path).status, 200);
  const auto with = [&](const char* header, const char* value) {
    http::Request r = request("GET", "/props");
    r.headers.emplace(header, value);
    return call(r).status;
  };
  EXPECT_EQ(with("authorization", "Bearer first"), 200);
  EXPECT_EQ(with("authorization", "Bearer second"), 200);
  EXPECT_EQ(with("authorization", "second"), 200);
  EXPECT_EQ(with("x-api-key", "first"), 200);
  for (const char* wrong : {"Bearer", "Bearer ", "Bearer third", "Bearer firs", "Bearer first ", "Basic first", ""})
    EXPECT_EQ(with("authorization", wrong), 401) << wrong;
}

TEST_F(ApiReady, PutsThePrefixBeforeEveryPath) {
  http::Router router;
  add_routes(router, api_, "/llm");
  EXPECT_TRUE(router.knows("/llm/completion") && router.knows("/llm/health") && router.knows("/llm/slots"));
  EXPECT_FALSE(router.knows("/completion"));
  api_.settings.api_keys = {"k"};
  const auto guard = make_guard(api_, "/llm");
  EXPECT_EQ(guard(request("GET", "/llm/health")), std::nullopt);
  EXPECT_NE(guard(request("GET", "/health")), std::nullopt) << "a path without the prefix is not public";
}

TEST_F(ApiReady, AnswersUnknownPathsAndMethods) {
  expect_error(get("/no/such/path"), 404, "not_found_error", {"File Not Found"});
  expect_error(get("/completion"), 405, "invalid_request_error", {"POST"});
}

TEST_F(ApiReady, CompletesAPrompt) {
  script(3, "hi\nyou");
  const Reply reply = post("/completion", body({{"return_tokens", true}}));
  ASSERT_EQ(reply.status, 200) << reply.text;
  EXPECT_THAT(reply.content_type, HasSubstr("application/json"));
  const Json answer = reply.json();
  ASSERT_TRUE(answer.is_object()) << reply.text;
  EXPECT_EQ(answer.at("content"), "hi\nyou");
  EXPECT_EQ(answer.at("index"), 0);
  EXPECT_EQ(answer.at("stop"), true);
  EXPECT_EQ(answer.at("stop_type"), "eos");
  EXPECT_EQ(answer.at("stopping_word"), "");
  EXPECT_EQ(answer.at("has_new_line"), true);
  EXPECT_EQ(answer.at("truncated"), false);
  EXPECT_EQ(answer.at("model"), "/models/toy.gguf");
  EXPECT_EQ(answer.at("tokens").size(), 6u);
  EXPECT_EQ(answer.at("tokens")[0], byte_token('h'));
  EXPECT_EQ(answer.at("tokens_evaluated"), 3);
  EXPECT_EQ(answer.at("tokens_predicted"), 7) << "the end-of-generation token counts";
  EXPECT_EQ(answer.at("prompt"), "<s>ab");
  EXPECT_TRUE(answer.at("stopped_eos") && !answer.at("stopped_word") && !answer.at("stopped_limit"));
  EXPECT_EQ(answer.at("generation_settings").at("temperature"), 0);
  EXPECT_EQ(answer.at("timings").at("prompt_n"), 3);
  EXPECT_EQ(answer.at("timings").at("predicted_n"), 7);
  for (const char* name : {"cache_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_ms",
                           "predicted_per_token_ms", "predicted_per_second"})
    EXPECT_TRUE(answer.at("timings").at(name).is_number()) << name;
  EXPECT_FALSE(answer.contains("completion_probabilities"));
}

TEST_F(ApiReady, ListsTokensOnlyWhereAsked) {
  script(3, "hi");
  EXPECT_EQ(post("/completions", body()).json().at("tokens"), Json::array());
}

TEST_F(ApiReady, EchoesTheSeed) {
  script(3, "hi");
  EXPECT_EQ(post("/completion", body({{"seed", 77}})).json().at("generation_settings").at("seed"), 77);
  EXPECT_TRUE(post("/completion", body()).json().at("generation_settings").at("seed").is_number_unsigned());
}

TEST_F(ApiReady, SaysWhyAnAnswerEnded) {
  script(3, "one two three");
  const Json limit = post("/completion", body({{"n_predict", 3}})).json();
  EXPECT_EQ(limit.at("content"), "one");
  EXPECT_EQ(limit.at("stop_type"), "limit");
  EXPECT_EQ(limit.at("stopped_limit"), true);
  const Json word = post("/completion", body({{"stop", {"two"}}})).json();
  EXPECT_EQ(word.at("content"), "one ");
  EXPECT_EQ(word.at("stop_type"), "word");
  EXPECT_EQ(word.at("stopping_word"), "two");
}

TEST_F(ApiReady, AnswersSeveralPromptsAsAnArrayInTheirOrder) {
  const Json answers =
      post("/completion", {{"prompt", {"a", {1, 5}, "b"}}, {"n_predict", 1}, {"temperature", 0}}).json();
  ASSERT_TRUE(answers.is_array());
  ASSERT_EQ(answers.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(answers[i].at("index"), i);
  EXPECT_EQ(answers[1].at("tokens_evaluated"), 2);
  EXPECT_TRUE(post("/completion", {{"prompt", Json::array({"a"})}, {"n_predict", 1}}).json().is_object());
}

TEST_F(ApiReady, SelectsTheFieldsThatAreAskedFor) {
  script(3, "hi");
  const Json answer =
      post("/completion",
           body({{"response_fields", {"content", "timings/prompt_n", "no_such", "content/x", "timings/", ""}}}))
          .json();
  EXPECT_THAT(keys(answer), ElementsAre("content", "timings/prompt_n"));
  EXPECT_EQ(answer.at("timings/prompt_n"), 3);
}

TEST_F(ApiReady, GivesProbabilitiesOfEveryToken) {
  script(3, "hi");
  const Json answer = post("/completion", body({{"n_probs", 2}})).json();
  const Json& steps = answer.at("completion_probabilities");
  ASSERT_TRUE(steps.is_array());
  ASSERT_EQ(steps.size(), 2u) << "the end-of-generation token is not listed";
  EXPECT_EQ(steps[0].at("id"), byte_token('h'));
  EXPECT_EQ(steps[0].at("token"), "h");
  EXPECT_EQ(steps[0].at("bytes"), Json::array({104}));
  EXPECT_LE(steps[0].at("logprob").get<double>(), 0);
  ASSERT_EQ(steps[0].at("top_logprobs").size(), 2u);
  EXPECT_EQ(steps[0].at("top_logprobs")[0].at("id"), byte_token('h'));
  EXPECT_THAT(keys(steps[0].at("top_logprobs")[1]), ElementsAre("id", "token", "bytes", "logprob"));
}

TEST_F(ApiReady, WritesBytesThatAreNoTextInProbabilities) {
  script(3, std::vector<int32_t>{byte_token('\xc3'), byte_token('\xbc')});
  const Json answer = post("/completion", body({{"n_probs", 1}})).json();
  EXPECT_EQ(answer.at("content"), "ü");
  EXPECT_EQ(answer.at("completion_probabilities")[0].at("bytes"), Json::array({0xc3}));
  EXPECT_EQ(answer.at("completion_probabilities")[0].at("token"), "\xef\xbf\xbd");
}

TEST_F(ApiReady, GivesProbabilitiesAfterSampling) {
  script(3, "hi");
  const Json answer = post("/completion", body({{"n_probs", 2}, {"post_sampling_probs", true}})).json();
  const Json& step = answer.at("completion_probabilities")[0];
  EXPECT_THAT(keys(step), ElementsAre("id", "token", "bytes", "prob", "top_probs"));
  EXPECT_EQ(step.at("prob"), 1) << "greedy";
  ASSERT_EQ(step.at("top_probs").size(), 1u) << "the others are impossible";
  EXPECT_THAT(keys(step.at("top_probs")[0]), ElementsAre("id", "token", "bytes", "prob"));
}

TEST_F(ApiReady, GivesSeveralCompletionsOfAPrompt) {
  const Json answers =
      post("/completion", body({{"n_cmpl", 3}, {"n_predict", 8}, {"temperature", 2}, {"seed", 9}})).json();
  ASSERT_EQ(answers.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(answers[i].at("index"), i);
    EXPECT_EQ(answers[i].at("generation_settings").at("seed"), 9 + i);
  }
  const Json alone = post("/completion", body({{"n_predict", 8}, {"temperature", 2}, {"seed", 10}})).json();
  EXPECT_EQ(answers[1].at("content"), alone.at("content"));
  expect_error(post("/completion", body({{"n", 5}})), 400, "invalid_request_error", {"'n'", "4"});
}

TEST_F(ApiReady, StreamsProgressAndTimingsWhereAsked) {
  script(3, "hi");
  const Reply reply =
      post("/completion", body({{"stream", true}, {"return_progress", true}, {"timings_per_token", true}}));
  const std::vector<Json> events = reply.events();
  ASSERT_GT(events.size(), 2u);
  const Json& progress = events[0].at("prompt_progress");
  EXPECT_EQ(progress.at("total"), 3);
  EXPECT_EQ(progress.at("processed"), 3);
  EXPECT_EQ(progress.at("cache"), 0);
  EXPECT_TRUE(progress.at("time_ms").is_number());
  EXPECT_EQ(events[0].at("content"), "");
  EXPECT_EQ(events[1].at("timings").at("predicted_n"), 1);
  EXPECT_FALSE(events[1].contains("prompt_progress"));
  EXPECT_FALSE(post("/completion", body({{"stream", true}})).events()[0].contains("timings"));
}

TEST_F(ApiReady, CompletesInTheShapeOfOpenAi) {
  script(3, "hi you");
  const Json answer = post("/v1/completions", body({{"max_tokens", 4}, {"model", "any"}})).json();
  EXPECT_THAT(keys(answer),
              ElementsAre("choices", "created", "model", "system_fingerprint", "object", "id", "usage", "timings"));
  EXPECT_EQ(answer.at("object"), "text_completion");
  EXPECT_EQ(answer.at("model"), "/models/toy.gguf");
  EXPECT_EQ(answer.at("system_fingerprint").get<std::string>()[0], 'b');
  EXPECT_EQ(answer.at("id").get<std::string>().rfind("chatcmpl-", 0), 0u);
  EXPECT_EQ(answer.at("choices"),
            Json::parse(R"([{"text": "hi y", "index": 0, "logprobs": null, "finish_reason": "length"}])"));
  EXPECT_EQ(answer.at("usage").at("prompt_tokens"), 3);
  EXPECT_EQ(answer.at("usage").at("completion_tokens"), 4);
  EXPECT_EQ(answer.at("usage").at("total_tokens"), 7);
  EXPECT_EQ(post("/v1/completions", body()).json().at("choices")[0].at("finish_reason"), "stop");
  EXPECT_NE(post("/v1/completions", body()).json().at("id"), answer.at("id"));
}

TEST_F(ApiReady, EchoesThePromptInTheShapeOfOpenAi) {
  script(3, "hi");
  EXPECT_EQ(post("/v1/completions", body({{"echo", true}})).json().at("choices")[0].at("text"), "abhi");
  const Reply reply = post("/v1/completions", body({{"echo", true}, {"stream", true}}));
  EXPECT_THAT(reply.text, HasSubstr("abh"));
}

TEST_F(ApiReady, CountsEveryChoiceInTheShapeOfOpenAi) {
  const Json answer = post("/v1/completions", {{"prompt", {{1, 5}, {1, 6, 7}}},
                                               {"n", 2},
                                               {"best_of", 2},
                                               {"max_tokens", 2},
                                               {"temperature", 0},
                                               {"ignore_eos", true}})
                          .json();
  ASSERT_EQ(answer.at("choices").size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(answer.at("choices")[i].at("index"), i);
  EXPECT_EQ(answer.at("usage").at("prompt_tokens"), 5);
  EXPECT_EQ(answer.at("usage").at("completion_tokens"), 8);
}

TEST_F(ApiReady, GivesLogprobsInBothShapes) {
  script(3, std::vector<int32_t>{byte_token('\xc3'), byte_token('\xbc'), byte_token('x')});
  const Json logprobs = post("/v1/completions", body({{"logprobs", 2}})).json().at("choices")[0].at("logprobs");
  ASSERT_EQ(logprobs.at("content").size(), 3u);
  EXPECT_EQ(logprobs.at("content")[2].at("token"), "x");
  EXPECT_EQ(logprobs.at("tokens")[2], "x");
  EXPECT_EQ(logprobs.at("token_logprobs")[2], logprobs.at("content")[2].at("logprob"));
  EXPECT_EQ(logprobs.at("top_logprobs")[2].size(), 2u);
  EXPECT_EQ(logprobs.at("text_offset"), Json::array({0, 1, 1})) << "characters, not bytes";
}

TEST_F(ApiReady, StreamsChunksInTheShapeOfOpenAi) {
  script(3, "hi");
  const Reply reply =
      post("/v1/completions", body({{"stream", true}, {"logprobs", 1}, {"stream_options", {{"include_usage", true}}}}));
  EXPECT_EQ(reply.content_type, "text/event-stream");
  const std::string done = "data: [DONE]\n\n";
  ASSERT_TRUE(reply.text.ends_with(done)) << reply.text;
  Reply events = reply;
  events.text.resize(events.text.size() - done.size());
  const std::vector<Json> chunks = events.events();
  ASSERT_EQ(chunks.size(), 4u);
  for (const Json& chunk : chunks) {
    EXPECT_EQ(chunk.at("id"), chunks[0].at("id"));
    EXPECT_EQ(chunk.at("object"), "text_completion");
  }
  EXPECT_EQ(chunks[0].at("choices")[0].at("text"), "h");
  EXPECT_EQ(chunks[0].at("choices")[0].at("finish_reason"), nullptr);
  EXPECT_EQ(chunks[1].at("choices")[0].at("logprobs").at("text_offset"), Json::array({1}));
  EXPECT_FALSE(chunks[1].contains("usage"));
  EXPECT_EQ(chunks[2].at("choices")[0].at("finish_reason"), "stop");
  EXPECT_EQ(chunks[2].at("choices")[0].at("text"), "");
  EXPECT_TRUE(chunks[2].contains("timings"));
  EXPECT_EQ(chunks[3].at("choices"), Json::array());
  EXPECT_EQ(chunks[3].at("usage").at("completion_tokens"), 3);
}

TEST_F(ApiReady, NamesWhatTheShapeOfOpenAiDoesNotSupport) {
  expect_error(post("/v1/completions", body({{"suffix", "x"}})), 501, "not_supported_error", {"'suffix'"});
  expect_error(post("/v1/completions", body({{"best_of", 3}})), 501, "not_supported_error", {"'best_of'"});
  expect_error(post("/v1/completions", body({{"echo", true}, {"logprobs", 1}})), 501, "not_supported_error",
               {"'echo'"});
  expect_error(post("/v1/completions", Json::object()), 400, "invalid_request_error", {"'prompt'"});
  expect_error(post("/v1/completions", body({{"temperature", "x"}})), 400, "invalid_request_error", {"temperature"});
  expect_error(post("/completion", body({{"echo", true}})), 501, "not_supported_error", {"'echo'"});
  pipeline_.fail_when([](const stage::Batch&) { return true; }, "out of order");
  for (const bool stream : {false, true})
    EXPECT_THAT(post("/v1/completions", body({{"stream", stream}})).text, HasSubstr("out of order"));
}

TEST_F(ApiReady, StreamsEventsWhoseContentsAreTheWholeAnswer) {
  script(3, "hi ünd you");
  const std::string whole = post("/completion", body()).json().at("content");
  const Reply reply = post("/completion", body({{"stream", true}, {"n_probs", 1}}));
  EXPECT_EQ(reply.status, 200);
  EXPECT_TRUE(reply.streamed);
  EXPECT_EQ(reply.content_type, "text/event-stream");
  const std::vector<Json> events = reply.events();
  ASSERT_GT(events.size(), 5u);
  EXPECT_EQ(reply.n_chunks, events.size()) << "every event is sent at once";
  std::string text;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    EXPECT_EQ(events[i].at("stop"), false);
    EXPECT_EQ(events[i].at("index"), 0);
    EXPECT_EQ(events[i].at("completion_probabilities").size(), events[i].at("tokens").size());
    text += events[i].at("content");
  }
  EXPECT_EQ(text, whole);
  const Json& last = events.back();
  EXPECT_EQ(last.at("stop"), true);
  EXPECT_EQ(last.at("content"), "");
  EXPECT_EQ(last.at("tokens"), Json::array());
  EXPECT_EQ(last.at("stop_type"), "eos");
  EXPECT_EQ(last.at("generation_settings").at("stream"), true);
  EXPECT_THAT(reply.text, Not(HasSubstr("[DONE]"))) << "the native endpoint does not send it";
}

TEST_F(ApiReady, StreamsSeveralPromptsWithTheirIndex) {
  const Reply reply =
      post("/completion", {{"prompt", {"a", "b"}}, {"n_predict", 4}, {"stream", true}, {"temperature", 0}});
  std::map<int, int> n_last;
  for (const Json& event : reply.events()) n_last[event.at("index")] += event.at("stop").get<bool>();
  EXPECT_EQ(n_last, (std::map<int, int>{{0, 1}, {1, 1}}));
}

TEST_F(ApiReady, NamesBadFieldsInsteadOfStreaming) {
  const Reply reply = post("/completion", body({{"stream", true}, {"top_k", "x"}}));
  EXPECT_FALSE(reply.streamed);
  expect_error(reply, 400, "invalid_request_error", {"top_k"});
  expect_error(post("/completion", Json::object()), 400, "invalid_request_error", {"'prompt'"});
  expect_error(post("/completion", {{"prompt", nullptr}}), 400, "invalid_request_error", {"'prompt'"});
  expect_error(post("/completion", {{"prompt", Json::array()}}), 400, "invalid_request_error", {"'prompt'"});
  expect_error(call(request("POST", "/completion", "{")), 400, "invalid_request_error", {"JSON"});
  expect_error(post("/completion", body({{"grammar", "x"}})), 400, "invalid_request_error", {"grammar line 1"});
  expect_error(post("/completion", body({{"json_schema", {{"type", "hiccup"}}}})), 400, "invalid_request_error",
               {"'json_schema'", "#/type"});
}

TEST_F(ApiReady, RefusesAPromptThatExceedsTheContext) {
  const Reply reply = post("/completion", {{"prompt", std::vector<int>(300, 5)}, {"stream", true}});
  expect_error(reply, 400, "exceed_context_size_error", {"exceeds the available context size"});
  EXPECT_EQ(reply.json().at("error").at("n_prompt_tokens"), 300);
  EXPECT_EQ(reply.json().at("error").at("n_ctx"), 256);
}

TEST_F(ApiReady, RefusesAllPromptsWhenOneIsBad) {
  expect_error(post("/completion", {{"prompt", Json::array({"a", std::vector<int>(300, 5)})}}), 400,
               "exceed_context_size_error");
  while (engine_.status().counters.cancelled + engine_.status().counters.finished < 1) std::this_thread::yield();
}

TEST_F(ApiReady, AnswersAFailureBeforeTheFirstEventWithAStatus) {
  pipeline_.fail_when([](const stage::Batch&) { return true; }, "out of order");
  for (const bool stream : {false, true}) {
    const Reply reply = post("/completion", body({{"stream", stream}}));
    EXPECT_FALSE(reply.streamed);
    EXPECT_GE(reply.status, 400);
    EXPECT_EQ(reply.json().at("error").at("code"), reply.status);
    EXPECT_THAT(reply.text, HasSubstr("out of order"));
  }
}

TEST_F(ApiReady, SendsAFailureInMidStreamAsTheLastEvent) {
  script(3, std::string(100, 'x'));
  pipeline_.fail_when(
      [](const stage::Batch& batch) { return !batch.positions.empty() && batch.positions.back()[0] >= 8; },
      "out of order");
  const Reply reply = post("/completion", body({{"stream", true}}));
  EXPECT_EQ(reply.status, 200);
  ASSERT_TRUE(reply.streamed && reply.ended);
  const auto events = reply.events();
  ASSERT_GT(events.size(), 1u);
  EXPECT_EQ(events.front().at("content"), "x");
  EXPECT_THAT(keys(events.back()), ElementsAre("error"));
  EXPECT_THAT(events.back().at("error").at("message").get<std::string>(), HasSubstr("out of order"));
  EXPECT_TRUE(events.back().at("error").at("code").is_number());
}

TEST_F(ApiReady, AnswersAFailureInTheMiddleOfAWholeAnswerWithAStatus) {
  script(3, std::string(100, 'x'));
  pipeline_.fail_when(
      [](const stage::Batch& batch) { return !batch.positions.empty() && batch.positions.back()[0] >= 8; },
      "out of order");
  EXPECT_GE(post("/completion", body()).status, 400);
}

TEST_F(ApiReady, StopsWhenTheClientLeavesTheStream) {
  script(3, std::string(200, 'x'));
  pipeline_.close_gate();
  test::FakeExchange exchange(io_.next_executor(), request("POST", "/completion", body({{"stream", true}}).dump()));
  auto done = boost::asio::co_spawn(exchange.executor(), dispatch(exchange), boost::asio::use_future);
  pipeline_.release(1);
  exchange.wait_for_chunks(1);
  exchange.leave();
  done.get();
  EXPECT_FALSE(exchange.reply().ended);
  pipeline_.open_gate();
  while (engine_.status().slots_busy > 0) std::this_thread::yield();
  EXPECT_EQ(engine_.status().counters.cancelled, 1u);
  EXPECT_LT(exchange.reply().n_chunks, 100u);
}

TEST_F(ApiReady, StopsWhenTheClientOfAWholeAnswerLeaves) {
  script(3, std::string(200, 'x'));
  pipeline_.close_gate();
  test::FakeExchange exchange(io_.next_executor(), request("POST", "/completion", body().dump()));
  auto done = boost::asio::co_spawn(exchange.executor(), dispatch(exchange), boost::asio::use_future);
  pipeline_.wait_for_batches(1);
  exchange.leave();
  done.get();
  EXPECT_EQ(exchange.reply().status, 0) << "nobody is there to answer";
  pipeline_.open_gate();
  while (engine_.status().counters.cancelled < 1) std::this_thread::yield();
}

TEST_F(ApiReady, RefusesToGenerateWhereItOnlyEmbeds) {
  api_.settings.embeddings_only = true;
  expect_error(post("/completion", body()), 501, "not_supported_error", {"--embeddings"});
  api_.settings.embeddings_only = false;
  api_.model.causal = false;
  expect_error(post("/completion", body()), 501, "not_supported_error", {"encoder"});
}

TEST_F(ApiReady, EmbedsOneOrSeveralTexts) {
  const Json one = post("/embedding", {{"content", "ab"}}).json();
  ASSERT_TRUE(one.is_array());
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].at("index"), 0);
  ASSERT_EQ(one[0].at("embedding").size(), 1u) << "a list with one pooled vector";
  ASSERT_EQ(one[0].at("embedding")[0].size(), 3u);
  double square = 0;
  for (const double x : one[0].at("embedding")[0]) square += x * x;
  EXPECT_NEAR(square, 1, 1e-5);

  const Json several = post("/embeddings", {{"input", {"ab", {1, 5}, "a"}}}).json();
  ASSERT_EQ(several.size(), 3u);
  EXPECT_EQ(several[0].at("embedding"), one[0].at("embedding"));
  EXPECT_EQ(several[2].at("index"), 2);
}

TEST_F(ApiReady, EmbedsEveryTokenWithoutPooling) {
  api_.model.pooling = engine::Pooling::none;
  EXPECT_EQ(post("/embedding", {{"content", {1, 5, 6, 7}}}).json()[0].at("embedding").size(), 4u);
}

TEST_F(ApiReady, LeavesVectorsAsTheyAreWhereAsked) {
  const Json raw = post("/embedding", {{"content", "ab"}, {"embd_normalize", -1}}).json()[0].at("embedding")[0];
  const Json unit = post("/embedding", {{"content", "ab"}, {"encoding_format", "float"}}).json()[0].at("embedding")[0];
  EXPECT_NE(raw, unit);
  EXPECT_NEAR(raw[0].get<double>() * unit[1].get<double>(), raw[1].get<double>() * unit[0].get<double>(), 1e-5);
}

TEST_F(ApiReady, EmbedsInTheShapeOfOpenAi) {
  const Json native = post("/embedding", {{"input", {"ab", "a"}}}).json();
  const Json answer = post("/v1/embeddings", {{"input", {"ab", "a"}}, {"model", "mine"}, {"dimensions", 3}}).json();
  EXPECT_THAT(keys(answer), ElementsAre("model", "object", "usage", "data"));
  EXPECT_EQ(answer.at("model"), "mine");
  EXPECT_EQ(answer.at("object"), "list");
  EXPECT_EQ(answer.at("usage"), Json({{"prompt_tokens", 5}, {"total_tokens", 5}}));
  ASSERT_EQ(answer.at("data").size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_THAT(keys(answer.at("data")[i]), ElementsAre("embedding", "index", "object"));
    EXPECT_EQ(answer.at("data")[i].at("embedding"), native[i].at("embedding")[0]);
    EXPECT_EQ(answer.at("data")[i].at("index"), i);
  }
  EXPECT_EQ(post("/v1/embeddings", {{"input", "ab"}}).json().at("model"), "/models/toy.gguf");
  EXPECT_TRUE(post("/v1/embeddings", {{"content", "ab"}}).json().is_array()) << "content asks for the native shape";
  api_.model.pooling = engine::Pooling::none;
  expect_error(post("/v1/embeddings", {{"input", "ab"}}), 400, "invalid_request_error", {"pooling"});
}

TEST_F(ApiReady, EmbedsAsBase64) {
  const auto call = [&](const char* format) {
    return post("/v1/embeddings", {{"input", "ab"}, {"encoding_format", format}}).json().at("data")[0];
  };
  const auto values = call("float").at("embedding").get<std::vector<float>>();
  const Json coded = call("base64");
  EXPECT_EQ(coded.at("encoding_format"), "base64");
  EXPECT_EQ(coded.at("embedding"),
            base64_encode({reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)}));
}

TEST_F(ApiReady, NamesWhatIsWrongWithAnEmbedding) {
  expect_error(post("/embedding", Json::object()), 400, "invalid_request_error", {"'content'", "'input'"});
  expect_error(post("/embedding", {{"content", 5}}), 400, "invalid_request_error", {"'content'"});
  expect_error(post("/embedding", {{"input", 5}}), 400, "invalid_request_error", {"'input'"});
  expect_error(post("/v1/embeddings", {{"input", "a"}, {"dimensions", 2}}), 501, "not_supported_error",
               {"'dimensions'"});
  expect_error(post("/embedding", {{"input", "a"}, {"encoding_format", "x"}}), 400, "invalid_request_error",
               {"'encoding_format'"});
  for (const Json& value : {Json(-2), Json(4294967297), Json(1.5), Json("x")})
    expect_error(post("/embedding", {{"input", "a"}, {"embd_normalize", value}}), 400, "invalid_request_error",
                 {"'embd_normalize'"});
  expect_error(post("/embedding", {{"input", std::vector<int>(300, 5)}}), 400, "exceed_context_size_error");
  expect_error(post("/embedding", {{"input", Json::array({Json::array()})}}), 400, "invalid_request_error", {"empty"});
}

TEST_F(ApiReady, Tokenizes) {
  const auto ids = vocabulary_->tokenize("ab", vocab::AddSpecial::no, vocab::ParseSpecial::yes);
  EXPECT_EQ(post("/tokenize", {{"content", "ab"}}).json(), Json({{"tokens", ids}}));
  EXPECT_EQ(post("/tokenize", {{"content", "ab"}, {"add_special", true}}).json().at("tokens")[0], 1);
  EXPECT_EQ(post("/tokenize", {{"content", "</s>"}}).json().at("tokens"), Json::array({2}));
  EXPECT_NE(post("/tokenize", {{"content", "</s>"}, {"parse_special", false}}).json().at("tokens"), Json::array({2}));
  EXPECT_EQ(post("/tokenize", {{"content", ""}}).json(), Json({{"tokens", Json::array()}}));
  expect_error(post("/tokenize", Json::object()), 400, "invalid_request_error", {"'content'"});
  expect_error(post("/tokenize", {{"content", 5}}), 400, "invalid_request_error", {"'content'"});
  expect_error(post("/tokenize", {{"content", "a"}, {"add_special", 1}}), 400, "invalid_request_error",
               {"'add_special'"});
}

TEST_F(ApiReady, TokenizesWithPiecesAsTextOrBytes) {
  const Json tokens = post("/tokenize", {{"content", "ü"}, {"with_pieces", true}}).json().at("tokens");
  ASSERT_GE(tokens.size(), 2u);
  const Json& last = tokens.back();
  EXPECT_THAT(keys(last), ElementsAre("id", "piece"));
  EXPECT_EQ(last.at("id"), byte_token('\xbc'));
  EXPECT_EQ(last.at("piece"), Json::array({0xbc}));
  const Json text = post("/tokenize", {{"content", "x"}, {"with_pieces", true}}).json().at("tokens");
  EXPECT_EQ(text.back().at("piece"), "x");
}

TEST_F(ApiReady, Detokenizes) {
  EXPECT_EQ(post("/detokenize", {{"tokens", {byte_token('h'), byte_token('i')}}}).json(), Json({{"content", "hi"}}));
  EXPECT_EQ(post("/detokenize", {{"tokens", Json::array()}}).json(), Json({{"content", ""}}));
  for (const Json& tokens : {Json(5), Json("x"), Json::array({-1}), Json::array({263}), Json::array({1.5}),
                             Json::array({"a"}), Json::array({18446744073709551615u}), Json(nullptr)})
    expect_error(post("/detokenize", {{"tokens", tokens}}), 400, "invalid_request_error", {"'tokens'"});
}

TEST_F(ApiReady, ListsTheModel) {
  api_.model.aliases = {"alpha", "beta"};
  const Json list = get("/v1/models").json();
  EXPECT_EQ(list, get("/models").json());
  EXPECT_THAT(keys(list), ElementsAre("models", "object", "data"));
  EXPECT_EQ(list.at("object"), "list");
  ASSERT_TRUE(list.at("data").is_array());
  ASSERT_EQ(list.at("data").size(), 1u);
  const Json& model = list.at("data")[0];
  ASSERT_TRUE(model.is_object());
  EXPECT_EQ(model.at("id"), "alpha");
  EXPECT_EQ(model.at("aliases"), Json::array({"alpha", "beta"}));
  EXPECT_EQ(model.at("object"), "model");
  EXPECT_EQ(model.at("created"), 1700000000);
  const Json& meta = model.at("meta");
  EXPECT_EQ(meta.at("n_vocab"), 263);
  EXPECT_EQ(meta.at("n_ctx"), 256);
  EXPECT_EQ(meta.at("n_ctx_train"), 2048);
  EXPECT_EQ(meta.at("size"), 4000);
  EXPECT_EQ(meta.at("n_params"), 1000);
  ASSERT_EQ(list.at("models").size(), 1u);
  const Json& old = list.at("models")[0];
  ASSERT_TRUE(old.is_object());
  EXPECT_EQ(old.at("name"), "alpha");
  EXPECT_EQ(old.at("capabilities"), Json::array({"completion"}));
  EXPECT_EQ(old.at("tags"), Json::array());
  EXPECT_EQ(old.at("details").at("families"), Json::array({"llama"}));
  EXPECT_EQ(old.at("details").at("quantization_level"), "Q4_K - Medium");
}

TEST_F(ApiReady, DescribesItselfInProps) {
  const Json props = get("/props").json();
  ASSERT_TRUE(props.is_object());
  EXPECT_EQ(props.at("total_slots"), 4);
  EXPECT_EQ(props.at("model_path"), "/models/toy.gguf");
  EXPECT_EQ(props.at("model_alias"), "/models/toy.gguf");
  EXPECT_EQ(props.at("modalities"), Json({{"vision", false}, {"video", false}, {"audio", false}}));
  EXPECT_EQ(props.at("bos_token"), "<s>");
  EXPECT_EQ(props.at("eos_token"), "</s>");
  EXPECT_THAT(props.at("chat_template").get<std::string>(), HasSubstr("<|im_start|>"))
      << "chatml where a model has none";
  const Json& defaults = props.at("default_generation_settings");
  EXPECT_EQ(defaults.at("n_ctx"), 256);
  EXPECT_EQ(defaults.at("params").at("seed"), 4294967295u);
  EXPECT_EQ(defaults.at("params").at("samplers").size(), 9u);
  EXPECT_EQ(props.at("plan").at("epoch"), 1);
  ASSERT_TRUE(props.at("plan").at("stages").is_array());
  ASSERT_EQ(props.at("plan").at("stages").size(), 1u);
  EXPECT_EQ(props.at("plan").at("stages")[0].at("layers"), Json::array({0, 0}));
  EXPECT_EQ(props.at("plan").at("stages")[0].at("replica"), 0);
}

TEST_F(ApiReady, CountsInPrometheusFormat) {
  script(3, "hi");
  pipeline_.machines = {{{"10.0.0.2:50052", 0.0005, 0.00025, 1000, 2000}}, plan_.epoch, {3}, {3, {{"a:1", 3}}, 2, 1.5}};
  post("/completion", body());
  while (engine_.status().counters.finished < 1) std::this_thread::yield();
  const Reply reply = get("/metrics");
  EXPECT_THAT(reply.content_type, HasSubstr("text/plain"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:prompt_tokens_total 3\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:tokens_predicted_total 3\n"));
  EXPECT_THAT(reply.text, HasSubstr("# TYPE llamacpp:requests_total counter\nllamacpp:requests_total 1\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:requests_processing 0\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:backend_rtt_seconds{backend=\"10.0.0.2:50052\"} 0.0005\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:backend_rtt_mean_seconds{backend=\"10.0.0.2:50052\"} 0.00025\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:backend_received_bytes_total{backend=\"10.0.0.2:50052\"} 1000\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:backend_sent_bytes_total{backend=\"10.0.0.2:50052\"} 2000\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:replicas_lost_total 3\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:recoveries_total 2\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:recovery_seconds_total 1.5\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:device_losses_total{device=\"a:1\"} 3\n"));
  EXPECT_THAT(reply.text, HasSubstr("\nllamacpp:stage_queue{stage=\"0\",replica=\"0\",device=\""));
  std::istringstream lines(reply.text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("# HELP llamacpp:", 0) == 0 || line.rfind("# TYPE llamacpp:", 0) == 0) continue;
    ASSERT_EQ(line.rfind("llamacpp:", 0), 0u) << line;
    size_t used = 0;
    const std::string value = line.substr(line.find(' ') + 1);
    EXPECT_TRUE(std::isfinite(std::stod(value, &used))) << line;
    EXPECT_EQ(used, value.size()) << line;
  }
}

class EncoderApi : public test::ApiTest {
 protected:
  EncoderApi() : ApiTest({engine::test::encoder_group()}) {}
  void SetUp() override { ready(); }
};

TEST_F(EncoderApi, EmbedsAndSaysSo) {
  EXPECT_EQ(post("/embedding", {{"content", "ab"}}).status, 200);
  EXPECT_EQ(get("/v1/models").json().at("models")[0].at("capabilities"), Json::array({"embedding"}));
  expect_error(post("/completion", {{"prompt", "a"}}), 501, "not_supported_error", {"encoder"});
  expect_error(post("/embedding", {{"content", std::vector<int>(17, 5)}}), 400, "invalid_request_error",
               {"too large to process"});
}

TEST(ErrorResponse, HasTheStatusAndTypeOfTheKind) {
  using Kind = RequestError::Kind;
  const auto check = [](std::exception_ptr error, int status, const char* type) {
    const http::Response response = error_response(error);
    EXPECT_EQ(response.status, status);
    EXPECT_EQ(Json::parse(response.body), Json({{"error", {{"code", status}, {"message", "why"}, {"type", type}}}}));
  };
  const auto of = [](Kind kind) { return std::make_exception_ptr(RequestError("why", kind)); };
  check(of(Kind::invalid), 400, "invalid_request_error");
  check(of(Kind::context_exceeded), 400, "exceed_context_size_error");
  check(of(Kind::unauthorized), 401, "authentication_error");
  check(of(Kind::not_found), 404, "not_found_error");
  check(of(Kind::not_supported), 501, "not_supported_error");
  check(of(Kind::unavailable), 503, "unavailable_error");
  check(std::make_exception_ptr(http::HttpError(413, "why")), 413, "invalid_request_error");
  check(std::make_exception_ptr(http::HttpError(404, "why")), 404, "not_found_error");
  check(std::make_exception_ptr(std::runtime_error("why")), 500, "server_error");
}

}  // namespace
}  // namespace caravan::server
