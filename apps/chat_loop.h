// A conversation in the terminal: messages from standard input, answers to standard output, everything else to
// standard error.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "chat_input.h"
#include "engine/request.h"
#include "model_options.h"
#include "terminal.h"

namespace caravan::app {

struct ChatOptions {
  std::string system_prompt;
  std::string chat_template;    // Jinja source
  bool tells_reasoning = true;  // marks and dims it; false: shown as the model writes it
  nlohmann::ordered_json template_arguments = nlohmann::ordered_json::object();  // more variables for the template
  std::optional<std::string> first_message;
  bool single_turn = false;  // ends after the answer to first_message
  MessageEnd message_end = MessageEnd::by_line;
  ColorMode colors = ColorMode::automatic;
  bool shows_timings = true;
  engine::GenerateParams generate;  // all but the prompt
};

// The Jinja source that setting names or holds; where it is empty the model's own template, else chatml. Throws
// RequestError for an unknown name.
std::string chat_template_source(const std::string& setting, const vocab::Vocabulary& vocabulary);

// Talks until the input ends, /exit, or Ctrl-C where a message is expected. Returns the exit status: 130 after Ctrl-C.
// Throws chat::TemplateError for a malformed template. Where nobody
// types (standard input is no terminal) a failed answer ends it: throws RequestError.
int run_chat(OpenedModel& opened, engine::Engine& engine, const ChatOptions& options);

}  // namespace caravan::app
