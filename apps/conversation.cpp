#include "conversation.h"

#include <fmt/format.h>

#include <span>

#include "base/error.h"
#include "base/file.h"

namespace caravan::app {

void Conversation::clear() {
  messages_.clear();
  if (!system_prompt_.empty()) messages_.push_back({"system", system_prompt_, ""});
}

bool Conversation::take_back_answer() {
  if (messages_.empty() || messages_.back().role != "assistant") return false;
  messages_.pop_back();
  return true;
}

void Conversation::take_back_question() {
  if (!messages_.empty() && messages_.back().role == "user") messages_.pop_back();
}

nlohmann::ordered_json Conversation::to_json() const {
  auto list = nlohmann::ordered_json::array();
  for (const Message& message : messages_) {
    nlohmann::ordered_json entry = {{"role", message.role}, {"content", message.content}};
    if (!message.reasoning.empty()) entry["reasoning_content"] = message.reasoning;
    list.push_back(std::move(entry));
  }
  return list;
}

std::string Conversation::serialise() const {
  const nlohmann::ordered_json file = {{"messages", to_json()}};
  constexpr int kIndent = 2;
  return file.dump(kIndent, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::vector<Message> Conversation::parse(const std::string& text) {
  const auto file = nlohmann::json::parse(text, nullptr, false);
  if (!file.is_object() || !file.contains("messages") || !file["messages"].is_array())
    throw RequestError("expected a JSON object with an array \"messages\"");
  std::vector<Message> messages;
  for (const auto& entry : file["messages"]) {
    const auto field = [&](const char* name) {
      if (!entry.is_object() || !entry.contains(name) || !entry[name].is_string())
        throw RequestError(fmt::format("messages[{}]: expected an object with a string \"{}\"", messages.size(), name));
      return entry[name].get<std::string>();
    };
    Message message{field("role"), field("content"), ""};
    if (message.role != "system" && message.role != "user" && message.role != "assistant")
      throw RequestError(fmt::format("messages[{}]: expected the role system, user or assistant, found '{}'",
                                     messages.size(), message.role));
    if (entry.contains("reasoning_content")) message.reasoning = field("reasoning_content");
    messages.push_back(std::move(message));
  }
  return messages;
}

void Conversation::save(const std::string& path) const {
  const std::string text = serialise();
  OutputFile file(path);
  file.write_at(0, std::as_bytes(std::span(text)));
  file.commit();
}

void Conversation::load(const std::string& path) {
  try {
    messages_ = parse(read_text_file(path));
  } catch (const RequestError& error) {
    throw RequestError(fmt::format("{}: {}", path, error.what()));
  }
}

}  // namespace caravan::app
