// Chats over a scripted pipeline: OpenAI's chat completions and Responses, Anthropic's messages, templates.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/api_harness.h"
#include "server/chat_format.h"

namespace caravan::server {
namespace {

using namespace caravan::server::test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// An event of a stream: its name ("" where it has none) and its data.
struct NamedEvent {
  std::string name;
  Json data;
};

std::vector<NamedEvent> named_events(const std::string& text) {
  std::vector<NamedEvent> events;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find("\n\n", at);
    std::string event = text.substr(at, end - at);
    at = end == std::string::npos ? text.size() : end + 2;
    NamedEvent parsed;
    if (event.starts_with("event: ")) {
      const size_t line_end = event.find('\n');
      parsed.name = event.substr(7, line_end - 7);
      event.erase(0, line_end + 1);
    }
    if (event == "data: [DONE]") {
      parsed.name = "[DONE]";
    } else {
      EXPECT_TRUE(event.starts_with("data: ")) << event;
      parsed.data = Json::parse(event.substr(6));
    }
    events.push_back(std::move(parsed));
  }
  return events;
}

const Json kTools = Json::parse(R"([{"type": "function", "function": {"name": "get_weather", "description": "Weather",
  "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}])");
constexpr const char* kCall =
    "<think>Hm.</think>I look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": "
    "{\"city\": \"Paris\"}}\n</tool_call>";

std::string replaced_name(std::string call, const std::string& name) {
  return call.replace(call.find("get_weather"), 11, name);
}

class ChatApi : public ApiTest {
 protected:
  ChatApi() : ApiTest({engine::test::full_group(1024)}) { plan_.n_ctx = 2048; }
  void SetUp() override { ready(); }

  static Json chat(const std::string& content, Json more = Json::object()) {
    Json body = {{"messages", Json::array({{{"role", "user"}, {"content", content}}})}, {"temperature", 0}};
    for (auto& [name, value] : more.items()) body[name] = value;
    return body;
  }
  // Makes the model answer a body with text, and asks it.
  Reply ask(const Json& body, std::string_view text, const std::string& path = "/v1/chat/completions",
            const std::string& count_path = "/v1/chat/completions/input_tokens") {
    const Json counted = post(count_path, body).json();
    EXPECT_TRUE(counted.contains("input_tokens")) << counted;
    script(counted.value("input_tokens", size_t{0}), text);
    return post(path, body);
  }
  std::string prompt_of(const Json& body) { return post("/apply-template", body).json().value("prompt", "none"); }
};

TEST_F(ChatApi, AnswersInTheShapeOfOpenAi) {
  const Reply reply = ask(chat("Hi"), "Hello!");
  ASSERT_EQ(reply.status, 200) << reply.text;
  const Json json = reply.json();
  EXPECT_EQ(json.at("object"), "chat.completion");
  EXPECT_EQ(json.at("model"), "/models/toy.gguf");
  EXPECT_THAT(json.at("id").get<std::string>(), HasSubstr("chatcmpl-"));
  EXPECT_EQ(
      json.at("choices"),
      Json::parse(R"([{"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "Hello!"}}])"));
  EXPECT_EQ(json.at("usage").at("completion_tokens"), 7);
  EXPECT_TRUE(json.at("usage").at("prompt_tokens_details").contains("cached_tokens"));
  EXPECT_TRUE(json.contains("timings"));
  EXPECT_EQ(post("/chat/completions", chat("Hi", {{"max_tokens", 3}})).json().at("choices")[0].at("finish_reason"),
            "length");
}

TEST_F(ChatApi, StreamsChunksThatAddUpToTheAnswer) {
  const Json body = chat("Hi", {{"tools", kTools}, {"stream", true}, {"stream_options", {{"include_usage", true}}}});
  const Reply reply = ask(body, kCall);
  ASSERT_EQ(reply.status, 200) << reply.text;
  const std::vector<NamedEvent> events = named_events(reply.text);
  ASSERT_GT(events.size(), 5u);
  EXPECT_EQ(events.back().name, "[DONE]");
  EXPECT_EQ(events[0].data.at("choices")[0].at("delta"), Json::parse(R"({"role": "assistant", "content": null})"));
  std::string content, reasoning, arguments, name, id, reason;
  for (size_t i = 1; i + 1 < events.size(); ++i) {
    const Json& data = events[i].data;
    EXPECT_EQ(data.at("id"), events[0].data.at("id"));
    EXPECT_EQ(data.at("object"), "chat.completion.chunk");
    if (data.at("choices").empty()) continue;
    const Json& choice = data.at("choices")[0];
    const Json& delta = choice.at("delta");
    EXPECT_FALSE(delta.contains("role"));
    content += delta.value("content", "");
    reasoning += delta.value("reasoning_content", "");
    if (!choice.at("finish_reason").is_null()) reason = choice.at("finish_reason");
    if (!delta.contains("tool_calls")) continue;
    const Json& call = delta.at("tool_calls")[0];
    EXPECT_EQ(call.at("index"), 0);
    arguments += call.at("function").value("arguments", "");
    name += call.at("function").value("name", "");
    id += call.value("id", "");
  }
  EXPECT_EQ(content, "I look.");
  EXPECT_EQ(reasoning, "Hm.");
  EXPECT_EQ(name, "get_weather");
  EXPECT_EQ(arguments, "{\"city\": \"Paris\"}");
  EXPECT_THAT(id, HasSubstr("call_"));
  EXPECT_EQ(reason, "tool_calls");
  const Json& usage = events[events.size() - 2].data;
  EXPECT_TRUE(usage.at("choices").empty());
  EXPECT_GT(usage.at("usage").at("completion_tokens"), 10);
}

TEST_F(ChatApi, GivesReasoningAndToolCallsApartFromTheContent) {
  const Json message = ask(chat("Hi", {{"tools", kTools}}), kCall).json().at("choices")[0].at("message");
  EXPECT_EQ(message.at("content"), "I look.");
  EXPECT_EQ(message.at("reasoning_content"), "Hm.");
  EXPECT_EQ(message.at("tool_calls")[0].at("type"), "function");
  EXPECT_EQ(message.at("tool_calls")[0].at("function"),
            Json::parse(R"({"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"})"));
  // without tools a call is text, and without a reasoning format everything is
  const Json plain = ask(chat("Hi"), kCall).json().at("choices")[0].at("message");
  EXPECT_THAT(plain.at("content").get<std::string>(), HasSubstr("<tool_call>"));
  EXPECT_FALSE(plain.contains("tool_calls"));
  const Json raw = ask(chat("Hi", {{"reasoning_format", "none"}}), kCall).json().at("choices")[0].at("message");
  EXPECT_EQ(raw.at("content"), kCall);
  EXPECT_EQ(
      ask(chat("Hi", {{"tools", kTools}, {"tool_choice", "none"}}), kCall).json().at("choices")[0].at("finish_reason"),
      "stop");
}

TEST_F(ChatApi, GivesOneCallWhereThatIsWanted) {
  const std::string twice =
      "<tool_call>{\"name\": \"get_weather\", \"arguments\": {}}</tool_call>"
      "<tool_call>{\"name\": \"get_weather\", \"arguments\": {}}</tool_call>";
  const auto n_calls = [&](const Json& more) {
    return ask(chat("Hi", more), twice).json().at("choices")[0].at("message").at("tool_calls").size();
  };
  EXPECT_EQ(n_calls({{"tools", kTools}}), 2u);
  EXPECT_EQ(n_calls({{"tools", kTools}, {"parallel_tool_calls", false}}), 1u);
}

TEST_F(ChatApi, HoldsACallToItsToolFromWhereItBegins) {
  const std::string wrong = replaced_name(kCall, "get_whether");
  const Json message = ask(chat("Hi", {{"tools", kTools}}), wrong).json().at("choices")[0].at("message");
  EXPECT_EQ(message.at("content"), "I look.");
  EXPECT_EQ(message.at("tool_calls")[0].at("function"),
            Json::parse(R"({"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"})"));
  std::string name;
  const Json streamed = chat("Hi", {{"tools", kTools}, {"stream", true}});
  for (const NamedEvent& event : named_events(ask(streamed, wrong).text)) {
    if (event.name == "[DONE]") continue;
    const Json& delta = event.data.at("choices")[0].at("delta");
    if (delta.contains("tool_calls")) name += delta["tool_calls"][0]["function"].value("name", "");
  }
  EXPECT_EQ(name, "get_weather");
  const std::string thought = "<think>A <tool_call>{\"name\": \"get_whether\"} would do.</think>No.";
  EXPECT_EQ(ask(chat("Hi", {{"tools", kTools}}), thought).json().at("choices")[0].at("message").at("content"), "No.");
}

TEST_F(ChatApi, TakesToolsOrAnotherFormOfTheAnswer) {
  const Json forms[] = {{{"grammar", "root ::= \"a\""}},
                        {{"json_schema", {{"type", "object"}}}},
                        {{"response_format", {{"type", "json_object"}}}}};
  for (Json form : forms) {
    form["tools"] = kTools;
    form["max_tokens"] = 4;
    expect_error(post("/v1/chat/completions", chat("Hi", form)), 400, "invalid_request_error", {"'tools'"});
    form["tool_choice"] = "none";
    EXPECT_EQ(post("/v1/chat/completions", chat("Hi", form)).status, 200) << form;
  }
  EXPECT_EQ(post("/v1/chat/completions",
                 chat("Hi", {{"tools", kTools}, {"max_tokens", 4}, {"response_format", {{"type", "text"}}}}))
                .status,
            200);
}

TEST_F(ChatApi, HoldsAnAnswerThatMustCallToACall) {
  const Json choices[] = {"required", Json::parse(R"({"type": "function", "function": {"name": "get_weather"}})")};
  for (const Json& choice : choices) {
    const Json answer = post("/v1/chat/completions",
                             chat("Hi", {{"tools", kTools}, {"tool_choice", choice}, {"max_tokens", 400}, {"seed", 1}}))
                            .json();
    ASSERT_TRUE(answer.contains("choices")) << answer;
    const Json& message = answer["choices"][0]["message"];
    ASSERT_TRUE(message.contains("tool_calls")) << answer;
    EXPECT_EQ(message["tool_calls"][0]["function"]["name"], "get_weather");
  }
  const auto refuse = [&](const Json& more, const char* word) {
    expect_error(post("/v1/chat/completions", chat("Hi", more)), 400, "invalid_request_error", {word});
  };
  refuse({{"tool_choice", "required"}}, "tool_choice");
  refuse({{"tools", kTools}, {"tool_choice", Json::parse(R"({"type": "function", "function": {"name": "other"}})")}},
         "other");
}

TEST_F(ChatApi, GivesLogprobsAndSeveralChoices) {
  const Json choice = ask(chat("Hi", {{"logprobs", true}, {"top_logprobs", 2}}), "ab").json().at("choices")[0];
  ASSERT_EQ(choice.at("logprobs").at("content").size(), 2u);
  EXPECT_EQ(choice.at("logprobs").at("content")[1].at("token"), "b");
  EXPECT_EQ(choice.at("logprobs").at("content")[0].at("top_logprobs").size(), 2u);
  std::string tokens;
  const Json streamed = chat("Hi", {{"logprobs", true}, {"stream", true}});
  for (const NamedEvent& event : named_events(ask(streamed, "a <b").text))
    if (event.name.empty() && event.data.at("choices")[0].contains("logprobs"))
      for (const Json& step : event.data["choices"][0]["logprobs"]["content"]) tokens += step.at("token");
  EXPECT_EQ(tokens, "a <b");
  const Json two = post("/v1/chat/completions", chat("Hi", {{"n", 2}, {"max_tokens", 2}, {"ignore_eos", true}})).json();
  ASSERT_EQ(two.at("choices").size(), 2u);
  EXPECT_EQ(two.at("choices")[1].at("index"), 1);
  EXPECT_EQ(two.at("usage").at("completion_tokens"), 4);
}

TEST_F(ChatApi, RendersTheTemplateWithoutBos) {
  EXPECT_EQ(prompt_of(chat("Hi")), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(prompt_of(chat("Hi", {{"add_generation_prompt", false}})), "<|im_start|>user\nHi<|im_end|>\n");
  const Json parts = Json::parse(R"([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])");
  EXPECT_THAT(prompt_of({{"messages", Json::array({{{"role", "user"}, {"content", parts}}})}}),
              HasSubstr("user\na\nb<"));
}

TEST_F(ChatApi, ContinuesTheLastMessageOfTheAssistant) {
  const Json user = {{"role", "user"}, {"content", "Hi"}}, prefill = {{"role", "assistant"}, {"content", "Well,"}};
  const auto body = [](Json messages, Json more = Json::object()) {
    more["messages"] = std::move(messages);
    return more;
  };
  const Json turns = Json::array({user, prefill});
  EXPECT_THAT(prompt_of(body(turns)), ::testing::EndsWith("<|im_start|>assistant\nWell,"));
  EXPECT_THAT(prompt_of(body(turns, {{"continue_final_message", true}})), ::testing::EndsWith("assistant\nWell,"));
  EXPECT_THAT(prompt_of(body(turns, {{"continue_final_message", false}})),
              ::testing::EndsWith("Well,<|im_end|>\n<|im_start|>assistant\n"));
  const Json thought = {{"role", "assistant"}, {"content", ""}, {"reasoning_content", "So"}};
  EXPECT_THAT(prompt_of(body(Json::array({user, thought}), {{"continue_final_message", "reasoning_content"}})),
              ::testing::EndsWith("assistant\n<think>\nSo"));
  const std::string path = "/v1/chat/completions";
  expect_error(post(path, body(turns, {{"continue_final_message", true}, {"add_generation_prompt", true}})), 400,
               "invalid_request_error", {"continue_final_message"});
  expect_error(post(path, body(Json::array({user, prefill, prefill}))), 400, "invalid_request_error", {"2 or more"});
  expect_error(post(path, body(Json::array({user}), {{"continue_final_message", true}})), 400, "invalid_request_error",
               {});
}

TEST_F(ChatApi, TellsATemplateWithoutToolsAboutThemInText) {
  const std::string prompt = prompt_of(chat("Hi", {{"tools", kTools}}));
  EXPECT_THAT(prompt, HasSubstr("get_weather"));
  EXPECT_THAT(prompt, HasSubstr("<tool_call>"));
  const Json messages = Json::parse(R"([{"role": "user", "content": "Hi"},
    {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "18 C"}])");
  const std::string after = prompt_of({{"messages", messages}});
  EXPECT_THAT(after, HasSubstr("{\"name\":\"get_weather\",\"arguments\":{\"city\":\"Rome\"}}"));
  EXPECT_THAT(after, HasSubstr("<tool_response>\n18 C"));
}

TEST_F(ChatApi, RefusesWhatItCannotDoAndNamesIt) {
  const auto refuse = [&](const Json& body, int code, const char* type, std::initializer_list<std::string> words) {
    expect_error(post("/v1/chat/completions", body), code, type, words);
  };
  const auto with_part = [](const Json& part) {
    return Json{{"messages", Json::array({{{"role", "user"}, {"content", Json::array({part})}}})}};
  };
  refuse(Json::object(), 400, "invalid_request_error", {"messages"});
  refuse({{"messages", "x"}}, 400, "invalid_request_error", {"messages"});
  refuse({{"messages", Json::array()}}, 400, "invalid_request_error", {"messages"});
  refuse({{"messages", Json::array({Json{{"role", "user"}}})}}, 400, "invalid_request_error", {"messages[0].content"});
  refuse(with_part({{"type", "image_url"}, {"image_url", {{"url", "data:x"}}}}), 400, "invalid_request_error",
         {"messages[0].content[0]", "image_url"});
  refuse(with_part({{"type", "input_audio"}}), 400, "invalid_request_error", {"input_audio"});
  refuse(chat("Hi", {{"tools", 1}}), 400, "invalid_request_error", {"tools"});
  refuse(chat("Hi", {{"tools", kTools}, {"tool_choice", "sometimes"}}), 400, "invalid_request_error", {"tool_choice"});
  refuse(chat("Hi", {{"tools", kTools}, {"grammar", "root ::= \"a\""}}), 400, "invalid_request_error", {"grammar"});
  refuse(chat("Hi", {{"top_logprobs", 2}}), 400, "invalid_request_error", {"top_logprobs"});
  refuse(chat("Hi", {{"logprobs", true}, {"tools", kTools}, {"stream", true}}), 400, "invalid_request_error",
         {"logprobs"});
  refuse(chat("Hi", {{"response_format", {{"type", "xml"}}}}), 400, "invalid_request_error", {"response_format"});
  refuse(chat("Hi", {{"response_format", {{"type", "json_schema"}}}}), 400, "invalid_request_error", {"schema"});
  refuse(chat("Hi", {{"reasoning_format", "deepseek-legacy"}}), 501, "not_supported_error", {"reasoning_format"});
  refuse(chat("Hi", {{"reasoning_budget_tokens", 5}}), 501, "not_supported_error", {"reasoning_budget_tokens"});
  const std::string deep = "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}";
  const Json calls = Json::array({{{"id", "1"}, {"function", {{"name", "f"}, {"arguments", deep}}}}});
  refuse({{"messages", Json::array({{{"role", "assistant"}, {"tool_calls", calls}}})}}, 400,
         "exceed_context_size_error", {});
  refuse(chat(std::string(9000, 'x')), 400, "exceed_context_size_error", {"context"});
}

TEST_F(ChatApi, SpeaksAnthropicsProtocol) {
  const std::string path = "/v1/messages", count = "/v1/messages/count_tokens";
  const Json tools = Json::parse(R"([{"name": "get_weather", "input_schema": {"type": "object"}}])");
  const Json body = {{"system", "Be terse."},
                     {"messages", Json::array({{{"role", "user"}, {"content", "Hi"}}})},
                     {"tools", tools},
                     {"temperature", 0}};
  const Json json = ask(body, kCall, path, count).json();
  EXPECT_EQ(json.at("type"), "message");
  EXPECT_EQ(json.at("stop_reason"), "tool_use");
  ASSERT_EQ(json.at("content").size(), 3u) << json;
  EXPECT_EQ(json.at("content")[0], Json::parse(R"({"type": "thinking", "thinking": "Hm.", "signature": ""})"));
  EXPECT_EQ(json.at("content")[1], Json::parse(R"({"type": "text", "text": "I look."})"));
  EXPECT_EQ(json.at("content")[2].at("input"), Json::parse(R"({"city": "Paris"})"));
  EXPECT_GT(json.at("usage").at("output_tokens"), 5);
  expect_error(post(path, Json::object()), 400, "invalid_request_error", {"messages"});
  const Json image = Json::parse(R"({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]})");
  expect_error(post(path, image), 400, "invalid_request_error", {"image"});
}

TEST_F(ChatApi, StreamsAnthropicsEvents) {
  const Json body = {{"messages", Json::array({{{"role", "user"}, {"content", "Hi"}}})},
                     {"temperature", 0},
                     {"stream", true},
                     {"tools", Json::parse(R"([{"name": "get_weather", "input_schema": {"type": "object"}}])")}};
  const std::vector<NamedEvent> events =
      named_events(ask(body, kCall, "/v1/messages", "/v1/messages/count_tokens").text);
  ASSERT_GT(events.size(), 6u);
  EXPECT_EQ(events.front().name, "message_start");
  EXPECT_EQ(events.back().name, "message_stop");
  EXPECT_EQ(events[events.size() - 2].data.at("delta").at("stop_reason"), "tool_use");
  int open = -1, next = 0;
  std::vector<std::string> types;
  std::string text, thinking, input;
  for (const NamedEvent& event : events) {
    EXPECT_EQ(event.data.at("type"), event.name);
    if (event.name == "content_block_start") {
      EXPECT_EQ(open, -1);
      open = event.data.at("index");
      EXPECT_EQ(open, next++);
      types.push_back(event.data.at("content_block").at("type"));
    } else if (event.name == "content_block_delta") {
      EXPECT_EQ(event.data.at("index"), open);
      const Json& delta = event.data.at("delta");
      text += delta.value("text", "");
      thinking += delta.value("thinking", "");
      input += delta.value("partial_json", "");
    } else if (event.name == "content_block_stop") {
      EXPECT_EQ(event.data.at("index"), open);
      open = -1;
    }
  }
  EXPECT_THAT(types, ElementsAre("thinking", "text", "tool_use"));
  EXPECT_EQ(thinking, "Hm.");
  EXPECT_EQ(text, "I look.");
  EXPECT_EQ(input, "{\"city\": \"Paris\"}");
}

TEST_F(ChatApi, SpeaksResponses) {
  const std::string path = "/v1/responses", count = "/v1/responses/input_tokens";
  const Json tools = Json::parse(R"([{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}])");
  const Json body = {{"instructions", "Be terse."}, {"input", "Hi"}, {"tools", tools}, {"temperature", 0}};
  const Json json = ask(body, kCall, path, count).json();
  EXPECT_EQ(json.at("object"), "response");
  EXPECT_EQ(json.at("status"), "completed");
  ASSERT_EQ(json.at("output").size(), 3u) << json;
  EXPECT_EQ(json.at("output")[0].at("type"), "reasoning");
  EXPECT_EQ(json.at("output")[1].at("content")[0].at("text"), "I look.");
  EXPECT_EQ(json.at("output")[2].at("type"), "function_call");
  EXPECT_EQ(json.at("output")[2].at("arguments"), "{\"city\": \"Paris\"}");
  EXPECT_GT(json.at("usage").at("total_tokens"), json.at("usage").at("input_tokens"));
  expect_error(post(path, {{"input", "Hi"}, {"previous_response_id", "resp_1"}}), 400, "invalid_request_error",
               {"previous_response_id"});
  expect_error(post(path, Json::object()), 400, "invalid_request_error", {"input"});
  const Json items = Json::parse(R"([{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "18 C"}])");
  EXPECT_EQ(ask({{"input", items}, {"temperature", 0}}, "18 degrees.", path, count)
                .json()
                .at("output")[0]
                .at("content")[0]
                .at("text"),
            "18 degrees.");
}

TEST_F(ChatApi, StreamsTheEventsOfResponses) {
  const Json body = {{"input", "Hi"}, {"temperature", 0}, {"stream", true}};
  const std::vector<NamedEvent> events =
      named_events(ask(body, "<think>Hm.</think>ok", "/v1/responses", "/v1/responses/input_tokens").text);
  std::vector<std::string> names;
  std::string text;
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_EQ(events[i].data.at("type"), events[i].name);
    EXPECT_EQ(events[i].data.at("sequence_number"), i);
    if (names.empty() || names.back() != events[i].name) names.push_back(events[i].name);
    if (events[i].name == "response.output_text.delta") text += events[i].data.at("delta");
  }
  EXPECT_EQ(text, "ok");
  EXPECT_THAT(names,
              ElementsAre("response.created", "response.in_progress", "response.output_item.added",
                          "response.reasoning_text.delta", "response.reasoning_text.done", "response.output_item.done",
                          "response.output_item.added", "response.content_part.added", "response.output_text.delta",
                          "response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"));
  EXPECT_EQ(events.back().data.at("response").at("output").size(), 2u);
}

TEST_F(ChatApi, TakesTemplatesByNameAndBySource) {
  const Json conversation =
      Json::parse(R"([{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}])");
  const auto rendered = [&](const std::string& setting) {
    ChatSettings settings;
    settings.chat_template = setting;
    ChatFormat::Conversation c;
    c.messages = conversation;
    return ChatFormat(settings, *vocabulary_).render(c).text;
  };
  EXPECT_THAT(rendered("llama3"), HasSubstr("<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"));
  EXPECT_EQ(rendered("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"), "[system]Be terse.[user]Hi");
  EXPECT_EQ(rendered("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ "
                     "m.content }}{% endfor %}"),
            "Be terse.\n\nHi")
      << "a template without system messages";
  EXPECT_THROW(rendered("no-such-name"), RequestError);
  EXPECT_THROW(rendered("{% if %}"), RequestError);
}

}  // namespace
}  // namespace caravan::server
