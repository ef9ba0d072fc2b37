// The subcommands of the one executable, by name.
#pragma once

#include <span>
#include <string>

namespace caravan::app {

struct Command {
  const char* name;
  const char* alias;  // a name of the executable that means this command, or ""
  const char* summary;
  int (*run)(int argc, char** argv);
};

std::span<const Command> commands();

// The command of that name or alias ("llama-server", "ggml-rpc-server"), nullptr when there is none.
const Command* find_command(const std::string& name);

// Throws RequestError with the closest name.
[[noreturn]] void unknown_command(const std::string& name);

}  // namespace caravan::app
