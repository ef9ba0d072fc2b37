#include "server/chat_format.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "chat/named_templates.h"

namespace caravan::server {
namespace {

std::string token_text(const vocab::Vocabulary& vocabulary, std::optional<vocab::TokenId> token) {
  return token && vocabulary.has_text() ? std::string(vocabulary.text(*token)) : std::string();
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

// The text of --chat-template: a name, or Jinja source.
std::string source_of(const std::string& setting) {
  if (auto source = chat::named_template(setting)) return *source;
  if (contains(setting, "{{") || contains(setting, "{%")) return setting;
  throw RequestError(fmt::format("--chat-template: '{}' is neither Jinja source nor one of {}", setting,
                                 fmt::join(chat::template_names(), ", ")));
}

std::string_view right_trimmed(std::string_view text) {
  const size_t last = text.find_last_not_of(" \t\r\n");
  return last == std::string_view::npos ? std::string_view() : text.substr(0, last + 1);
}

// Puts text before the content of the first system message, which is added where there is none.
void add_to_system(Json& messages, const std::string& text) {
  if (messages.empty() || messages[0].value("role", "") != "system") {
    messages.insert(messages.begin(), Json{{"role", "system"}, {"content", text}});
    return;
  }
  messages[0]["content"] = text + "\n\n" + messages[0].value("content", "");
}

// For templates that know no system messages: they become the beginning of the next message of the user.
Json without_system(const Json& messages) {
  Json result = Json::array();
  std::string pending;
  for (const Json& message : messages) {
    if (message.value("role", "") == "system") {
      pending += (pending.empty() ? "" : "\n\n") + message.value("content", "");
      continue;
    }
    Json copy = message;
    if (!pending.empty() && message.value("role", "") == "user")
      copy["content"] = std::exchange(pending, {}) + "\n\n" + message.value("content", "");
    result.push_back(std::move(copy));
  }
  if (!pending.empty()) result.push_back({{"role", "user"}, {"content", pending}});
  return result;
}

std::string tool_instructions(const Json& tools) {
  std::string text = "You can call these functions:\n";
  for (const Json& tool : tools) text += to_text(tool.contains("function") ? tool["function"] : tool) + "\n";
  return text +
         "To call one, answer with\n<tool_call>\n{\"name\": the function's name, \"arguments\": an "
         "object}\n</tool_call>";
}

// For templates that know no tools: everything about them as text.
Json without_tools(const Json& messages, const Json& tools) {
  Json result = Json::array();
  for (const Json& message : messages) {
    Json copy = message;
    if (const Json* calls = find_field(message, "tool_calls")) {
      std::string text = message.value("content", "");
      for (const Json& call : *calls) {
        const Json& function = call.at("function");
        text += (text.empty() ? "" : "\n") + std::string("<tool_call>\n") +
                to_text({{"name", function.at("name")}, {"arguments", function.at("arguments")}}) + "\n</tool_call>";
      }
      copy["content"] = text;
      copy.erase("tool_calls");
    }
    if (message.value("role", "") == "tool")
      copy = {{"role", "user"}, {"content", "<tool_response>\n" + message.value("content", "") + "\n</tool_response>"}};
    result.push_back(std::move(copy));
  }
  if (!tools.is_null() && !tools.empty()) add_to_system(result, tool_instructions(tools));
  return result;
}

// The arguments of all calls as strings of JSON.
void write_arguments(Json& messages) {
  for (Json& message : messages)
    if (message.contains("tool_calls"))
      for (Json& call : message["tool_calls"]) {
        Json& arguments = call["function"]["arguments"];
        if (!arguments.is_string()) arguments = to_text(arguments);
      }
}

}  // namespace

std::string chat_template_source(const ChatSettings& settings, const vocab::Vocabulary& vocabulary) {
  if (!settings.chat_template.empty()) return source_of(settings.chat_template);
  return vocabulary.chat_template().value_or(*chat::named_template("chatml"));
}

// A template and what trial renderings told about it.
struct ChatFormat::Prepared {
  chat::Template source;
  chat::OutputSyntax syntax;
  bool knows_system = true, knows_tools = false, knows_developer = false, wants_text_arguments = false;

  Prepared(std::string text, const std::string& bos, const std::string& eos)
      : source(std::move(text)), syntax(chat::detect_syntax(source.source())) {
    knows_tools = contains(source.source(), "tools");
    knows_developer = contains(source.source(), "developer");
    const auto attempt = [&](Json messages, Json tools) -> std::string {
      chat::RenderInput input;
      input.messages = std::move(messages);
      input.tools = std::move(tools);
      input.bos_token = bos;
      input.eos_token = eos;
      try {
        return source.render(input);
      } catch (const chat::TemplateError&) {
        return "";
      }
    };
    const Json user = {{"role", "user"}, {"content", "x"}};
    knows_system =
        contains(attempt({{{"role", "system"}, {"content", "system_needle"}}, user}, nullptr), "system_needle");
    if (!knows_tools) return;
    const auto with_call = [&](const Json& arguments) {
      const Json call = {
          {"type", "function"}, {"id", "call00001"}, {"function", {{"name", "name_needle"}, {"arguments", arguments}}}};
      const Json tool = {{"type", "function"},
                         {"function",
                          {{"name", "name_needle"},
                           {"description", "d"},
                           {"parameters", {{"type", "object"}, {"properties", Json::object()}}}}}};
      Json messages =
          Json::array({user, {{"role", "assistant"}, {"content", ""}, {"tool_calls", Json::array({call})}}});
      return attempt(std::move(messages), Json::array({tool}));
    };
    const Json arguments = {{"key_needle", "value_needle"}};
    const std::string as_object = with_call(arguments);
    const bool object_works = contains(as_object, "value_needle") && !contains(as_object, "'key_needle'");
    wants_text_arguments = !object_works && contains(with_call(to_text(arguments)), "value_needle");
  }
};

ChatFormat::ChatFormat(const ChatSettings& settings, const vocab::Vocabulary& vocabulary)
    : vocabulary_(vocabulary),
      bos_(token_text(vocabulary, vocabulary.bos())),
      eos_(token_text(vocabulary, vocabulary.eos())) {
  const auto prepare = [&](std::string source) {
    return std::make_unique<const Prepared>(std::move(source), bos_, eos_);
  };
  if (!settings.chat_template.empty()) {
    try {
      main_ = prepare(chat_template_source(settings, vocabulary));
    } catch (const chat::TemplateError& e) {
      throw RequestError(fmt::format("--chat-template: {}", e.what()));
    }
    return;
  }
  try {
    main_ = prepare(chat_template_source(settings, vocabulary));
    if (const auto with_tools = vocabulary.chat_template("tool_use")) with_tools_ = prepare(*with_tools);
  } catch (const chat::TemplateError& e) {
    failure_ = e.what();
    spdlog::warn("the model's chat template cannot be used: {}; chats answer 501 (see --chat-template)", failure_);
  }
}

ChatFormat::~ChatFormat() = default;

Json ChatFormat::fitted(const Prepared& prepared, const Conversation& conversation) const {
  Json messages = conversation.messages;
  if (!prepared.knows_developer)
    for (Json& message : messages)
      if (message.value("role", "") == "developer") message["role"] = "system";
  if (!prepared.knows_tools) messages = without_tools(messages, conversation.tools);
  if (prepared.wants_text_arguments) write_arguments(messages);
  return prepared.knows_system ? messages : without_system(messages);
}

ChatFormat::Prompt ChatFormat::render(const Conversation& conversation) const {
  if (!main_)
    throw RequestError("the model's chat template cannot be used: " + failure_, RequestError::Kind::not_supported);
  const bool has_tools = conversation.tools.is_array() && !conversation.tools.empty();
  const Prepared& prepared = has_tools && with_tools_ ? *with_tools_ : *main_;
  chat::RenderInput input;
  input.messages = fitted(prepared, conversation);
  if (has_tools && prepared.knows_tools) input.tools = conversation.tools;
  input.add_generation_prompt = conversation.add_generation_prompt;
  input.bos_token = bos_;
  input.eos_token = eos_;
  input.extra = conversation.extra;
  input.now = chat::local_time_now();
  Prompt prompt;
  prompt.syntax = &prepared.syntax;
  try {
    prompt.text = prepared.source.render(input);
  } catch (const chat::TemplateError& e) {
    throw RequestError(e.what());
  }
  if (vocabulary_.adds_bos() && !bos_.empty() && prompt.text.starts_with(bos_)) prompt.text.erase(0, bos_.size());
  const chat::OutputSyntax& syntax = prepared.syntax;
  const auto is_open = [&] {
    return !syntax.reasoning_begin.empty() && right_trimmed(prompt.text).ends_with(syntax.reasoning_begin);
  };
  if (conversation.prefill_is_reasoning) {
    if (syntax.reasoning_begin.empty()) throw RequestError("this model's template has no reasoning to continue");
    if (!is_open()) prompt.text += syntax.reasoning_begin + "\n";
    prompt.text += conversation.prefill;
    prompt.reasoning_open = true;
  } else {
    if (!conversation.prefill.empty() && is_open()) prompt.text += "\n" + syntax.reasoning_end + "\n\n";
    prompt.reasoning_open = conversation.add_generation_prompt && is_open();
    prompt.text += conversation.prefill;
  }
  return prompt;
}

std::vector<int32_t> ChatFormat::marks_in_vocabulary(const chat::OutputSyntax& syntax) const {
  std::vector<int32_t> tokens;
  if (!vocabulary_.has_text()) return tokens;
  for (const std::string& mark : chat::marks_of(syntax))
    for (const vocab::TokenId token : vocabulary_.tokenize(mark, vocab::AddSpecial::no, vocab::ParseSpecial::yes))
      if (vocabulary_.type(token) == vocab::TokenType::control && !vocabulary_.is_end_of_generation(token))
        tokens.push_back(token);
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

}  // namespace caravan::server
