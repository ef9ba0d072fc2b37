// The one executable: finds the command by the name it was started under, by its first argument, or by APP_MODE, and
// runs it.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "inspect.h"
#include "options.h"
#include "synth.h"

namespace caravan::app {
namespace {

struct Command {
  const char* name;
  const char* alias;  // a name of the executable that means this command, or ""
  const char* summary;
  int (*run)(int argc, char** argv);
};

constexpr Command kCommands[] = {
    {"server", "llama-server", "serve a model over HTTP", run_server},
    {"backend", "rpc-server", "offer this machine's memory and processor to servers", run_backend},
    {"cli", "llama-cli", "talk with a model, or continue a text, in the terminal", run_cli},
    {"embedding", "llama-embedding", "print embeddings of texts", run_embedding},
    {"bench", "", "measure prompt and generation speed against the machine's limits", run_bench},
    {"logits", "", "write the logits of given tokens to a file", run_logits},
    {"inspect", "", "print what a GGUF file holds", run_inspect},
    {"quantize", "llama-quantize", "write a model with smaller tensor types", run_quantize},
    {"synth", "", "write a model of a known shape with random weights", run_synth},
    {"token", "", "print a random token for --rpc-token", run_token},
    {"health", "", "ask a server for its health; exit status 0 when it is ready", run_health},
};

void print_help() {
  fmt::print("caravan {}: GGUF models over the machines you have\n\nusage: caravan COMMAND [options]\n\n",
             CARAVAN_VERSION);
  for (const Command& command : kCommands)
    fmt::print("  {:<12} {}{}\n", command.name, command.summary,
               *command.alias ? fmt::format(" (also: {})", command.alias) : "");
  fmt::print(
      "\n`caravan COMMAND --help` lists a command's options. Without a command, APP_MODE chooses one: backend, server "
      "or none\n"
      "(then nothing runs). Example:\n\n"
      "  caravan backend --host 0.0.0.0 --port 50052                    on each machine\n"
      "  caravan server -m model.gguf --rpc hostA:50052,hostB:50052     on one of them\n");
}

const Command* find_command(const std::string& name) {
  for (const Command& command : kCommands)
    if (name == command.name ||
        (*command.alias && (name == command.alias || name == std::string("ggml-") + command.alias)))
      return &command;
  return nullptr;
}

[[noreturn]] void unknown_command(const std::string& name) {
  std::vector<std::string> names;
  for (const Command& command : kCommands) names.emplace_back(command.name);
  const auto suggestion = closest(name, names);
  throw RequestError(fmt::format("unknown command '{}'{}; `caravan --help` lists them", name,
                                 suggestion ? fmt::format(", did you mean '{}'?", *suggestion) : ""));
}

int run_by_mode() {
  const char* mode = std::getenv("APP_MODE");
  if (mode == nullptr || *mode == '\0') {
    print_help();
    return 1;
  }
  if (std::strcmp(mode, "none") == 0) {
    fmt::print("APP_MODE=none: nothing to do\n");
    return 0;
  }
  if (std::strcmp(mode, "backend") != 0 && std::strcmp(mode, "server") != 0)
    throw RequestError(fmt::format("APP_MODE='{}' is not known; accepted: backend, server, none", mode));
  // The defaults that the containers have always had, where the user set nothing else.
  setenv("APP_BIND", "0.0.0.0", 0);
  if (std::strcmp(mode, "backend") == 0) {
    setenv("APP_MEM", "1024", 0);
  } else {
    setenv("APP_MODEL", "/app/models/TinyLlama-1.1B-q4_0.gguf", 0);
    setenv("APP_RPC_BACKENDS", "backend-cuda:50052,backend-cpu:50052", 0);
    setenv("APP_GPU_LAYERS", "99", 0);
  }
  char* arguments[] = {const_cast<char*>(mode), nullptr};
  return find_command(mode)->run(1, arguments);
}

int dispatch(int argc, char** argv) {
  const std::string program = std::filesystem::path(argv[0]).filename().string();
  if (const Command* command = program == "caravan" ? nullptr : find_command(program)) return command->run(argc, argv);
  if (argc < 2) return run_by_mode();
  const std::string first = argv[1];
  if (first == "-h" || first == "--help" || first == "help") {
    print_help();
    return 0;
  }
  if (first == "--version") {
    fmt::print(stderr, "version: {}\nbuilt with {}\n", CARAVAN_VERSION, __VERSION__);
    return 0;
  }
  if (const Command* command = find_command(first)) return command->run(argc - 1, argv + 1);
  unknown_command(first);
}

}  // namespace
}  // namespace caravan::app

int main(int argc, char** argv) {
  try {
    return caravan::app::dispatch(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
