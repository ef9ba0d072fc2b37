#include "entrypoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "command_table.h"
#include "options.h"

namespace caravan::app {
namespace {

constexpr const char* kModes[] = {"backend", "server", "cli", "embedding", "none"};

struct Variable {
  const char* name;
  const char* value;
  const char* meaning;
};

constexpr Variable kVariables[] = {
    {"APP_MODE", "MODE", "backend, server, cli, embedding, or none: waits, for `docker exec` (backend)"},
    {"APP_BIND", "HOST", "address to listen on (0.0.0.0)"},
    {"APP_PORT", "N", "port to listen on (50052 of a backend, 8080 of a server)"},
    {"APP_MEM", "MIB", "memory that a backend may use; auto: what is free, less a margin (1024)"},
    {"APP_RPC_BACKENDS", "HOST:PORT,...", "backends of a server; none: it computes itself"},
    {"APP_MODEL", "FILE", "GGUF model (/app/share/demo.gguf)"},
    {"APP_REPEAT_PENALTY", "N", "penalty of repeated tokens, unless a request says another (1.0)"},
    {"APP_GPU_LAYERS", "N", "most layers on backends, a number, auto or all (99)"},
    {"APP_PLAN", "GOAL", "what a server places layers for: latency, throughput, auto or memory (auto)"},
    {"APP_RPC_TOKEN", "TOKEN", "secret that servers and backends share; none: no encryption"},
    {"APP_RPC_TOKEN_FILE", "FILE", "file that holds it"},
    {"APP_THREADS", "N", "threads to compute with (all)"},
    {"APP_CTX_SIZE", "N", "context in tokens (the largest that fits)"},
    {"APP_PARALLEL", "N", "sequences computed at the same time (4)"},
    {"APP_API_KEY", "KEY,...", "keys of which a client must send one"},
    {"APP_API_KEY_FILE", "FILE", "file of such keys, one on each line"},
    {"APP_CACHE", "on", "a backend keeps weights between starts, in the volume /app/cache"},
    {"APP_CACHE_DIR", "DIR", "the same in this folder; of a server: where it remembers the hashes of models"},
    {"APP_CACHE_LIMIT", "SIZE", "most that a backend keeps there (64G)"},
    {"APP_MODELS_DIR", "DIR", "a backend's folder of GGUF files whose weights need not be sent"},
    {"APP_ADVERTISE", "HOST:PORT", "where other backends reach this one (where the server does)"},
    {"APP_METRICS_PORT", "N", "port of a backend's /metrics and /health, for Prometheus (none)"},
    {"APP_DEVICE", "DEVICE", "what a backend computes with: cpu (cpu)"},
};

// An option that a container's command gets unless one of the variables is set.
struct Default {
  const char* option;
  const char* value;
  std::vector<const char*> unless_set;         // an empty value counts as not set
  std::vector<const char*> unless_there = {};  // an empty value means none
};

using Defaults = std::vector<Default>;

Defaults defaults_of(const std::string& command) {
  const Default model{"--model",
                      "/app/share/demo.gguf",
                      {"LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL"},
                      {"APP_MODEL"}};
  const Default layers{"--gpu-layers", "99", {"APP_GPU_LAYERS", "LLAMA_ARG_N_GPU_LAYERS"}};
  if (command == "backend") return {{"--host", "0.0.0.0", {"APP_BIND"}}, {"--mem", "1024", {"APP_MEM"}}};
  if (command == "cli" || command == "embedding") return {model, layers};
  if (command != "server") return {};
  // Engines kill a container ten seconds after SIGTERM.
  return {{"--host", "0.0.0.0", {"APP_BIND", "LLAMA_ARG_HOST"}}, model, layers, {"--stop-timeout", "7", {}}};
}

std::string value_of(const Environment& environment, const std::string& name) { return environment(name).value_or(""); }

std::string command_of_mode(const Environment& environment) {
  const std::string mode = value_of(environment, "APP_MODE");
  if (mode.empty()) return "backend";
  if (std::find(std::begin(kModes), std::end(kModes), mode) == std::end(kModes))
    throw RequestError(fmt::format("APP_MODE='{}': accepted are {}", mode, fmt::join(kModes, ", ")));
  return mode;
}

void check_secrets(const Environment& environment) {
  for (const std::string name : {"APP_RPC_TOKEN", "APP_API_KEY"})
    if (!value_of(environment, name).empty() && !value_of(environment, name + "_FILE").empty())
      throw RequestError(fmt::format("{} and {}_FILE='{}' are both set: give one of them", name, name,
                                     value_of(environment, name + "_FILE")));
}

bool names_command(const std::string& argument) { return !argument.empty() && argument.front() != '-'; }

}  // namespace

std::optional<std::string> process_environment(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

Launch container_launch(const Environment& environment, const std::vector<std::string>& arguments) {
  auto rest = arguments.begin();
  Launch launch;
  if (rest != arguments.end() && names_command(*rest)) {
    const Command* command = find_command(std::filesystem::path(*rest).filename().string());
    if (command == nullptr) unknown_command(*rest);
    if (std::string_view(command->name) == "entrypoint") throw RequestError("entrypoint cannot run itself");
    launch.command = command->name;
    ++rest;
  } else {
    launch.command = command_of_mode(environment);
  }
  if (launch.command == "none" && rest != arguments.end())
    throw RequestError(fmt::format("APP_MODE=none waits and takes no arguments, found '{}'", *rest));
  check_secrets(environment);
  for (const Default& d : defaults_of(launch.command)) {
    const bool is_set = std::any_of(d.unless_set.begin(), d.unless_set.end(),
                                    [&](const char* name) { return !value_of(environment, name).empty(); }) ||
                        std::any_of(d.unless_there.begin(), d.unless_there.end(),
                                    [&](const char* name) { return environment(name).has_value(); });
    if (!is_set) launch.arguments.insert(launch.arguments.end(), {d.option, d.value});
  }
  launch.arguments.insert(launch.arguments.end(), rest, arguments.end());
  return launch;
}

std::optional<Launch> launch_of_process(std::string_view command_line, const Environment& environment) {
  std::vector<std::string> words = split(command_line, '\0');
  if (!words.empty() && words.back().empty()) words.pop_back();
  // Under an emulator its own name comes first, and ours twice.
  for (size_t i = 0; i + 1 < words.size() && i < 4; ++i)
    if (words[i + 1] == "entrypoint" && std::filesystem::path(words[i]).filename() == "caravan")
      return container_launch(environment, {words.begin() + static_cast<ptrdiff_t>(i) + 2, words.end()});
  return std::nullopt;
}

std::vector<std::string> misspelt_variables(std::span<const std::string> names) {
  std::vector<std::string> known, warnings;
  for (const Variable& variable : kVariables) known.emplace_back(variable.name);
  for (const std::string& name : names) {
    if (!name.starts_with("APP_") || std::find(known.begin(), known.end(), name) != known.end()) continue;
    if (const auto meant = closest(name, known))
      warnings.push_back(fmt::format("{} is set but never read; did you mean {}?", name, *meant));
  }
  return warnings;
}

std::string entrypoint_help() {
  std::string text =
      "usage: caravan entrypoint [COMMAND] [options of the command]\n\n"
      "Runs COMMAND, or the one that APP_MODE names, with a container's defaults. The options of a command read\n"
      "variables, too: APP_* and LLAMA_ARG_*, as its --help says; an option that is given wins. An empty list, path\n"
      "or secret means none, another empty variable its default. With --print-config the command prints what all\n"
      "that came to, and ends.\n\nVariables:\n";
  for (const Variable& v : kVariables)
    text += fmt::format("  {:<34}{}\n", fmt::format("{}={}", v.name, v.value), v.meaning);
  return text;
}

}  // namespace caravan::app
