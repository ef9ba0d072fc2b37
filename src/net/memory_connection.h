// Two connected ends in memory, with the faults a network can have: for tests of whatever speaks over a Connection.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "net/connection.h"

namespace caravan::net {

// What goes wrong in one direction.
struct Faults {
  // Reads return at most this many bytes.
  size_t max_read = SIZE_MAX;
  // The direction ends in order after this many bytes: what is written beyond is swallowed.
  std::optional<uint64_t> cut_after_bytes;
  // As cut_after_bytes, but the reader gets an error, as from a reset.
  bool cut_is_reset = false;
  // Every read waits this long first.
  Duration read_delay{};
  // This bit of the stream is flipped (counted from the first bit of the first byte).
  std::optional<uint64_t> flip_bit;
  // Writers wait while this many bytes are unread.
  size_t capacity = 1 << 20;
};

// A pair of connected ends, both on executor (a serial one). first's writes meet first_to_second.
std::pair<std::unique_ptr<Connection>, std::unique_ptr<Connection>> make_memory_pair(const Executor& executor,
                                                                                     Faults first_to_second = {},
                                                                                     Faults second_to_first = {});

}  // namespace caravan::net
