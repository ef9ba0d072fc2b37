// The KV blocks of one cache group: which are free, how many tables hold each of the others, and which the prefix cache
// keeps beyond that.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace caravan::engine {

// Ids are [0, n_blocks); the lowest free ids are given out first at the start, the most recently freed ones later.
// A block is free, held by tables, or idle: kept, and held by no table.
class BlockAllocator {
 public:
  explicit BlockAllocator(uint32_t n_blocks);

  // A free block, held once, or nullopt when there is none.
  std::optional<uint32_t> allocate();
  // One more holder of a block that is not free.
  void share(uint32_t block);
  // One holder less; without any the block is free, or idle when it is kept.
  void release(uint32_t block);

  // The contents of a held block are wanted later: it does not become free with its last holder.
  void keep(uint32_t block);
  // Ends keep(): an idle block becomes free.
  void forget(uint32_t block);

  uint32_t n_blocks() const { return static_cast<uint32_t>(blocks_.size()); }
  uint32_t n_free() const { return static_cast<uint32_t>(free_.size()); }
  uint32_t n_idle() const { return n_idle_; }
  // Blocks that no table holds.
  uint32_t n_available() const { return n_free() + n_idle_; }
  uint32_t holders(uint32_t block) const { return blocks_.at(block).holders; }
  bool idle(uint32_t block) const { return blocks_.at(block).kept && blocks_.at(block).holders == 0; }

 private:
  struct Block {
    uint32_t holders = 0;
    bool kept = false;
  };
  std::vector<uint32_t> free_;  // a stack
  std::vector<Block> blocks_;
  uint32_t n_idle_ = 0;
};

}  // namespace caravan::engine
