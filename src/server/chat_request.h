// An OpenAI chat request as the engine and the output parser need it. Other protocols are turned into one.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "chat/output_parser.h"
#include "server/chat_format.h"
#include "server/generation.h"
#include "server/json.h"
#include "server/params.h"

namespace caravan::server {

struct ChatRequest {
  CompletionParams completion;  // without the prompt
  std::string prompt;           // as text
  chat::OutputSyntax syntax;
  chat::ParseOptions parse;
  Json tools;                       // null: none
  bool parallel_tool_calls = true;  // false: calls after the first are dropped
};

// Everything but the generation fields: the prompt that a chat body means. Throws RequestError naming the field.
ChatFormat::Prompt render_chat(const Json& body, const ChatFormat& format, const Api& api);

// A whole chat body. Throws RequestError naming the field, also for parts that are known and not supported.
ChatRequest parse_chat_request(const Json& body, const ChatFormat& format, const Api& api);

// The object that the arguments of a call are; nullopt for other text and beyond the nesting that parse_object() takes.
std::optional<Json> parse_arguments(const std::string& text);

// The tokens of a rendered prompt.
Prompt tokenize_prompt(const std::string& prompt, const Api& api);

// Submits the request's prompt, as submit() does.
Generation submit_chat(const ChatRequest& request, const Api& api);

// One answer to a chat request while it grows.
class ChatAnswer {
 public:
  explicit ChatAnswer(const ChatRequest& request);
  // What a client is told: calls have ids, and calls beyond the first are left out where the request wants one.
  std::vector<chat::Delta> push(std::string_view text) { return filtered(parser_.push(text)); }
  std::vector<chat::Delta> finish() { return filtered(parser_.finish()); }
  // All deltas together.
  const chat::ParsedMessage& message() const { return message_; }

 private:
  std::vector<chat::Delta> filtered(std::vector<chat::Delta> deltas);
  chat::OutputParser parser_;
  chat::ParsedMessage message_;
  bool parallel_, short_ids_;
};

}  // namespace caravan::server
