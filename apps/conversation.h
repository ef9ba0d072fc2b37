// The messages of a conversation in the terminal, and the file they are saved to.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace caravan::app {

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
  std::string reasoning;  // what the assistant thought before it answered
  bool operator==(const Message&) const = default;
};

class Conversation {
 public:
  explicit Conversation(std::string system_prompt) : system_prompt_(std::move(system_prompt)) { clear(); }

  const std::vector<Message>& messages() const { return messages_; }
  void add(Message message) { messages_.push_back(std::move(message)); }
  // Forgets everything but the system prompt.
  void clear();
  // Takes the last answer back, so that its question is the last message. False: the last message is no answer.
  bool take_back_answer();
  // Takes back the last message if it is a question, for which there was no answer.
  void take_back_question();

  // The messages as chat templates want them: role, content, and reasoning_content where there is any.
  nlohmann::ordered_json to_json() const;
  // {"messages": [...]} with an end of line, and the reverse. parse() throws RequestError naming what is wrong.
  std::string serialise() const;
  static std::vector<Message> parse(const std::string& text);
  // Throws SystemError, RequestError (load: not such a file; the conversation stays as it was).
  void save(const std::string& path) const;
  void load(const std::string& path);

 private:
  std::string system_prompt_;
  std::vector<Message> messages_;
};

}  // namespace caravan::app
