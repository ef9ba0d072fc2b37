#include "server/chat_request.h"

#include <fmt/format.h>

#include "base/log.h"
#include "server/openai.h"
#include "server/tool_grammar.h"

namespace caravan::server {
namespace {

using Kind = RequestError::Kind;

std::string place(size_t i, const char* member) { return fmt::format("messages[{}].{}", i, member); }

// The text of a message's content: a string, or parts of type text.
std::string content_text(const Json& content, size_t i) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    throw RequestError(fmt::format("Field '{}': expected a string or an array of parts, found {}", place(i, "content"),
                                   content.type_name()));
  std::string text;
  bool first = true;
  for (size_t k = 0; k < content.size(); ++k) {
    const Json& part = content[k];
    const std::string type = part.is_object() ? find_text(part, "type").value_or("") : "";
    if (type.empty())
      throw RequestError(fmt::format("Field '{}[{}]': a part is an object with a type", place(i, "content"), k));
    if (type != "text")
      throw RequestError(fmt::format("Field '{}[{}]': parts of type '{}' are not supported; only text is",
                                     place(i, "content"), k, type));
    const auto value = find_text(part, "text");
    if (!value)
      throw RequestError(fmt::format("Field '{}[{}].text': missing; expected a string", place(i, "content"), k));
    if (!std::exchange(first, false)) text += '\n';
    text += *value;
  }
  return text;
}

// Checked, with arguments as objects where they are JSON.
Json tool_calls(const Json& calls, size_t i) {
  if (!calls.is_array()) throw RequestError(fmt::format("Field '{}': expected an array", place(i, "tool_calls")));
  Json result = Json::array();
  for (const Json& call : calls) {
    const Json* function = call.is_object() ? find_field(call, "function") : nullptr;
    if (function == nullptr || !function->is_object() || !find_text(*function, "name"))
      throw RequestError(fmt::format("Field '{}': each call has a function with a name", place(i, "tool_calls")));
    Json copy = call;
    copy["type"] = "function";
    Json& arguments = copy["function"]["arguments"];
    if (arguments.is_null()) arguments = Json::object();
    if (arguments.is_string()) {
      if (auto object = parse_arguments(arguments.get_ref<const std::string&>())) arguments = std::move(*object);
    }
    result.push_back(std::move(copy));
  }
  return result;
}

Json checked_message(const Json& message, size_t i) {
  if (!message.is_object()) throw RequestError(fmt::format("Field 'messages[{}]': expected an object", i));
  const auto role = find_text(message, "role");
  if (!role) throw RequestError(fmt::format("Field '{}': missing; expected a string", place(i, "role")));
  Json copy = message;
  const Json* content = find_field(message, "content");
  const Json* calls = find_field(message, "tool_calls");
  const bool is_assistant = *role == "assistant";
  if (content == nullptr && !(is_assistant && (calls != nullptr || find_field(message, "reasoning_content"))))
    throw RequestError(fmt::format("Field '{}': missing; expected a string or an array of parts", place(i, "content")));
  copy["content"] = content != nullptr ? content_text(*content, i) : std::string();
  copy.erase("tool_calls");
  if (calls != nullptr && !calls->empty()) copy["tool_calls"] = tool_calls(*calls, i);
  return copy;
}

Json checked_tools(const Json& body, const Api& api) {
  const Json* tools = find_field(body, "tools");
  if (tools == nullptr) return nullptr;
  if (!tools->is_array()) throw RequestError("Field 'tools': expected an array");
  if (tools->empty()) return nullptr;
  if (!api.settings.chat.jinja) throw RequestError("Field 'tools': not supported with --no-jinja", Kind::not_supported);
  for (size_t i = 0; i < tools->size(); ++i) {
    const Json& tool = (*tools)[i];
    const auto type = tool.is_object() ? find_text(tool, "type") : std::nullopt;
    const Json* function = tool.is_object() ? find_field(tool, "function") : nullptr;
    if (type.value_or("function") != "function" || function == nullptr || !function->is_object() ||
        !find_text(*function, "name"))
      throw RequestError(
          fmt::format("Field 'tools[{}]': expected {{\"type\": \"function\", \"function\": {{\"name\", ...}}}}", i));
  }
  return *tools;
}

// The message that the answer continues, if any: taken out of the conversation.
void take_prefill(const Json& body, ChatFormat::Conversation& conversation) {
  const Json* flag = find_field(body, "continue_final_message");
  const auto generation_prompt = find_bool(body, "add_generation_prompt");
  bool wanted = true, reasoning = false;
  if (flag != nullptr) {
    if (flag->is_string() && (*flag == "content" || *flag == "reasoning_content")) {
      reasoning = *flag == "reasoning_content";
    } else if (flag->is_boolean()) {
      wanted = flag->get<bool>();
    } else {
      throw RequestError("Field 'continue_final_message': expected a bool, \"content\" or \"reasoning_content\"");
    }
    if (wanted && generation_prompt.value_or(false))
      throw RequestError("Fields 'continue_final_message' and 'add_generation_prompt': only one can be true");
  }
  conversation.add_generation_prompt = generation_prompt.value_or(true);
  Json& messages = conversation.messages;
  const auto is_assistant = [&](size_t from_end) {
    return messages.size() >= from_end && messages[messages.size() - from_end].value("role", "") == "assistant";
  };
  if (!is_assistant(1) || messages.back().contains("tool_calls")) {
    if (flag != nullptr && wanted)
      throw RequestError("Field 'continue_final_message': the last message is not a text of the assistant");
    return;
  }
  if (!wanted || (flag == nullptr && !conversation.add_generation_prompt)) return;
  if (is_assistant(2))
    throw RequestError("Field 'messages': Cannot have 2 or more assistant messages at the end of the list");
  const Json last = messages.back();
  messages.erase(messages.size() - 1);
  conversation.add_generation_prompt = true;
  conversation.prefill_is_reasoning = reasoning;
  conversation.prefill = reasoning ? find_text(last, "reasoning_content").value_or("") : last.value("content", "");
}

// Variables for the template: chat_template_kwargs and what stands for some of them.
Json template_variables(const Json& body, const Api& api) {
  Json variables = Json::object();
  if (api.settings.chat.reasoning_budget == 0) variables["enable_thinking"] = false;
  for (const char* name : {"reasoning_budget_tokens", "thinking_budget_tokens"})
    if (const auto budget = find_integer(body, name)) {
      if (*budget > 0)
        throw RequestError(fmt::format("Field '{}': only 0 and -1 are supported", name), Kind::not_supported);
      if (*budget == 0) variables["enable_thinking"] = false;
    }
  if (const auto enable = find_bool(body, "enable_thinking")) variables["enable_thinking"] = *enable;
  if (const auto effort = find_text(body, "reasoning_effort")) {
    if (*effort == "none") {
      variables["enable_thinking"] = false;
    } else {
      variables["reasoning_effort"] = *effort;
    }
  }
  if (const Json* more = find_field(body, "chat_template_kwargs")) {
    if (!more->is_object()) throw RequestError("Field 'chat_template_kwargs': expected an object");
    for (const auto& [name, value] : more->items()) variables[name] = value;
  }
  return variables;
}

bool wants_reasoning(const Json& body, const Api& api) {
  const std::string format = find_text(body, "reasoning_format").value_or(api.settings.chat.reasoning_format);
  if (format == "none") return false;
  if (format == "auto" || format == "deepseek") return true;
  if (format == "deepseek-legacy")
    throw RequestError("Field 'reasoning_format': 'deepseek-legacy' is not supported; none, auto and deepseek are",
                       Kind::not_supported);
  throw RequestError(fmt::format("Field 'reasoning_format': '{}' is unknown; expected none, auto or deepseek", format));
}

// response_format -> json_schema.
void translate_response_format(Json& body) {
  const Json* format = find_field(body, "response_format");
  if (format == nullptr) return;
  const auto type = format->is_object() ? find_text(*format, "type") : std::nullopt;
  if (!type) throw RequestError("Field 'response_format': expected an object with a type");
  Json schema;
  if (*type == "json_object") {
    const Json* given = find_field(*format, "schema");
    schema = given != nullptr ? *given : Json{{"type", "object"}};
  } else if (*type == "json_schema") {
    const Json* inner = find_field(*format, "json_schema");
    const Json* given = inner != nullptr && inner->is_object() ? find_field(*inner, "schema") : nullptr;
    if (given == nullptr) throw RequestError("Field 'response_format.json_schema.schema': missing");
    schema = *given;
  } else if (*type != "text") {
    throw RequestError(
        fmt::format("Field 'response_format.type': '{}' is unknown; expected text, json_object or json_schema", *type));
  }
  body.erase("response_format");
  if (schema.is_null()) return;
  if (find_field(body, "json_schema") || !find_text(body, "grammar").value_or("").empty())
    throw RequestError("Fields 'response_format', 'json_schema' and 'grammar': only one can be given");
  if (!schema.is_object()) throw RequestError("Field 'response_format': the schema is not an object");
  body["json_schema"] = std::move(schema);
}

// OpenAI's logprobs and top_logprobs -> n_probs.
void translate_logprobs(Json& body, bool has_tools) {
  const bool wanted = find_bool(body, "logprobs").value_or(false);
  const auto top = find_integer(body, "top_logprobs");
  if (top && !wanted) throw RequestError("Field 'top_logprobs': needs logprobs to be true");
  if (wanted && has_tools && find_bool(body, "stream").value_or(false))
    throw RequestError("Field 'logprobs': not possible with tools and stream");
  body.erase("logprobs");
  body.erase("top_logprobs");
  constexpr int64_t kDefault = 20;
  if (wanted) body["n_probs"] = std::max<int64_t>(top.value_or(kDefault), 1);
}

// Whether the model may call: not for "none".
bool may_call(const Json& body) {
  const Json* choice = find_field(body, "tool_choice");
  return choice == nullptr || *choice != "none";
}

// The tools of which the answer must call one; null where it need not.
Json forced_tools(const Json& body, const Json& tools) {
  const Json* choice = find_field(body, "tool_choice");
  if (choice == nullptr || *choice == "auto" || *choice == "none") return nullptr;
  if (tools.is_null()) throw RequestError("Field 'tool_choice': there are no tools to call");
  if (*choice == "required") return tools;
  const Json* function = choice->is_object() ? find_field(*choice, "function") : nullptr;
  const auto name = function != nullptr && function->is_object() ? find_text(*function, "name") : std::nullopt;
  if (!name)
    throw RequestError("Field 'tool_choice': expected auto, none, required or an object that names a function");
  for (const Json& tool : tools)
    if (tool["function"]["name"] == *name) return Json::array({tool});
  throw RequestError(fmt::format("Field 'tool_choice': no tool has the name '{}'", *name));
}

// Holds the answer to calls of the tools: of forced ones from its beginning on, else from where it begins to call.
void constrain_calls(ChatRequest& request, const Json& forced, std::optional<bool> several, const Api& api) {
  const auto count = [](bool more) { return more ? CallCount::several : CallCount::one; };
  engine::GenerateParams& params = request.completion.generate;
  if (!forced.is_null()) {
    // several calls only where they are asked for: a model that may go on often does
    params.grammar = forced_call_grammar(request.syntax, request.parse, forced, count(several.value_or(false)));
    params.grammar->special_tokens = params.rendered_tokens;
    return;
  }
  if (params.grammar) return;  // the server's own
  auto lazy = lazy_call_grammar(request.syntax, request.parse, request.tools, count(several.value_or(true)));
  if (!lazy) return;
  lazy->special_tokens = params.rendered_tokens;
  try {
    api.engine.check_grammar(*lazy);
    params.grammar = std::move(*lazy);
  } catch (const RequestError& error) {  // the client did not ask for a grammar
    spdlog::debug("calls of tools are not constrained: {}", error.what());
  }
}

ChatFormat::Conversation parse_conversation(const Json& body, const Api& api) {
  const Json* messages = find_field(body, "messages");
  if (messages == nullptr || !messages->is_array()) throw RequestError("Field 'messages': missing; expected an array");
  if (messages->empty()) throw RequestError("Field 'messages': the array is empty");
  ChatFormat::Conversation conversation;
  conversation.messages = Json::array();
  for (size_t i = 0; i < messages->size(); ++i) conversation.messages.push_back(checked_message((*messages)[i], i));
  conversation.tools = checked_tools(body, api);
  if (!conversation.tools.is_null() && !may_call(body)) conversation.tools = nullptr;
  conversation.extra = template_variables(body, api);
  take_prefill(body, conversation);
  return conversation;
}

}  // namespace

ChatFormat::Prompt render_chat(const Json& body, const ChatFormat& format, const Api& api) {
  return format.render(parse_conversation(body, api));
}

ChatRequest parse_chat_request(const Json& asked, const ChatFormat& format, const Api& api) {
  ChatRequest request;
  Json body = asked;
  const ChatFormat::Conversation conversation = parse_conversation(body, api);
  request.tools = conversation.tools;
  request.parse.tools = !request.tools.is_null();
  request.parse.reasoning = wants_reasoning(body, api);
  request.parallel_tool_calls = find_bool(body, "parallel_tool_calls").value_or(true);
  const Json forced = forced_tools(body, request.tools);
  translate_response_format(body);
  if (request.parse.tools && (find_field(body, "json_schema") || !find_text(body, "grammar").value_or("").empty()))
    throw RequestError(
        "Fields 'tools' and 'grammar', 'json_schema' or 'response_format': only one can be given, unless tool_choice "
        "is "
        "none");
  translate_logprobs(body, request.parse.tools);
  for (const char* name : {"messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "prompt"})
    body.erase(name);
  request.completion = parse_completion(body, api);
  ChatFormat::Prompt prompt = format.render(conversation);
  request.prompt = std::move(prompt.text);
  request.syntax = *prompt.syntax;
  request.parse.reasoning_open = prompt.reasoning_open;
  if (request.parse.tools || request.parse.reasoning)
    request.completion.generate.rendered_tokens = format.marks_in_vocabulary(request.syntax);
  if (request.parse.tools) constrain_calls(request, forced, find_bool(asked, "parallel_tool_calls"), api);
  return request;
}

std::optional<Json> parse_arguments(const std::string& text) {
  try {
    return parse_object(text);
  } catch (const RequestError&) {  // models write what they like
    return std::nullopt;
  }
}

Prompt tokenize_prompt(const std::string& prompt, const Api& api) {
  return api.vocabulary.tokenize(prompt, vocab::AddSpecial::yes, vocab::ParseSpecial::yes);
}

Generation submit_chat(const ChatRequest& request, const Api& api) {
  std::vector<Prompt> prompts;
  prompts.push_back(tokenize_prompt(request.prompt, api));
  return submit(api, request.completion, std::move(prompts));
}

ChatAnswer::ChatAnswer(const ChatRequest& request)
    : parser_(request.syntax, request.parse, request.tools),
      parallel_(request.parallel_tool_calls),
      short_ids_(request.syntax.name.starts_with("mistral")) {}

std::vector<chat::Delta> ChatAnswer::filtered(std::vector<chat::Delta> deltas) {
  using DeltaKind = chat::Delta::Kind;
  const auto is_beyond = [&](const chat::Delta& d) {
    return !parallel_ && d.index > 0 && (d.kind == DeltaKind::call || d.kind == DeltaKind::arguments);
  };
  std::erase_if(deltas, is_beyond);
  for (chat::Delta& delta : deltas) {
    // Mistral's templates accept ids of nine letters and digits only
    if (delta.kind == DeltaKind::call && delta.id.empty())
      delta.id = short_ids_ ? random_id("", 9) : random_id("call_", 24);
    message_.add(delta);
  }
  return deltas;
}

}  // namespace caravan::server
