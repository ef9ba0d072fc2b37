// Signals that end a long-running command, taken by one thread instead of handlers.
#pragma once

#include <csignal>

namespace caravan::app {

// Blocks SIGINT, SIGTERM and SIGUSR1 in this thread and all that it starts from now on, and ignores SIGPIPE.
sigset_t block_stop_signals();

// Waits for one of them and returns it. SIGUSR1 is what a thread of ours raises to end the wait.
int wait_for_stop_signal(const sigset_t& set);

// From now on another of them ends the process at once, with status 1.
void exit_on_next_signal(const sigset_t& set);

}  // namespace caravan::app
