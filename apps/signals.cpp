#include "signals.h"

#include <cstdlib>
#include <thread>

namespace caravan::app {

sigset_t block_stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&set, signal);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return set;
}

int wait_for_stop_signal(const sigset_t& set) {
  int signal = 0;
  sigwait(&set, &signal);
  return signal;
}

void exit_on_next_signal(const sigset_t& set) {
  std::thread([set] {
    wait_for_stop_signal(set);
    std::_Exit(1);
  }).detach();
}

}  // namespace caravan::app
