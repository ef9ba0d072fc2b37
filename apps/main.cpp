// The one executable: finds the command by the name it was started under, by its first argument, or by APP_MODE, and
// runs it.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "command_table.h"
#include "commands.h"

namespace caravan::app {
namespace {

void print_help() {
  fmt::print("caravan {}: GGUF models over the machines you have\n\nusage: caravan COMMAND [options]\n\n",
             CARAVAN_VERSION);
  for (const Command& command : commands())
    fmt::print("  {:<12} {}{}\n", command.name, command.summary,
               *command.alias ? fmt::format(" (also: {})", command.alias) : "");
  fmt::print(
      "\n`caravan COMMAND --help` lists a command's options. Without a command, but with APP_MODE set, it is "
      "`entrypoint`. Example:\n\n"
      "  caravan backend --host 0.0.0.0 --port 50052                    on each machine\n"
      "  caravan server -m model.gguf --rpc hostA:50052,hostB:50052     on one of them\n");
}

int run_without_arguments(char** argv) {
  const char* mode = std::getenv("APP_MODE");
  if (mode != nullptr && *mode != '\0') return run_entrypoint(1, argv);
  print_help();
  return 1;
}

int dispatch(int argc, char** argv) {
  const std::string program = std::filesystem::path(argv[0]).filename().string();
  if (const Command* command = program == "caravan" ? nullptr : find_command(program)) return command->run(argc, argv);
  if (argc < 2) return run_without_arguments(argv);
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
