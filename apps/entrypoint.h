// What a container runs: its environment and the arguments behind the image's name become a command and its arguments.
// The variables themselves are read by the options of that command (options.h); here is what differs in a container:
// the choice of the command and other defaults.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::app {

// The value of a variable, nullopt when it is not set.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;

// Reads the environment of this process.
std::optional<std::string> process_environment(const std::string& name);

struct Launch {
  std::string command;                 // "backend", "server", ...; "none": wait
  std::vector<std::string> arguments;  // behind the command: defaults of a container, then the user's
  bool operator==(const Launch&) const = default;
};

// arguments[0] that is no option names the command ("server", "llama-cli", "/app/rpc-server"); otherwise APP_MODE does.
// Throws RequestError naming the variable, what it was and what is accepted.
Launch container_launch(const Environment& environment, const std::vector<std::string>& arguments);

// The launch of a process whose command line (as in /proc/PID/cmdline) is `caravan entrypoint ...`, nullopt for
// another.
std::optional<Launch> launch_of_process(std::string_view command_line, const Environment& environment);

// A line for each set variable that looks like a misspelt one of ours: "APP_RPC_BACKEND is set but never read; did you
// mean APP_RPC_BACKENDS?"
std::vector<std::string> misspelt_variables(std::span<const std::string> names);

// The help of `caravan entrypoint`: every variable of the containers.
std::string entrypoint_help();

}  // namespace caravan::app
