// POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol, over the same chats.
#include <fmt/format.h>

#include "server/chat_request.h"
#include "server/chat_routes.h"
#include "server/event_stream.h"
#include "server/generation.h"
#include "server/openai.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

using Kind = RequestError::Kind;

// A string, or blocks of type text, joined by line ends.
std::string block_text(const Json& value, const std::string& field) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) throw RequestError(fmt::format("Field '{}': expected a string or an array of blocks", field));
  std::string text;
  for (const Json& block : value) {
    const std::string type = block.is_object() ? find_text(block, "type").value_or("") : "";
    if (type != "text")
      throw RequestError(
          fmt::format("Field '{}': blocks of type '{}' are not supported here; only text is", field, type));
    text += (text.empty() ? "" : "\n") + find_text(block, "text").value_or("");
  }
  return text;
}

// One message of Anthropic's as one or several of OpenAI's.
void add_message(Json& messages, const Json& message, size_t i) {
  const std::string field = fmt::format("messages[{}].content", i);
  const auto role = message.is_object() ? find_text(message, "role") : std::nullopt;
  const Json* content = message.is_object() ? find_field(message, "content") : nullptr;
  if (!role || content == nullptr)
    throw RequestError(fmt::format("Field 'messages[{}]': expected an object with role and content", i));
  if (content->is_string()) {
    messages.push_back({{"role", *role}, {"content", *content}});
    return;
  }
  if (!content->is_array())
    throw RequestError(fmt::format("Field '{}': expected a string or an array of blocks", field));
  Json own = {{"role", *role}, {"content", ""}};
  std::string text, reasoning;
  bool has_text = false;
  for (const Json& block : *content) {
    const std::string type = block.is_object() ? find_text(block, "type").value_or("") : "";
    if (type == "text") {
      text += (has_text ? "\n" : "") + find_text(block, "text").value_or("");
      has_text = true;
    } else if (type == "thinking") {
      reasoning += find_text(block, "thinking").value_or("");
    } else if (type == "tool_use") {
      const Json* input = find_field(block, "input");
      own["tool_calls"].push_back({{"type", "function"},
                                   {"id", find_text(block, "id").value_or("")},
                                   {"function",
                                    {{"name", find_text(block, "name").value_or("")},
                                     {"arguments", input != nullptr ? *input : Json::object()}}}});
    } else if (type == "tool_result") {
      const Json* result = find_field(block, "content");
      messages.push_back({{"role", "tool"},
                          {"tool_call_id", find_text(block, "tool_use_id").value_or("")},
                          {"content", result != nullptr ? block_text(*result, field) : ""}});
    } else if (type != "redacted_thinking") {
      throw RequestError(fmt::format("Field '{}': blocks of type '{}' are not supported", field, type));
    }
  }
  own["content"] = text;
  if (!reasoning.empty()) own["reasoning_content"] = reasoning;
  if (has_text || !reasoning.empty() || own.contains("tool_calls")) messages.push_back(std::move(own));
}

Json openai_tools(const Json& tools) {
  if (!tools.is_array()) throw RequestError("Field 'tools': expected an array");
  Json result = Json::array();
  for (size_t i = 0; i < tools.size(); ++i) {
    const auto name = tools[i].is_object() ? find_text(tools[i], "name") : std::nullopt;
    const Json* schema = tools[i].is_object() ? find_field(tools[i], "input_schema") : nullptr;
    if (!name || schema == nullptr)
      throw RequestError(fmt::format(
          "Field 'tools[{}]': expected an object with name and input_schema; server tools are not supported", i));
    result.push_back({{"type", "function"},
                      {"function",
                       {{"name", *name},
                        {"description", find_text(tools[i], "description").value_or("")},
                        {"parameters", *schema}}}});
  }
  return result;
}

// Anthropic's request as OpenAI's chat request.
Json chat_body(const Json& body) {
  Json chat = Json::object();
  const Json* messages = find_field(body, "messages");
  if (messages == nullptr || !messages->is_array()) throw RequestError("Field 'messages': missing; expected an array");
  chat["messages"] = Json::array();
  if (const Json* system = find_field(body, "system"))
    chat["messages"].push_back({{"role", "system"}, {"content", block_text(*system, "system")}});
  for (size_t i = 0; i < messages->size(); ++i) add_message(chat["messages"], (*messages)[i], i);
  constexpr int64_t kMaxTokens = 4096;
  chat["max_tokens"] = find_integer(body, "max_tokens").value_or(kMaxTokens);
  if (const Json* stop = find_field(body, "stop_sequences")) chat["stop"] = *stop;
  for (const char* name : {"temperature", "top_p", "top_k", "stream", "seed", "chat_template_kwargs", "cache_prompt"})
    if (const Json* value = find_field(body, name)) chat[name] = *value;
  if (const Json* tools = find_field(body, "tools"); tools != nullptr && !tools->empty())
    chat["tools"] = openai_tools(*tools);
  if (const Json* choice = find_field(body, "tool_choice")) {
    const auto type = choice->is_object() ? find_text(*choice, "type") : std::nullopt;
    if (!type) throw RequestError("Field 'tool_choice': expected an object with a type");
    if (*type != "auto" && *type != "any" && *type != "tool" && *type != "none")
      throw RequestError(
          fmt::format("Field 'tool_choice.type': '{}' is unknown; expected auto, any, tool or none", *type));
    chat["tool_choice"] = *type == "any" ? Json("required") : Json(*type);
    if (*type == "tool")
      chat["tool_choice"] = {{"type", "function"}, {"function", {{"name", find_text(*choice, "name").value_or("")}}}};
    if (find_bool(*choice, "disable_parallel_tool_use").value_or(false)) chat["parallel_tool_calls"] = false;
  }
  if (const Json* thinking = find_field(body, "thinking")) {
    const auto type = thinking->is_object() ? find_text(*thinking, "type") : std::nullopt;
    if (!type) throw RequestError("Field 'thinking': expected an object with a type");
    if (*type == "disabled") chat["enable_thinking"] = false;
    if (*type == "enabled" || *type == "adaptive") chat["enable_thinking"] = true;
  }
  return chat;
}

const char* stop_reason(const engine::FinalEvent& end, const chat::ParsedMessage& message) {
  if (end.stop_type == engine::StopType::limit) return "max_tokens";
  return message.calls.empty() ? "end_turn" : "tool_use";
}

Json stop_sequence(const engine::FinalEvent& end) {
  return end.stop_type == engine::StopType::word ? Json(end.stopping_word) : Json(nullptr);
}

Json usage_json(const engine::FinalEvent& end) {
  return {{"cache_read_input_tokens", end.timings.cache_n},
          {"input_tokens", end.n_prompt_tokens - std::min(end.n_prompt_tokens, end.timings.cache_n)},
          {"output_tokens", end.timings.predicted_n}};
}

Json tool_input(const std::string& arguments) { return parse_arguments(arguments).value_or(Json::object()); }

Json message_frame(const std::string& id, const Api& api) {
  return {
      {"id", id}, {"type", "message"}, {"role", "assistant"}, {"content", Json::array()}, {"model", api.model.id()}};
}

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const ChatRequest& request, const Api& api) {
  co_await collect(reader, answers);
  const Answer& answer = answers.front();
  ChatAnswer parsed(request);
  parsed.push(answer.content);
  parsed.finish();
  const chat::ParsedMessage& message = parsed.message();
  Json json = message_frame(random_id("msg_", 24), api);
  Json& content = json["content"];
  if (!message.reasoning.empty())
    content.push_back({{"type", "thinking"}, {"thinking", message.reasoning}, {"signature", ""}});
  if (!message.content.empty() || (message.calls.empty() && content.empty()))
    content.push_back({{"type", "text"}, {"text", message.content}});
  for (const chat::ToolCall& call : message.calls)
    content.push_back(
        {{"type", "tool_use"}, {"id", call.id}, {"name", call.name}, {"input", tool_input(call.arguments)}});
  json["stop_reason"] = stop_reason(*answer.end, message);
  json["stop_sequence"] = stop_sequence(*answer.end);
  json["usage"] = usage_json(*answer.end);
  http::Response response = json_response(json);
  co_await exchange.send(std::move(response));
}

// Deltas -> blocks that begin and end.
class BlockWriter {
 public:
  std::vector<ServerSentEvent> add(const std::vector<chat::Delta>& deltas) {
    for (const chat::Delta& delta : deltas) add(delta);
    return std::exchange(events_, {});
  }
  std::vector<ServerSentEvent> end() {
    if (n_blocks_ == 0) begin("text", {{"type", "text"}, {"text", ""}});
    close();
    return std::exchange(events_, {});
  }

 private:
  void add(const chat::Delta& delta) {
    switch (delta.kind) {
      case chat::Delta::Kind::reasoning:
        begin_unless("thinking", {{"type", "thinking"}, {"thinking", ""}, {"signature", ""}});
        emit({{"type", "thinking_delta"}, {"thinking", delta.text}});
        break;
      case chat::Delta::Kind::content:
        begin_unless("text", {{"type", "text"}, {"text", ""}});
        emit({{"type", "text_delta"}, {"text", delta.text}});
        break;
      case chat::Delta::Kind::call:
        begin("tool_use", {{"type", "tool_use"}, {"id", delta.id}, {"name", delta.text}, {"input", Json::object()}});
        break;
      case chat::Delta::Kind::arguments:
        emit({{"type", "input_json_delta"}, {"partial_json", delta.text}});
        break;
    }
  }
  void emit(Json delta) {
    events_.push_back({"content_block_delta",
                       {{"type", "content_block_delta"}, {"index", n_blocks_ - 1}, {"delta", std::move(delta)}}});
  }
  void begin_unless(const char* type, Json block) {
    if (open_ != type) begin(type, std::move(block));
  }
  void begin(const char* type, Json block) {
    close();
    open_ = type;
    events_.push_back({"content_block_start",
                       {{"type", "content_block_start"}, {"index", n_blocks_++}, {"content_block", std::move(block)}}});
  }
  void close() {
    if (open_.empty()) return;
    if (open_ == "thinking") emit({{"type", "signature_delta"}, {"signature", ""}});
    events_.push_back({"content_block_stop", {{"type", "content_block_stop"}, {"index", n_blocks_ - 1}}});
    open_.clear();
  }

  std::vector<ServerSentEvent> events_;
  std::string open_;  // the type of the block that has begun
  size_t n_blocks_ = 0;
};

ServerSentEvent start_event(const std::string& id, const Api& api, size_t n_prompt_tokens) {
  Json message = message_frame(id, api);
  message["stop_reason"] = nullptr;
  message["stop_sequence"] = nullptr;
  message["usage"] = {{"cache_read_input_tokens", 0}, {"input_tokens", n_prompt_tokens}, {"output_tokens", 0}};
  return {"message_start", {{"type", "message_start"}, {"message", std::move(message)}}};
}

net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                      const ChatRequest& request, const Api& api) {
  EventStream stream(exchange);
  ChatAnswer parsed(request);
  BlockWriter blocks;
  bool begun = false;
  const EventWriter writer = [&](size_t, const engine::Event& event) {
    std::vector<ServerSentEvent> events;
    const auto add = [&events](std::vector<ServerSentEvent> more) {
      for (ServerSentEvent& one : more) events.push_back(std::move(one));
    };
    if (!std::exchange(begun, true))
      events.push_back(start_event(random_id("msg_", 24), api, answers.front().prompt.size()));
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) {
      add(blocks.add(parsed.push(token->text)));
    } else if (const auto* end = std::get_if<engine::FinalEvent>(&event)) {
      add(blocks.add(parsed.finish()));
      add(blocks.end());
      events.push_back(
          {"message_delta",
           {{"type", "message_delta"},
            {"delta", {{"stop_reason", stop_reason(*end, parsed.message())}, {"stop_sequence", stop_sequence(*end)}}},
            {"usage", usage_json(*end)}}});
      events.push_back({"message_stop", {{"type", "message_stop"}}});
    }
    return events;
  };
  co_await stream_answers(stream, reader, request.completion.ping_interval, writer, "error");
  co_await stream.end();
}

net::awaitable<void> post_messages(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format, const Api& api) {
  require_generation(api);
  const Json body = parse_object(exchange.request().body);
  const ChatRequest request = parse_chat_request(chat_body(body), *format, api);
  Generation generation = submit_chat(request, api);
  StreamReader reader(exchange, std::move(generation.streams));
  if (request.completion.stream) {
    co_await answer_streaming(exchange, reader, generation.answers, request, api);
  } else {
    co_await answer_whole(exchange, reader, generation.answers, request, api);
  }
}

net::awaitable<void> count_tokens(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format, const Api& api) {
  const Json body = parse_object(exchange.request().body);
  const Prompt prompt = tokenize_prompt(render_chat(chat_body(body), *format, api).text, api);
  http::Response response = json_response({{"input_tokens", prompt.size()}});
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_messages_routes(http::Router& router, const Api& api, const std::shared_ptr<const ChatFormat>& format,
                         const std::string& prefix) {
  router.add("POST", prefix + "/v1/messages",
             [format, &api](http::Exchange& exchange) { return post_messages(exchange, format, api); });
  router.add("POST", prefix + "/v1/messages/count_tokens",
             [format, &api](http::Exchange& exchange) { return count_tokens(exchange, format, api); });
}

}  // namespace caravan::server
