// A conversation in the terminal: messages from standard input, answers to standard output, everything else to
// standard error.
#pragma once

#include <optional>
#include <string>

#include "chat_input.h"
#include "engine/request.h"
#include "model_options.h"
#include "server/api.h"
#include "server/json.h"
#include "terminal.h"

namespace caravan::app {

struct ChatOptions {
  std::string system_prompt;
  server::ChatSettings settings;                             // the template, and whether reasoning is told apart
  server::Json template_arguments = server::Json::object();  // more variables for the template
  std::optional<std::string> first_message;
  bool single_turn = false;  // ends after the answer to first_message
  MessageEnd message_end = MessageEnd::by_line;
  ColorMode colors = ColorMode::automatic;
  bool shows_timings = true;
  engine::GenerateParams generate;  // all but the prompt
};

// Talks until the input ends, /exit, or Ctrl-C where a message is expected. Returns the exit status: 130 after Ctrl-C.
// Where nobody types (standard input is no terminal) a failed answer ends it: throws RequestError.
int run_chat(OpenedModel& opened, engine::Engine& engine, const ChatOptions& options);

}  // namespace caravan::app
