// The KV blocks of one cache group: which are free, and how many tables hold each of the others.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace caravan::engine {

// Ids are [0, n_blocks); the lowest free ids are given out first at the start, the most recently freed ones later.
class BlockAllocator {
 public:
  explicit BlockAllocator(uint32_t n_blocks);

  // A block held once, or nullopt when all are in use.
  std::optional<uint32_t> allocate();
  // One more holder of a block that is in use.
  void share(uint32_t block);
  // One holder less; the last one frees the block.
  void release(uint32_t block);

  uint32_t n_blocks() const { return static_cast<uint32_t>(holders_.size()); }
  uint32_t n_free() const { return static_cast<uint32_t>(free_.size()); }
  uint32_t holders(uint32_t block) const { return holders_.at(block); }

 private:
  std::vector<uint32_t> free_;     // a stack
  std::vector<uint32_t> holders_;  // per block; 0: free
};

}  // namespace caravan::engine
