#include "command_table.h"

#include <fmt/format.h>

#include <vector>

#include "base/error.h"
#include "commands.h"
#include "inspect.h"
#include "options.h"
#include "synth.h"

namespace caravan::app {
namespace {

constexpr Command kCommands[] = {
    {"server", "llama-server", "serve a model over HTTP", run_server},
    {"backend", "rpc-server", "offer this machine's memory and processor to servers", run_backend},
    {"cli", "llama-cli", "talk with a model, or continue a text, in the terminal", run_cli},
    {"embedding", "llama-embedding", "print embeddings of texts", run_embedding},
    {"bench", "", "measure prompt and generation speed against the machine's limits", run_bench},
    {"plan", "", "show which backend would hold which layers, and how fast that would be", run_plan},
    {"doctor", "", "check backends and the network between them", run_doctor},
    {"logits", "", "write the logits of given tokens to a file", run_logits},
    {"inspect", "", "print what a GGUF file holds", run_inspect},
    {"quantize", "llama-quantize", "write a model with smaller tensor types", run_quantize},
    {"synth", "", "write a model of a known shape with random weights", run_synth},
    {"health", "", "ask a server or a backend for its health; exit status 0 when it is ready", run_health},
    {"token", "", "print a new secret for --rpc-token", run_token},
    {"entrypoint", "", "what containers run: the command that APP_MODE and the arguments choose", run_entrypoint},
};

}  // namespace

std::span<const Command> commands() { return kCommands; }

const Command* find_command(const std::string& name) {
  for (const Command& command : kCommands)
    if (name == command.name ||
        (*command.alias && (name == command.alias || name == std::string("ggml-") + command.alias)))
      return &command;
  return nullptr;
}

void unknown_command(const std::string& name) {
  std::vector<std::string> names;
  for (const Command& command : kCommands) names.emplace_back(command.name);
  const auto suggestion = closest(name, names);
  throw RequestError(fmt::format("unknown command '{}'{}; `caravan --help` lists them", name,
                                 suggestion ? fmt::format(", did you mean '{}'?", *suggestion) : ""));
}

}  // namespace caravan::app
