#include "engine/block_allocator.h"

#include "base/error.h"

namespace caravan::engine {

BlockAllocator::BlockAllocator(uint32_t n_blocks) : holders_(n_blocks, 0) {
  free_.reserve(n_blocks);
  for (uint32_t block = n_blocks; block > 0; --block) free_.push_back(block - 1);
}

std::optional<uint32_t> BlockAllocator::allocate() {
  if (free_.empty()) return std::nullopt;
  const uint32_t block = free_.back();
  free_.pop_back();
  holders_[block] = 1;
  return block;
}

void BlockAllocator::share(uint32_t block) {
  CARAVAN_ASSERT(holders_.at(block) > 0, "only a block in use can be shared");
  ++holders_[block];
}

void BlockAllocator::release(uint32_t block) {
  CARAVAN_ASSERT(holders_.at(block) > 0, "a block is released once per holder");
  if (--holders_[block] == 0) free_.push_back(block);
}

}  // namespace caravan::engine
