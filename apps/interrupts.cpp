#include "interrupts.h"

#include <atomic>
#include <csignal>

namespace caravan::app {
namespace {

std::atomic<int> interrupts{0};  // written by the signal handler, which can reach nothing else
extern "C" void on_interrupt(int) { interrupts.fetch_add(1); }

}  // namespace

void count_interrupts() {
  struct sigaction action{};
  action.sa_handler = on_interrupt;  // without SA_RESTART: reading a line ends too
  sigaction(SIGINT, &action, nullptr);
}

int interrupt_count() { return interrupts.load(); }

}  // namespace caravan::app
