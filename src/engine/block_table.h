// The blocks of one sequence in one cache group, as the engine knows them; the stages hold the same by KvOps.
#pragma once

#include <cstdint>
#include <deque>

namespace caravan::engine {

// By logical index: position / block_tokens.
struct BlockTable {
  uint32_t n_dropped = 0;       // logical blocks at the front that left the window
  std::deque<uint32_t> blocks;  // the ones after them
  uint32_t end() const { return n_dropped + static_cast<uint32_t>(blocks.size()); }
};

}  // namespace caravan::engine
