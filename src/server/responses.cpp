// POST /v1/responses and /responses (and .../input_tokens): OpenAI's Responses, over the same chats. Nothing is stored.
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

// The text of an item's content: a string, or parts that hold text.
std::string item_text(const Json& content, size_t i) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    throw RequestError(fmt::format("Field 'input[{}].content': expected a string or an array", i));
  std::string text;
  for (const Json& part : content) {
    const std::string type = part.is_object() ? find_text(part, "type").value_or("") : "";
    if (type != "input_text" && type != "output_text" && type != "text" && type != "reasoning_text" &&
        type != "summary_text")
      throw RequestError(
          fmt::format("Field 'input[{}].content': parts of type '{}' are not supported; only text is", i, type));
    text += (text.empty() ? "" : "\n") + find_text(part, "text").value_or("");
  }
  return text;
}

// The assistant's message that calls and reasoning of one turn are gathered in.
Json& assistant_message(Json& messages) {
  if (messages.empty() || messages.back().value("role", "") != "assistant")
    messages.push_back({{"role", "assistant"}, {"content", ""}});
  return messages.back();
}

void add_item(Json& messages, const Json& item, size_t i) {
  if (!item.is_object()) throw RequestError(fmt::format("Field 'input[{}]': expected an object", i));
  const std::string type = find_text(item, "type").value_or("message");
  const Json* content = find_field(item, "content");
  if (type == "message") {
    const auto role = find_text(item, "role");
    if (!role || content == nullptr)
      throw RequestError(fmt::format("Field 'input[{}]': a message has role and content", i));
    if (*role == "assistant") {
      Json& message = assistant_message(messages);
      message["content"] = message.value("content", "") + item_text(*content, i);
    } else {
      messages.push_back({{"role", *role}, {"content", item_text(*content, i)}});
    }
  } else if (type == "function_call") {
    assistant_message(messages)["tool_calls"].push_back(
        {{"type", "function"},
         {"id", find_text(item, "call_id").value_or("")},
         {"function",
          {{"name", find_text(item, "name").value_or("")},
           {"arguments", find_text(item, "arguments").value_or("{}")}}}});
  } else if (type == "function_call_output") {
    const Json* output = find_field(item, "output");
    messages.push_back({{"role", "tool"},
                        {"tool_call_id", find_text(item, "call_id").value_or("")},
                        {"content", output != nullptr ? item_text(*output, i) : ""}});
  } else if (type == "reasoning") {
    Json& message = assistant_message(messages);
    const std::string text = content != nullptr ? item_text(*content, i) : "";
    if (!text.empty()) message["reasoning_content"] = message.value("reasoning_content", "") + text;
  } else {
    throw RequestError(fmt::format("Field 'input[{}]': items of type '{}' are not supported", i, type));
  }
}

Json chat_messages(const Json& body) {
  Json messages = Json::array();
  if (const auto instructions = find_text(body, "instructions"))
    messages.push_back({{"role", "system"}, {"content", *instructions}});
  const Json* input = find_field(body, "input");
  if (input == nullptr) throw RequestError("Field 'input': missing; expected a string or an array of items");
  if (input->is_string()) {
    messages.push_back({{"role", "user"}, {"content", *input}});
  } else if (input->is_array()) {
    for (size_t i = 0; i < input->size(); ++i) add_item(messages, (*input)[i], i);
  } else {
    throw RequestError("Field 'input': expected a string or an array of items");
  }
  return messages;
}

Json chat_tools(const Json& tools) {
  if (!tools.is_array()) throw RequestError("Field 'tools': expected an array");
  Json result = Json::array();
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string type = tools[i].is_object() ? find_text(tools[i], "type").value_or("") : "";
    if (type != "function")
      throw RequestError(
          fmt::format("Field 'tools[{}]': tools of type '{}' are not supported; only functions are", i, type));
    Json function = tools[i];
    for (const char* name : {"type", "strict"}) function.erase(name);
    result.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return result;
}

// The request as a chat request.
Json chat_body(const Json& body) {
  for (const char* name : {"previous_response_id", "conversation"})
    if (find_field(body, name))
      throw RequestError(fmt::format("Field '{}': not supported, as no responses are stored", name));
  if (find_bool(body, "background").value_or(false))
    throw RequestError("Field 'background': not supported, as no responses are stored", Kind::not_supported);
  Json chat = body;
  for (const char* name : {"input", "instructions", "reasoning", "text", "max_output_tokens", "tools", "store",
                           "include", "metadata", "truncation", "background", "stream_options"})
    chat.erase(name);
  chat["messages"] = chat_messages(body);
  if (const Json* n = find_field(body, "max_output_tokens")) chat["max_tokens"] = *n;
  if (const Json* tools = find_field(body, "tools"); tools != nullptr && !tools->empty())
    chat["tools"] = chat_tools(*tools);
  if (const Json* reasoning = find_field(body, "reasoning"); reasoning != nullptr && reasoning->is_object())
    if (const auto effort = find_text(*reasoning, "effort")) chat["reasoning_effort"] = *effort;
  if (const Json* choice = find_field(body, "tool_choice"); choice != nullptr && choice->is_object())
    chat["tool_choice"] = {{"type", "function"}, {"function", {{"name", find_text(*choice, "name").value_or("")}}}};
  const Json* text = find_field(body, "text");
  const Json* format = text != nullptr && text->is_object() ? find_field(*text, "format") : nullptr;
  if (format != nullptr && format->is_object() && find_text(*format, "type") == "json_schema") {
    chat["response_format"] = {{"type", "json_schema"}, {"json_schema", *format}};
  } else if (format != nullptr) {
    chat["response_format"] = *format;
  }
  return chat;
}

// What the response consists of, in the order in which it was written.
struct Item {
  enum class Kind { reasoning, message, call } kind = Kind::message;
  std::string id, text;  // text: also the arguments of a call
  std::string call_id, name;

  Json json(const char* status) const {
    switch (kind) {
      case Kind::reasoning:
        return {{"id", id},
                {"type", "reasoning"},
                {"summary", Json::array()},
                {"content", Json::array({{{"type", "reasoning_text"}, {"text", text}}})},
                {"encrypted_content", ""},
                {"status", status}};
      case Kind::call:
        return {{"id", id},          {"type", "function_call"}, {"status", status},
                {"arguments", text}, {"call_id", call_id},      {"name", name}};
      case Kind::message:
        break;
    }
    return {
        {"id", id}, {"type", "message"}, {"role", "assistant"}, {"status", status}, {"content", Json::array({part()})}};
  }
  Json part() const {
    return {{"type", "output_text"}, {"annotations", Json::array()}, {"logprobs", Json::array()}, {"text", text}};
  }
};

class ResponseBuilder {
 public:
  explicit ResponseBuilder(const Api& api) : api_(api), id_(random_id("resp_", 24)), created_(unix_time()) {}

  std::vector<ServerSentEvent> begin() {
    emit("response.created", {{"response", json("in_progress", nullptr)}});
    emit("response.in_progress", {{"response", json("in_progress", nullptr)}});
    return std::exchange(events_, {});
  }

  std::vector<ServerSentEvent> add(const std::vector<chat::Delta>& deltas) {
    for (const chat::Delta& delta : deltas) add(delta);
    return std::exchange(events_, {});
  }

  std::vector<ServerSentEvent> end(const engine::FinalEvent& end) {
    if (items_.empty()) open(Item::Kind::message, nullptr);
    close();
    emit("response.completed", {{"response", result(end)}});
    return std::exchange(events_, {});
  }

  // The complete response.
  Json result(const engine::FinalEvent& end) const {
    Json response = json("completed", &end);  // also at the limit of tokens, as llama-server says
    response["timings"] = timings_json(end.timings);
    return response;
  }

 private:
  Json json(const char* status, const engine::FinalEvent* end) const {
    Json output = Json::array();
    for (const Item& item : items_) output.push_back(item.json("completed"));
    Json usage;
    if (end != nullptr)
      usage = {{"input_tokens", end->n_prompt_tokens},
               {"output_tokens", end->timings.predicted_n},
               {"total_tokens", end->n_prompt_tokens + end->timings.predicted_n},
               {"input_tokens_details", {{"cached_tokens", end->timings.cache_n}}},
               {"output_tokens_details", {{"reasoning_tokens", 0}}}};
    return {{"id", id_},
            {"object", "response"},
            {"created_at", created_},
            {"completed_at", end != nullptr ? Json(unix_time()) : Json(nullptr)},
            {"status", status},
            {"model", api_.model.id()},
            {"output", std::move(output)},
            {"error", nullptr},
            {"incomplete_details", nullptr},
            {"usage", std::move(usage)}};
  }

  void emit(const char* name, Json data) {
    Json event = {{"type", name}, {"sequence_number", n_events_++}};
    for (auto& [key, value] : data.items()) event[key] = std::move(value);
    events_.push_back({name, std::move(event)});
  }

  void add(const chat::Delta& delta) {
    using DeltaKind = chat::Delta::Kind;
    const Item::Kind kind = delta.kind == DeltaKind::reasoning ? Item::Kind::reasoning
                            : delta.kind == DeltaKind::content ? Item::Kind::message
                                                               : Item::Kind::call;
    if (delta.kind == DeltaKind::call || !is_open_ || items_.back().kind != kind) open(kind, &delta);
    if (delta.kind == DeltaKind::call) return;
    Item& item = items_.back();
    item.text += delta.text;
    Json data = {{"item_id", item.id}, {"output_index", items_.size() - 1}};
    if (kind != Item::Kind::call) data["content_index"] = 0;
    data["delta"] = delta.text;
    if (kind == Item::Kind::message) data["logprobs"] = Json::array();
    emit(kind == Item::Kind::reasoning ? "response.reasoning_text.delta"
         : kind == Item::Kind::message ? "response.output_text.delta"
                                       : "response.function_call_arguments.delta",
         std::move(data));
  }

  void open(Item::Kind kind, const chat::Delta* delta) {
    close();
    Item item;
    item.kind = kind;
    item.id = random_id(kind == Item::Kind::reasoning ? "rs_" : kind == Item::Kind::call ? "fc_" : "msg_", 24);
    if (kind == Item::Kind::call) {
      item.call_id = delta->id;
      item.name = delta->text;
    }
    items_.push_back(std::move(item));
    is_open_ = true;
    Json added = items_.back().json("in_progress");
    if (kind != Item::Kind::call) added["content"] = Json::array();
    emit("response.output_item.added", {{"output_index", items_.size() - 1}, {"item", std::move(added)}});
    if (kind == Item::Kind::message)
      emit("response.content_part.added", {{"item_id", items_.back().id},
                                           {"output_index", items_.size() - 1},
                                           {"content_index", 0},
                                           {"part", items_.back().part()}});
  }

  void close() {
    if (!std::exchange(is_open_, false)) return;
    const Item& item = items_.back();
    Json place = {{"item_id", item.id}, {"output_index", items_.size() - 1}};
    if (item.kind != Item::Kind::call) place["content_index"] = 0;
    const auto with = [&](const char* name, Json value) {
      Json data = place;
      data[name] = std::move(value);
      return data;
    };
    if (item.kind == Item::Kind::reasoning) {
      emit("response.reasoning_text.done", with("text", item.text));
    } else if (item.kind == Item::Kind::call) {
      Json data = with("arguments", item.text);
      data["name"] = item.name;
      emit("response.function_call_arguments.done", std::move(data));
    } else {
      Json data = with("text", item.text);
      data["logprobs"] = Json::array();
      emit("response.output_text.done", std::move(data));
      emit("response.content_part.done", with("part", item.part()));
    }
    emit("response.output_item.done", {{"output_index", items_.size() - 1}, {"item", item.json("completed")}});
  }

  const Api& api_;
  std::string id_;
  int64_t created_;
  std::vector<Item> items_;
  bool is_open_ = false;  // the last item still grows
  std::vector<ServerSentEvent> events_;
  uint64_t n_events_ = 0;
};

net::awaitable<void> answer_whole(http::Exchange& exchange, StreamReader& reader, std::vector<Answer>& answers,
                                  const ChatRequest& request, const Api& api) {
  co_await collect(reader, answers);
  const Answer& answer = answers.front();
  ChatAnswer parsed(request);
  ResponseBuilder builder(api);
  builder.add(parsed.push(answer.content));
  builder.add(parsed.finish());
  builder.end(*answer.end);
  http::Response response = json_response(builder.result(*answer.end));
  co_await exchange.send(std::move(response));
}

net::awaitable<void> answer_streaming(http::Exchange& exchange, StreamReader& reader, const ChatRequest& request,
                                      const Api& api) {
  EventStream stream(exchange);
  ChatAnswer parsed(request);
  ResponseBuilder builder(api);
  bool begun = false;
  const EventWriter writer = [&](size_t, const engine::Event& event) {
    std::vector<ServerSentEvent> events;
    const auto add = [&events](std::vector<ServerSentEvent> more) {
      for (ServerSentEvent& one : more) events.push_back(std::move(one));
    };
    if (!std::exchange(begun, true)) add(builder.begin());
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) {
      add(builder.add(parsed.push(token->text)));
    } else if (const auto* end = std::get_if<engine::FinalEvent>(&event)) {
      add(builder.add(parsed.finish()));
      add(builder.end(*end));
    }
    return events;
  };
  co_await stream_answers(stream, reader, request.completion.ping_interval, writer, "error");
  co_await stream.end();
}

net::awaitable<void> post_responses(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format,
                                    const Api& api) {
  require_generation(api);
  const Json body = parse_object(exchange.request().body);
  const ChatRequest request = parse_chat_request(chat_body(body), *format, api);
  Generation generation = submit_chat(request, api);
  StreamReader reader(exchange, std::move(generation.streams));
  if (request.completion.stream) {
    co_await answer_streaming(exchange, reader, request, api);
  } else {
    co_await answer_whole(exchange, reader, generation.answers, request, api);
  }
}

net::awaitable<void> count_tokens(http::Exchange& exchange, std::shared_ptr<const ChatFormat> format, const Api& api) {
  const Json body = parse_object(exchange.request().body);
  const Prompt prompt = tokenize_prompt(render_chat(chat_body(body), *format, api).text, api);
  http::Response response = json_response({{"input_tokens", prompt.size()}, {"object", "response.input_tokens"}});
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_responses_routes(http::Router& router, const Api& api, const std::shared_ptr<const ChatFormat>& format,
                          const std::string& prefix) {
  for (const char* path : {"/v1/responses", "/responses"}) {
    router.add("POST", prefix + path,
               [format, &api](http::Exchange& exchange) { return post_responses(exchange, format, api); });
    router.add("POST", prefix + path + "/input_tokens",
               [format, &api](http::Exchange& exchange) { return count_tokens(exchange, format, api); });
  }
}

}  // namespace caravan::server
