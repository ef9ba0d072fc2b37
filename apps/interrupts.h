// Ctrl-C as a number that grows, for commands that end an answer by it instead of the program.
#pragma once

namespace caravan::app {

// From now on SIGINT is counted and ends a blocking read instead of the program.
void count_interrupts();

// How often Ctrl-C was pressed since count_interrupts().
int interrupt_count();

}  // namespace caravan::app
