// caravan entrypoint: the first process of a container.
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "command_table.h"
#include "commands.h"
#include "entrypoint.h"
#include "signals.h"

namespace caravan::app {
namespace {

// The kernel gives process 1 no default actions: without a handler it ignores SIGTERM. server and backend take the
// signals themselves later. Children that others left behind vanish when they end.
void behave_as_first_process() {
  std::signal(SIGCHLD, SIG_IGN);
  if (getpid() != 1) return;
  for (const int signal : {SIGTERM, SIGINT}) std::signal(signal, [](int) { _exit(0); });
}

std::vector<std::string> variable_names() {
  std::vector<std::string> names;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    names.emplace_back(text.substr(0, text.find('=')));
  }
  return names;
}

int wait_until_stopped() {
  const sigset_t signals = block_stop_signals();
  fmt::print("APP_MODE=none: waiting; `docker exec` runs commands here\n");
  std::fflush(stdout);
  wait_for_stop_signal(signals);
  return 0;
}

}  // namespace

int run_entrypoint(int argc, char** argv) {
  behave_as_first_process();
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && (arguments[0] == "-h" || arguments[0] == "--help")) {
    fmt::print("{}", entrypoint_help());
    return 0;
  }
  for (const std::string& warning : misspelt_variables(variable_names())) fmt::print(stderr, "warning: {}\n", warning);
  Launch launch = container_launch(process_environment, arguments);
  if (launch.command == "none") return wait_until_stopped();
  std::vector<char*> words{launch.command.data()};
  for (std::string& argument : launch.arguments) words.push_back(argument.data());
  words.push_back(nullptr);
  return find_command(launch.command)->run(static_cast<int>(words.size()) - 1, words.data());
}

}  // namespace caravan::app
